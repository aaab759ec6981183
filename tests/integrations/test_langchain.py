"""The cache of LangChain, with the suites that LangChain has for caches."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")

from langchain_core.globals import set_llm_cache
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.load.dump import dumps
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation
from langchain_tests.integration_tests import cache as suites

from yatagarasu_cache import ClosedError
from yatagarasu_cache.integrations.langchain import YatagarasuCache

SECRET = b"secret of the tests"


@pytest.fixture
def cache(tmp_path: Path) -> YatagarasuCache:
    return YatagarasuCache(tmp_path / "cache", secret=SECRET)


class TestSync(suites.SyncCacheTestSuite):
    @pytest.fixture
    def cache(self, tmp_path: Path) -> YatagarasuCache:
        return YatagarasuCache(tmp_path / "cache", secret=SECRET)


class TestAsync(suites.AsyncCacheTestSuite):
    @pytest.fixture
    def cache(self, tmp_path: Path) -> YatagarasuCache:
        return YatagarasuCache(tmp_path / "cache", secret=SECRET)


def test_a_model_is_asked_once(cache: YatagarasuCache) -> None:
    set_llm_cache(cache)
    try:
        model = FakeListLLM(responses=["one", "two", "three"])
        assert [model.invoke("a"), model.invoke("a"), model.invoke("b"), model.invoke("a")] == ["one", "one", "two", "one"]

        async def ask() -> list[str]:
            return [await model.ainvoke("b"), await model.ainvoke("c")]

        assert asyncio.run(ask()) == ["two", "three"]
        chat = GenericFakeChatModel(messages=iter([AIMessage("hello", id="1"), AIMessage("bye", id="2")]))
        first, second = chat.invoke("hi"), chat.invoke("hi")
        assert (first.content, second.content) == ("hello", "hello")
        assert first.id == second.id or str(second.id).startswith("lc_cache")
    finally:
        set_llm_cache(None)


def test_answers_come_back_as_they_were(cache: YatagarasuCache) -> None:
    answer = [Generation(text="é" * 10_000, generation_info={"tokens": [1, 2]}), ChatGeneration(message=AIMessage("x"))]
    cache.update("p" * 200_000, "model", answer)
    assert cache.lookup("p" * 200_000, "model") == answer
    assert cache.lookup("p" * 200_000, "other") is None and cache.lookup("p", "model") is None
    with pytest.raises(ValueError, match="Generation"):
        cache.update("p", "model", ["text"])  # type: ignore[list-item]


def test_clearing_one_model(cache: YatagarasuCache) -> None:
    for model in ("a", "b"):
        cache.update("p", model, [Generation(text=model)])
    cache.clear(llm_string="a")
    assert cache.lookup("p", "a") is None and cache.lookup("p", "b") == [Generation(text="b")]
    asyncio.run(cache.aclear(llm_string="b"))
    assert cache.lookup("p", "b") is None
    cache.update("p", "a", [Generation(text="a")])
    asyncio.run(cache.aclear())
    assert len(cache.cache) == 0


def test_what_nobody_signed_is_a_miss(cache: YatagarasuCache, tmp_path: Path, caplog: Any) -> None:
    cache.update("p", "m", [Generation(text="mine")])
    (key,) = cache.cache
    stored = cache.cache[key]
    for forged in (dumps([Generation(text="forged")]).encode(), stored[:-1] + b"x", 5, "text", b""):
        cache.cache[key] = forged
        assert cache.lookup("p", "m") is None
    cache.cache[key] = stored
    assert cache.lookup("p", "m") == [Generation(text="mine")]
    assert YatagarasuCache(tmp_path / "cache", secret=b"other").lookup("p", "m") is None
    assert len([record for record in caplog.records if "taken for a miss" in record.getMessage()]) == 4


def test_closing_ends_a_use(cache: YatagarasuCache, tmp_path: Path) -> None:
    other = YatagarasuCache(tmp_path / "cache", secret=SECRET)
    other.update("p", "m", [Generation(text="x")])
    cache.close()
    with pytest.raises(ClosedError):
        cache.lookup("p", "m")
    assert other.lookup("p", "m") == [Generation(text="x")]


ASK = """
import sys
from langchain_core.globals import set_llm_cache
from langchain_core.language_models.fake import FakeListLLM
from yatagarasu_cache.integrations.langchain import YatagarasuCache
set_llm_cache(YatagarasuCache(sys.argv[1], secret=b"secret of the tests"))
print(FakeListLLM(responses=[sys.argv[2]]).invoke("question"))
"""


def test_another_process_finds_the_answer(tmp_path: Path) -> None:
    cache = YatagarasuCache(tmp_path / "cache", secret=SECRET)
    set_llm_cache(cache)
    try:
        assert FakeListLLM(responses=["answer"]).invoke("question") == "answer"
    finally:
        set_llm_cache(None)
    hits = cache.cache.stats().hits
    command = [sys.executable, "-c", ASK, str(tmp_path / "cache"), "answer"]
    assert subprocess.check_output(command, text=True).strip() == "answer"
    assert cache.cache.stats().hits == hits + 1 and len(cache.cache) == 1

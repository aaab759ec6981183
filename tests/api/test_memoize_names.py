"""What memoized functions are called, in scripts, modules, notebooks and pools: results are found again by whoever
runs the same function, and by nobody else."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import environment

from yatagarasu_cache import DiskCache

SCRIPT = """
import sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1] if __name__ == "__main__" else PLACE)
@cache.memoize()
def area(width, height=2, **options):
    print("computed", end=" ")
    return width * height
class Model:
    __cache_key__ = "m"
    @cache.memoize()
    def predict(self, x):
        print("computed", end=" ")
        return x
    @cache.memoize()
    @classmethod
    def load(cls, x):
        print("computed", end=" ")
        return x
def main():
    print(area(2, colours={"red", "green", "blue"}), Model().predict([1]), Model.load(3), area.cache_key(1)[0])
if __name__ == "__main__":
    main()
"""


def run(*command: object, seed: str = "random", cwd: Path | None = None, **more: str) -> list[str]:
    """Words that a process prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=100, cwd=cwd,
        env={**environment(), "PYTHONHASHSEED": seed, **more},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


NEW = ["computed", "computed", "computed", "4", "[1]", "3"]
KEPT = ["4", "[1]", "3"]


def test_a_script_finds_its_results_again(tmp_path: Path) -> None:
    """Under whatever path it is called, and whatever the order of its sets."""
    (tmp_path / "work.py").write_text(SCRIPT)
    (tmp_path / "link.py").symlink_to(tmp_path / "work.py")
    name = f"{os.path.realpath(tmp_path / 'work.py')}:area"
    assert run(tmp_path / "work.py", tmp_path / "c", seed="1") == [*NEW, name]
    for command in (tmp_path / "work.py", "work.py", "./work.py", "link.py"):
        assert run(command, tmp_path / "c", seed="2", cwd=tmp_path) == [*KEPT, name]


def test_scripts_with_the_same_functions_do_not_meet(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "work.py").write_text(SCRIPT)
        assert run(tmp_path / folder / "work.py", tmp_path / "c")[:6] == NEW
        assert run(tmp_path / folder / "work.py", tmp_path / "c")[:3] == KEPT


def test_a_module_has_its_name_whoever_runs_it(tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("prices", "__main__"):
        (package / f"{name}.py").write_text(f"PLACE = {str(tmp_path / 'c')!r}\n{SCRIPT}")
    assert run("-m", "shop.prices", tmp_path / "c", cwd=tmp_path) == [*NEW, "shop.prices:area"]
    assert run("-c", "import shop.prices; shop.prices.main()", cwd=tmp_path) == [*KEPT, "shop.prices:area"]
    assert run("-m", "shop", tmp_path / "c", cwd=tmp_path) == [*NEW, "shop.__main__:area"]
    assert run("-m", "shop", tmp_path / "c", cwd=tmp_path)[:3] == KEPT


SESSION = """
import sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
def computed(): print("computed", end=" ")
namespace = {"__name__": "__main__", "cache": cache, "computed": computed}
for cell in sys.argv[2:]:
    exec(compile(cell, f"<cell {cell!r}>", "exec"), namespace)
"""
CELL = "@cache.memoize()\ndef f(x):\n    computed()\n    return {} * x if x in {{1, 2, 3}} else (lambda: x)()\n"


def test_a_session_without_a_file_tells_functions_apart_by_their_code(tmp_path: Path) -> None:
    """A notebook whose path nobody tells, a prompt, ``python -c``."""
    ask = "print(f(1), f.cache_key(1)[0].partition('#')[0])"
    assert run("-c", SESSION, tmp_path / "c", CELL.format(2), ask) == ["computed", "2", "__main__:f"]
    # Run again, from the top and within the session; and with the cell at another place.
    assert run("-c", SESSION, tmp_path / "c", CELL.format(2), ask, CELL.format(2), ask) == ["2", "__main__:f"] * 2
    assert run("-c", SESSION, tmp_path / "c", "x = 1", "\n\n" + CELL.format(2), ask, seed="5") == ["2", "__main__:f"]
    # The cell was changed, or it is another notebook.
    assert run("-c", SESSION, tmp_path / "c", CELL.format(3), ask) == ["computed", "3", "__main__:f"]
    assert run("-c", SESSION, tmp_path / "c", CELL.format(2), ask) == ["2", "__main__:f"]


def test_notebooks_whose_path_is_known(tmp_path: Path) -> None:
    ask = "print(f(1), f.cache_key(1)[0].partition('#')[0])"
    code = "import sys; sys.modules['ipykernel'] = sys\n" + SESSION
    for path in ("/home/a.ipynb", "/home/b.ipynb"):
        results = [run("-c", code, tmp_path / "c", CELL.format(2), ask, JPY_SESSION_NAME=path) for _ in range(2)]
        assert results == [["computed", "2", f"{path}:f"], ["2", f"{path}:f"]]
    cell = "__vsc_ipynb_file__ = '/home/a.ipynb'"
    assert run("-c", SESSION, tmp_path / "c", cell, CELL.format(2), ask) == ["2", "/home/a.ipynb:f"]


def test_ipython_kernels(tmp_path: Path) -> None:
    """The real thing, whose cells are compiled by IPython."""
    pytest.importorskip("IPython")
    (tmp_path / "cells.ipy").write_text(
        f"from yatagarasu_cache import DiskCache\ncache = DiskCache({str(tmp_path / 'c')!r})\n"
        "@cache.memoize()\ndef f(x):\n    print('computed', end=' ')\n    return 2 * x\n\nprint(f(1))\n"
    )
    outputs = []
    for _ in range(2):
        with open(tmp_path / "cells.ipy") as cells:
            done = subprocess.run(
                [sys.executable, "-m", "IPython", "--quick", "--no-banner", "--simple-prompt", "--InteractiveShell.history_load_length=0", "--HistoryManager.enabled=False"],
                stdin=cells, capture_output=True, text=True, timeout=100, env={**environment(), "IPYTHONDIR": str(tmp_path / "ipython")},
            )  # fmt: skip
        outputs.append("computed" in done.stdout)
        assert "2" in done.stdout, done.stdout + done.stderr
    assert outputs == [True, False]


POOL = """
import multiprocessing, os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(os.environ["PLACE"])
@cache.memoize()
def double(n):
    with open(os.environ["PLACE"] + ".log", "a") as log:
        log.write("%d\\n" % n)
    return 2 * n
class Model:
    __cache_key__ = "m"
    @cache.memoize()
    def predict(self, n):
        return double(n) + 1
def name(n):
    return double.cache_key(n)[0]
if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(3) as pool:
        assert pool.map(double, [1, 2, 3] * 10) == [2, 4, 6] * 10
        assert pool.map(Model().predict, [1, 2, 3]) == [3, 5, 7]
        assert set(pool.map(name, range(9))) == {name(1)}
    assert double(3) == 6
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.parametrize("as_module", [False, True])
def test_pools(tmp_path: Path, method: str, as_module: bool) -> None:
    """A pool's processes call the module of the script ``__mp_main__``, and all know its functions by one name."""
    (tmp_path / "work.py").write_text(POOL)
    run(*(["-m", "work"] if as_module else ["work.py"]), method, cwd=tmp_path, PLACE=str(tmp_path / "c"))
    computed = (tmp_path / "c.log").read_text().split()
    assert set(computed) == {"1", "2", "3"} and len(computed) <= 9  # who asks at once is not of interest here


PREFORK = """
import os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
@cache.memoize(expire=60)
def page(path, **query):
    return [path, os.getpid()]
first = page("/")
def worker(n):
    assert page("/") == first
    own = page("/", worker=n)
    assert own[1] == os.getpid() and page(path="/", worker=n) == own and page.invalidate("/", worker=n)
    page("/", last=n)
    os._exit(0)
for generation in range(2):
    children = []
    for n in range(3):
        child = os.fork()
        if not child:
            worker(n)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
assert page.cache_clear() == 4
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_server_that_forks_its_workers(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(PREFORK)
    run(tmp_path / "server.py", tmp_path / "c")


def test_other_runners_of_scripts(tmp_path: Path) -> None:
    script = SCRIPT.replace("Model().predict([1]), Model.load(3), ", "")  # `trace` hides its classes
    (tmp_path / "work.py").write_text(script)
    assert run(tmp_path / "work.py", tmp_path / "c")[:2] == ["computed", "4"]
    for runner in (["-m", "trace", "--count", "-C", tmp_path / "t"], ["-X", "utf8"]):
        words = run(*runner, tmp_path / "work.py", tmp_path / "c")
        assert words[0] == "4"
    runpy = f"import runpy, sys; sys.argv[1:] = [{str(tmp_path / 'c')!r}]; runpy.run_path({str(tmp_path / 'work.py')!r}, run_name='__main__')"
    assert run("-c", runpy)[0] == "4"


def test_a_function_redefined_in_its_module_needs_a_version(tmp_path: Path) -> None:
    """What is the same by name is the same: that is what `version` is for."""
    with DiskCache(tmp_path / "c") as cache:
        spaces: list[dict[str, Any]] = [{"__name__": "work"} for _ in range(3)]
        for space, factor in zip(spaces, (2, 3, 3), strict=True):
            exec(f"def f(x): return {factor} * x", space)
        assert cache.memoize()(spaces[0]["f"])(1) == cache.memoize()(spaces[1]["f"])(1) == 2
        assert cache.memoize(version=2)(spaces[2]["f"])(1) == 3

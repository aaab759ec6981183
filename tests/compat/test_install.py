"""`install`: packages that import diskcache themselves get the module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import environment

INSTALL = "import yatagarasu_cache.compat.diskcache as dc\ndc.install()\n"


def run(code: str, tmp_path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_of_all_kinds_give_this_module(tmp_path: Path) -> None:
    code = INSTALL + (
        "dc.install()\n"
        "import diskcache, diskcache.core, diskcache.fanout as f, diskcache.persistent, diskcache.recipes\n"
        "from diskcache import Cache, Disk, FanoutCache\n"
        "from diskcache.core import ENOVAL, MODE_PICKLE, UNKNOWN, args_to_key, full_name\n"
        "assert diskcache is dc and Cache is dc.Cache and f.FanoutCache is dc.FanoutCache\n"
        "assert diskcache.core.Cache is dc.Cache and diskcache.recipes.Lock is dc.Lock\n"
        "print(diskcache.persistent.Deque is dc.Deque)"
    )
    assert run(code, tmp_path) == "True"


def test_without_django_only_what_needs_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "django.py").write_text("raise ImportError('no Django')")
    code = INSTALL + (
        "import diskcache\n"
        "try:\n    import diskcache.djangocache\nexcept ImportError as error:\n    print(error)\n"
    )
    assert "Django" in run(code, tmp_path)


def test_an_import_of_diskcache_itself_is_told_and_left(tmp_path: Path) -> None:
    (tmp_path / "diskcache.py").write_text("Cache = 5")
    code = (
        "import diskcache\nimport yatagarasu_cache.compat.diskcache as dc\n"
        "try:\n    dc.install()\nexcept ImportError as error:\n    print(error.name, error)\n"
        "import sys\nprint(sys.modules['diskcache'].Cache, 'diskcache.core' in sys.modules)"
    )
    told, left = run(code, tmp_path).splitlines()
    assert told.startswith("diskcache diskcache was imported already") and str(tmp_path) in told
    assert left == "5 False"


STAR = INSTALL + "from diskcache import *\nprint('DjangoCache' in globals(), 'Cache' in globals())"


def test_all_names_are_those_of_diskcache(tmp_path: Path) -> None:
    django = tmp_path / "django" / "core" / "cache" / "backends"
    django.mkdir(parents=True)
    for place in (django, *django.parents[:3]):
        (place / "__init__.py").write_text("")
    (django / "base.py").write_text("class BaseCache: pass\nDEFAULT_TIMEOUT = object()")
    assert run(STAR, tmp_path) == "True True"


def test_all_names_without_django(tmp_path: Path) -> None:
    (tmp_path / "django.py").write_text("raise ImportError('no Django')")
    assert run(STAR, tmp_path) == "False True"


def test_what_a_package_says_of_itself(tmp_path: Path) -> None:
    code = INSTALL + (
        "import diskcache as d\n"
        "print(d.__title__, d.__version__, hex(d.__build__), all((d.__author__, d.__license__, d.__copyright__)))"
    )
    assert run(code, tmp_path) == "diskcache 5.6.3 0x50603 True"

"""``python -m yatagarasu_cache``: the same as the command ``yatagarasu-cache``."""

from yatagarasu_cache.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

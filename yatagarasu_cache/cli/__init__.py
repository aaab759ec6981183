"""The command line: ``yatagarasu-cache``, also ``python -m yatagarasu_cache``.

Exit codes: 0 done, 1 the answer is no (a miss, an unreadable file, problems that remain),
2 a wrong call or an error, 130 interrupted, 141 the reader of our output went away.

Results go to standard output, everything else to standard error. What is shown on a terminal
goes through one `Presenter`, which uses `rich` where it is installed (extra ``cli``).
"""

from __future__ import annotations

from .commands import main

__all__ = ["main"]

"""`python -m perf.guard`: see `perf.guard.compare`."""

import sys

from perf.guard.compare import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m perf.soak`: see `perf.soak.steady`."""

import sys

from perf.soak.steady import main

if __name__ == "__main__":
    sys.exit(main())

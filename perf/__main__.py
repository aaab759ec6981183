"""`python -m perf report`: see `perf.report.write`."""

import sys

from perf.report import write

if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit(
            "usage: python -m perf report [--quick] [--output FILE]   (soak: python -m perf.soak; single benchmarks: python -m perf.bench.hot)"
        )
    sys.exit(write.main(sys.argv[2:]))

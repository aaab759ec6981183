"""`python -m perf report`: see `perf.report`."""

import sys

from perf import report

if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit(
            "usage: python -m perf report [--quick] [--output FILE]   (soak: python -m perf.soak; single benchmarks: python -m perf.bench_hot)"
        )
    sys.exit(report.main(sys.argv[2:]))

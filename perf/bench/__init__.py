"""One kind of work a file, on this cache and its peers: `python -m perf.bench.hot`, and so on."""

class AsyncDiskCache: pass

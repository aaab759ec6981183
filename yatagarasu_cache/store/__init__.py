"""What a cache is: an index over segments and large files, shared by threads and processes.

The store deals in digests and bytes; `cache.py` turns keys and values into these. The rules that
keep it right are few:

* a record is appended first, then the index is changed under the lock: a failure in between
  leaves the old value;
* records carry stamps, and the index always shows the record with the highest one, so segments
  and the log of changes alone tell what the index should say;
* whatever is read is verified against the slot that led there; a mismatch is looked at again
  under the lock, and only then dropped and counted.

Lock order: `appending` (threads of this handle), `reclaiming`, `checkpointing`, `lock` (everybody's).
"""

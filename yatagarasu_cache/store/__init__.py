"""What a cache is: an index over segments and large files, shared by threads and processes.

Everything here deals in digests and bytes; the faces (`cache.py`, `aio.py`) turn keys and values into
these. (`core` and `keyed` take keys as they are: compiled code encodes them faster.) The rules that keep it
right are few:

* a record is appended first, then the index is changed under the lock: a failure in between
  leaves the old value;
* records carry stamps, and the index always shows the record with the highest one, so segments
  and the log of changes alone tell what the index should say;
* whatever is read is verified against the slot that led there; a mismatch is looked at again
  under the lock, and only then dropped and counted.

A `Store` (`store.py`) is made of parts, each of which may touch what its constructor names, from the bottom
up:

* what all go by: `life`, `limits`, `notices` (the log), `locking`, `counters`, `item` (an entry to store),
  `expected` (what must be there for that);
* files: `format` (every byte), `segment`, `large`, `chunks` (checksums of large values), `owners`,
  `directory`, `cache_files`, `unreadable` (what is absence, what a fault), `strangers` (what others have
  made), `settings_file`, `cache_settings`, `shared_settings`;
* the index: `index` (one mapped file), `tag_table` (which entries have a tag), `damage` (of an index),
  `segment_table`, `eviction` (policies), `compiled` (which core there is), `core` (compiled code over the
  index), `recovery`, `rebuild`, `checkpoint`, `current` (which index is in use), `presence` (is it still
  there), `hidden` (slots behind damage);
* what changes it: `changes` (the log), `active` (the segment that is appended to), `durability`, `showing`,
  `writing`, `annotating` (of metadata alone), `large_writing`, `under_way` (large files without an entry),
  `leaving_files`, `removal`;
* what reads it: `finding`, `reading`, `lending` (files and mappings), `walks`, `tags`,
  `sampling` (some entries), `check` and `checks`;
* what keeps room free: `budget` (how much there may be), `grants`, `room`, `evicting`, `victims`,
  `cleaning`, `dead_segments`, `checkpointing`, `reaping` (of the dead), `pace` and `upkeep` (when);
* what shares it: `sharing` (one store for all handles of a process), `keyed` (the shortest way for a key);
* what a call begins with and how use ends: `tidying` (what an interrupted call left), `ending`.
"""

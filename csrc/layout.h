/* Every number that C and Python share.
 *
 * tests/store/test_layout.py reads each line: `#define NAME value`, the value a plain number or string. The
 * comment above a group names the Python module, which has the same under the same name; X_SIZE may be the
 * size of its struct X. A comment "module: Sequence" stands above places in a tuple of names, or among the
 * fields of a class, counted from 0: SEQUENCE_NAME. Of all SEQUENCE_COUNT is how many there are.
 */
#ifndef YATAGARASU_LAYOUT_H
#define YATAGARASU_LAYOUT_H

/* store/format.py */
#define CODEC_FLAGS 0x0F /* of the flags: the kind of value */
#define MASK32 0xFFFFFFFF
#define LAST_CLOCK 0x7F00000000000000 /* a clock beyond this is not believed */
#define LAST_STAMP 0x7F40000000000000 /* a stamp beyond this is damage */
#define AHEAD 10000000000 /* nanoseconds: what was made so much later than now was made by a wrong clock */
#define MOST_BYTES 0x100000000000000 /* counts of bytes beyond this are damage */

#define HEADER_BYTES 4096 /* of the index */
#define SLOT_BYTES 64
#define SLOT_WORDS 8
#define PARTITIONS 64
#define DESCRIPTOR_BITS 24 /* of a partition's descriptor, the low ones: its slots */
#define CAPACITY_MASK 0xFFFFFF /* the same as a mask */

#define W_SUPERSEDED 11
#define W_CLOCK 12
#define W_EPOCH 15
#define W_LIVE_BYTES 19
#define W_WRITTEN 22
#define W_COUNTERS 24 /* the first of COUNTERS */
#define W_LOG 31
#define W_ACTIVE 32
#define W_EVICTION 34 /* the policy, counted from 1 */
#define W_BUSY 40 /* the journal */
#define W_PARTITIONS 64
#define W_COUNTS 128
#define W_DELETED 192
#define W_TAGS 256
#define BUSY_CHANGING 0x474E49474E414843

#define S_LOW 0
#define S_HIGH 1
#define S_PLACE 2
#define S_LENGTHS 3
#define S_SUM 4
#define S_STAMP 5
#define S_EXPIRES 6
#define S_ACCESS 7
#define EMPTY 0 /* S_LOW of a slot that was never used */
#define REMOVED 1 /* S_LOW of a tombstone */
#define DIGEST_BIT 2 /* set in S_LOW of all others */
#define LENGTH_SHIFT 24 /* in S_LENGTHS: bytes of the value, */
#define FLAGS_SHIFT 16 /* flags, */
#define HEAD_MASK 0xFFFF /* and bytes of the head / ALIGN */

#define TAG_TABLE_WORDS 4 /* what a tag table begins with */
#define TAG_CELL_WORDS 4
#define TAG_CELLS 7 /* so many cells are in */
#define TAG_CELL_SLOTS 4 /* so many slots of a tag table */
#define TAG_HASH_BYTES 4
#define NO_CELL 0xFFFFFFFF /* instead of the number of a cell */
#define UNTAGGED 0x4445474741544E55 /* instead of the descriptor of a tag table */

#define ENTRY_WORDS 8 /* of the segment table */
#define T_STATE 0
#define T_SIZE 1
#define T_LIVE 2
#define T_OWNER 3
#define T_TAIL 7
#define ACTIVE 0x100000000 /* states */
#define LOG 0x400000000

#define SEGMENT_HEADER_BYTES 64
#define ALIGN 16
#define RECORD_MAGIC "YREC"
#define RECORD_BYTES 64
#define RECORD_SIZE 56 /* without the checksum */
#define RECORD_TAG_LENGTH 6 /* where a record has that, */
#define RECORD_KEY_LENGTH 8 /* that, */
#define RECORD_META_LENGTH 12 /* that, */
#define RECORD_VALUE_SUM 48 /* and that */
#define PUT 1 /* kinds of records */
#define LARGE 2
#define REMOVE 3
#define FLAG_LARGE 0x10
#define FOOTER_ENTRY_SIZE 12 /* what a footer has before the head of a record */
#define LARGE_POINTER_SIZE 8
#define CHUNK_BYTES 0x10000 /* of a large value: each such part has a checksum of its own */
#define CHUNK_SUM_BYTES 8 /* of one of these, in the value's record */
#define MOST_SUMS 0x10000 /* in there: of longer values each is of two chunks, or more */
#define MAX_VALUE_BYTES 0xFFFFFFFFFF
#define DIGEST_BYTES 16 /* of a digest in a record of removals */

/* store/format.py: TagTable */
#define TAGTABLE_CELLS 0
#define TAGTABLE_DESCRIPTOR 1
#define TAGTABLE_NUMBER 2

/* store/format.py: TagCell */
#define TAGCELL_STAMP 2
#define TAGCELL_LINK 3

/* store/format.py: Journal */
#define JOURNAL_PART 1
#define JOURNAL_AT 2
#define JOURNAL_NEW_LIVE 3
#define JOURNAL_NOW 4
#define JOURNAL_OLD_LIVE 5
#define JOURNAL_LEFT 6
#define JOURNAL_SLOT 7

/* store/format.py: COUNTERS */
#define COUNTERS_SETS 2
#define COUNTERS_DELETES 3

/* store/format.py: EVICTIONS */
#define EVICTIONS_LRU 0
#define EVICTIONS_LFU 2

/* store/eviction.py */
#define COUNT_SHIFT 44 /* in S_ACCESS, for LFU: hits above, the stamp below */
#define COUNT_MAX 0xFFFFF

/* store/index.py */
#define MAX_LOAD 0.75 /* of a partition, tombstones included */

/* store/tag_table.py */
#define LEAST_SLOTS 8 /* of a tag table */
#define TAG_LEAST_GROWTH 1.75 /* a new one has room for so many times its cells, */
#define TAG_GROWTH_SPREAD 0.5 /* and for up to so many times more */

/* store/changes.py */
#define LOG_AHEAD 2048 /* bytes that a log has behind its last record, or it is made longer */

/* store/reading.py */
#define UNLOOKED 0x100000 /* bytes of a value up to which no file is asked whether it can have so many */

/* store/item.py: Item */
#define ITEM_KEY 2
#define ITEM_PAYLOAD 3
#define ITEM_FLAGS 4
#define ITEM_EXPIRES 5
#define ITEM_TAG 6
#define ITEM_META 7
#define ITEM_COUNT 8

/* store/core.py */
#define SHORT_KEY 1024 /* bytes: longer keys are encoded in Python */
#define SHORT_META 128 /* bytes: an entry with longer metadata is encoded in Python */

#define RANK_BYTES 8 /* of metadata that say where an entry stands in an order of its users' */
#define USES_MOST 192
#define USES_MORE 16
#define USES_NANOSECONDS 1000000000

/* store/compiled.py */
#define ABI_VERSION 15 /* of what Python calls, and how */

/* codec/basics.py */
#define KIND_BYTES 0 /* in the flags of a value that is what was stored */
#define KIND_ARRAY 9 /* of one that is handed on in memory of its own, to be written to */

/* codec/keys.py */
#define KEY_STR "s" /* first byte of an encoded key */
#define KEY_BYTES "b"
#define KEY_INT "i"
#define KEY_FLOAT "d"
#define KEY_NONE "n"
#define KEY_TRUE "t"
#define KEY_FALSE "f"
#define KEY_TUPLE "u"
#define MAX_KEY_DEPTH 32

/* codec/bounds.py */
#define DEEPEST 255 /* levels of a value that ormsgpack writes and reads */

/* concurrency/file_locks.py */
#define LOOK_EVERY 0.01 /* seconds between looks whether files still have their names */

/* backends/reads.py */
#define OURS 0x8000000000000000 /* in the numbers of these reads; those of other reads lack it */

#endif

/* The core: get, put and remove of plain entries over a mapped index and open segments.
 *
 * It does what store/ does in Python, over the same files, for the plain cases, and leaves all others
 * to it. Rules that hold for every function:
 *
 * - The Python code is the specification. Whatever is not plain (a large value, growth, a segment
 *   that is not open, an index under repair or replaced, damage, an entry that fails its checksum)
 *   gives a status that sends the caller down the ordinary path, and has changed nothing but what
 *   the status says.
 * - Nothing is global, nothing is allocated, nothing calls back; errno is not part of the results.
 *   Only reading and writing whole files uses a thread, which has ended when the call returns.
 * - No address is taken from the mapped file on trust: it is shared, and may be damaged.
 * - Looking up takes no lock and may run in many threads at once. Callers of yc_put() hold the
 *   thread locks of the store (`appending`, and that of the index), those of yc_remove() the
 *   latter; the lock file is locked here.
 *
 * This file and core.c know nothing of Python; coremodule.c makes them a module.
 */
#ifndef YATAGARASU_CORE_H
#define YATAGARASU_CORE_H

#include "layout.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The most bytes that key, tag and metadata of a record for yc_put() may have. */
#define YC_MAX_NAMES 4000
#define YC_HEAD_BYTES 4080 /* of a record with as many names */
#define YC_READ_BYTES 4096 /* memory for one that is read */
#define YC_REMOVAL_BYTES (RECORD_BYTES + DIGEST_BYTES) /* of a record that yc_remove() logs */
#define YC_MAX_VALUE ((uint64_t)1 << 26) /* longer ones are taken to be large, or damage */

/* One mapping of an index file. Never changed while a call may use it: a new mapping is a new
 * view. A view of zeros sends every call down the ordinary path. */
struct yc_view {
    void *map;           /* the file, mapped from its start */
    uint64_t words;      /* 8-byte words mapped */
    uint64_t table_word; /* the segment table: its first word, and its entries */
    uint64_t table_capacity;
    uint64_t seed; /* of digests and record checksums */
    void *files;   /* table_capacity words: segment << 32 | descriptor + 1, or 0 */
    bool writable; /* the mapping: else no use is noted */
    int fd;        /* the file: when the lock is acquired, it and the lock file must be at their paths, */
    const char *path, *lock_path;
    int64_t *looked; /* which is checked again LOOK_EVERY after this time (nanoseconds) */
};

enum { YC_OTHER = -1, YC_MISS, YC_FOUND, YC_UNOPENED };

/* A live entry: where its value is, and what its record has to have: the value's checksum, and the key, as
 * digests can be made to collide. */
struct yc_found {
    const void *key; /* encoded; the caller keeps it for as long as this is used */
    uint64_t key_length, at, low, high, value_sum, offset, length;
    uint32_t head, flags, segment; /* head: bytes of the record before the value */
    int fd;
};

/* Look a key up at the time `now` (nanoseconds since the epoch): YC_FOUND, YC_MISS, YC_OTHER, or
 * YC_UNOPENED if its segment has to be opened first. */
int yc_find(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t now,
            struct yc_found *found);
/* Read all `found->length` bytes of the value, and into `head`, which has YC_READ_BYTES, what is before it in
 * the record; false if the read was short, or the record is not the key's. */
bool yc_read(const struct yc_found *found, char *head, void *value);
/* The same if it is in the page cache: it never waits for a disk. 1 or 0; a negative errno where
 * the system can't do that. Without `value` only the head is read. */
int yc_read_nowait(const struct yc_found *found, char *head, void *value);
/* Find the metadata in a head that was read; its bytes, or -1 if the head is not what was written there, and of
 * the value that the slot promises. Moves what is in `head`. */
int64_t yc_meta(const struct yc_view *view, const struct yc_found *found, char *head, const char **meta);
/* Have the disk begin to read it, without waiting. */
void yc_prefetch(const struct yc_found *found);
/* True if `value` is the value of the key; then its use is noted. */
bool yc_verify(const struct yc_view *view, const struct yc_found *found, const void *value, uint64_t now);
/* The same for a value that was read by other means, long after it was found: the index may have changed, or
 * been mapped anew. Checks also that the record is the key's, without waiting for a disk. */
bool yc_verify_late(const struct yc_view *view, const struct yc_found *found, const void *value,
                    uint64_t now);

/* Whether the key has a live entry: YC_FOUND, and `head` (YC_READ_BYTES) has what is before its value; YC_MISS
 * or YC_OTHER. It hardly ever waits for a disk. */
int yc_holds(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t now,
             struct yc_found *found, char *head);

/* Whether the index shows the record at `place` as that of the key: YC_FOUND, and `slot` has its SLOT_WORDS words;
 * YC_MISS or YC_OTHER. */
int yc_shows(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t place,
             uint64_t *slot);

struct yc_entry {
    const void *key, *tag, *meta, *payload;
    uint32_t key_length, tag_length, meta_length, flags;
    uint64_t length, expires;
};

/* Where to append, in a segment or the log; and the lock file. */
struct yc_end {
    int fd, lock_fd;
    uint64_t segment, offset;
};

/* A record that was appended. */
struct yc_record {
    uint64_t slot[SLOT_WORDS]; /* what its slot holds, or is to hold */
    uint64_t epoch;   /* the index's when the append began */
    uint64_t owner;   /* who appends: it is shown only if the segment is still theirs */
    uint64_t head_bytes, listed_bytes;
    uint32_t tag_hash;  /* of its tag; 0: it has none */
    int error;          /* of YC_FAILED: a negative errno */
    int64_t stop_after; /* for tests: only so many stores to the index take effect; -1: all do */
    char listed[FOOTER_ENTRY_SIZE + YC_HEAD_BYTES]; /* the footer's entry, which contains the head */
};

enum { YC_FAILED = -2, YC_APPENDED = 0, YC_INSTALLED = 1, YC_EXPIRED = 2 };

/* Append a record and show it in the index. YC_INSTALLED; YC_APPENDED if the ordinary path has to show
 * it; YC_FAILED if it could not be written, and the segment ends where it did; or YC_OTHER if nothing
 * was done. Reads `record->stop_after` and `owner`, and sets the rest of it. */
int yc_put(const struct yc_view *view, const struct yc_entry *entry, const struct yc_end *end, uint64_t now,
           struct yc_record *record);

/* Append the records of `count` entries by one write, and set `slots` (SLOT_WORDS each) to what
 * yc_install_many() is to show. `records` is a buffer of yc_batch_bytes(). 0; YC_FAILED with *error set;
 * or YC_OTHER if one of them is not plain, and nothing was done. */
int yc_append_many(const struct yc_view *view, const struct yc_entry *entries, size_t count,
                   const struct yc_end *end, uint64_t now, char *records, uint64_t *slots, int *error);
uint64_t yc_batch_bytes(const struct yc_entry *entries, size_t count);
uint64_t yc_record_bytes(const struct yc_entry *entry);
/* As format.room_for(): at most so much, its entry in the footer included. */
uint64_t yc_room_for(const struct yc_entry *entry);
/* Write the footer's entry of a record at `offset` into `listed`, unless that is NULL. Returns its length. */
uint64_t yc_list(const struct yc_entry *entry, uint64_t offset, const char *record, char *listed);
/* Show records in the index, one after the other, while holding the lock, up to the first one that is
 * left to the ordinary path. Returns how many. `epoch`: the index's before they were appended. `tag_hashes`: of
 * their tags; NULL if none has one. */
size_t yc_install_many(const struct yc_view *view, const uint64_t *slots, const uint32_t *tag_hashes,
                       size_t count, uint64_t epoch, uint64_t owner);
uint64_t yc_epoch(const struct yc_view *view);
/* The latest stamp; 0 if the index can't be used. */
uint64_t yc_clock(const struct yc_view *view);

/* Log a removal of the key and take it out of the index. YC_FOUND if it was there. YC_EXPIRED if it
 * had expired; or if it was missing, but others may just be putting it, so that the removal was logged.
 * YC_MISS if it was missing, and nothing was done; YC_OTHER as above. `log->offset` is not used: the index
 * tells where the log ends. `own`: the segment that the caller appends to (or 0), and its end. */
int yc_remove(const struct yc_view *view, const void *key, uint64_t key_length, const struct yc_end *log,
              const struct yc_end *own, uint64_t now, struct yc_record *record);

/* Make the tag table of a partition anew, with the cells that count and room for more, while holding the lock.
 * False, and nothing was done, if the file has no room for it, or it is damaged. */
bool yc_renew_tags(const struct yc_view *view, uint64_t part, uint64_t now);

/* format.large_payload(): bytes that the record of a large value has in the place of its `length` bytes. */
uint64_t yc_large_payload(uint64_t length);
/* How many chunks, each of CHUNK_BYTES but for the last one, `length` bytes of a large value have. */
#define YC_CHUNKS(length) (((uint64_t)(length) + CHUNK_BYTES - 1) / CHUNK_BYTES)
#define YC_PIECE ((uint64_t)256 << 10) /* bytes that stay in the processor's cache: some chunks */
#define YC_SCRATCH_BYTES (2 * YC_PIECE) /* memory for what is read and not kept */

/* Read `length` bytes of a file from `start`, where a chunk begins, and set the sum of each chunk. `bytes` is
 * where they go; unless they are to be `kept`, that is scratch memory. Returns the bytes read, fewer if the
 * file ends earlier (then without all sums), or a negative errno. */
int64_t yc_read_chunks(int fd, uint64_t start, void *bytes, bool kept, uint64_t length, uint64_t seed,
                       uint64_t *sums);

struct yc_part {
    const void *bytes;
    uint64_t length;
};

/* Write a large value, which comes in `count` parts, to its new file, and set the sums of its chunks. 0 or a
 * negative errno. */
int yc_write_file(int fd, const struct yc_part *parts, size_t count, uint64_t seed, uint64_t *sums);

/* For tests: the digest of a key (low, high), and format.value_sum(). */
void yc_digest(const void *key, uint64_t length, uint64_t seed, uint64_t *digest);
uint64_t yc_value_sum(const void *payload, uint64_t length, uint64_t low, uint32_t flags);

#if defined __x86_64__ && defined __GNUC__ && !defined __clang__
#define YC_AVX2
uint64_t yc_xxh3_avx2(const void *data, uint64_t length, uint64_t seed);
void yc_xxh3_avx2_update(void *state, const void *data, uint64_t length); /* of an XXH3_state_t */
#endif

#endif

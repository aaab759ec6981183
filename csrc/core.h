/* The core: get, put and remove of plain entries over a mapped index and open segments.
 *
 * It does what index.py, store/ and format.py do, over the same files, for the cases that are
 * plain, and leaves all others to them. Rules that hold for every function:
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

/* Key, tag and metadata of a record that yc_put() takes have this many bytes at most. */
#define YC_MAX_NAMES 4000
#define YC_HEAD_BYTES 4080 /* of a record with as many names */
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
    int fd;        /* the file: it, and the lock file, have to have their names when the lock is taken, */
    const char *path, *lock_path;
    int64_t *looked; /* which is looked at if that was last done so long ago (nanoseconds) */
};

enum { YC_OTHER = -1, YC_MISS, YC_FOUND, YC_UNOPENED };

/* A live entry: where its value is, what it has to be, and the key that its record has to have: digests
 * can be made to collide. */
struct yc_found {
    const void *key; /* encoded; the caller keeps it for as long as this is used */
    uint64_t key_length, at, low, high, value_sum, offset, length;
    uint32_t head, flags, segment; /* head: bytes of the record before the value */
    int fd;
};

/* Look a key up at the time `now` (nanoseconds since the epoch): YC_FOUND, YC_MISS, YC_OTHER, or
 * YC_UNOPENED if it would have been found, were its segment open. */
int yc_find(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t now,
            struct yc_found *found);
/* Read all `found->length` bytes of the value; false if they did not come at once, or the record is not
 * of the key. */
bool yc_read(const struct yc_found *found, void *value);
/* The same if it is in the page cache: it never waits for a disk. 1 or 0; a negative errno where
 * that can't be had at all. Without `value` only the head is read. */
int yc_read_nowait(const struct yc_found *found, void *value);
/* Let the disk begin to read it, without waiting. */
void yc_prefetch(const struct yc_found *found);
/* True if that is the value of the key; its use is noted then. */
bool yc_verify(const struct yc_view *view, const struct yc_found *found, const void *value, uint64_t now);
/* The same of what others read, long after it was found: the index may have changed, or been mapped anew. That
 * the record is of the key is seen now, without waiting for a disk. */
bool yc_verify_late(const struct yc_view *view, const struct yc_found *found, const void *value,
                    uint64_t now);

/* Whether there is a live entry of this very key: YC_FOUND, YC_MISS or YC_OTHER. It hardly ever waits for a disk. */
int yc_holds(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t now);

struct yc_entry {
    const void *key, *tag, *meta, *payload;
    uint32_t key_length, tag_length, meta_length, flags;
    uint64_t length, expires;
};

/* The end of the segment, or the log, that is written to, and the lock file. */
struct yc_end {
    int fd, lock_fd;
    uint64_t segment, offset;
};

/* A record that was appended. */
struct yc_record {
    uint64_t slot[SLOT_WORDS]; /* what its slot shows, or should show */
    uint64_t epoch;   /* the index's when the append began */
    uint64_t owner;   /* who appends: nobody else's segment shows it */
    uint64_t head_bytes, listed_bytes;
    int error;          /* of YC_FAILED: a negative errno */
    int64_t stop_after; /* for tests: stores to the index after so many are lost; -1 for none */
    char listed[FOOTER_ENTRY_SIZE + YC_HEAD_BYTES]; /* the footer's entry; the whole head is in it */
};

enum { YC_FAILED = -2, YC_APPENDED = 0, YC_INSTALLED = 1, YC_EXPIRED = 2 };

/* Append a record and show it in the index. YC_INSTALLED; YC_APPENDED if the index is left to the
 * ordinary path; YC_FAILED if it could not be written, and the segment ends where it did; or
 * YC_OTHER if nothing was done. `record->stop_after` and `owner` are read, the rest of it is set. */
int yc_put(const struct yc_view *view, const struct yc_entry *entry, const struct yc_end *end, uint64_t now,
           struct yc_record *record);

/* Append the records of `count` entries, one behind the other, by one write from `records`, which has
 * room for yc_batch_bytes(). Their slots, of SLOT_WORDS each, are not shown yet. 0; YC_FAILED with
 * *error set; or YC_OTHER if one of them is not plain, and nothing was done. */
int yc_append_many(const struct yc_view *view, const struct yc_entry *entries, size_t count,
                   const struct yc_end *end, uint64_t now, char *records, uint64_t *slots, int *error);
uint64_t yc_batch_bytes(const struct yc_entry *entries, size_t count);
uint64_t yc_record_bytes(const struct yc_entry *entry);
/* As format.room_for(): the same at most, with its entry in the footer. */
uint64_t yc_room_for(const struct yc_entry *entry);
/* The footer's entry of a record at `offset` into `listed`; its length, which NULL asks for. */
uint64_t yc_list(const struct yc_entry *entry, uint64_t offset, const char *record, char *listed);
/* Show records in the index, one after the other, while the lock is held. How many, from the first,
 * until one that is left to the ordinary path. `epoch`: the index's before they were appended. */
size_t yc_install_many(const struct yc_view *view, const uint64_t *slots, size_t count, uint64_t epoch,
                       uint64_t owner);
uint64_t yc_epoch(const struct yc_view *view);

/* Log a removal of the key and take it out of the index. YC_FOUND if it was there, YC_EXPIRED if
 * it was, but had expired, or if it was not, and the removal was logged because others may have
 * begun to put it; YC_MISS if nothing was done; YC_OTHER as above. `log->offset` is not used: the
 * index tells where the log ends. `own`: the segment that the caller appends to (or 0), and its end. */
int yc_remove(const struct yc_view *view, const void *key, uint64_t key_length, const struct yc_end *log,
              const struct yc_end *own, uint64_t now, struct yc_record *record);

/* All of a file, from its start, into `bytes`, and its checksum. Bytes read, fewer where the file
 * ends earlier (there is no checksum then); a negative errno. */
int64_t yc_read_file(int fd, void *bytes, uint64_t length, uint64_t seed, uint64_t *sum);
/* Write `bytes` to a new file. 0 or a negative errno. */
int yc_write_file(int fd, const void *bytes, uint64_t length, uint64_t seed, uint64_t *sum);

/* For tests: the digest of a key (low, high), and format.value_sum(). */
void yc_digest(const void *key, uint64_t length, uint64_t seed, uint64_t *digest);
uint64_t yc_value_sum(const void *payload, uint64_t length, uint64_t low, uint32_t flags);

#if defined __x86_64__ && defined __GNUC__ && !defined __clang__
#define YC_AVX2
uint64_t yc_xxh3_avx2(const void *data, uint64_t length, uint64_t seed);
void yc_xxh3_avx2_update(void *state, const void *data, uint64_t length); /* of an XXH3_state_t */
#endif

#endif

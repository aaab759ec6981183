/* The interface of the core module. One file, read twice: by the C compiler (through core.h,
 * which states the rules that hold for all of it) and by cffi. So: declarations only, no
 * preprocessor but integer constants. What the words and bytes mean is in format.py. */

#define YC_ABI_VERSION 1

/* What yc_get() may return instead of a length. */
#define YC_MISS -1  /* there is no live entry */
#define YC_OTHER -2 /* nothing was done: take the ordinary path */

/* Added to the result of yc_put(): the record is in the segment, the index is as it was. */
#define YC_NOT_INSTALLED 65536

/* Key, tag and metadata of a record that yc_put() takes have this many bytes at most. */
#define YC_MAX_NAMES 4000
#define YC_HEAD_BYTES 4080 /* of a record with as many names */

/* What a hit does to a slot's access word (eviction.py). */
#define YC_TOUCH_NONE 0
#define YC_TOUCH_RECENT 1   /* lru */
#define YC_TOUCH_FREQUENT 2 /* lfu */

/* One mapping of an index file. Made by Python, never changed while a call may use it: a new
 * mapping is a new view. A view of zeros sends every call down the ordinary path. */
struct yc_view {
    void *map;               /* the file, mapped from its start */
    uint64_t words;          /* 8-byte words mapped */
    uint64_t table_word;     /* the segment table: its first word, and its entries */
    uint64_t table_capacity;
    uint64_t seed;           /* of digests and record checksums */
    void *files;             /* table_capacity words: segment << 32 | descriptor + 1, or 0 */
    int32_t touch;           /* hits: YC_TOUCH_...; NONE for a mapping that can't be written */
    int32_t first;           /* the same for an entry's first access word */
};

/* A record that yc_put() appended: what its slot shows, or should show, and its head. */
struct yc_record {
    uint64_t slot[8];        /* digest low and high, place, lengths, checksum, stamp, expiry, access */
    uint64_t epoch;          /* the index's when the append began */
    int64_t stop_after;      /* for tests: stores to the index after this many are lost; -1 for none */
    char head[YC_HEAD_BYTES];
};

int yc_abi_version(void);

/* The digest of a key: low and high. */
void yc_digest(const void *key, uint64_t length, uint64_t seed, uint64_t *digest);
/* The checksum of a payload, as format.value_sum(). */
uint64_t yc_value_sum(const void *payload, uint64_t length, uint64_t low, uint32_t flags);

/* The value of `key` into `value`, which has `room` bytes, verified, and the use noted; `now` in
 * nanoseconds since the epoch. length << 8 | flags, YC_MISS, or YC_OTHER. */
int64_t yc_get(const struct yc_view *view, const void *key, uint64_t key_length, void *value,
               uint64_t room, uint64_t now);
/* The same if it is in the page cache, else YC_OTHER: it never waits for a disk. */
int64_t yc_get_nowait(const struct yc_view *view, const void *key, uint64_t key_length, void *value,
                      uint64_t room, uint64_t now);

/* Append a record at `offset` of the segment, and show it in the index under the lock file's
 * lock. `names` are key, tag and metadata, one behind the other. The bytes of the head, plus
 * YC_NOT_INSTALLED if the index is to be changed by the ordinary path; 0 if nothing was done;
 * or a negative errno if it could not be written: the segment still ends where it did. */
int64_t yc_put(const struct yc_view *view, struct yc_record *record, int fd, uint64_t segment,
               uint64_t offset, int lock_fd, const void *names, uint32_t key_length,
               uint32_t tag_length, uint32_t meta_length, const void *payload, uint64_t length,
               uint32_t flags, uint64_t expires, uint64_t now);

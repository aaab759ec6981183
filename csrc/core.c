/* The contract is in core.h. What is done, and why, stands in the Python code of store/. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the files are little-endian, and this code works on them as they are"
#endif
#if XXH_VERSION_NUMBER < 800
#error "XXH3 is final from xxHash 0.8.0 on"
#endif
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "words of the index are changed by one store");
_Static_assert(sizeof(_Atomic uint64_t) == 8, "words of the index have 8 bytes");

#define HEADER_WORDS (HEADER_BYTES / 8)
#define MAGIC_BYTES 4
enum { W_SETS = W_COUNTERS + COUNTERS_SETS, W_DELETES = W_COUNTERS + COUNTERS_DELETES };
enum { LRU = EVICTIONS_LRU + 1, LFU = EVICTIONS_LFU + 1 }; /* W_EVICTION; any other policy notes no uses */
#define UNASKED                                                                                              \
    ((uint64_t)32 << 10) /* a value of up to so many bytes is read without asking whether its
                                        segment can hold it */

_Static_assert(SLOT_BYTES == SLOT_WORDS * 8 && S_ACCESS == SLOT_WORDS - 1 && T_TAIL < ENTRY_WORDS, "words");
_Static_assert(W_BUSY + JOURNAL_SLOT + SLOT_WORDS <= W_PARTITIONS && W_PARTITIONS + PARTITIONS <= W_COUNTS &&
                   W_COUNTS + PARTITIONS <= W_DELETED && W_DELETED + PARTITIONS <= W_TAGS &&
                   (W_TAGS + PARTITIONS) * 8 <= HEADER_BYTES,
               "what the header holds does not overlap");
_Static_assert(CAPACITY_MASK == (1 << DESCRIPTOR_BITS) - 1 && LAST_CLOCK < LAST_STAMP, "masks and limits");
_Static_assert(TAG_CELLS *TAG_CELL_WORDS == TAG_CELL_SLOTS * (SLOT_WORDS - 1) &&
                   TAGCELL_LINK == TAG_CELL_WORDS - 1 && TAG_TABLE_WORDS < LEAST_SLOTS,
               "each slot of a tag table leaves a word for a chain");
_Static_assert(EMPTY < REMOVED && REMOVED < DIGEST_BIT, "low words tell slots apart");
_Static_assert(sizeof RECORD_MAGIC - 1 == MAGIC_BYTES && RECORD_BYTES == RECORD_SIZE + 8,
               "the head of a record");

#define UNSURE UINT64_MAX /* not a plain case: left to the ordinary path */
#define SEARCHES 16       /* tries, while the partition is being replaced */
#define TRIES 50          /* to lock the file, before sleeping in between */
#define SHORTEST_PAUSE 50000L /* nanoseconds between further tries; each is half as long again */
#define LONGEST_WAIT 20000000L
#ifdef CLOCK_MONOTONIC_COARSE
#define COARSE_CLOCK CLOCK_MONOTONIC_COARSE
#else
#define COARSE_CLOCK CLOCK_MONOTONIC
#endif
#define PAUSES 32         /* pause instructions between two tries: some hundred nanoseconds */
#define ONE_THREAD ((uint64_t)2 << 20) /* bytes; for larger files a second thread pays */
#define GATHER 8192 /* bytes; shorter records are copied together, which is cheaper than a vector */
#define TOGETHER                                                                                             \
    YC_READ_BYTES /* bytes; shorter records are read in one piece and copied, which is cheaper than a vector */
#define SPACE_AHEAD ((uint64_t)1 << 20) /* bytes of a segment that are allocated at once */

_Static_assert(CHUNK_SUM_BYTES == sizeof(uint64_t) && YC_PIECE % CHUNK_BYTES == 0, "chunks");
_Static_assert(YC_HEAD_BYTES >= RECORD_BYTES + YC_MAX_NAMES && YC_HEAD_BYTES % ALIGN == 0 &&
                   YC_HEAD_BYTES <= TOGETHER,
               "heads fit");

struct digest {
    uint64_t low, high;
};

struct partition {
    uint64_t descriptor, base, end, capacity; /* words, the last one slots */
};

static uint64_t load(const void *words, uint64_t at)
{
    return atomic_load_explicit((_Atomic uint64_t *)words + at, memory_order_acquire);
}

/* With release order: neither the compiler nor another processor moves it before an earlier store. */
static void store(void *words, uint64_t at, uint64_t value)
{
    atomic_store_explicit((_Atomic uint64_t *)words + at, value, memory_order_release);
}

static uint64_t aligned(uint64_t length)
{
    return (length + ALIGN - 1) & ~(uint64_t)(ALIGN - 1);
}

/* Python reads the canonical (big-endian) bytes of a hash as little-endian words. */
static struct digest digest_of(const void *key, uint64_t length, uint64_t seed)
{
    XXH128_hash_t hash = XXH3_128bits_withSeed(key, length, seed);
    return (struct digest){__builtin_bswap64(hash.high64) | DIGEST_BIT, __builtin_bswap64(hash.low64)};
}

static uint64_t value_sum(const void *payload, uint64_t length, uint64_t low, uint32_t flags)
{
#ifdef YC_AVX2
    if (length > 240 && __builtin_cpu_supports("avx2"))
        return yc_xxh3_avx2(payload, length, low ^ flags);
#endif
    return XXH3_64bits_withSeed(payload, length, low ^ flags);
}

static void update(XXH3_state_t *state, const void *data, uint64_t length)
{
#ifdef YC_AVX2
    if (__builtin_cpu_supports("avx2")) {
        yc_xxh3_avx2_update(state, data, length);
        return;
    }
#endif
    XXH3_64bits_update(state, data, length);
}

static bool usable(const struct yc_view *view)
{
    return view->words >= HEADER_WORDS && view->table_capacity &&
           view->table_word + view->table_capacity * ENTRY_WORDS <= view->words;
}

/* A stamp above all earlier ones; 0 if the clock word makes no sense. */
static uint64_t new_stamp(const struct yc_view *view, uint64_t now)
{
    _Atomic uint64_t *clock = (_Atomic uint64_t *)view->map + W_CLOCK;
    uint64_t last = atomic_load_explicit(clock, memory_order_relaxed), stamp;
    do {
        if (last >= LAST_STAMP)
            return 0;
        stamp = now > last && now <= LAST_CLOCK ? now : last + 1;
    } while (!atomic_compare_exchange_weak(clock, &last, stamp));
    return stamp;
}

/* An access word after a hit, or the first one of an entry: then `word` is 0. */
static uint64_t touched(uint64_t policy, uint64_t word, uint64_t stamp)
{
    uint64_t count = word >> COUNT_SHIFT;
    if (policy != LFU)
        return stamp;
    count = count < COUNT_MAX ? count + 1 : COUNT_MAX;
    return count << COUNT_SHIFT | stamp >> (64 - COUNT_SHIFT);
}

/* False if the partition does not lie within the mapping, behind the segment table. */
static bool partition_of(const struct yc_view *view, uint64_t high, struct partition *part)
{
    part->descriptor = load(view->map, W_PARTITIONS + high % PARTITIONS);
    part->capacity = part->descriptor & CAPACITY_MASK;
    part->base = (part->descriptor >> DESCRIPTOR_BITS) * SLOT_WORDS;
    part->end = part->base + part->capacity * SLOT_WORDS;
    return part->end <= view->words &&
           (part->capacity ? part->base >= view->table_word + view->table_capacity * ENTRY_WORDS
                           : !part->descriptor);
}

/* The slot of a digest, 0 if there is none, or UNSURE. */
static uint64_t find(const struct yc_view *view, struct digest key)
{
    for (int search = 0; search < SEARCHES; search++) {
        struct partition part;
        if (!partition_of(view, key.high, &part))
            return UNSURE;
        if (!part.descriptor)
            return 0;
        uint64_t at = part.base + key.low % part.capacity * SLOT_WORDS;
        for (uint64_t i = 0; i < part.capacity; i++) {
            uint64_t word = load(view->map, at + S_LOW);
            if (word == key.low && load(view->map, at + S_HIGH) == key.high)
                return at;
            if (word == EMPTY)
                break;
            at += SLOT_WORDS;
            if (at == part.end)
                at = part.base;
        }
        /* The partition may have been replaced, and its old place reused, meanwhile. */
        if (load(view->map, W_PARTITIONS + key.high % PARTITIONS) == part.descriptor)
            return 0;
    }
    return UNSURE;
}

/* Where partitions and tag tables may begin. */
static uint64_t first_slot(const struct yc_view *view)
{
    return (view->table_word + view->table_capacity * ENTRY_WORDS) / SLOT_WORDS;
}

static uint64_t entry_of(const struct yc_view *view, uint64_t segment)
{
    return view->table_word + segment % view->table_capacity * ENTRY_WORDS;
}

/* -- get ---------------------------------------------------------------------------------- */

/* The error of a system call that a sandbox refuses, or that the kernel does not know. */
static bool is_refused(int error)
{
    return error == EPERM || error == ENOSYS;
}

/* True if the segment has the whole value; checked before allocating as much as a damaged slot may say. If
 * the segment is being appended to, the table may say too little: then the file is asked. */
static bool fits(const struct yc_view *view, const struct yc_found *found)
{
    struct stat status;
    uint64_t end = found->offset + found->length;
    if (found->length <= UNLOOKED && end <= load(view->map, entry_of(view, found->segment) + T_SIZE))
        return true;
    return !fstat(found->fd, &status) && status.st_size >= 0 && end <= (uint64_t)status.st_size;
}

/* What the slot at `at` shows. */
static int locate(const struct yc_view *view, uint64_t at, struct digest digest, const void *key,
                  uint64_t key_length, struct yc_found *found)
{
    uint64_t place = load(view->map, at + S_PLACE), lengths = load(view->map, at + S_LENGTHS);
    uint64_t segment = place >> 32, file = load(view->files, segment % view->table_capacity);
    *found = (struct yc_found){
        .key = key,
        .key_length = key_length,
        .head = (uint32_t)(lengths & HEAD_MASK) * ALIGN,
        .at = at,
        .low = digest.low,
        .high = digest.high,
        .value_sum = load(view->map, at + S_SUM),
        .offset = ((place & MASK32) + (lengths & HEAD_MASK)) * ALIGN,
        .length = lengths >> LENGTH_SHIFT,
        .flags = lengths >> FLAGS_SHIFT & 0xFF,
        .segment = (uint32_t)segment,
        .fd = (int)((file & MASK32) - 1),
    };
    if (found->flags & FLAG_LARGE || found->length > YC_MAX_VALUE || found->head > YC_HEAD_BYTES)
        return YC_OTHER;
    if (file >> 32 != segment || !(file & MASK32))
        return YC_UNOPENED;
    return found->length <= UNASKED || fits(view, found) ? YC_FOUND : YC_OTHER;
}

int yc_find(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t now,
            struct yc_found *found)
{
    if (!usable(view))
        return YC_OTHER;
    struct digest digest = digest_of(key, key_length, view->seed);
    uint64_t at = find(view, digest);
    if (at == UNSURE)
        return YC_OTHER;
    if (!at)
        return YC_MISS;
    uint64_t expires = load(view->map, at + S_EXPIRES);
    if (expires && expires <= now) {
        bool same = load(view->map, at + S_LOW) == digest.low && load(view->map, at + S_HIGH) == digest.high;
        return same ? YC_MISS : YC_OTHER;
    }
    if (expires && load(view->map, at + S_STAMP) > now + AHEAD)
        return YC_OTHER; /* the clock was set back: the record tells when it was made */
    return locate(view, at, digest, key, key_length, found);
}

/* `head`, which was read, is that of a record of the key. */
static bool is_of_key(const struct yc_found *found, const char *head)
{
    uint32_t length;
    if (RECORD_BYTES + found->key_length > found->head || memcmp(head, RECORD_MAGIC, MAGIC_BYTES))
        return false;
    memcpy(&length, head + RECORD_KEY_LENGTH, sizeof length);
    return length == found->key_length && !memcmp(head + RECORD_BYTES, found->key, length);
}

static bool read_head(const struct yc_found *found, char *head)
{
    ssize_t done = pread(found->fd, head, found->head, (off_t)(found->offset - found->head));
    return done >= 0 && (uint64_t)done == found->head && is_of_key(found, head);
}

/* Reads the whole record at once: its head costs next to nothing beside the value. */
bool yc_read(const struct yc_found *found, char *head, void *value)
{
    struct iovec vector[2] = {{head, found->head}, {value, found->length}};
    ssize_t done = preadv(found->fd, vector, 2, (off_t)(found->offset - found->head));
    if (done < 0 && is_refused(errno)) { /* a sandbox may know pread() only */
        done = pread(found->fd, head, found->head, (off_t)(found->offset - found->head));
        done += done < 0 ? 0 : pread(found->fd, value, found->length, (off_t)found->offset);
    }
    return done >= 0 && (uint64_t)done == found->head + found->length && is_of_key(found, head);
}

int yc_read_nowait(const struct yc_found *found, char *head, void *value)
{
#if defined SYS_preadv2 && defined RWF_NOWAIT
    /* Not every C library has it. The kernel takes the offset in two halves. */
    uint64_t length = value ? found->length : 0, start = found->offset - found->head;
    bool together = found->head + length <= TOGETHER;
    struct iovec vector[2] = {{head, found->head + (together ? length : 0)}, {value, length}};
    long done = syscall(SYS_preadv2, found->fd, vector, together ? 1L : 2L, (long)start, (long)(start >> 32),
                        (long)RWF_NOWAIT);
    if (done < 0 && (errno == EOPNOTSUPP || errno == EINVAL || is_refused(errno)))
        return -errno;
    if (done < 0 || (uint64_t)done != found->head + length || !is_of_key(found, head))
        return 0;
    if (together && length)
        memcpy(value, head + found->head, length);
    return 1;
#else
    (void)found, (void)head, (void)value;
    return -ENOSYS;
#endif
}

/* Read the head of a record, which should be in the page cache: true if the record is the key's. */
static bool is_held(const struct yc_found *found, char *head)
{
    int done = yc_read_nowait(found, head, NULL);
    return done < 0 ? read_head(found, head) : done;
}

int64_t yc_meta(const struct yc_view *view, const struct yc_found *found, char *head, const char **meta)
{
    uint16_t tag_length;
    uint32_t meta_length;
    uint64_t value_sum, sum, place = (uint64_t)found->segment << 32 | (found->offset - found->head) / ALIGN;
    memcpy(&tag_length, head + RECORD_TAG_LENGTH, sizeof tag_length);
    memcpy(&meta_length, head + RECORD_META_LENGTH, sizeof meta_length);
    memcpy(&value_sum, head + RECORD_VALUE_SUM, sizeof value_sum);
    memcpy(&sum, head + RECORD_SIZE, sizeof sum);
    uint64_t before = found->key_length + tag_length, names = before + meta_length;
    if (RECORD_BYTES + names > found->head || value_sum != found->value_sum)
        return -1;
    /* What is summed stands around the checksum. */
    char *summed = memmove(head + RECORD_BYTES - RECORD_SIZE, head, RECORD_SIZE);
    if (__builtin_bswap64(XXH3_64bits_withSeed(summed, RECORD_SIZE + names, view->seed ^ place)) != sum)
        return -1;
    *meta = head + RECORD_BYTES + before;
    return meta_length;
}

void yc_prefetch(const struct yc_found *found)
{
#ifdef POSIX_FADV_WILLNEED
    off_t start = (off_t)(found->offset - found->head);
    posix_fadvise(found->fd, start, (off_t)(found->head + found->length), POSIX_FADV_WILLNEED);
#else
    (void)found;
#endif
}

static bool is_right(const struct yc_found *found, const void *value)
{
    return value_sum(value, found->length, found->low, found->flags) == found->value_sum;
}

static void note_use(const struct yc_view *view, uint64_t at, uint64_t now)
{
    uint64_t policy = load(view->map, W_EVICTION);
    if (view->writable && (policy == LRU || policy == LFU)) {
        uint64_t access = load(view->map, at + S_ACCESS), stamp = new_stamp(view, now);
        if (stamp)
            store(view->map, at + S_ACCESS, touched(policy, access, stamp));
    }
}

bool yc_verify(const struct yc_view *view, const struct yc_found *found, const void *value, uint64_t now)
{
    if (!is_right(found, value))
        return false;
    note_use(view, found->at, now);
    return true;
}

bool yc_verify_late(const struct yc_view *view, const struct yc_found *found, const void *value, uint64_t now)
{
    char head[YC_READ_BYTES];
    if (!usable(view) || !is_right(found, value) || !is_held(found, head))
        return false;
    uint64_t at = find(view, (struct digest){found->low, found->high});
    if (at && at != UNSURE)
        note_use(view, at, now);
    return true;
}

int yc_holds(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t now,
             struct yc_found *found, char *head)
{
    int status = yc_find(view, key, key_length, now, found);
    if (status != YC_FOUND)
        return status == YC_MISS ? YC_MISS : YC_OTHER;
    return is_held(found, head) ? YC_FOUND : YC_OTHER;
}

int yc_shows(const struct yc_view *view, const void *key, uint64_t key_length, uint64_t place, uint64_t *slot)
{
    if (!usable(view))
        return YC_OTHER;
    struct digest digest = digest_of(key, key_length, view->seed);
    uint64_t at = find(view, digest);
    if (!at || at == UNSURE)
        return at ? YC_OTHER : YC_MISS;
    for (uint64_t i = 0; i < SLOT_WORDS; i++)
        slot[i] = load(view->map, at + i);
    return slot[S_PLACE] == place && slot[S_LOW] == digest.low && slot[S_HIGH] == digest.high ? YC_FOUND
                                                                                              : YC_MISS;
}

/* -- put ---------------------------------------------------------------------------------- */

static void pause_a_little(void)
{
    for (int i = 0; i < PAUSES; i++) {
#if defined __x86_64__
        __builtin_ia32_pause();
#elif defined __aarch64__
        __asm__ volatile("yield");
#endif
    }
}

/* True if the open file is the one at the path: it was not removed, moved away or replaced. */
static bool has_name(int fd, const char *path)
{
    struct stat own, there;
    if (fstat(fd, &own) || !own.st_nlink)
        return false;
    if (lstat(path, &there))
        return errno != ENOENT && errno != ENOTDIR; /* this user may no longer look there */
    return own.st_ino == there.st_ino && own.st_dev == there.st_dev;
}

/* True if index, lock file and the file that is appended to (`end`) still have their names: else others use
 * other files. The lock is held. Checked every LOOK_EVERY seconds: a process that replaces one of these files
 * waits for longer than that. */
static bool in_place(const struct yc_view *view, const struct yc_end *end)
{
    struct stat status;
    struct timespec clock;
    _Atomic int64_t *looked = (_Atomic int64_t *)view->looked;
    clock_gettime(COARSE_CLOCK, &clock);
    int64_t now = clock.tv_sec * 1000000000ll + clock.tv_nsec;
    if (now - atomic_load_explicit(looked, memory_order_relaxed) < (int64_t)(LOOK_EVERY * 1e9))
        return true;
    if (!has_name(end->lock_fd, view->lock_path) || !has_name(view->fd, view->path))
        return false;
    if (fstat(end->fd, &status) || !status.st_nlink)
        return false;
    atomic_store_explicit(looked, now, memory_order_relaxed);
    return true;
}

/* Acquire the lock of all processes. Others hold it for microseconds, and a sleeper wakes milliseconds
 * later where the processors are busy: so try for a while first. False if that does not succeed: the
 * ordinary path goes on waiting, and heeds signals and its timeout. */
static bool lock(const struct yc_view *view, const struct yc_end *end)
{
    int fd = end->lock_fd;
    struct timespec pause = {.tv_nsec = SHORTEST_PAUSE};
    int tries = 0;
    for (long waited = 0; flock(fd, LOCK_EX | LOCK_NB);) {
        if (errno != EWOULDBLOCK || waited > LONGEST_WAIT)
            return false;
        if (tries++ < TRIES) {
            pause_a_little();
        } else {
            nanosleep(&pause, NULL);
            waited += pause.tv_nsec;
            pause.tv_nsec += pause.tv_nsec / 2;
        }
    }
    if (in_place(view, end))
        return true;
    flock(fd, LOCK_UN);
    return false;
}

/* Write all of the vectors, which it uses up. 0 or a negative errno. */
static int write_all(int fd, struct iovec *vector, int count, uint64_t offset)
{
    bool together = true;
    while (count) {
        bool one = count == 1 || !together;
        if (!together && !vector->iov_len) { /* of an empty value */
            vector++, count--;
            continue;
        }
        ssize_t done = one ? pwrite(fd, vector->iov_base, vector->iov_len, (off_t)offset)
                           : pwritev(fd, vector, count, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && !one && is_refused(errno)) {
            together = false;
            continue;
        }
        if (done < 0)
            return -errno;
        if (!done)
            return -EIO;
        offset += (uint64_t)done;
        while (count && (size_t)done >= vector->iov_len) {
            done -= (ssize_t)vector->iov_len;
            vector++, count--;
        }
        if (count) {
            vector->iov_base = (char *)vector->iov_base + done;
            vector->iov_len -= (size_t)done;
        }
    }
    return 0;
}

static void put_bytes(char **to, const void *from, size_t length)
{
    if (length) /* memcpy() must not get a null pointer, not even for no bytes */
        memcpy(*to, from, length);
    *to += length;
}

static uint64_t names_bytes(const struct yc_entry *entry)
{
    return (uint64_t)entry->key_length + entry->tag_length + entry->meta_length;
}

/* The start of a footer's entry, before the record's head. */
static void begin_listed(char *listed, uint64_t offset)
{
    uint32_t kept = 0; /* of the payload */
    memcpy(listed, &offset, 8);
    memcpy(listed + 8, &kept, 4);
}

/* Make header, key, tag and meta as format.pack_record() does, and the footer's entry. Returns the
 * head's bytes, padding included. */
static uint64_t pack_head(const struct yc_view *view, struct yc_record *record, const struct yc_entry *entry,
                          uint8_t record_kind, uint64_t created)
{
    uint64_t names_length = names_bytes(entry);
    uint64_t bytes = aligned(RECORD_BYTES + names_length);
    uint8_t kind[2] = {record_kind, (uint8_t)entry->flags};
    uint16_t tag_length = (uint16_t)entry->tag_length;
    char *head = record->listed + FOOTER_ENTRY_SIZE;
    begin_listed(record->listed, (record->slot[S_PLACE] & MASK32) * ALIGN);
    /* For the checksum the fields stand right before the names; they are moved to their place afterwards. */
    char *fixed = head + RECORD_BYTES - RECORD_SIZE, *to = fixed;
    put_bytes(&to, RECORD_MAGIC, MAGIC_BYTES);
    put_bytes(&to, kind, 2);
    put_bytes(&to, &tag_length, 2);
    put_bytes(&to, &entry->key_length, 4);
    put_bytes(&to, &entry->meta_length, 4);
    put_bytes(&to, &entry->length, 8);
    put_bytes(&to, &record->slot[S_STAMP], 8);
    put_bytes(&to, &entry->expires, 8);
    put_bytes(&to, &created, 8);
    put_bytes(&to, &record->slot[S_SUM], 8);
    put_bytes(&to, entry->key, entry->key_length);
    put_bytes(&to, entry->tag, entry->tag_length);
    put_bytes(&to, entry->meta, entry->meta_length);
    memset(to, 0, (size_t)(head + bytes - to));
    uint64_t sum = __builtin_bswap64(
        XXH3_64bits_withSeed(fixed, RECORD_SIZE + names_length, view->seed ^ record->slot[S_PLACE]));
    memmove(head, fixed, RECORD_SIZE);
    memcpy(head + RECORD_SIZE, &sum, 8);
    return bytes;
}

uint64_t yc_large_payload(uint64_t length)
{
    uint64_t sums = YC_CHUNKS(length);
    while (sums > MOST_SUMS)
        sums = (sums + 1) / 2;
    return LARGE_POINTER_SIZE + sums * CHUNK_SUM_BYTES;
}

/* Bytes of a slot's record. */
static uint64_t record_bytes(uint64_t lengths)
{
    uint64_t length = lengths >> LENGTH_SHIFT;
    bool is_large = lengths >> FLAGS_SHIFT & FLAG_LARGE;
    return (lengths & HEAD_MASK) * ALIGN + aligned(is_large ? yc_large_payload(length) : length);
}

static uint64_t live_word(const struct yc_view *view, uint64_t place)
{
    return entry_of(view, place >> 32) + T_LIVE;
}

/* The empty slot at which a search for a digest ends, or UNSURE; sets `slot` to the first free one on the
 * way. */
static uint64_t end_of(const struct yc_view *view, const struct partition *part, struct digest key,
                       uint64_t *slot)
{
    uint64_t at = part->base + (part->capacity ? key.low % part->capacity : 0) * SLOT_WORDS;
    *slot = UNSURE;
    for (uint64_t i = 0; i < part->capacity; i++) {
        uint64_t low = load(view->map, at + S_LOW);
        if (low <= REMOVED && *slot == UNSURE)
            *slot = at;
        if (low == EMPTY)
            return at;
        at += SLOT_WORDS;
        if (at == part->end)
            at = part->base;
    }
    return UNSURE;
}

/* True for damage: a slot behind the empty one at `at` belongs before it (Index._ensure_none_hidden()). */
static bool hides(const struct yc_view *view, const struct partition *part, uint64_t at)
{
    uint64_t position = (at - part->base) / SLOT_WORDS;
    for (uint64_t i = 1; i < part->capacity; i++) {
        position = position + 1 < part->capacity ? position + 1 : 0;
        uint64_t low = load(view->map, part->base + position * SLOT_WORDS + S_LOW),
                 start = low % part->capacity;
        if (low == EMPTY)
            return false;
        if (low > REMOVED && (position >= start ? position - start : position + part->capacity - start) >= i)
            return true;
    }
    return false;
}

/* Where a new entry of the partition goes; UNSURE if the partition has to grow first, or is damaged. */
static uint64_t free_slot(const struct yc_view *view, struct digest key)
{
    struct partition part;
    if (!partition_of(view, key.high, &part))
        return UNSURE;
    uint64_t counts = load(view->map, W_COUNTS + key.high % PARTITIONS), used = counts & MASK32;
    if ((double)(used + 1) > (double)part.capacity * MAX_LOAD || counts >> 32 > used)
        return UNSURE;
    uint64_t slot, end = end_of(view, &part, key, &slot);
    return end != UNSURE && hides(view, &part, end) ? UNSURE : slot;
}

/* find(), but UNSURE if damage may have hidden the slot. */
static uint64_t find_surely(const struct yc_view *view, struct digest key)
{
    struct partition part;
    uint64_t at = find(view, key), slot;
    if (at)
        return at;
    if (!partition_of(view, key.high, &part))
        return UNSURE;
    uint64_t end = end_of(view, &part, key, &slot);
    return end != UNSURE && hides(view, &part, end) ? UNSURE : 0;
}

/* One store to the index; none after the point at which a test has "killed" the process. */
static void change(const struct yc_view *view, struct yc_record *record, uint64_t at, uint64_t value)
{
    if (record->stop_after) {
        if (record->stop_after > 0)
            record->stop_after--;
        store(view->map, at, value);
    }
}

/* -- tags --------------------------------------------------------------------------------- */

/* A tag table: words, and cells. As TagTable in tag_table.py. */
struct tag_table {
    uint64_t base, chains, first_cell, room, count;
};

/* A cell about to be added to a table, its place, and that of its chain. */
struct cell {
    uint64_t at, table, number, chain, length, first;
};

static uint32_t tag_hash(const void *tag, uint64_t length, uint64_t seed)
{
    uint32_t hash = length ? (uint32_t)XXH3_64bits_withSeed(tag, length, seed) : 0;
    return length && !hash ? 1 : hash;
}

/* False if there is none, or none that lies within the mapping, behind the segment table. */
static bool tag_table_of(const struct yc_view *view, uint64_t part, struct tag_table *table)
{
    uint64_t descriptor = load(view->map, W_TAGS + part), slots = descriptor & CAPACITY_MASK;
    uint64_t base = (descriptor >> DESCRIPTOR_BITS) * SLOT_WORDS;
    if (descriptor == UNTAGGED || slots < LEAST_SLOTS || slots % TAG_CELL_SLOTS ||
        base < first_slot(view) * SLOT_WORDS || base + slots * SLOT_WORDS > view->words ||
        load(view->map, base + TAGTABLE_DESCRIPTOR) != descriptor)
        return false;
    *table = (struct tag_table){
        .base = base,
        .chains = slots - TAG_TABLE_WORDS,
        .first_cell = base + slots,
        .room = slots / TAG_CELL_SLOTS * TAG_CELLS,
        .count = load(view->map, base + TAGTABLE_CELLS),
    };
    return table->count <= table->room;
}

/* TagTable.add(), in the same order. */
static void add_cell(const struct yc_view *view, struct yc_record *record, const struct cell *cell)
{
    change(view, record, cell->at + S_LOW, record->slot[S_LOW] ^ DIGEST_BIT);
    change(view, record, cell->at + S_HIGH, record->slot[S_HIGH]);
    change(view, record, cell->at + TAGCELL_STAMP, record->slot[S_STAMP]);
    change(view, record, cell->at + TAGCELL_LINK, (uint64_t)record->tag_hash << 32 | cell->first);
    change(view, record, cell->table + TAGTABLE_CELLS, cell->number);
    change(view, record, cell->chain, (cell->length + 1) << 32 | cell->number);
}

/* True if the version of an entry that a cell stands for is the one that its slot shows. */
static bool counts_cell(const struct yc_view *view, uint64_t part, uint64_t at)
{
    const void *map = view->map;
    struct digest key = {load(map, at + S_LOW) ^ DIGEST_BIT, load(map, at + S_HIGH)};
    if (key.high % PARTITIONS != part || !(key.low & DIGEST_BIT)) /* damage */
        return false;
    uint64_t slot = find(view, key);
    return slot && slot != UNSURE && load(map, slot + S_STAMP) == load(map, at + TAGCELL_STAMP);
}

/* Index._extent() within the mapping: the first of so many free slots; 0 if there are none, or for damage. */
static uint64_t free_extent(const struct yc_view *view, uint64_t slots)
{
    uint64_t extents[2 * PARTITIONS], count = 0, first = first_slot(view), end = view->words / SLOT_WORDS;
    for (uint64_t i = 0; i < 2 * PARTITIONS; i++) {
        uint64_t descriptor = load(view->map, i < PARTITIONS ? W_PARTITIONS + i : W_TAGS + i - PARTITIONS);
        if (!descriptor || descriptor == UNTAGGED)
            continue;
        uint64_t at = count++; /* sorted by where they begin */
        for (; at && extents[at - 1] > descriptor; at--)
            extents[at] = extents[at - 1];
        extents[at] = descriptor;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t begins = extents[i] >> DESCRIPTOR_BITS, ends = begins + (extents[i] & CAPACITY_MASK);
        if (begins < first || ends > end)
            return 0;
        if (begins - first >= slots)
            return first;
        first = ends;
    }
    return first + slots <= end ? first : 0;
}

/* Index._renew_tags() where the file has room. Nobody looks at what is written before the descriptor is. */
static bool renew_tags(const struct yc_view *view, struct yc_record *record, uint64_t part, uint64_t now)
{
    struct tag_table old = {0};
    const void *map = view->map;
    if (load(map, W_TAGS + part) != UNTAGGED && !tag_table_of(view, part, &old))
        return false;
    uint64_t live = 0, number = 0, stamp;
    for (uint64_t i = 0; i < old.count; i++)
        live += counts_cell(view, part, old.first_cell + i * TAG_CELL_WORDS);
    /* As tag_table.slots_for() and growth(). */
    double factor = TAG_LEAST_GROWTH + TAG_GROWTH_SPREAD * (double)(part * 37 % PARTITIONS) / PARTITIONS;
    uint64_t slots = ((uint64_t)((double)(live + 1) * factor) / TAG_CELLS + 1) * TAG_CELL_SLOTS;
    slots = slots > LEAST_SLOTS ? slots : LEAST_SLOTS;
    uint64_t first = slots <= CAPACITY_MASK ? free_extent(view, slots) : 0;
    if (!first || !(stamp = new_stamp(view, now)))
        return false;

    uint64_t base = first * SLOT_WORDS, chains = base + TAG_TABLE_WORDS, cell = base + slots;
    for (uint64_t at = chains; at < cell; at++)
        change(view, record, at, NO_CELL);
    for (uint64_t i = 0; i < old.count && number < live; i++) {
        uint64_t from = old.first_cell + i * TAG_CELL_WORDS;
        if (!counts_cell(view, part, from))
            continue;
        uint64_t hash = load(map, from + TAGCELL_LINK) >> 32,
                 chain = chains + hash % (slots - TAG_TABLE_WORDS);
        uint64_t word = load(map, chain);
        for (uint64_t at = 0; at < TAGCELL_LINK; at++)
            change(view, record, cell + at, load(map, from + at));
        change(view, record, cell + TAGCELL_LINK, hash << 32 | (word & MASK32));
        change(view, record, chain, ((word >> 32) + 1) << 32 | ++number);
        cell += TAG_CELL_WORDS;
    }
    for (uint64_t at = cell; at < base + slots * SLOT_WORDS; at++)
        change(view, record, at, 0);
    change(view, record, base + TAGTABLE_NUMBER + 1, 0);
    change(view, record, base + TAGTABLE_CELLS, number);
    change(view, record, base + TAGTABLE_DESCRIPTOR, first << DESCRIPTOR_BITS | slots);
    change(view, record, base + TAGTABLE_NUMBER, stamp);
    change(view, record, W_TAGS + part, first << DESCRIPTOR_BITS | slots);
    return true;
}

bool yc_renew_tags(const struct yc_view *view, uint64_t part, uint64_t now)
{
    struct yc_record record = {.stop_after = -1};
    return usable(view) && part < PARTITIONS && renew_tags(view, &record, part, now);
}

/* Where the cell of a new entry goes; false if there is no room for it in the file, or for damage. */
static bool place_cell(const struct yc_view *view, struct yc_record *record, struct cell *cell)
{
    struct tag_table table = {0};
    uint64_t part = record->slot[S_HIGH] % PARTITIONS, hash = record->tag_hash;
    bool there = tag_table_of(view, part, &table);
    if (!there || table.count == table.room)
        there = renew_tags(view, record, part, record->slot[S_STAMP]) && tag_table_of(view, part, &table);
    if (!there || table.count >= table.room)
        return false;
    uint64_t chain = table.base + TAG_TABLE_WORDS + hash % table.chains, word = load(view->map, chain);
    *cell = (struct cell){
        .at = table.first_cell + table.count * TAG_CELL_WORDS,
        .table = table.base,
        .number = table.count + 1,
        .chain = chain,
        .length = word >> 32,
        .first = word & MASK32,
    };
    return cell->length ? cell->length <= table.count && cell->first && cell->first <= table.count
                        : cell->first == NO_CELL;
}

/* -- showing what was put ------------------------------------------------------------------ */

/* Changes of live bytes: `more` in the segment that a slot points to, `less` in the one it pointed to. */
struct counts {
    uint64_t new_live, more, old_live, less;
};

/* Index._begin(). No count gets negative: install() and is_plain() check that. */
static void begin(const struct yc_view *view, struct yc_record *record, uint64_t part, uint64_t at,
                  const uint64_t *slot, const struct counts *of)
{
    const void *map = view->map;
    uint64_t left = load(map, of->old_live) - of->less, now = load(map, of->new_live) + of->more;
    if (of->old_live == of->new_live) {
        now -= of->less;
        left = now;
    }
    change(view, record, W_BUSY + JOURNAL_PART, part);
    change(view, record, W_BUSY + JOURNAL_AT, at);
    change(view, record, W_BUSY + JOURNAL_NEW_LIVE, of->new_live);
    change(view, record, W_BUSY + JOURNAL_NOW, now);
    change(view, record, W_BUSY + JOURNAL_OLD_LIVE, of->old_live);
    change(view, record, W_BUSY + JOURNAL_LEFT, left);
    for (uint64_t i = 0; i < SLOT_WORDS; i++)
        change(view, record, W_BUSY + JOURNAL_SLOT + i, slot[i]);
    change(view, record, W_BUSY, BUSY_CHANGING);
}

/* Index._count() */
static void count(const struct yc_view *view, struct yc_record *record, const struct counts *of)
{
    const void *map = view->map;
    change(view, record, of->old_live, load(map, of->old_live) - of->less);
    change(view, record, of->new_live, load(map, of->new_live) + of->more);
    change(view, record, W_LIVE_BYTES, load(map, W_LIVE_BYTES) - of->less + of->more);
}

/* Index.settle() for a record that is shown; its segment is active. */
static void settle(const struct yc_view *view, struct yc_record *record, uint64_t size)
{
    uint64_t place = record->slot[S_PLACE], tail = entry_of(view, place >> 32) + T_TAIL;
    uint64_t start = (place & MASK32) * ALIGN;
    if (load(view->map, tail) == start)
        change(view, record, tail, start + size);
}

/* Index.put(): the slot shows the record. In the same order, with the same journal. */
static void put_slot(const struct yc_view *view, struct yc_record *record, uint64_t at, bool fresh)
{
    const void *map = view->map;
    uint64_t part = record->slot[S_HIGH] % PARTITIONS, size = record_bytes(record->slot[S_LENGTHS]);
    uint64_t was = load(map, at + S_LOW), new_live = live_word(view, record->slot[S_PLACE]);
    struct counts of = {new_live, size, new_live, 0};
    if (!fresh) {
        of.old_live = live_word(view, load(map, at + S_PLACE));
        of.less = record_bytes(load(map, at + S_LENGTHS));
    }

    begin(view, record, part, at, record->slot, &of);
    for (uint64_t i = S_PLACE; i < SLOT_WORDS; i++)
        change(view, record, at + i, record->slot[i]);
    if (fresh) {
        uint64_t counts = load(map, W_COUNTS + part);
        change(view, record, W_COUNTS + part, counts + ((uint64_t)1 << 32) + (was == EMPTY));
        change(view, record, at + S_HIGH, record->slot[S_HIGH]);
        change(view, record, at + S_LOW, record->slot[S_LOW]);
    }
    count(view, record, &of);
    change(view, record, W_BUSY, 0);

    settle(view, record, size);
    change(view, record, W_WRITTEN, load(map, W_WRITTEN) + 1);
    change(view, record, W_SETS, load(map, W_SETS) + 1);
}

/* Showing._install() in the plain case; else returns false, and leaves the index as it is. */
static bool install(const struct yc_view *view, struct yc_record *record)
{
    const void *map = view->map;
    struct digest key = {record->slot[S_LOW], record->slot[S_HIGH]};
    uint64_t segment = record->slot[S_PLACE] >> 32;
    uint64_t entry = entry_of(view, segment);
    if (load(map, W_BUSY) || load(map, W_SUPERSEDED) || load(map, W_EPOCH) != record->epoch ||
        record->slot[S_STAMP] <= record->epoch || load(map, entry + T_STATE) != (ACTIVE | segment) ||
        load(map, entry + T_OWNER) != record->owner)
        return false;
    uint64_t at = find(view, key);
    bool fresh = !at;
    if (fresh) {
        if (load(map, W_DELETED + key.high % PARTITIONS) >= record->slot[S_STAMP])
            return false;
        at = free_slot(view, key);
    }
    /* Adding to them must not overflow the counts, even damaged ones. */
    if (at == UNSURE || load(map, entry + T_LIVE) > MOST_BYTES || load(map, W_LIVE_BYTES) > MOST_BYTES)
        return false;
    if (!fresh) {
        uint64_t lengths = load(map, at + S_LENGTHS);
        if (load(map, at + S_STAMP) >= record->slot[S_STAMP] || lengths >> FLAGS_SHIFT & FLAG_LARGE)
            return false;
        uint64_t size = record_bytes(lengths);
        if (load(map, live_word(view, load(map, at + S_PLACE))) < size || load(map, W_LIVE_BYTES) < size)
            return false;
    }
    struct cell cell = {0};
    if (record->tag_hash && !place_cell(view, record, &cell))
        return false;
    /* Another policy may hold since the record was made. */
    record->slot[S_ACCESS] = touched(load(map, W_EVICTION), 0, record->slot[S_STAMP]);
    if (record->tag_hash)
        add_cell(view, record, &cell);
    put_slot(view, record, at, fresh);
    return true;
}

/* Allocating ahead of the writes makes them a tenth cheaper: a piece at a time, within the segment's granted
 * size. Sealing gives back what was not used. Failures are ignored. */
static void space_ahead(const struct yc_view *view, const struct yc_end *end, uint64_t bytes)
{
#ifdef __linux__
    uint64_t from = (end->offset + bytes) / SPACE_AHEAD * SPACE_AHEAD;
    uint64_t granted = load(view->map, entry_of(view, end->segment) + T_SIZE);
    uint64_t length = granted > from + SPACE_AHEAD ? SPACE_AHEAD : granted - from;
    if (end->offset < from && from < granted)
        fallocate(end->fd, FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)length);
#else
    (void)view, (void)end, (void)bytes;
#endif
}

/* Write a record at the end of the segment. 0 or a negative errno. */
static int append(const struct yc_view *view, const struct yc_end *end, char *head, uint64_t head_bytes,
                  const struct yc_entry *entry)
{
    static const char padding[ALIGN];
    char whole[GATHER];
    uint64_t bytes = head_bytes + aligned(entry->length);
    struct iovec vector[3] = {{head, head_bytes},
                              {(void *)(uintptr_t)entry->payload, entry->length},
                              {(void *)(uintptr_t)padding, aligned(entry->length) - entry->length}};
    int count = 3;
    if (bytes <= GATHER) { /* cheaper than having the kernel gather it */
        char *to = whole;
        for (int i = 0; i < 3; i++)
            put_bytes(&to, vector[i].iov_base, vector[i].iov_len);
        vector[0] = (struct iovec){whole, bytes};
        count = 1;
    }
    space_ahead(view, end, bytes);
    return write_all(end->fd, vector, count, end->offset);
}

/* Make head and slot of an entry whose record will be at `offset` of a segment. False if it is not plain. */
static bool draft(const struct yc_view *view, const struct yc_entry *entry, uint64_t segment, uint64_t offset,
                  uint64_t now, struct yc_record *record)
{
    if (!usable(view) || names_bytes(entry) > YC_MAX_NAMES || entry->length > YC_MAX_VALUE ||
        entry->flags > 0xFF || entry->flags & FLAG_LARGE || segment > MASK32 || offset % ALIGN ||
        offset / ALIGN > MASK32)
        return false;
    struct digest key = digest_of(entry->key, entry->key_length, view->seed);
    uint64_t stamp, *slot = record->slot;
    record->epoch = load(view->map, W_EPOCH);
    if (!(stamp = new_stamp(view, now)))
        return false;
    slot[S_LOW] = key.low;
    slot[S_HIGH] = key.high;
    slot[S_PLACE] = segment << 32 | offset / ALIGN;
    slot[S_SUM] = value_sum(entry->payload, entry->length, key.low, entry->flags);
    slot[S_STAMP] = stamp;
    slot[S_EXPIRES] = entry->expires;
    slot[S_ACCESS] = touched(load(view->map, W_EVICTION), 0, stamp);
    record->tag_hash = tag_hash(entry->tag, entry->tag_length, view->seed);
    record->head_bytes = pack_head(view, record, entry, PUT, now);
    record->listed_bytes = yc_list(entry, 0, NULL, NULL);
    slot[S_LENGTHS] = entry->length << LENGTH_SHIFT | (uint64_t)entry->flags << FLAGS_SHIFT |
                      record->head_bytes / ALIGN;
    return true;
}

int yc_put(const struct yc_view *view, const struct yc_entry *entry, const struct yc_end *end, uint64_t now,
           struct yc_record *record)
{
    if (!draft(view, entry, end->segment, end->offset, now, record))
        return YC_OTHER;
    record->error = append(view, end, record->listed + FOOTER_ENTRY_SIZE, record->head_bytes, entry);
    if (record->error)
        return YC_FAILED;
    if (!lock(view, end))
        return YC_APPENDED;
    bool installed = install(view, record);
    flock(end->lock_fd, LOCK_UN);
    return installed ? YC_INSTALLED : YC_APPENDED;
}

/* -- many puts ---------------------------------------------------------------------------- */

uint64_t yc_record_bytes(const struct yc_entry *entry)
{
    return aligned(RECORD_BYTES + names_bytes(entry)) + aligned(entry->length);
}

uint64_t yc_room_for(const struct yc_entry *entry)
{
    return 2 * (RECORD_BYTES + names_bytes(entry)) + FOOTER_ENTRY_SIZE + entry->length + 2 * ALIGN;
}

uint64_t yc_batch_bytes(const struct yc_entry *entries, size_t count)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < count; i++)
        bytes += yc_record_bytes(&entries[i]);
    return bytes;
}

uint64_t yc_list(const struct yc_entry *entry, uint64_t offset, const char *record, char *listed)
{
    uint64_t head = RECORD_BYTES + entry->key_length + entry->tag_length;
    if (listed) {
        begin_listed(listed, offset);
        memcpy(listed + FOOTER_ENTRY_SIZE, record, head);
    }
    return FOOTER_ENTRY_SIZE + head;
}

int yc_append_many(const struct yc_view *view, const struct yc_entry *entries, size_t count,
                   const struct yc_end *end, uint64_t now, char *records, uint64_t *slots, int *error)
{
    struct yc_record record;
    char *to = records;
    for (size_t i = 0; i < count; i++) {
        const struct yc_entry *entry = &entries[i];
        if (!draft(view, entry, end->segment, end->offset + (uint64_t)(to - records), now, &record))
            return YC_OTHER;
        memcpy(&slots[i * SLOT_WORDS], record.slot, sizeof record.slot);
        put_bytes(&to, record.listed + FOOTER_ENTRY_SIZE, record.head_bytes);
        put_bytes(&to, entry->payload, entry->length);
        size_t padding = aligned(entry->length) - entry->length;
        memset(to, 0, padding);
        to += padding;
    }
    struct iovec vector = {records, (size_t)(to - records)};
    space_ahead(view, end, vector.iov_len);
    *error = write_all(end->fd, &vector, 1, end->offset);
    return *error ? YC_FAILED : 0;
}

size_t yc_install_many(const struct yc_view *view, const uint64_t *slots, const uint32_t *tag_hashes,
                       size_t count, uint64_t epoch, uint64_t owner)
{
    struct yc_record record = {.epoch = epoch, .owner = owner, .stop_after = -1};
    size_t done = 0;
    while (done < count && usable(view)) {
        memcpy(record.slot, &slots[done * SLOT_WORDS], sizeof record.slot);
        record.tag_hash = tag_hashes ? tag_hashes[done] : 0;
        if (!install(view, &record))
            break;
        done++;
    }
    return done;
}

uint64_t yc_epoch(const struct yc_view *view)
{
    return usable(view) ? load(view->map, W_EPOCH) : 0;
}

uint64_t yc_clock(const struct yc_view *view)
{
    return usable(view) ? load(view->map, W_CLOCK) : 0;
}

/* -- remove ------------------------------------------------------------------------------- */

/* Index.remove(), and what Removal.remove_slots() does before and counts after it. */
static void remove_slot(const struct yc_view *view, struct yc_record *record, const struct partition *part,
                        uint64_t at, bool alive)
{
    const void *map = view->map;
    uint64_t number = record->slot[S_HIGH] % PARTITIONS, live = live_word(view, load(map, at + S_PLACE));
    uint64_t size = record_bytes(load(map, at + S_LENGTHS));
    uint64_t next = at + SLOT_WORDS < part->end ? at + SLOT_WORDS : part->base;
    bool empty = load(map, next) == EMPTY;

    struct counts of = {live, 0, live, size};
    uint64_t slot[SLOT_WORDS];
    for (uint64_t i = 0; i < SLOT_WORDS; i++)
        slot[i] = load(map, at + i);
    slot[S_LOW] = empty ? EMPTY : REMOVED;
    slot[S_ACCESS] = 0;

    change(view, record, W_DELETED + number, record->slot[S_STAMP]);
    begin(view, record, number, at, slot, &of);
    change(view, record, at + S_LOW, slot[S_LOW]);
    change(view, record, at + S_ACCESS, 0);
    change(view, record, W_COUNTS + number, load(map, W_COUNTS + number) - ((uint64_t)1 << 32) - empty);
    count(view, record, &of);
    change(view, record, W_BUSY, 0);
    if (alive)
        change(view, record, W_DELETES, load(map, W_DELETES) + 1);
}

/* True if a removal can be logged without making the log longer. */
static bool log_has_room(const struct yc_view *view, const struct yc_end *log)
{
    uint64_t entry = entry_of(view, log->segment), tail = load(view->map, entry + T_TAIL);
    return load(view->map, W_LOG) == log->segment &&
           load(view->map, entry + T_STATE) == (LOG | log->segment) && !(tail % ALIGN) &&
           tail >= SEGMENT_HEADER_BYTES && tail / ALIGN <= MASK32 &&
           tail + YC_REMOVAL_BYTES + LOG_AHEAD <= load(view->map, entry + T_SIZE);
}

/* ChangeLog.append() of one digest; false if nothing was logged. */
static bool log_removal(const struct yc_view *view, struct digest key, uint64_t stamp,
                        const struct yc_end *log, struct yc_record *record)
{
    const void *map = view->map;
    uint64_t *slot = record->slot, entry = entry_of(view, log->segment);
    uint64_t tail = load(map, entry + T_TAIL), digest[2] = {key.low, key.high};
    struct yc_entry removal = {.length = DIGEST_BYTES};
    struct iovec vector = {record->listed + FOOTER_ENTRY_SIZE, YC_REMOVAL_BYTES};
    slot[S_LOW] = key.low;
    slot[S_HIGH] = key.high;
    slot[S_PLACE] = log->segment << 32 | tail / ALIGN;
    slot[S_SUM] = value_sum(digest, DIGEST_BYTES, 0, 0);
    slot[S_STAMP] = stamp;
    pack_head(view, record, &removal, REMOVE, stamp);
    memcpy(record->listed + FOOTER_ENTRY_SIZE + RECORD_BYTES, digest, DIGEST_BYTES);
    if (write_all(log->fd, &vector, 1, tail)) /* the ordinary path says why */
        return false;
    change(view, record, entry + T_TAIL, tail + YC_REMOVAL_BYTES);
    change(view, record, W_WRITTEN, load(map, W_WRITTEN) + 1);
    return true;
}

/* ActiveSegment.others_append() */
static bool others_append(const struct yc_view *view, const struct yc_end *own)
{
    uint64_t entry = entry_of(view, own->segment);
    bool settled = own->segment && load(view->map, entry + T_STATE) == (ACTIVE | own->segment) &&
                   load(view->map, entry + T_TAIL) == own->offset;
    return load(view->map, W_ACTIVE) > settled;
}

/* True for a slot without a large file, whose record can be subtracted from all counts. */
static bool is_plain(const struct yc_view *view, uint64_t at)
{
    const void *map = view->map;
    uint64_t lengths = load(map, at + S_LENGTHS), size = record_bytes(lengths);
    uint64_t counts = load(map, W_COUNTS + load(map, at + S_HIGH) % PARTITIONS);
    return !(lengths >> FLAGS_SHIFT & FLAG_LARGE) && counts & MASK32 && counts >> 32 &&
           load(map, live_word(view, load(map, at + S_PLACE))) >= size && load(map, W_LIVE_BYTES) >= size;
}

/* yc_remove() with the lock held, of the slot at `at`. If that is 0, there is none, but a record may have
 * been appended and not shown yet, so the removal is logged all the same. */
static int remove_locked(const struct yc_view *view, struct digest key, uint64_t at, const struct yc_end *log,
                         uint64_t now, struct yc_record *record)
{
    const void *map = view->map;
    struct partition part;
    if (load(map, W_BUSY) || load(map, W_SUPERSEDED) || !partition_of(view, key.high, &part) ||
        (at &&
         (!is_plain(view, at) || (load(map, at + S_EXPIRES) && load(map, at + S_STAMP) > now + AHEAD))) ||
        !log_has_room(view, log))
        return YC_OTHER;
    uint64_t stamp = new_stamp(view, now);
    if (!stamp || stamp <= load(map, W_EPOCH) || (at && stamp <= load(map, at + S_STAMP)) ||
        !log_removal(view, key, stamp, log, record))
        return YC_OTHER;
    if (!at) {
        change(view, record, W_DELETED + key.high % PARTITIONS, stamp);
        return YC_EXPIRED;
    }
    uint64_t expires = load(map, at + S_EXPIRES);
    bool alive = !expires || expires > now;
    remove_slot(view, record, &part, at, alive);
    return alive ? YC_FOUND : YC_EXPIRED;
}

/* True if the record that the slot shows is this very key's; false also if that can't be read plainly. */
static bool is_slot_of(const struct yc_view *view, uint64_t at, struct digest digest, const void *key,
                       uint64_t key_length)
{
    struct yc_found found;
    char head[YC_READ_BYTES];
    return locate(view, at, digest, key, key_length, &found) == YC_FOUND && read_head(&found, head);
}

int yc_remove(const struct yc_view *view, const void *key, uint64_t key_length, const struct yc_end *log,
              const struct yc_end *own, uint64_t now, struct yc_record *record)
{
    if (!usable(view))
        return YC_OTHER;
    struct digest digest = digest_of(key, key_length, view->seed);
    uint64_t at = find_surely(view, digest), place = at && at != UNSURE ? load(view->map, at + S_PLACE) : 0;
    if (!at && !others_append(view, own))
        return YC_MISS;
    /* Before locking: it may have to wait for the disk. */
    if (at == UNSURE || log->segment > MASK32 || (at && !is_slot_of(view, at, digest, key, key_length)) ||
        !lock(view, log))
        return YC_OTHER;
    int status = YC_OTHER;
    at = find_surely(view, digest);
    if (!at && !others_append(view, own))
        status = YC_MISS;
    else if (at != UNSURE && (!at || load(view->map, at + S_PLACE) == place))
        status = remove_locked(view, digest, at, log, now, record);
    flock(log->lock_fd, LOCK_UN);
    return status;
}

/* -- large values ------------------------------------------------------------------------- */

/* A file that threads read together: each takes the next piece, and sums its chunks while these are in the
 * processor's cache. */
struct reading {
    int fd;
    bool kept; /* else each of the two threads has a piece of `bytes`, over and over */
    char *bytes; /* where they go */
    uint64_t start, length, seed, *sums;
    _Atomic uint64_t next;
    _Atomic int64_t end; /* where the file ended early, or a negative errno: all threads stop then */
};

/* A value being written, while another thread sums its chunks. */
struct summing {
    const struct yc_part *parts;
    size_t count;
    uint64_t seed, *sums;
};

/* Run `work` in a thread of its own, with signals blocked: those are the interpreter's. */
static bool start(pthread_t *thread, void *(*work)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = !pthread_create(thread, NULL, work, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

/* Read bytes of the file into `to`: false if it ends before, or fails. */
static bool read_piece(struct reading *file, char *to, uint64_t at, uint64_t length)
{
    while (length) {
        ssize_t done = pread(file->fd, to, length, (off_t)(file->start + at));
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) { /* the first thread to see that sets it */
            int64_t whole = (int64_t)file->length;
            atomic_compare_exchange_strong(&file->end, &whole, done < 0 ? -(int64_t)errno : (int64_t)at);
            return false;
        }
        to += done;
        at += (uint64_t)done;
        length -= (uint64_t)done;
    }
    return true;
}

static void sum_chunks(const char *bytes, uint64_t length, uint64_t seed, uint64_t *sums)
{
    for (uint64_t at = 0; at < length; at += CHUNK_BYTES) {
        uint64_t left = length - at;
        *sums++ = value_sum(bytes + at, left < CHUNK_BYTES ? left : CHUNK_BYTES, seed, 0);
    }
}

/* Read and sum pieces that nobody has taken, until there is none. */
static void read_pieces(struct reading *file, char *scratch)
{
    while (atomic_load_explicit(&file->end, memory_order_relaxed) == (int64_t)file->length) {
        uint64_t at = atomic_fetch_add(&file->next, YC_PIECE), left = file->length - at;
        if (at >= file->length)
            return;
        uint64_t length = left < YC_PIECE ? left : YC_PIECE;
        char *to = file->kept ? file->bytes + at : scratch;
        if (!read_piece(file, to, at, length))
            return;
        sum_chunks(to, length, file->seed, file->sums + at / CHUNK_BYTES);
    }
}

static void *read_in_thread(void *argument)
{
    struct reading *file = argument;
    read_pieces(file, file->kept ? NULL : file->bytes + YC_PIECE);
    return NULL;
}

/* The helper thread, if there is one, may come late: then this one reads most pieces, or all. */
int64_t yc_read_chunks(int fd, uint64_t start_at, void *bytes, bool kept, uint64_t length, uint64_t seed,
                       uint64_t *sums)
{
    struct reading file = {.fd = fd,
                           .kept = kept,
                           .bytes = bytes,
                           .start = start_at,
                           .length = length,
                           .seed = seed,
                           .sums = sums,
                           .end = (int64_t)length};
    pthread_t helper;
    bool helped = length >= ONE_THREAD && start(&helper, read_in_thread, &file);
    read_pieces(&file, file.bytes);
    if (helped)
        pthread_join(helper, NULL);
    return file.end;
}

/* Sum the chunks of a value that lies in parts: those within one at once, others piece by piece. */
static void *sum_in_thread(void *argument)
{
    struct summing *value = argument;
    uint64_t left = CHUNK_BYTES, *sums = value->sums; /* left: of the one that is summed piece by piece */
    XXH3_state_t state;
    XXH3_INITSTATE(&state);
    for (size_t i = 0; i < value->count; i++) {
        const char *bytes = value->parts[i].bytes;
        uint64_t length = value->parts[i].length;
        while (length) {
            if (left == CHUNK_BYTES && length >= CHUNK_BYTES) {
                uint64_t whole = length - length % CHUNK_BYTES;
                sum_chunks(bytes, whole, value->seed, sums);
                sums += whole / CHUNK_BYTES;
                bytes += whole;
                length -= whole;
                continue;
            }
            uint64_t more = length < left ? length : left;
            if (left == CHUNK_BYTES)
                XXH3_64bits_reset_withSeed(&state, value->seed);
            update(&state, bytes, more);
            bytes += more;
            length -= more;
            left -= more;
            if (!left) {
                *sums++ = XXH3_64bits_digest(&state);
                left = CHUNK_BYTES;
            }
        }
    }
    if (left != CHUNK_BYTES)
        *sums = XXH3_64bits_digest(&state);
    return NULL;
}

static int write_parts(int fd, const struct yc_part *parts, size_t count)
{
    uint64_t offset = 0;
    int error = 0;
    for (size_t i = 0; i < count && !error; i++) {
        struct iovec vector = {(void *)(uintptr_t)parts[i].bytes, parts[i].length};
        error = vector.iov_len ? write_all(fd, &vector, 1, offset) : 0;
        offset += parts[i].length;
    }
    return error;
}

int yc_write_file(int fd, const struct yc_part *parts, size_t count, uint64_t seed, uint64_t *sums)
{
    struct summing value = {.parts = parts, .count = count, .seed = seed, .sums = sums};
    uint64_t length = 0;
    for (size_t i = 0; i < count; i++)
        length += parts[i].length;
    pthread_t thread;
    int error = 0;
    bool started = length >= ONE_THREAD && start(&thread, sum_in_thread, &value);
#ifdef __linux__
    /* Allocating all at once costs much less than page by page; only a full volume is a failure. */
    if (fallocate(fd, 0, 0, (off_t)length) && errno == ENOSPC)
        error = -ENOSPC;
#endif
    if (!error)
        error = write_parts(fd, parts, count);
    if (started)
        pthread_join(thread, NULL);
    else
        sum_in_thread(&value);
    return error;
}

/* -- for tests ---------------------------------------------------------------------------- */

void yc_digest(const void *key, uint64_t length, uint64_t seed, uint64_t *digest)
{
    struct digest made = digest_of(key, length, seed);
    digest[0] = made.low;
    digest[1] = made.high;
}

uint64_t yc_value_sum(const void *payload, uint64_t length, uint64_t low, uint32_t flags)
{
    return value_sum(payload, length, low, flags);
}

/* The contract is in core.h; what is done, and why, in index.py and store.py. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "core.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <sys/uio.h>
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

/* As in format.py. */
#define PARTITIONS 64u
#define CAPACITY_MASK 0xFFFFFFu
#define DESCRIPTOR_BITS 24
#define MASK32 0xFFFFFFFFu
#define SLOT_WORDS 8u
#define ENTRY_WORDS 8u
#define HEADER_WORDS 512u
#define EMPTY 0u
#define REMOVED 1u
#define FLAG_LARGE 0x10u
#define ACTIVE ((uint64_t)1 << 32)
#define RECORD_BYTES 64u
#define RECORD_FIXED 56u
#define RECORD_PUT 1u
#define ALIGN 16u
#define BUSY_CHANGING 0x474e49474e414843u

enum { W_SUPERSEDED = 11, W_CLOCK = 12, W_EPOCH = 15, W_LIVE_BYTES = 19, W_WRITTEN = 22, W_SETS = 26,
       W_BUSY = 40, W_PARTITIONS = 64, W_COUNTS = 128, W_DELETED = 192 };
enum { J_PARTITION = W_BUSY + 1, J_SLOT, J_LIVE_A, J_WAS_A, J_LIVE_B, J_WAS_B, J_IMAGE };
enum { S_LOW, S_HIGH, S_PLACE, S_LENGTHS, S_SUM, S_STAMP, S_EXPIRES, S_ACCESS };
enum { T_LIVE = 2 };

/* As in eviction.py. */
#define COUNT_SHIFT 44
#define COUNT_MAX 0xFFFFFu

#define UNSURE UINT64_MAX /* the index is not as a plain case has it: the ordinary path sorts it out */
#define SEARCHES 16       /* of a partition that is replaced again and again meanwhile */

_Static_assert(YC_HEAD_BYTES >= RECORD_BYTES + YC_MAX_NAMES && YC_HEAD_BYTES % ALIGN == 0, "heads fit");

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

/* Released, so that neither the compiler nor another processor puts it before an earlier one. */
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
    return (struct digest){__builtin_bswap64(hash.high64) | 2, __builtin_bswap64(hash.low64)};
}

static uint64_t value_sum(const void *payload, uint64_t length, uint64_t low, uint32_t flags)
{
#ifdef YC_AVX2
    if (length > 240 && __builtin_cpu_supports("avx2"))
        return yc_xxh3_avx2(payload, length, low ^ flags);
#endif
    return XXH3_64bits_withSeed(payload, length, low ^ flags);
}

static bool usable(const struct yc_view *view)
{
    return view->words >= HEADER_WORDS && view->table_capacity &&
           view->table_word + view->table_capacity * ENTRY_WORDS <= view->words;
}

/* A stamp above all that were given out. */
static uint64_t new_stamp(const struct yc_view *view, uint64_t now)
{
    _Atomic uint64_t *clock = (_Atomic uint64_t *)view->map + W_CLOCK;
    uint64_t last = atomic_load_explicit(clock, memory_order_relaxed), stamp;
    do
        stamp = now > last ? now : last + 1;
    while (!atomic_compare_exchange_weak(clock, &last, stamp));
    return stamp;
}

/* An access word after a hit. */
static uint64_t touched(int32_t touch, uint64_t word, uint64_t stamp)
{
    uint64_t count = word >> COUNT_SHIFT;
    if (touch != YC_TOUCH_FREQUENT)
        return stamp;
    count = count < COUNT_MAX ? count + 1 : COUNT_MAX;
    return count << COUNT_SHIFT | stamp >> (64 - COUNT_SHIFT);
}

/* False if the partition does not lie within the mapping. */
static bool partition_of(const struct yc_view *view, uint64_t high, struct partition *part)
{
    part->descriptor = load(view->map, W_PARTITIONS + high % PARTITIONS);
    part->capacity = part->descriptor & CAPACITY_MASK;
    part->base = (part->descriptor >> DESCRIPTOR_BITS) * SLOT_WORDS;
    part->end = part->base + part->capacity * SLOT_WORDS;
    return part->end <= view->words && (part->capacity || !part->descriptor);
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

/* -- get ---------------------------------------------------------------------------------- */

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
    uint64_t place = load(view->map, at + S_PLACE), lengths = load(view->map, at + S_LENGTHS);
    uint64_t expires = load(view->map, at + S_EXPIRES);
    if (expires && expires <= now) {
        bool same = load(view->map, at + S_LOW) == digest.low && load(view->map, at + S_HIGH) == digest.high;
        return same ? YC_MISS : YC_OTHER;
    }
    uint64_t segment = place >> 32, file = load(view->files, segment % view->table_capacity);
    *found = (struct yc_found){
        .at = at,
        .low = digest.low,
        .high = digest.high,
        .value_sum = load(view->map, at + S_SUM),
        .offset = ((place & MASK32) + (lengths & 0xFFFF)) * ALIGN,
        .length = lengths >> 24,
        .flags = lengths >> 16 & 0xFF,
        .fd = (int)((file & MASK32) - 1),
    };
    bool open = file >> 32 == segment && file & MASK32;
    return open && !(found->flags & FLAG_LARGE) && found->length <= YC_MAX_VALUE ? YC_FOUND : YC_OTHER;
}

bool yc_read(const struct yc_found *found, void *value)
{
    ssize_t done = pread(found->fd, value, found->length, (off_t)found->offset);
    return done >= 0 && (uint64_t)done == found->length;
}

int yc_read_nowait(const struct yc_found *found, void *value)
{
#if defined SYS_preadv2 && defined RWF_NOWAIT
    /* Not every C library has it. The kernel takes the offset in two halves. */
    struct iovec vector = {value, found->length};
    long done = syscall(SYS_preadv2, found->fd, &vector, 1L, (long)found->offset,
                        (long)(found->offset >> 32), (long)RWF_NOWAIT);
    if (done < 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL))
        return -errno;
    return done >= 0 && (uint64_t)done == found->length;
#else
    (void)found, (void)value;
    return -ENOSYS;
#endif
}

static bool is_right(const struct yc_found *found, const void *value)
{
    return value_sum(value, found->length, found->low, found->flags) == found->value_sum;
}

static void note_use(const struct yc_view *view, uint64_t at, uint64_t now)
{
    if (view->touch != YC_TOUCH_NONE) {
        uint64_t access = load(view->map, at + S_ACCESS);
        store(view->map, at + S_ACCESS, touched(view->touch, access, new_stamp(view, now)));
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
    if (!usable(view) || !is_right(found, value))
        return false;
    uint64_t at = find(view, (struct digest){found->low, found->high});
    if (at && at != UNSURE)
        note_use(view, at, now);
    return true;
}

/* -- put ---------------------------------------------------------------------------------- */

/* Write all of the vectors, which it uses up. 0 or a negative errno. */
static int write_all(int fd, struct iovec *vector, int count, uint64_t offset)
{
    while (count) {
        ssize_t done = pwritev(fd, vector, count, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
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
    memcpy(*to, from, length);
    *to += length;
}

/* Header, key, tag and meta as format.pack_record() makes them. Their bytes, padding included. */
static uint64_t pack_head(const struct yc_view *view, struct yc_record *record, const struct yc_entry *entry)
{
    uint64_t names_length = (uint64_t)entry->key_length + entry->tag_length + entry->meta_length;
    uint64_t bytes = aligned(RECORD_BYTES + names_length);
    uint8_t kind[2] = {RECORD_PUT, (uint8_t)entry->flags};
    uint16_t tag_length = (uint16_t)entry->tag_length;
    uint64_t offset = (record->slot[S_PLACE] & MASK32) * ALIGN;
    uint32_t kept = 0; /* of the payload, in the footer */
    char *head = record->listed + YC_LISTED_BYTES;
    memcpy(record->listed, &offset, 8);
    memcpy(record->listed + 8, &kept, 4);
    /* First where the checksum is taken: the fields right before the names. */
    char *fixed = head + RECORD_BYTES - RECORD_FIXED, *to = fixed;
    put_bytes(&to, "YREC", 4);
    put_bytes(&to, kind, 2);
    put_bytes(&to, &tag_length, 2);
    put_bytes(&to, &entry->key_length, 4);
    put_bytes(&to, &entry->meta_length, 4);
    put_bytes(&to, &entry->length, 8);
    put_bytes(&to, &record->slot[S_STAMP], 8);
    put_bytes(&to, &entry->expires, 8);
    put_bytes(&to, &record->slot[S_STAMP], 8); /* created */
    put_bytes(&to, &record->slot[S_SUM], 8);
    put_bytes(&to, entry->key, entry->key_length);
    put_bytes(&to, entry->tag, entry->tag_length);
    put_bytes(&to, entry->meta, entry->meta_length);
    memset(to, 0, (size_t)(head + bytes - to));
    uint64_t sum = __builtin_bswap64(
        XXH3_64bits_withSeed(fixed, RECORD_FIXED + names_length, view->seed ^ record->slot[S_PLACE]));
    memmove(head, fixed, RECORD_FIXED);
    memcpy(head + RECORD_FIXED, &sum, 8);
    return bytes;
}

/* Bytes that the record of a slot takes; the payload of a large value's is a pointer. */
static uint64_t record_bytes(uint64_t lengths)
{
    uint64_t payload = lengths >> 16 & FLAG_LARGE ? 8 : lengths >> 24;
    return (lengths & 0xFFFF) * ALIGN + aligned(payload);
}

static uint64_t live_word(const struct yc_view *view, uint64_t place)
{
    return view->table_word + (place >> 32) % view->table_capacity * ENTRY_WORDS + T_LIVE;
}

/* Where a new entry of the partition goes, or UNSURE if the partition has to grow first. */
static uint64_t free_slot(const struct yc_view *view, struct digest key)
{
    struct partition part;
    if (!partition_of(view, key.high, &part))
        return UNSURE;
    uint64_t used = load(view->map, W_COUNTS + key.high % PARTITIONS) & MASK32;
    if ((used + 1) * 4 > part.capacity * 3)
        return UNSURE;
    uint64_t at = part.base + key.low % part.capacity * SLOT_WORDS;
    for (uint64_t i = 0; i < part.capacity; i++) {
        if (load(view->map, at + S_LOW) <= REMOVED)
            return at;
        at += SLOT_WORDS;
        if (at == part.end)
            at = part.base;
    }
    return UNSURE;
}

/* One store to the index; none if the test that this is has "killed" the process before. */
static void change(const struct yc_view *view, struct yc_record *record, uint64_t at, uint64_t value)
{
    if (record->stop_after) {
        if (record->stop_after > 0)
            record->stop_after--;
        store(view->map, at, value);
    }
}

/* Index.put(): the slot shows the record. In the same order, with the same undo journal. */
static void put_slot(const struct yc_view *view, struct yc_record *record, uint64_t at, bool fresh)
{
    const void *map = view->map;
    uint64_t part = record->slot[S_HIGH] % PARTITIONS, size = record_bytes(record->slot[S_LENGTHS]);
    uint64_t old_size = record_bytes(load(map, at + S_LENGTHS)), was = load(map, at + S_LOW);
    uint64_t new_live = live_word(view, record->slot[S_PLACE]);
    uint64_t old_live = fresh ? new_live : live_word(view, load(map, at + S_PLACE));

    change(view, record, J_PARTITION, part);
    change(view, record, J_SLOT, at);
    change(view, record, J_LIVE_A, new_live);
    change(view, record, J_WAS_A, load(map, new_live));
    change(view, record, J_LIVE_B, old_live);
    change(view, record, J_WAS_B, load(map, old_live));
    for (uint64_t i = 0; i < SLOT_WORDS; i++)
        change(view, record, J_IMAGE + i, load(map, at + i));
    change(view, record, W_BUSY, BUSY_CHANGING);

    for (uint64_t i = S_PLACE; i < SLOT_WORDS; i++)
        change(view, record, at + i, record->slot[i]);
    if (fresh) {
        uint64_t counts = load(map, W_COUNTS + part);
        change(view, record, W_COUNTS + part, counts + ((uint64_t)1 << 32) + (was == EMPTY));
        change(view, record, at + S_HIGH, record->slot[S_HIGH]);
        change(view, record, at + S_LOW, record->slot[S_LOW]);
    } else {
        change(view, record, old_live, load(map, old_live) - old_size);
        change(view, record, W_LIVE_BYTES, load(map, W_LIVE_BYTES) - old_size);
    }
    change(view, record, new_live, load(map, new_live) + size);
    change(view, record, W_LIVE_BYTES, load(map, W_LIVE_BYTES) + size);
    change(view, record, W_BUSY, 0);

    change(view, record, W_WRITTEN, load(map, W_WRITTEN) + 1);
    change(view, record, W_SETS, load(map, W_SETS) + 1);
}

/* Store._install() where nothing stands in the way; false leaves the index as it is. */
static bool install(const struct yc_view *view, struct yc_record *record)
{
    const void *map = view->map;
    struct digest key = {record->slot[S_LOW], record->slot[S_HIGH]};
    uint64_t segment = record->slot[S_PLACE] >> 32;
    uint64_t entry = view->table_word + segment % view->table_capacity * ENTRY_WORDS;
    if (load(map, W_BUSY) || load(map, W_SUPERSEDED) || load(map, W_EPOCH) != record->epoch ||
        record->slot[S_STAMP] <= record->epoch ||
        record->slot[S_STAMP] <= record->epoch || load(map, entry) != (ACTIVE | segment))
        return false;
    uint64_t at = find(view, key);
    bool fresh = !at;
    if (fresh) {
        if (load(map, W_DELETED + key.high % PARTITIONS) >= record->slot[S_STAMP])
            return false;
        at = free_slot(view, key);
    }
    if (at == UNSURE)
        return false;
    if (!fresh) {
        uint64_t lengths = load(map, at + S_LENGTHS);
        if (load(map, at + S_STAMP) >= record->slot[S_STAMP] || lengths >> 16 & FLAG_LARGE)
            return false;
        uint64_t size = record_bytes(lengths);
        if (load(map, live_word(view, load(map, at + S_PLACE))) < size || load(map, W_LIVE_BYTES) < size)
            return false;
    }
    put_slot(view, record, at, fresh);
    return true;
}

int yc_put(const struct yc_view *view, const struct yc_entry *entry, const struct yc_end *end, uint64_t now,
           struct yc_record *record)
{
    static const char padding[ALIGN];
    if (!usable(view) || (uint64_t)entry->key_length + entry->tag_length + entry->meta_length > YC_MAX_NAMES ||
        entry->length > YC_MAX_VALUE || entry->flags > 0xFF || entry->flags & FLAG_LARGE ||
        end->segment > MASK32 || end->offset % ALIGN || end->offset / ALIGN > MASK32)
        return YC_OTHER;
    struct digest key = digest_of(entry->key, entry->key_length, view->seed);
    uint64_t stamp, *slot = record->slot;
    record->epoch = load(view->map, W_EPOCH);
    stamp = new_stamp(view, now);
    slot[S_LOW] = key.low;
    slot[S_HIGH] = key.high;
    slot[S_PLACE] = end->segment << 32 | end->offset / ALIGN;
    slot[S_SUM] = value_sum(entry->payload, entry->length, key.low, entry->flags);
    slot[S_STAMP] = stamp;
    slot[S_EXPIRES] = entry->expires;
    slot[S_ACCESS] = touched(view->first, 0, stamp);
    record->head_bytes = pack_head(view, record, entry);
    record->listed_bytes = YC_LISTED_BYTES + RECORD_BYTES + entry->key_length + entry->tag_length;
    slot[S_LENGTHS] = entry->length << 24 | (uint64_t)entry->flags << 16 | record->head_bytes / ALIGN;

    struct iovec vector[3] = {{record->listed + YC_LISTED_BYTES, record->head_bytes},
                              {(void *)(uintptr_t)entry->payload, entry->length},
                              {(void *)(uintptr_t)padding, aligned(entry->length) - entry->length}};
    record->error = write_all(end->fd, vector, 3, end->offset);
    if (record->error)
        return YC_FAILED;
    /* A signal may end the waiting: its handler runs in Python, which then waits on. */
    if (flock(end->lock_fd, LOCK_EX))
        return YC_APPENDED;
    bool installed = install(view, record);
    flock(end->lock_fd, LOCK_UN);
    return installed ? YC_INSTALLED : YC_APPENDED;
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

/* Calls the functions of core.h and walk.h with damaged indexes, for as long as it is told to: ci/fuzz builds it with the
 * sanitizers. Some words of a sound index take extreme values, or are noise; in some rounds another thread goes on
 * changing them; and footers and records are damaged. What must hold: nothing outside of the mapping is touched, no memory is asked for that no file can
 * fill, no file grows without bound, every call comes to its end.
 *
 * Usage: fuzz SECONDS SEED. It says which seed a round had, which then is the only one: fuzz 0 SEED. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "core.h"
#include "walk.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { TABLE = 8, CAPACITY = 8, KEYS = 64, ROUNDS = 16 };
#define HEADER_WORDS (HEADER_BYTES / 8)
#define FIRST_SLOT (HEADER_WORDS + TABLE * ENTRY_WORDS)
#define WORDS (FIRST_SLOT + 3 * PARTITIONS * CAPACITY * SLOT_WORDS) /* two thirds are for tag tables */
#define SEGMENT 1u
#define CHANGES 2u
#define FILE_BYTES ((uint64_t)1 << 16)
#define OWNER 77u
#define MOST ((uint64_t)1 << 24) /* bytes that a file may have come to after a round */

static uint64_t state;

/* xorshift64*: the same numbers everywhere. */
static uint64_t number(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717u;
}

static uint64_t below(uint64_t end)
{
    return number() % end;
}

static uint64_t wild(uint64_t value)
{
    static const uint64_t extremes[] =
        {0,         1,          2,          63,         64,         0xFFFFFF,         1u << 24,
         1u << 31,  UINT32_MAX, 1ull << 40, 1ull << 56, 1ull << 62, (1ull << 63) - 1, 1ull << 63,
         UINT64_MAX};
    switch (below(4)) {
    case 0:
        return extremes[below(sizeof extremes / sizeof *extremes)];
    case 1:
        return value ^ 1ull << below(64);
    case 2:
        return value + below(5) - 2;
    default:
        return number();
    }
}

static void die(const char *what)
{
    fprintf(stderr, "fuzz: %s (%s)\n", what, strerror(errno));
    abort();
}

static int file(char *path)
{
    int fd = mkstemp(path);
    if (fd < 0)
        die("cannot make a file");
    return fd;
}

struct cache {
    _Atomic uint64_t *words;
    uint64_t files[TABLE];
    int index, lock, segment, changes;
    int64_t looked;
    struct yc_view view;
    atomic_bool stop;
    uint64_t seed;
};

static void set_word(struct cache *cache, uint64_t at, uint64_t value)
{
    atomic_store_explicit(&cache->words[at], value, memory_order_relaxed);
}

/* A sound index without entries, one segment and one log. */
static void begin(struct cache *cache)
{
    for (uint64_t at = 0; at < WORDS; at++)
        set_word(cache, at, 0);
    set_word(cache, W_CLOCK, 1000);
    set_word(cache, W_LOG, CHANGES);
    set_word(cache, W_ACTIVE, 1);
    set_word(cache, W_EVICTION, 1 + below(4));
    for (uint64_t part = 0; part < PARTITIONS; part++) {
        set_word(cache, W_PARTITIONS + part,
                 (FIRST_SLOT / SLOT_WORDS + part * CAPACITY) << DESCRIPTOR_BITS | CAPACITY);
        set_word(cache, W_TAGS + part, UNTAGGED);
    }
    for (uint64_t segment = SEGMENT; segment <= CHANGES; segment++) {
        uint64_t entry = HEADER_WORDS + segment * ENTRY_WORDS;
        set_word(cache, entry + T_STATE, (segment == CHANGES ? LOG : ACTIVE) | segment);
        set_word(cache, entry + T_SIZE, FILE_BYTES);
        set_word(cache, entry + T_OWNER, OWNER);
        set_word(cache, entry + T_TAIL, SEGMENT_HEADER_BYTES);
    }
    cache->files[SEGMENT] = (uint64_t)SEGMENT << 32 | (uint64_t)(cache->segment + 1);
    cache->files[CHANGES] = (uint64_t)CHANGES << 32 | (uint64_t)(cache->changes + 1);
    if (ftruncate(cache->segment, FILE_BYTES) || ftruncate(cache->changes, FILE_BYTES))
        die("cannot set a length");
}

static void damage(struct cache *cache)
{
    for (uint64_t left = 1 + below(4); left; left--) {
        uint64_t at = below(2) ? below(FIRST_SLOT) : below(WORDS);
        if (below(8)) {
            set_word(cache, at, wild(cache->words[at]));
        } else { /* a block */
            uint64_t bytes = below(2) ? 512 : 4096, first = at * 8 / bytes * bytes / 8;
            for (uint64_t i = first; i < first + bytes / 8 && i < WORDS; i++)
                set_word(cache, i, below(2) ? 0 : number());
        }
    }
}

static void *scribble(void *argument)
{
    struct cache *cache = argument;
    uint64_t own = cache->seed | 1;
    while (!atomic_load(&cache->stop)) {
        own = own * 6364136223846793005u + 1442695040888963407u;
        set_word(cache, (own >> 33) % WORDS, own & 1 ? own : own >> 60);
    }
    return NULL;
}

static void look(struct cache *cache, const char *key, uint64_t length)
{
    struct yc_found found;
    struct stat status;
    if (yc_find(&cache->view, key, length, 2000, &found) != YC_FOUND)
        return;
    if (fstat(found.fd, &status))
        die("a descriptor that is none of ours");
    if (found.length > (1u << 20) && atomic_load(&cache->stop) && found.length > (uint64_t)status.st_size)
        die("a value that its file cannot hold");
    char *value = malloc(found.length ? found.length : 1);
    if (!value)
        die("no memory");
    const char *meta;
    char head[YC_READ_BYTES];
    if (yc_read(&found, head, value)) {
        (void)yc_meta(&cache->view, &found, head, &meta);
        (void)yc_verify(&cache->view, &found, value, 2000);
        (void)yc_verify_late(&cache->view, &found, value, 2000);
    }
    (void)yc_read_nowait(&found, head, value);
    yc_prefetch(&found);
    free(value);
}

/* True if a key has no entry, and nobody else changes anything. */
static bool is_missed(struct cache *cache, const char *key, uint64_t length)
{
    struct yc_found found;
    return atomic_load(&cache->stop) && yc_find(&cache->view, key, length, 2000, &found) == YC_MISS;
}

/* Some bytes of a segment, of a length that the sanitizer sees, with a few of them damaged. */
static char *damaged(const char *data, uint64_t length)
{
    char *bytes = malloc(length ? length : 1);
    if (!bytes)
        die("no memory");
    memcpy(bytes, data, length);
    for (uint64_t left = below(4); left && length; left--) {
        uint64_t at = below(length);
        bytes[at] = (char)(below(2) ? bytes[at] ^ 1 << below(8) : (int)number());
    }
    return bytes;
}

typedef int64_t walk_step(const struct yc_view *, const struct yc_walk *, uint64_t *, uint64_t *,
                          struct yc_shown *, uint64_t);

static void walk(struct cache *cache, walk_step *go, const char *data, uint64_t length, uint64_t base,
                 uint64_t at)
{
    struct yc_shown found[7];
    char *bytes = damaged(data, length);
    struct yc_walk walk = {bytes, length, base, SEGMENT, "sk1", below(4), below(2) ? UINT64_MAX : 1700};
    volatile char touched = 0;
    for (uint64_t count = 0, before = UINT64_MAX; at < length && at != before;) {
        before = at;
        int64_t shown = go(&cache->view, &walk, &at, &count, found, 7);
        if (shown > 7 || (shown < 0 && shown != YC_OTHER) || at < before)
            die("a walk that goes nowhere");
        for (int64_t i = 0; i < shown; i++)
            for (uint64_t byte = 0; byte < found[i].key_length; byte++)
                touched ^= found[i].key[byte];
        if (shown < 0)
            break;
    }
    free(bytes);
}

static void walk_both(struct cache *cache, const char *listed, uint64_t listed_bytes)
{
    static char data[FILE_BYTES];
    uint64_t length = below(FILE_BYTES);
    if (pread(cache->segment, data, length, 0) != (ssize_t)length)
        die("cannot read the segment");
    walk(cache, yc_walk_records, data, length, 0, SEGMENT_HEADER_BYTES);
    walk(cache, yc_walk_footer, listed, listed_bytes, FILE_BYTES, 0);
}

static void use(struct cache *cache)
{
    static char payload[4096], records[64 << 10], listed[8 << 10];
    uint64_t listed_bytes = 0;
    uint64_t tail = SEGMENT_HEADER_BYTES, slots[4 * SLOT_WORDS];
    for (int step = 0; step < 40; step++) {
        char key[16];
        struct yc_record record = {.stop_after = -1, .owner = OWNER};
        int length = snprintf(key, sizeof key, "sk%d", (int)below(KEYS)), error = 0;
        uint32_t hashes[] = {0, (uint32_t)number(), 5, UINT32_MAX};
        struct yc_entry entry = {.key = key,
                                 .tag = "stag",
                                 .tag_length = (uint32_t)below(5),
                                 .payload = payload,
                                 .key_length = (uint32_t)length,
                                 .length = below(600),
                                 .expires = below(4) ? 0 : number()};
        struct yc_end end = {cache->segment, cache->lock, SEGMENT, tail},
                      log = {cache->changes, cache->lock, CHANGES, 0};
        switch (below(5)) {
        case 0:
            switch (yc_put(&cache->view, &entry, &end, 1500 + below(900), &record)) {
            case YC_INSTALLED:
                if (!entry.expires && is_missed(cache, key, (uint64_t)length))
                    die("what was stored is not found");
                /* fall through */
            case YC_APPENDED:
                tail += yc_record_bytes(&entry);
                if (listed_bytes + record.listed_bytes <= sizeof listed) {
                    memcpy(listed + listed_bytes, record.listed, record.listed_bytes);
                    listed_bytes += record.listed_bytes;
                }
            }
            break;
        case 1:
            (void)yc_remove(&cache->view, key, (uint64_t)length, &log, &end, 1500 + below(900), &record);
            break;
        case 2: {
            struct yc_entry entries[] = {entry, entry, entry, entry};
            uint64_t epoch = yc_epoch(&cache->view);
            if (!yc_append_many(&cache->view, entries, 4, &end, 1700, records, slots, &error)) {
                tail += yc_batch_bytes(entries, 4);
                (void)yc_install_many(&cache->view, slots, below(2) ? hashes : NULL, 4, epoch, OWNER);
            }
            break;
        }
        case 3:
            (void)yc_renew_tags(&cache->view, below(PARTITIONS + 1), 1500 + below(900));
            break;
        default:
            look(cache, key, (uint64_t)length);
        }
        if (tail > FILE_BYTES - 8192)
            tail = SEGMENT_HEADER_BYTES;
    }
    walk_both(cache, listed, listed_bytes);
}

static void check_files(struct cache *cache)
{
    struct stat status;
    int files[] = {cache->segment, cache->changes};
    for (int i = 0; i < 2; i++)
        if (fstat(files[i], &status) || (uint64_t)status.st_blocks * 512 > MOST)
            die("a file grew without bound");
}

static void run(struct cache *cache, uint64_t seed)
{
    pthread_t thread;
    cache->seed = state = seed | 1;
    begin(cache);
    use(cache);
    bool scribbled = below(8) == 0;
    atomic_store(&cache->stop, !scribbled);
    if (scribbled && pthread_create(&thread, NULL, scribble, cache))
        die("no thread");
    for (int round = 0; round < ROUNDS; round++) {
        damage(cache);
        alarm(60); /* whatever does not end ends the process */
        use(cache);
    }
    atomic_store(&cache->stop, true);
    if (scribbled)
        pthread_join(thread, NULL);
    check_files(cache);
}

int main(int count, char **arguments)
{
    char index[] = "yatagarasu-fuzz-XXXXXX", lock[] = "yatagarasu-fuzz-XXXXXX";
    char segment[] = "yatagarasu-fuzz-XXXXXX", changes[] = "yatagarasu-fuzz-XXXXXX";
    struct cache cache = {.index = file(index),
                          .lock = file(lock),
                          .segment = file(segment),
                          .changes = file(changes)};
    unlink(segment);
    unlink(changes);
    long seconds = count > 1 ? atol(arguments[1]) : 10;
    uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 0) : 1, rounds = 0;
    cache.words = malloc(WORDS * 8); /* not mapped: the sanitizer sees where it ends */
    if (!cache.words)
        die("no memory");
    cache.view = (struct yc_view){.map = (void *)cache.words,
                                  .words = WORDS,
                                  .table_word = HEADER_WORDS,
                                  .table_capacity = TABLE,
                                  .seed = 7,
                                  .files = cache.files,
                                  .writable = true,
                                  .fd = cache.index,
                                  .path = index,
                                  .lock_path = lock,
                                  .looked = &cache.looked};
    time_t until = time(NULL) + seconds;
    do {
        printf("fuzz: seed %llu\n", (unsigned long long)seed), fflush(stdout);
        run(&cache, seed++ * 0x9E3779B97F4A7C15u);
        rounds++;
    } while (time(NULL) < until);
    printf("fuzz: %llu rounds, no complaint\n", (unsigned long long)rounds);
    unlink(index);
    unlink(lock);
    free((void *)cache.words);
    return 0;
}

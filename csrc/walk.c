/* The contract is in walk.h. What is done, and why, stands in store/segment.py and store/walks.py. */

#include "walk.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define MAGIC_BYTES 4

/* The fixed fields of a record that a walk needs. */
struct head {
    uint64_t key_length, tag_length, meta_length, value_length, stamp;
    uint8_t kind, flags;
};

static uint64_t aligned(uint64_t length)
{
    return (length + ALIGN - 1) & ~(uint64_t)(ALIGN - 1);
}

static uint64_t names_bytes(const struct head *head)
{
    return head->key_length + head->tag_length + head->meta_length;
}

static uint64_t head_bytes(const struct head *head)
{
    return aligned(RECORD_BYTES + names_bytes(head));
}

/* Bytes of a record. */
static uint64_t record_bytes(const struct head *head)
{
    uint64_t length = head->value_length;
    return head_bytes(head) + aligned(head->kind == LARGE ? yc_large_payload(length) : length);
}

/* Bytes of its payload that a walk needs, and a footer lists. */
static uint64_t listed_bytes(const struct head *head)
{
    return head->kind == LARGE ? LARGE_POINTER_SIZE : 0;
}

/* format.unpack_head() of `left` bytes; false also for kinds that are not in segments. */
static bool unpack_head(const char *data, uint64_t left, struct head *head)
{
    uint16_t tag_length;
    uint32_t key_length, meta_length;
    if (left < RECORD_BYTES || memcmp(data, RECORD_MAGIC, MAGIC_BYTES))
        return false;
    head->kind = (uint8_t)data[MAGIC_BYTES];
    head->flags = (uint8_t)data[MAGIC_BYTES + 1];
    memcpy(&tag_length, data + MAGIC_BYTES + 2, sizeof tag_length);
    memcpy(&key_length, data + RECORD_KEY_LENGTH, sizeof key_length);
    memcpy(&meta_length, data + RECORD_KEY_LENGTH + 4, sizeof meta_length);
    memcpy(&head->value_length, data + RECORD_KEY_LENGTH + 8, 8);
    memcpy(&head->stamp, data + RECORD_KEY_LENGTH + 16, 8);
    head->tag_length = tag_length;
    head->key_length = key_length;
    head->meta_length = meta_length;
    return (head->kind == PUT || head->kind == LARGE) && head_bytes(head) <= (uint64_t)HEAD_MASK * ALIGN &&
           head->value_length <= MAX_VALUE_BYTES && head->stamp <= LAST_STAMP &&
           !(head->flags & FLAG_LARGE) == (head->kind == PUT);
}

/* format.verify_head(): all of it is there. */
static bool verify_head(const char *data, const struct head *head, uint64_t seed, uint64_t place)
{
    char together[RECORD_SIZE + YC_MAX_NAMES];
    uint64_t names = names_bytes(head), sum, expected;
    const char *start = data + RECORD_BYTES;
    memcpy(&expected, data + RECORD_SIZE, 8);
    if (names <= YC_MAX_NAMES) {
        memcpy(together, data, RECORD_SIZE);
        memcpy(together + RECORD_SIZE, start, names);
        sum = XXH3_64bits_withSeed(together, RECORD_SIZE + names, seed ^ place);
    } else {
        XXH3_state_t state;
        XXH3_INITSTATE(&state);
        XXH3_64bits_reset_withSeed(&state, seed ^ place);
        XXH3_64bits_update(&state, data, RECORD_SIZE);
        XXH3_64bits_update(&state, start, names);
        sum = XXH3_64bits_digest(&state);
    }
    return __builtin_bswap64(sum) == expected;
}

/* Look whether the record at `place` is one that is looked for, and shown: YC_FOUND, YC_MISS or YC_OTHER. */
static int look(const struct yc_view *view, const struct yc_walk *walk, const struct head *head,
                const char *key, uint64_t place, struct yc_shown *found)
{
    if (head->stamp > walk->before || head->key_length < walk->prefix_length ||
        (walk->prefix_length && memcmp(key, walk->prefix, walk->prefix_length)))
        return YC_MISS;
    found->key = key;
    found->key_length = head->key_length;
    return yc_shows(view, key, head->key_length, place, found->slot);
}

static uint64_t place_of(const struct yc_walk *walk, uint64_t offset)
{
    return walk->segment << 32 | offset / ALIGN;
}

int64_t yc_walk_footer(const struct yc_view *view, const struct yc_walk *walk, uint64_t *at, uint64_t *count,
                       struct yc_shown *found, uint64_t most)
{
    uint64_t shown = 0;
    while (*at < walk->length && shown < most) {
        const char *entry = walk->data + *at, *data = entry + FOOTER_ENTRY_SIZE;
        uint64_t left = walk->length - *at, offset;
        uint32_t kept;
        struct head head;
        if (left < FOOTER_ENTRY_SIZE)
            return YC_OTHER;
        memcpy(&offset, entry, 8);
        memcpy(&kept, entry + 8, 4);
        if (!unpack_head(data, left - FOOTER_ENTRY_SIZE, &head) || kept != listed_bytes(&head))
            return YC_OTHER;
        uint64_t bytes = FOOTER_ENTRY_SIZE + RECORD_BYTES + head.key_length + head.tag_length + kept;
        uint64_t record = record_bytes(&head);
        if (bytes > left || offset % ALIGN || offset < SEGMENT_HEADER_BYTES || record > walk->base ||
            offset > walk->base - record)
            return YC_OTHER;
        int status = look(view, walk, &head, data + RECORD_BYTES, place_of(walk, offset), &found[shown]);
        if (status == YC_OTHER)
            return YC_OTHER;
        shown += status == YC_FOUND;
        *at += bytes;
        ++*count;
    }
    return (int64_t)shown;
}

int64_t yc_walk_records(const struct yc_view *view, const struct yc_walk *walk, uint64_t *at, uint64_t *count,
                        struct yc_shown *found, uint64_t most)
{
    uint64_t shown = 0;
    while (*at < walk->length && shown < most) {
        const char *data = walk->data + *at;
        uint64_t left = walk->length - *at, place = place_of(walk, walk->base + *at);
        struct head head;
        if (!unpack_head(data, left, &head) || RECORD_BYTES + names_bytes(&head) > left ||
            (head.kind == LARGE && head_bytes(&head) + listed_bytes(&head) > left) ||
            !verify_head(data, &head, view->seed, place))
            break;
        int status = look(view, walk, &head, data + RECORD_BYTES, place, &found[shown]);
        if (status == YC_OTHER)
            return YC_OTHER;
        shown += status == YC_FOUND;
        *at += record_bytes(&head);
        ++*count;
    }
    return (int64_t)shown;
}

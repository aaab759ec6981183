/* Walks over the records of a segment, as store/walks.py does them: which of them does the index show? */
#ifndef YATAGARASU_WALK_H
#define YATAGARASU_WALK_H

#include "core.h"

/* Bytes that were read of a segment, and what is looked for in them. */
struct yc_walk {
    const char *data;
    uint64_t length, base; /* where in the segment the data begins; of a footer: where its records end */
    uint64_t segment;
    const char *prefix; /* of encoded keys */
    uint64_t prefix_length, before; /* stamps beyond this are left out */
};

/* An entry that is shown. */
struct yc_shown {
    const char *key; /* within the data */
    uint64_t key_length, slot[SLOT_WORDS];
};

/* Go through the entries of a footer, or records, that begin at *at in the data, until `most` were found: how many,
 * or YC_OTHER if something is not plain. *at and *count go on by what was looked at.
 *
 * Records: up to the first that is none, or that is not all there; *at may lie beyond the data in the end. */
int64_t yc_walk_footer(const struct yc_view *view, const struct yc_walk *walk, uint64_t *at, uint64_t *count,
                       struct yc_shown *found, uint64_t most);
int64_t yc_walk_records(const struct yc_view *view, const struct yc_walk *walk, uint64_t *at, uint64_t *count,
                        struct yc_shown *found, uint64_t most);

#endif

/* The core: get and put of plain entries over a mapped index and open segments.
 *
 * It does what index.py, store.py and format.py do, over the same files, for the cases that are
 * plain, and leaves all others to them. Rules that hold for every function of core.cdef.h:
 *
 * - The Python code is the specification. Whatever is not plain (a large value, growth, a segment
 *   that is not open, an index under repair or replaced, damage, an entry that fails its checksum)
 *   gives a status that sends the caller down the ordinary path, and has changed nothing but what
 *   the status says.
 * - Results are a length or a status; errno itself is not used.
 * - Nothing is global, nothing is allocated, nothing calls back.
 * - No address is taken from the mapped file on trust: it is shared, and may be damaged.
 * - yc_get() takes no lock and may run in many threads at once. Callers of yc_put() hold the
 *   thread locks of the store (`appending`, and that of the index); the lock file is locked here.
 */
#ifndef YATAGARASU_CORE_H
#define YATAGARASU_CORE_H

#include <stddef.h>
#include <stdint.h>

#include "core.cdef.h"

#endif

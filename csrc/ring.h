/* The ring: batches of file operations over io_uring, for one owner.
 *
 * Rules that hold for every function of ring.cdef.h:
 *
 * - Results are 0 or a count, or a negative errno; errno itself is not used.
 * - Nothing is global and nothing calls back: all state is in the struct yr_ring, all results
 *   go to arrays of the caller. No function takes a lock.
 * - A ring belongs to the thread that made it (SINGLE_ISSUER in force: -EPERM for any other), or
 *   to one thread at a time that the caller sees to. In the child of a fork it is of no use:
 *   -EPERM, but for yr_destroy().
 * - An operation is in flight from being queued until its completion was reaped. There are at
 *   most max_inflight of them; with max_inflight <= cq_entries the completion queue cannot overflow.
 * - Memory that an operation names (not the columns that name it) stays where it is, unread and
 *   unfreed, while the operation is in flight.
 * - A thread that ends with operations in flight cancels them (they complete with -ECANCELED,
 *   but nobody may be left to see it): drain first.
 * - Arguments are checked: NULL, an unknown operation or flag, a length above YR_MAX_IO, an index
 *   outside its table give -EINVAL and change nothing.
 */
#ifndef YATAGARASU_RING_H
#define YATAGARASU_RING_H

#include <stddef.h>
#include <stdint.h>

#include "ring.cdef.h"

#endif

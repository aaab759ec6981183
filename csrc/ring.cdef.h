/* The interface of the ring module. One file, read twice: by the C compiler (through ring.h,
 * which states the rules that hold for all of it) and by cffi. So: declarations only, no
 * preprocessor but integer constants. Addresses travel as uint64_t, because columns of
 * integers are cheap to make in Python and pointers are not. */

#define YR_ABI_VERSION 2

/* Largest transfer that one operation takes; batches cut longer ones. */
#define YR_MAX_IO 0x7ffff000

/* Operations, for yr_supports() and yr_inject(). */
#define YR_OP_NOP 0
#define YR_OP_READ 1
#define YR_OP_WRITE 2
#define YR_OP_FDATASYNC 3
#define YR_OP_MKDIRAT 4
#define YR_OP_RENAMEAT 5
#define YR_OP_UNLINKAT 6
#define YR_OP_COUNT 7
/* For yr_inject() only: any operation; the submitting system call itself. */
#define YR_OP_ANY 254
#define YR_OP_SUBMIT 255

/* Flags of a read. */
#define YR_FIXED_FILE 1    /* fd is an index into the registered files */
#define YR_FIXED_BUFFER 2  /* the memory lies in a registered buffer */

/* Flags of yr_create(). */
#define YR_ONE_THREAD 1 /* only the thread that makes the ring will ever use it */
#define YR_SQPOLL 2     /* a kernel thread submits */

struct yr_ring; /* opaque */

struct yr_info {
    uint32_t setup_flags;    /* IORING_SETUP_... that the kernel accepted */
    uint32_t sq_entries;
    uint32_t cq_entries;
    uint32_t max_inflight;
    uint32_t inflight;       /* queued or running; their memory is not the caller's */
    uint32_t queued;         /* of these, not submitted yet */
    uint32_t broken;         /* errno after which the ring could not be used any more, or 0 */
    uint64_t enters;         /* calls of io_uring_enter made for submitting or waiting */
    uint64_t submitted;
    uint64_t completed;
    uint64_t resumed;        /* short transfers that batches continued */
    uint64_t retried;        /* operations that batches repeated */
    uint64_t overflows;      /* times the completion queue was found overflown (nothing is lost) */
    uint64_t injected;       /* results replaced by yr_inject */
};

/* -- the ring ------------------------------------------------------------------------------ */

/* YR_ABI_VERSION of the compiled code. */
int yr_abi_version(void);

/* A new ring in *ring: `depth` submission queue entries (1..32768, the kernel rounds up), twice as
 * many for completions, at most `max_inflight` operations queued or running at once. How far the
 * kernel goes along with `flags` is found out, best first.
 * -ENOSYS, -EPERM, -EACCES, -ENOMEM, -EMFILE, -ENFILE, -EINVAL: there is none to be had. */
int yr_create(struct yr_ring **ring, uint32_t depth, uint32_t max_inflight, uint32_t flags);

/* Free the ring: by its owner, or after the owner's thread has ended (until then the kernel keeps
 * what that thread has registered). With operations in flight -EBUSY, unless `force`: then the
 * kernel may still write to their memory, which must never be freed. In the child of a fork the
 * parent's ring is let go without being touched, whatever is in flight. NULL is fine. */
int yr_destroy(struct yr_ring *ring, int force);

/* State and counters. */
int yr_info(const struct yr_ring *ring, struct yr_info *info);

/* 1 if this kernel has the operation, else 0. */
int yr_supports(const struct yr_ring *ring, unsigned op);

/* Do nothing through the ring, and wait for that: 0, -ETIME, or what is in its way. */
int yr_try_out(struct yr_ring *ring, int64_t timeout_ns);

/* Bound the kernel's worker threads of this ring's thread; 0 leaves one as it is. */
int yr_set_workers(struct yr_ring *ring, unsigned bounded, unsigned unbounded);

/* Let the kernel's workers run on these CPUs only; n = 0 undoes it. */
int yr_set_affinity(struct yr_ring *ring, unsigned n, const uint32_t *cpus);

/* The eventfd that becomes readable when completions arrive, made at the first call; it is the
 * ring's and non-blocking. yr_reap() reads it empty. */
int yr_eventfd(struct yr_ring *ring);

/* -- memory, registered buffers and files -------------------------------------------------- */

/* Overwrite with zeros in a way that no compiler leaves out. */
void yr_wipe(void *memory, size_t size);

/* Register `n` buffers (1..64) for good, all or none, once. -ENOMEM: over the limit of locked memory. */
int yr_buffers_register(struct yr_ring *ring, unsigned n, const uint64_t *addrs, const uint64_t *lens);

/* An empty table of `count` places for files (1..32768). */
int yr_files_register(struct yr_ring *ring, unsigned count);

/* Put `n` files into the places from `first` on; -1 empties one. Returns how many were put. A
 * registered file stays open, with its locks, until its place is emptied and the operations on it
 * have ended. */
int yr_files_update(struct yr_ring *ring, unsigned first, unsigned n, const int32_t *fds);

/* -- queueing, submitting, reaping --------------------------------------------------------- */

/* Queue `n` reads, one a row: `flags` are YR_FIXED_..., `buffers` the places of the registered
 * buffers; both may be NULL. All are checked first (-EINVAL, and nothing is queued). Returns how
 * many were queued: fewer than `n` when max_inflight is reached. A full submission queue is
 * submitted on the way. */
int yr_queue_reads(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                   const uint32_t *lens, const uint64_t *offs, const uint64_t *user_data,
                   const uint8_t *flags, const uint16_t *buffers);

/* Hand what is queued to the kernel, in one call. Returns how many it took. -EAGAIN, -EBUSY,
 * -ENOMEM: try again after reaping. */
int yr_submit(struct yr_ring *ring);

/* Submit, then wait until `count` completions (or all that are in flight, if fewer) are there or
 * the time is up; timeout < 0 waits without end, 0 not at all. Returns how many are there: fewer
 * than asked, even 0, when the time is up or a signal came. */
int yr_wait(struct yr_ring *ring, unsigned count, int64_t timeout_ns);

/* Take up to `max` completions into the columns. With room for max_inflight the queue is always
 * left empty, overflown ones included. */
int yr_reap(struct yr_ring *ring, unsigned max, uint64_t *user_data, int32_t *results);

/* -- whole batches, in one call ------------------------------------------------------------ */

/* These need a ring with nothing in flight (-EBUSY) and leave it so. Up to the ring's depth is
 * kept running; short transfers are resumed; EINTR, EAGAIN and ECANCELED are retried with a bound.
 * `buffer` is the registered buffer that all of the memory lies in, or -1.
 * Returns 0 once every request has its result, else a negative errno (-EINVAL, -EBUSY, -EOPNOTSUPP:
 * the kernel lacks it, -EPERM: not the owner; nothing was done); a ring that fails half-way gives
 * each request that it left undone a negative errno, and 0. Only if yr_info.broken is set
 * afterwards may the kernel still use the memory. */

/* results[i] = bytes read (fewer than lens[i] only where the file ends), or -errno. */
int yr_read_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                  const uint64_t *lens, const uint64_t *offs, int64_t *results, int32_t buffer);

/* results[i] = bytes written (all of them), or -errno. */
int yr_write_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                   const uint64_t *lens, const uint64_t *offs, int64_t *results, int32_t buffer);

/* Make files durable at the same time: results[i] = 0 or -errno. */
int yr_sync_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, int64_t *results);

/* -- paths, one at a time ------------------------------------------------------------------ */

/* As a batch of one, whose result is returned: 0 or -errno. `at` is a directory's descriptor or
 * AT_FDCWD. -EOPNOTSUPP: the kernel has no such operation; an ordinary call takes its place. */
int yr_make_directory(struct yr_ring *ring, int32_t at, const char *path, uint32_t mode);
int yr_rename(struct yr_ring *ring, int32_t at, const char *path, int32_t new_at, const char *new_path);

/* `flags`: 0 or AT_REMOVEDIR. */
int yr_unlink(struct yr_ring *ring, int32_t at, const char *path, int flags);

/* -- for tests ----------------------------------------------------------------------------- */

/* After `skip` matching operations (YR_OP_..., ANY, SUBMIT) the next `count` have their result
 * replaced by `result`: a negative errno, or for READ and WRITE a byte count, which never
 * lengthens the real one; for SUBMIT the number of operations that the kernel takes. With
 * `instead` the operation does not happen at all. Counted in the order of completion, with
 * `instead` in the order of queueing, for SUBMIT by system call. At most 16 rules a ring
 * (-ENOSPC). */
int yr_inject(struct yr_ring *ring, unsigned op, uint64_t skip, uint64_t count, int32_t result,
              int instead);

/* Remove all rules. */
int yr_inject_clear(struct yr_ring *ring);

/* The interface of the ring module. One file, read twice: by the C compiler (through ring.h,
 * which states the rules that hold for all of it) and by cffi. So: declarations only, no
 * preprocessor but integer constants. Addresses travel as uint64_t, because columns of
 * integers are cheap to make in Python and pointers are not. */

#define YR_ABI_VERSION 1

/* Largest transfer that one operation takes; the batch helpers cut longer ones. */
#define YR_MAX_IO 0x7ffff000

/* Operations, for yr_op.op and yr_supports(). */
#define YR_OP_NOP 0
#define YR_OP_READ 1
#define YR_OP_WRITE 2
#define YR_OP_WRITEV 3
#define YR_OP_FSYNC 4
#define YR_OP_FDATASYNC 5
#define YR_OP_OPENAT 6
#define YR_OP_CLOSE 7
#define YR_OP_RENAMEAT 8
#define YR_OP_UNLINKAT 9
#define YR_OP_MKDIRAT 10
#define YR_OP_CANCEL 11
#define YR_OP_COUNT 12
/* For yr_inject() only: any operation; the submitting system call itself. */
#define YR_OP_ANY 254
#define YR_OP_SUBMIT 255

/* Flags of an operation (yr_op.flags) and of the batch helpers. */
#define YR_FIXED_FILE 1    /* fd is an index into the registered files */
#define YR_FIXED_BUFFER 2  /* the memory lies in the registered buffer yr_op.buffer */
#define YR_LINK 4          /* the next operation starts when this one has fully succeeded */
#define YR_HARDLINK 8      /* the next operation starts when this one has ended */
#define YR_ASYNC 16        /* straight to a kernel worker, no attempt in place */
#define YR_DRAIN 32        /* starts when everything queued before it has ended */
#define YR_DIRECT 64       /* batch helpers: fd is O_DIRECT, an unaligned short read is the file's end */

/* Flags of yr_options.flags; the first three are taken as far as the kernel has them. */
#define YR_SETUP_SINGLE_ISSUER 1
#define YR_SETUP_DEFER_TASKRUN 2
#define YR_SETUP_COOP_TASKRUN 4
#define YR_SETUP_SQPOLL 8    /* a kernel thread submits; excludes the two TASKRUN flags */
#define YR_SETUP_IOPOLL 16   /* polled completions: O_DIRECT reads and writes only, no eventfd */
#define YR_SETUP_STRICT 32   /* exactly these flags, or -EINVAL */
#define YR_SETUP_DEFAULT 7

struct yr_ring; /* opaque */

struct yr_options {
    uint32_t depth;        /* submission queue entries, 1..32768; the kernel rounds up */
    uint32_t cq_entries;   /* completion queue entries; 0 = twice the depth */
    uint32_t max_inflight; /* operations queued or running at once; 0 = cq_entries */
    uint32_t flags;        /* YR_SETUP_... */
    uint32_t sq_idle_ms;   /* SQPOLL: the thread sleeps after this idle time; 0 = the kernel's default */
    int32_t sq_cpu;        /* SQPOLL: the thread's CPU; -1 = any */
};

struct yr_info {
    int32_t ring_fd;
    int32_t event_fd;        /* -1 if there is none */
    uint32_t setup_flags;    /* IORING_SETUP_... that the kernel accepted */
    uint32_t features;       /* IORING_FEAT_... of the kernel */
    uint32_t sq_entries;
    uint32_t cq_entries;
    uint32_t max_inflight;
    uint32_t inflight;       /* queued or running; their memory is not the caller's */
    uint32_t queued;         /* of these, not submitted yet */
    uint32_t buffers;        /* size of the table of registered buffers, 0 if there is none */
    uint32_t files;          /* size of the table of registered files, 0 if there is none */
    uint32_t broken;         /* errno after which the ring could not be used any more, or 0 */
    uint64_t enters;         /* calls of io_uring_enter made for submitting or waiting */
    uint64_t submitted;
    uint64_t completed;
    uint64_t resumed;        /* short transfers continued by the batch helpers */
    uint64_t retried;        /* operations that the batch helpers repeated */
    uint64_t overflows;      /* times the completion queue was found overflown (nothing is lost) */
    uint64_t injected;       /* results replaced by yr_inject */
};

/* One operation, 56 bytes without padding; struct.pack("<BBHiQQQQiIIi") where little-endian.
 *   READ, WRITE    fd, addr = memory, len = bytes <= YR_MAX_IO, off; arg = RWF_... flags
 *   WRITEV         fd, addr = array of {address, length} (two uint64_t each), len = their number
 *                  (1..1024; the array is copied, the memory must stay), off; arg = RWF_... flags
 *   FSYNC, FDATASYNC   fd
 *   OPENAT         fd = directory or AT_FDCWD, addr = path, arg = open flags, mode;
 *                  file_index = slot + 1 opens into the table of registered files
 *   CLOSE          fd, or file_index = slot + 1
 *   RENAMEAT       fd, addr = old path; fd2, off = address of the new path; arg = rename flags
 *   UNLINKAT       fd, addr = path, arg = flags
 *   MKDIRAT        fd, addr = path, mode
 *   NOP            nothing; CANCEL is queued by yr_cancel() only
 * Paths are NUL-terminated and copied. */
struct yr_op {
    uint8_t op;
    uint8_t flags;
    uint16_t buffer;
    int32_t fd;
    uint64_t addr;
    uint64_t len;
    uint64_t off;
    uint64_t user_data;
    int32_t arg;
    uint32_t mode;
    uint32_t file_index;
    int32_t fd2;
};

/* -- the ring ------------------------------------------------------------------------------ */

/* YR_ABI_VERSION of the compiled code. */
int yr_abi_version(void);

/* A new ring in *ring. What the kernel refuses of the flags is left out, best set first, unless
 * STRICT. -ENOSYS, -EPERM, -EACCES, -ENOMEM, -EMFILE, -ENFILE, -EINVAL: there is none to be had. */
int yr_create(struct yr_ring **ring, const struct yr_options *options);

/* Free the ring: by its owner, or after the owner's thread has ended (until then the kernel keeps
 * what that thread has registered). With operations in flight -EBUSY, unless `force`: then the kernel may still
 * write to their memory, which must never be freed. In the child of a fork the parent's ring is
 * let go without being touched, whatever is in flight. NULL is fine. */
int yr_destroy(struct yr_ring *ring, int force);

/* State and counters. */
int yr_info(const struct yr_ring *ring, struct yr_info *info);

/* 1 if this kernel has the operation (for YR_LINK chains and the like see features), else 0. */
int yr_supports(const struct yr_ring *ring, unsigned op);

/* Bound the kernel's worker threads of this ring's thread; 0 leaves one as it is. */
int yr_set_workers(struct yr_ring *ring, unsigned bounded, unsigned unbounded);

/* Let the kernel's workers run on these CPUs only; n = 0 undoes it. */
int yr_set_affinity(struct yr_ring *ring, unsigned n, const uint32_t *cpus);

/* The eventfd that becomes readable when completions arrive, made at the first call; it is the
 * ring's and non-blocking. yr_reap() and yr_turn() read it empty. */
int yr_eventfd(struct yr_ring *ring);

/* Unregister and close the eventfd. */
int yr_eventfd_close(struct yr_ring *ring);

/* -- registered buffers and files ---------------------------------------------------------- */

/* An empty table of `count` buffers (1..16384). -EINVAL: kernel before 5.19. */
int yr_buffers_register(struct yr_ring *ring, unsigned count);

/* Put `n` buffers into the slots from `first` on; address 0 with length 0 empties a slot.
 * Returns how many were put; -ENOMEM: over the limit of locked memory. A slot that operations in
 * flight use keeps its memory pinned until they end. */
int yr_buffers_update(struct yr_ring *ring, unsigned first, unsigned n,
                      const uint64_t *addrs, const uint64_t *lens);
int yr_buffers_unregister(struct yr_ring *ring);

/* The same for files; -1 empties a slot. A registered file stays open, with its locks, until its
 * slot is emptied and the operations on it have ended. */
int yr_files_register(struct yr_ring *ring, unsigned count);
int yr_files_update(struct yr_ring *ring, unsigned first, unsigned n, const int32_t *fds);
int yr_files_unregister(struct yr_ring *ring);

/* Zeroed memory at a multiple of `align` (a power of two), or NULL. Freed with yr_free only. */
void *yr_alloc(size_t size, size_t align);

/* Wipe and free; NULL is fine. */
void yr_free(void *memory, size_t size);

/* Overwrite with zeros in a way that no compiler leaves out. */
void yr_wipe(void *memory, size_t size);

/* -- queueing, submitting, reaping --------------------------------------------------------- */

/* Queue operations in this order. All are checked first (-EINVAL, -EOPNOTSUPP for one that the
 * kernel lacks, and nothing is queued). Returns how many were queued: fewer than `n` when
 * max_inflight is reached, never part of a chain; -E2BIG for a chain that can never fit. A full
 * submission queue is submitted on the way. Memory named stays the ring's until the completion
 * was reaped. */
int yr_queue(struct yr_ring *ring, unsigned n, const struct yr_op *ops);

/* The same for plain reads or writes, from columns; `flags` and `buffers` may be NULL. */
int yr_queue_reads(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                   const uint32_t *lens, const uint64_t *offs, const uint64_t *user_data,
                   const uint8_t *flags, const uint16_t *buffers);
int yr_queue_writes(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                    const uint32_t *lens, const uint64_t *offs, const uint64_t *user_data,
                    const uint8_t *flags, const uint16_t *buffers);

/* Queue the cancellation of an operation in flight: 1 if queued, 0 if there is no room, -ENOENT
 * if none has `target`. Both complete, the target possibly as if nothing had happened. */
int yr_cancel(struct yr_ring *ring, uint64_t target, uint64_t user_data);

/* Hand what is queued to the kernel, in one call. Returns how many it took. -EAGAIN, -EBUSY,
 * -ENOMEM: try again after reaping. */
int yr_submit(struct yr_ring *ring);

/* Submit, then wait until `count` completions (or all that are in flight, if fewer) are there or
 * the time is up; timeout < 0 waits without end, 0 not at all. Returns how many are there: fewer
 * than asked, even 0, when the time is up or a signal came. */
int yr_wait(struct yr_ring *ring, unsigned count, int64_t timeout_ns);

/* Take up to `max` completions into the columns (`flags` may be NULL). With room for
 * max_inflight the queue is always left empty, overflown ones included. */
int yr_reap(struct yr_ring *ring, unsigned max, uint64_t *user_data, int32_t *results,
            uint32_t *flags);

/* yr_submit and yr_reap in one call. -EAGAIN and its kind from submitting are not errors here:
 * what was not taken stays queued (yr_info.queued). */
int yr_turn(struct yr_ring *ring, unsigned max, uint64_t *user_data, int32_t *results,
            uint32_t *flags);

/* -- whole batches, in one call ------------------------------------------------------------ */

/* These need a ring with nothing in flight (-EBUSY) and leave it so. Up to the ring's depth is
 * kept running; short transfers are resumed; EINTR, EAGAIN and ECANCELED are retried with a
 * bound. `flags`: YR_FIXED_FILE, YR_ASYNC, YR_DIRECT, YR_FIXED_BUFFER with `buffer` for all.
 * Returns 0 once every request has its result, else a negative errno (-EINVAL, -EBUSY, -ENOMEM,
 * -EPERM: not the owner; nothing was done); a ring that fails half-way gives each request that it
 * left undone a negative errno, and 0. Only if yr_info.broken is set afterwards may the kernel
 * still use the memory. */

/* results[i] = bytes read (fewer than lens[i] only where the file ends), or -errno. */
int yr_read_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                  const uint64_t *lens, const uint64_t *offs, int64_t *results, unsigned flags,
                  unsigned buffer);

/* Request i writes the pieces first[i] .. first[i+1]-1 of addrs/lens, one after another, from
 * offs[i] on; first == NULL: one piece each. results[i] = bytes written (all), or -errno.
 * Then each of sync_fds (all different, at most 1024) is made durable, as soon as the writes to it
 * have ended, whether they succeeded or not: sync_results[j] = 0 or -errno. A write that is the only one to its
 * descriptor is linked with its sync. */
int yr_write_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *offs,
                   const uint32_t *first, const uint64_t *addrs, const uint64_t *lens,
                   int64_t *results, unsigned flags, unsigned buffer, unsigned nsync,
                   const int32_t *sync_fds, int32_t *sync_results);

/* One large read in pieces of `chunk` bytes, `window` of them at once (0 = the ring's depth).
 * Returns the bytes read from the start on, fewer than `len` only where the file ends, or the
 * first error in the order of the file. */
int64_t yr_read_chunked(struct yr_ring *ring, int32_t fd, uint64_t addr, uint64_t len,
                        uint64_t off, uint64_t chunk, unsigned window, unsigned flags,
                        unsigned buffer);

/* -- for tests ----------------------------------------------------------------------------- */

/* After `skip` matching operations (YR_OP_..., ANY, SUBMIT) the next `count` have their result
 * replaced by `result`: a negative errno, or for READ, WRITE and WRITEV a byte count, which never
 * lengthens the real one; for SUBMIT the number of operations that the kernel takes. With `instead` the operation does not happen at all. Counted in the
 * order of completion, with `instead` in the order of queueing, for SUBMIT by system call.
 * WRITE also means WRITEV, FSYNC also FDATASYNC. At most 16 rules a ring (-ENOSPC). */
int yr_inject(struct yr_ring *ring, unsigned op, uint64_t skip, uint64_t count, int32_t result,
              int instead);

/* Remove all rules. */
int yr_inject_clear(struct yr_ring *ring);

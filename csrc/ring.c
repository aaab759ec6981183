/* The contract is in ring.h and ring.cdef.h; here are the reasons. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "ring.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

#define MAX_DEPTH 32768u
#define MAX_INFLIGHT (1u << 20)
#define MAX_BUFFERS 16384u
#define MAX_FILES 32768u
#define MAX_VECTOR 1024u
#define MAX_SYNCS 1024u
#define MAX_RULES 16u
#define MAX_RETRIES 16u
#define MAX_WAITS 10u /* 1 ms, 2 ms, ... about one second in all */
#define INLINE_VECTOR 4u
#define REAP_AT_ONCE 64u
#define NONE UINT32_MAX
/* Direct transfers move whole sectors: one that ends elsewhere has met the end of the file. */
#define SECTOR 512u

#define OP_FLAGS \
    (YR_FIXED_FILE | YR_FIXED_BUFFER | YR_LINK | YR_HARDLINK | YR_ASYNC | YR_DRAIN)
#define BATCH_FLAGS (YR_FIXED_FILE | YR_FIXED_BUFFER | YR_ASYNC | YR_DIRECT)
#define SETUP_FLAGS                                                                        \
    (YR_SETUP_SINGLE_ISSUER | YR_SETUP_DEFER_TASKRUN | YR_SETUP_COOP_TASKRUN |             \
     YR_SETUP_SQPOLL | YR_SETUP_IOPOLL | YR_SETUP_STRICT)

_Static_assert(sizeof(struct yr_op) == 56, "yr_op is packed by struct.pack in Python");
_Static_assert(sizeof(struct iovec) == 2 * sizeof(void *), "vectors are copied word by word");

/* What must outlive the submission of one operation, until its completion was reaped. */
struct slot {
    uint64_t user_data; /* the caller's */
    uint32_t generation;
    uint32_t next_free;
    uint32_t request; /* batch helpers: index of the request, or of the sync */
    uint32_t asked;   /* batch helpers: bytes that this operation transfers if it is not short */
    int32_t result;   /* the injected one, if `replaced` */
    uint8_t op;
    uint8_t retries;
    bool busy;
    bool replaced;
    bool sync;
    struct iovec *vector; /* inline_vector or allocated */
    struct iovec inline_vector[INLINE_VECTOR];
    char *paths; /* allocated: one or two strings */
};

struct rule {
    uint64_t skip;
    uint64_t count;
    int32_t result;
    uint8_t op;
    bool instead;
};

struct yr_ring {
    struct io_uring ring;
    pid_t pid;
    pid_t tid;
    uint32_t setup_flags;
    uint32_t max_inflight;
    uint32_t free_count;
    uint32_t first_free;
    uint32_t buffers;
    uint32_t files;
    uint32_t broken;
    int32_t event_fd;
    uint32_t rule_count;
    bool supported[YR_OP_COUNT];
    struct rule rules[MAX_RULES];
    struct yr_info counters; /* only the counters of it */
    struct slot *slots;
};

/* -- small things -------------------------------------------------------------------------- */

/* Addresses come as integers, see ring.cdef.h. */
static void *pointer(uint64_t address)
{
    return (void *)(uintptr_t)address;
}

/* gettid() of glibc 2.30 and of some musl, by its number everywhere. */
static pid_t thread_id(void)
{
    return (pid_t)syscall(SYS_gettid);
}

/* A ring in the wrong process or thread must be refused before anything is queued. One system
 * call: no thread of a child has the number of a thread that lives in its parent. */
static int check_owner(const struct yr_ring *ring)
{
    if (ring == NULL)
        return -EINVAL;
    if (ring->setup_flags & IORING_SETUP_SINGLE_ISSUER)
        return thread_id() == ring->tid ? 0 : -EPERM;
    return getpid() == ring->pid ? 0 : -EPERM;
}

/* Errors of io_uring_enter that pass by themselves once something has completed. */
static bool passing(int error)
{
    return error == -EAGAIN || error == -EBUSY || error == -ENOMEM || error == -EINTR;
}

static uint32_t inflight(const struct yr_ring *ring)
{
    return ring->max_inflight - ring->free_count;
}

int yr_abi_version(void)
{
    return YR_ABI_VERSION;
}

/* -- memory -------------------------------------------------------------------------------- */

void yr_wipe(void *memory, size_t size)
{
    if (memory != NULL && size > 0)
        explicit_bzero(memory, size);
}

void *yr_alloc(size_t size, size_t align)
{
    void *memory = NULL;

    if (size == 0 || align == 0 || (align & (align - 1)) != 0)
        return NULL;
    if (align < sizeof(void *))
        align = sizeof(void *);
    if (posix_memalign(&memory, align, size) != 0)
        return NULL;
    memset(memory, 0, size);
    return memory;
}

void yr_free(void *memory, size_t size)
{
    yr_wipe(memory, size);
    free(memory);
}

/* -- slots --------------------------------------------------------------------------------- */

/* The generation tells an operation from an earlier one in the same slot, for cancelling. */
static uint64_t slot_tag(const struct yr_ring *ring, const struct slot *slot)
{
    return (uint64_t)slot->generation << 32 | (uint64_t)(slot - ring->slots);
}

static struct slot *slot_of_tag(const struct yr_ring *ring, uint64_t tag)
{
    struct slot *slot = &ring->slots[tag & UINT32_MAX];

    assert((tag & UINT32_MAX) < ring->max_inflight);
    assert(slot->busy && slot->generation == (uint32_t)(tag >> 32));
    return slot;
}

static struct slot *slot_take(struct yr_ring *ring)
{
    struct slot *slot;

    if (ring->free_count == 0)
        return NULL;
    slot = &ring->slots[ring->first_free];
    assert(!slot->busy);
    ring->first_free = slot->next_free;
    ring->free_count--;
    slot->busy = true;
    slot->generation++;
    slot->retries = 0;
    slot->replaced = false;
    slot->sync = false;
    slot->asked = 0;
    slot->request = NONE;
    slot->vector = slot->inline_vector;
    slot->paths = NULL;
    return slot;
}

static void slot_release(struct yr_ring *ring, struct slot *slot)
{
    assert(slot->busy);
    if (slot->vector != slot->inline_vector)
        free(slot->vector);
    free(slot->paths);
    slot->vector = slot->inline_vector;
    slot->paths = NULL;
    slot->busy = false;
    slot->next_free = ring->first_free;
    ring->first_free = (uint32_t)(slot - ring->slots);
    ring->free_count++;
    assert(ring->free_count <= ring->max_inflight);
}

/* Room for `count` vectors; the inline ones serve the common header + value. */
static bool slot_vector(struct slot *slot, size_t count)
{
    struct iovec *more;

    if (count <= INLINE_VECTOR || slot->vector != slot->inline_vector)
        return true;
    more = calloc(MAX_VECTOR, sizeof(*more)); /* once, whatever a resumed write needs */
    if (more == NULL)
        return false;
    slot->vector = more;
    return true;
}

/* -- injection ----------------------------------------------------------------------------- */

/* Rules name operations as tests think of them: a write is a write, vectored or not. */
static bool rule_matches(const struct rule *rule, uint8_t op)
{
    if (rule->op == op)
        return true;
    if (op == YR_OP_SUBMIT)
        return false;
    return rule->op == YR_OP_ANY || (rule->op == YR_OP_WRITE && op == YR_OP_WRITEV) ||
           (rule->op == YR_OP_FSYNC && op == YR_OP_FDATASYNC);
}

/* Every matching rule counts, so that rules do not change each other's meaning; the first acts. */
static bool injected(struct yr_ring *ring, uint8_t op, bool instead, int32_t *result)
{
    bool found = false;

    for (uint32_t i = 0; i < ring->rule_count; i++) {
        struct rule *rule = &ring->rules[i];

        if (rule->instead != instead || !rule_matches(rule, op))
            continue;
        if (rule->skip > 0) {
            rule->skip--;
        } else if (rule->count > 0) {
            rule->count--;
            if (!found)
                *result = rule->result;
            found = true;
        }
    }
    if (found)
        ring->counters.injected++;
    return found;
}

int yr_inject(struct yr_ring *ring, unsigned op, uint64_t skip, uint64_t count, int32_t result,
              int instead)
{
    struct rule *rule;

    if (ring == NULL || count == 0)
        return -EINVAL;
    if (op >= YR_OP_COUNT && op != YR_OP_ANY && op != YR_OP_SUBMIT)
        return -EINVAL;
    if (op == YR_OP_SUBMIT && instead)
        return -EINVAL;
    if (ring->rule_count == MAX_RULES)
        return -ENOSPC;
    rule = &ring->rules[ring->rule_count++];
    rule->op = (uint8_t)op;
    rule->skip = skip;
    rule->count = count;
    rule->result = result;
    rule->instead = instead != 0;
    return 0;
}

int yr_inject_clear(struct yr_ring *ring)
{
    if (ring == NULL)
        return -EINVAL;
    ring->rule_count = 0;
    return 0;
}

/* What the caller is to see as the result of the operation in `slot`. */
static int32_t filter_result(struct yr_ring *ring, const struct slot *slot, int32_t result)
{
    int32_t other;

    if (ring->rule_count == 0 && !slot->replaced)
        return result;
    if (slot->replaced) /* one that a broken chain cancelled was never reached */
        return result == -ECANCELED ? result : slot->result;
    if (!injected(ring, slot->op, false, &other))
        return result;
    if (other < 0)
        return other;
    return result >= 0 && other < result ? other : result;
}

/* -- creating and freeing ------------------------------------------------------------------ */

/* Best set first. What is not asked for is never tried; SUBMIT_ALL only saves system calls. */
static unsigned setup_candidates(uint32_t flags, unsigned *sets)
{
    unsigned fixed = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
    unsigned single = flags & YR_SETUP_SINGLE_ISSUER ? IORING_SETUP_SINGLE_ISSUER : 0;
    unsigned count = 0;

    if (flags & YR_SETUP_IOPOLL)
        fixed |= IORING_SETUP_IOPOLL;
    if (flags & YR_SETUP_SQPOLL) {
        fixed |= IORING_SETUP_SQPOLL;
        sets[count++] = fixed | single | IORING_SETUP_SUBMIT_ALL;
        sets[count++] = fixed;
        return count;
    }
    if (flags & YR_SETUP_DEFER_TASKRUN)
        sets[count++] = fixed | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                        IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL;
    if (flags & YR_SETUP_COOP_TASKRUN) {
        unsigned coop = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;

        sets[count++] = fixed | single | coop | IORING_SETUP_SUBMIT_ALL;
        sets[count++] = fixed | coop | IORING_SETUP_SUBMIT_ALL;
    }
    if (single)
        sets[count++] = fixed | single | IORING_SETUP_SUBMIT_ALL;
    sets[count++] = fixed | IORING_SETUP_SUBMIT_ALL;
    sets[count++] = fixed;
    return count;
}

/* Really make a ring: the only probe that containers, sysctls and limits cannot fool. */
static int setup_ring(struct yr_ring *ring, const struct yr_options *options)
{
    unsigned sets[8];
    unsigned count = setup_candidates(options->flags, sets);
    int result = -EINVAL;

    if (options->flags & YR_SETUP_STRICT)
        count = 1;
    for (unsigned i = 0; i < count && result == -EINVAL; i++) {
        struct io_uring_params params;

        memset(&params, 0, sizeof(params));
        params.flags = sets[i];
        params.cq_entries = options->cq_entries ? options->cq_entries : 2 * options->depth;
        if (options->flags & YR_SETUP_SQPOLL) {
            params.sq_thread_idle = options->sq_idle_ms;
            if (options->sq_cpu >= 0) {
                params.flags |= IORING_SETUP_SQ_AFF;
                params.sq_thread_cpu = (unsigned)options->sq_cpu;
            }
        }
        result = io_uring_queue_init_params(options->depth, &ring->ring, &params);
        ring->setup_flags = params.flags;
    }
    return result;
}

/* Which operations the kernel has; one that cannot be asked (before 5.6) has none of use here. */
static int probe_ring(struct yr_ring *ring)
{
    static const uint8_t opcodes[YR_OP_COUNT] = {
        [YR_OP_NOP] = IORING_OP_NOP,           [YR_OP_READ] = IORING_OP_READ,
        [YR_OP_WRITE] = IORING_OP_WRITE,       [YR_OP_WRITEV] = IORING_OP_WRITEV,
        [YR_OP_FSYNC] = IORING_OP_FSYNC,       [YR_OP_FDATASYNC] = IORING_OP_FSYNC,
        [YR_OP_OPENAT] = IORING_OP_OPENAT,     [YR_OP_CLOSE] = IORING_OP_CLOSE,
        [YR_OP_RENAMEAT] = IORING_OP_RENAMEAT, [YR_OP_UNLINKAT] = IORING_OP_UNLINKAT,
        [YR_OP_MKDIRAT] = IORING_OP_MKDIRAT,   [YR_OP_CANCEL] = IORING_OP_ASYNC_CANCEL,
    };
    struct io_uring_probe *probe = io_uring_get_probe_ring(&ring->ring);

    if (probe == NULL)
        return -EOPNOTSUPP;
    for (unsigned op = 0; op < YR_OP_COUNT; op++)
        ring->supported[op] = io_uring_opcode_supported(probe, opcodes[op]) != 0;
    io_uring_free_probe(probe);
    return 0;
}

static int check_options(const struct yr_options *options)
{
    if (options == NULL || options->depth == 0 || options->depth > MAX_DEPTH)
        return -EINVAL;
    if (options->cq_entries > 2 * MAX_DEPTH || options->max_inflight > MAX_INFLIGHT)
        return -EINVAL;
    if (options->cq_entries != 0 && options->cq_entries < options->depth)
        return -EINVAL;
    if ((options->flags & ~(uint32_t)SETUP_FLAGS) != 0)
        return -EINVAL;
    if ((options->flags & YR_SETUP_DEFER_TASKRUN) && !(options->flags & YR_SETUP_SINGLE_ISSUER))
        return -EINVAL;
    return 0;
}

static int make_slots(struct yr_ring *ring, uint32_t count)
{
    ring->slots = calloc(count, sizeof(*ring->slots));
    if (ring->slots == NULL)
        return -ENOMEM;
    ring->max_inflight = ring->free_count = count;
    for (uint32_t i = 0; i < count; i++) {
        ring->slots[i].next_free = i + 1;
        ring->slots[i].vector = ring->slots[i].inline_vector;
    }
    return 0;
}

int yr_create(struct yr_ring **result, const struct yr_options *options)
{
    struct yr_ring *ring;
    int error = check_options(options);

    if (error != 0 || result == NULL)
        return -EINVAL;
    *result = NULL;
    ring = calloc(1, sizeof(*ring));
    if (ring == NULL)
        return -ENOMEM;
    ring->pid = getpid();
    ring->tid = thread_id();
    ring->event_fd = -1;
    error = setup_ring(ring, options);
    if (error != 0) {
        free(ring);
        return error;
    }
    error = probe_ring(ring);
    if (error == 0)
        error = make_slots(ring, options->max_inflight ? options->max_inflight
                                                       : ring->ring.cq.ring_entries);
    if (error != 0) {
        io_uring_queue_exit(&ring->ring);
        free(ring);
        return error;
    }
    /* Saves looking the descriptor up in each call, but belongs to one thread. */
    if (ring->setup_flags & IORING_SETUP_SINGLE_ISSUER)
        (void)io_uring_register_ring_fd(&ring->ring);
    *result = ring;
    return 0;
}

/* The kernel may still be reading vectors and paths: they stay, which is no leak to be reported. */
static void keep_for_ever(struct slot *slots)
{
#ifdef __SANITIZE_ADDRESS__
    __lsan_ignore_object(slots);
#else
    (void)slots;
#endif
}

int yr_destroy(struct yr_ring *ring, int force)
{
    bool lost;

    if (ring == NULL)
        return 0;
    lost = inflight(ring) > 0 && getpid() == ring->pid;
    if (lost && !force)
        return -EBUSY;
    /* Of another process's ring this only undoes mappings and closes descriptors of our own. */
    io_uring_queue_exit(&ring->ring);
    if (ring->event_fd >= 0)
        close(ring->event_fd);
    if (lost) {
        keep_for_ever(ring->slots);
    } else {
        for (uint32_t i = 0; i < ring->max_inflight; i++)
            if (ring->slots[i].busy)
                slot_release(ring, &ring->slots[i]);
        free(ring->slots);
    }
    free(ring);
    return 0;
}

/* -- what a ring tells and can be told ------------------------------------------------------- */

int yr_info(const struct yr_ring *ring, struct yr_info *info)
{
    if (ring == NULL || info == NULL)
        return -EINVAL;
    *info = ring->counters;
    info->ring_fd = ring->ring.ring_fd;
    info->event_fd = ring->event_fd;
    info->setup_flags = ring->setup_flags;
    info->features = ring->ring.features;
    info->sq_entries = ring->ring.sq.ring_entries;
    info->cq_entries = ring->ring.cq.ring_entries;
    info->max_inflight = ring->max_inflight;
    info->inflight = inflight(ring);
    info->queued = io_uring_sq_ready(&ring->ring);
    info->buffers = ring->buffers;
    info->files = ring->files;
    info->broken = ring->broken;
    return 0;
}

int yr_supports(const struct yr_ring *ring, unsigned op)
{
    if (ring == NULL)
        return -EINVAL;
    return op < YR_OP_COUNT && ring->supported[op] ? 1 : 0;
}

int yr_set_workers(struct yr_ring *ring, unsigned bounded, unsigned unbounded)
{
    unsigned values[2] = {bounded, unbounded};
    int error = check_owner(ring);

    return error ? error : io_uring_register_iowq_max_workers(&ring->ring, values);
}

int yr_set_affinity(struct yr_ring *ring, unsigned n, const uint32_t *cpus)
{
    cpu_set_t set;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n == 0)
        return io_uring_unregister_iowq_aff(&ring->ring);
    if (cpus == NULL)
        return -EINVAL;
    CPU_ZERO(&set);
    for (unsigned i = 0; i < n; i++) {
        if (cpus[i] >= CPU_SETSIZE)
            return -EINVAL;
        CPU_SET(cpus[i], &set);
    }
    return io_uring_register_iowq_aff(&ring->ring, sizeof(set), &set);
}

int yr_eventfd(struct yr_ring *ring)
{
    int fd, error = check_owner(ring);

    if (error != 0)
        return error;
    if (ring->event_fd >= 0)
        return ring->event_fd;
    if (ring->setup_flags & IORING_SETUP_IOPOLL)
        return -EOPNOTSUPP;
    fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    error = io_uring_register_eventfd(&ring->ring, fd);
    if (error != 0) {
        close(fd);
        return error;
    }
    ring->event_fd = fd;
    return fd;
}

int yr_eventfd_close(struct yr_ring *ring)
{
    int error = check_owner(ring);

    if (error != 0 || ring->event_fd < 0)
        return error;
    error = io_uring_unregister_eventfd(&ring->ring);
    close(ring->event_fd);
    ring->event_fd = -1;
    return error;
}

/* -- registered buffers and files ---------------------------------------------------------- */

int yr_buffers_register(struct yr_ring *ring, unsigned count)
{
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (count == 0 || count > MAX_BUFFERS)
        return -EINVAL;
    if (ring->buffers != 0)
        return -EBUSY;
    error = io_uring_register_buffers_sparse(&ring->ring, count);
    if (error == 0)
        ring->buffers = count;
    return error;
}

int yr_buffers_update(struct yr_ring *ring, unsigned first, unsigned n, const uint64_t *addrs,
                      const uint64_t *lens)
{
    struct iovec vector[REAP_AT_ONCE];
    __u64 tags[REAP_AT_ONCE] = {0};
    unsigned done = 0;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n == 0 || addrs == NULL || lens == NULL || n > ring->buffers || first > ring->buffers - n)
        return -EINVAL;
    while (done < n) {
        unsigned part = n - done < REAP_AT_ONCE ? n - done : REAP_AT_ONCE;
        int put;

        for (unsigned i = 0; i < part; i++) {
            vector[i].iov_base = pointer(addrs[done + i]);
            vector[i].iov_len = (size_t)lens[done + i];
        }
        put = io_uring_register_buffers_update_tag(&ring->ring, first + done, vector, tags, part);
        if (put < 0)
            return done > 0 ? (int)done : put;
        done += (unsigned)put;
        if ((unsigned)put < part)
            break;
    }
    return (int)done;
}

int yr_buffers_unregister(struct yr_ring *ring)
{
    int error = check_owner(ring);

    if (error != 0 || ring->buffers == 0)
        return error;
    ring->buffers = 0;
    return io_uring_unregister_buffers(&ring->ring);
}

int yr_files_register(struct yr_ring *ring, unsigned count)
{
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (count == 0 || count > MAX_FILES)
        return -EINVAL;
    if (ring->files != 0)
        return -EBUSY;
    error = io_uring_register_files_sparse(&ring->ring, count);
    if (error == -EINVAL) { /* before 5.19 a table of -1 does the same */
        int *fds = malloc(count * sizeof(*fds));

        if (fds == NULL)
            return -ENOMEM;
        memset(fds, 0xff, count * sizeof(*fds));
        error = io_uring_register_files(&ring->ring, fds, count);
        free(fds);
    }
    if (error == 0)
        ring->files = count;
    return error;
}

int yr_files_update(struct yr_ring *ring, unsigned first, unsigned n, const int32_t *fds)
{
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n == 0 || fds == NULL || n > ring->files || first > ring->files - n)
        return -EINVAL;
    return io_uring_register_files_update(&ring->ring, first, fds, n);
}

int yr_files_unregister(struct yr_ring *ring)
{
    int error = check_owner(ring);

    if (error != 0 || ring->files == 0)
        return error;
    ring->files = 0;
    return io_uring_unregister_files(&ring->ring);
}

/* -- entering the kernel --------------------------------------------------------------------- */

/* The kernel took only the beginning of a chain (it may run out of memory anywhere). What is left
 * would run on its own, perhaps too early, so it is made to fail as a broken chain does. */
static void cut_chain(struct yr_ring *ring)
{
    const unsigned link = IOSQE_IO_LINK | IOSQE_IO_HARDLINK;
    struct io_uring_sq *sq = &ring->ring.sq;
    unsigned at = *sq->khead;
    unsigned linked = sq->sqes[(at - 1) & sq->ring_mask].flags & link;

    for (; linked != 0 && at != sq->sqe_tail; at++) {
        struct io_uring_sqe *sqe = &sq->sqes[at & sq->ring_mask];
        struct slot *slot;

        if (sqe->user_data == LIBURING_UDATA_TIMEOUT)
            break; /* liburing's own, see is_foreign() */
        slot = slot_of_tag(ring, sqe->user_data);
        linked = sqe->flags & link;
        io_uring_prep_read(sqe, -1, NULL, 0, 0);
        io_uring_sqe_set_flags(sqe, linked);
        io_uring_sqe_set_data64(sqe, slot_tag(ring, slot));
        slot->replaced = true;
        slot->result = -ECANCELED;
    }
}

/* For tests: a kernel that takes `some` entries and no more. */
static int submit_some(struct yr_ring *ring, unsigned some)
{
    struct io_uring_sq *sq = &ring->ring.sq;
    unsigned tail = sq->sqe_tail;
    int result;

    if (some < tail - *sq->khead)
        sq->sqe_tail = *sq->khead + some;
    result = io_uring_submit(&ring->ring);
    sq->sqe_tail = tail;
    return result;
}

/* The one place that submits: counts the calls, and is where tests let them fail. */
static int enter(struct yr_ring *ring, unsigned want, int64_t timeout_ns)
{
    unsigned before = io_uring_sq_ready(&ring->ring);
    unsigned after;
    int32_t other = INT32_MAX;
    int result;

    if (ring->rule_count > 0 && injected(ring, YR_OP_SUBMIT, false, &other) && other < 0)
        return other;
    ring->counters.enters++;
    if (other != INT32_MAX) {
        result = submit_some(ring, (unsigned)other);
    } else if (timeout_ns >= 0) {
        struct io_uring_cqe *cqe;
        struct __kernel_timespec ts = {
            .tv_sec = timeout_ns / 1000000000,
            .tv_nsec = timeout_ns % 1000000000,
        };

        result = io_uring_submit_and_wait_timeout(&ring->ring, &cqe, want, &ts, NULL);
    } else if (want > 0) {
        result = io_uring_submit_and_wait(&ring->ring, want);
    } else {
        result = io_uring_submit(&ring->ring);
    }
    after = io_uring_sq_ready(&ring->ring);
    if (after < before) { /* liburing's own timeout operation on old kernels is not counted */
        ring->counters.submitted += before - after;
        if (after > 0 && !(ring->setup_flags & IORING_SETUP_SQPOLL))
            cut_chain(ring);
    }
    return result;
}

int yr_submit(struct yr_ring *ring)
{
    unsigned before;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    before = io_uring_sq_ready(&ring->ring);
    if (before == 0)
        return 0;
    do {
        error = enter(ring, 0, -1);
    } while (error == -EINTR);
    return error < 0 ? error : (int)(before - io_uring_sq_ready(&ring->ring));
}

int yr_wait(struct yr_ring *ring, unsigned count, int64_t timeout_ns)
{
    unsigned ready;
    int result, error = check_owner(ring);

    if (error != 0)
        return error;
    if (count > inflight(ring)) /* never wait for what cannot come */
        count = inflight(ring);
    if (timeout_ns == 0)
        count = 0;
    ready = io_uring_cq_ready(&ring->ring);
    if (count == 0 || ready >= count) {
        error = yr_submit(ring);
        if (error < 0)
            return error;
        if (count == 0 && inflight(ring) > 0)
            (void)io_uring_get_events(&ring->ring);
        return (int)io_uring_cq_ready(&ring->ring);
    }
    result = enter(ring, count, timeout_ns);
    ready = io_uring_cq_ready(&ring->ring);
    /* A signal cannot be told from a timeout where the same call has submitted something. */
    if (result < 0 && result != -ETIME && result != -EINTR && ready == 0)
        return result;
    return (int)ready;
}

/* -- queueing -------------------------------------------------------------------------------- */

static bool is_transfer(unsigned op)
{
    return op == YR_OP_READ || op == YR_OP_WRITE || op == YR_OP_WRITEV;
}

static bool has_path(unsigned op)
{
    return op == YR_OP_OPENAT || op == YR_OP_RENAMEAT || op == YR_OP_UNLINKAT ||
           op == YR_OP_MKDIRAT;
}

/* Everything that can be known to be wrong is refused before anything is queued. */
static int check_op(const struct yr_ring *ring, const struct yr_op *op)
{
    unsigned fixed = op->flags & (YR_FIXED_FILE | YR_FIXED_BUFFER);

    if (op->op >= YR_OP_COUNT || (op->flags & ~OP_FLAGS) != 0)
        return -EINVAL;
    if (!ring->supported[op->op])
        return -EOPNOTSUPP;
    if ((op->flags & YR_FIXED_FILE) &&
        (op->fd < 0 || (uint32_t)op->fd >= ring->files || has_path(op->op)))
        return -EINVAL;
    if ((op->flags & YR_FIXED_BUFFER) &&
        (op->buffer >= ring->buffers || (op->op != YR_OP_READ && op->op != YR_OP_WRITE)))
        return -EINVAL;
    if (op->file_index > ring->files)
        return -EINVAL;
    if (is_transfer(op->op)) {
        uint64_t most = op->op == YR_OP_WRITEV ? MAX_VECTOR : YR_MAX_IO;

        if (op->len > most || (op->addr == 0 && op->len > 0) || op->off > INT64_MAX)
            return -EINVAL;
        if (op->op == YR_OP_WRITEV && op->len == 0)
            return -EINVAL;
    } else if (fixed != 0 && op->op != YR_OP_FSYNC && op->op != YR_OP_FDATASYNC) {
        return -EINVAL;
    }
    if (has_path(op->op) && op->addr == 0)
        return -EINVAL;
    if (op->op == YR_OP_RENAMEAT && op->off == 0)
        return -EINVAL;
    return 0;
}

/* Length of the chain that begins at `i`: operations that must be submitted together. */
static unsigned chain_length(const struct yr_op *ops, unsigned n, unsigned i)
{
    unsigned length = 1;

    while (i < n && (ops[i].flags & (YR_LINK | YR_HARDLINK))) {
        i++;
        length++;
    }
    return i < n ? length : 0; /* 0: the chain has no end */
}

/* Copies what the kernel reads at submission at the earliest and at completion at the latest. */
static int keep_arguments(struct slot *slot, const struct yr_op *op)
{
    if (op->op == YR_OP_WRITEV) {
        const uint64_t *words = pointer(op->addr);

        if (!slot_vector(slot, (size_t)op->len))
            return -ENOMEM;
        for (size_t i = 0; i < op->len; i++) {
            slot->vector[i].iov_base = pointer(words[2 * i]);
            slot->vector[i].iov_len = (size_t)words[2 * i + 1];
        }
    } else if (has_path(op->op)) {
        size_t one = strlen(pointer(op->addr)) + 1;
        size_t two = op->op == YR_OP_RENAMEAT ? strlen(pointer(op->off)) + 1 : 0;

        slot->paths = malloc(one + two);
        if (slot->paths == NULL)
            return -ENOMEM;
        memcpy(slot->paths, pointer(op->addr), one);
        if (two > 0)
            memcpy(slot->paths + one, pointer(op->off), two);
    }
    return 0;
}

/* The operation's own part of a submission entry. */
static void prepare(struct io_uring_sqe *sqe, const struct slot *slot, const struct yr_op *op)
{
    bool fixed = (op->flags & YR_FIXED_BUFFER) != 0;
    void *memory = pointer(op->addr);
    unsigned len = (unsigned)op->len;

    switch (op->op) {
    case YR_OP_READ:
        if (fixed)
            io_uring_prep_read_fixed(sqe, op->fd, memory, len, op->off, op->buffer);
        else
            io_uring_prep_read(sqe, op->fd, memory, len, op->off);
        sqe->rw_flags = op->arg;
        break;
    case YR_OP_WRITE:
        if (fixed)
            io_uring_prep_write_fixed(sqe, op->fd, memory, len, op->off, op->buffer);
        else
            io_uring_prep_write(sqe, op->fd, memory, len, op->off);
        sqe->rw_flags = op->arg;
        break;
    case YR_OP_WRITEV:
        io_uring_prep_writev2(sqe, op->fd, slot->vector, len, op->off, op->arg);
        break;
    case YR_OP_FSYNC:
        io_uring_prep_fsync(sqe, op->fd, 0);
        break;
    case YR_OP_FDATASYNC:
        io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
        break;
    case YR_OP_OPENAT:
        if (op->file_index > 0)
            io_uring_prep_openat_direct(sqe, op->fd, slot->paths, op->arg, (mode_t)op->mode,
                                        op->file_index - 1);
        else
            io_uring_prep_openat(sqe, op->fd, slot->paths, op->arg, (mode_t)op->mode);
        break;
    case YR_OP_CLOSE:
        if (op->file_index > 0)
            io_uring_prep_close_direct(sqe, op->file_index - 1);
        else
            io_uring_prep_close(sqe, op->fd);
        break;
    case YR_OP_RENAMEAT:
        io_uring_prep_renameat(sqe, op->fd, slot->paths, op->fd2,
                               slot->paths + strlen(slot->paths) + 1, (unsigned)op->arg);
        break;
    case YR_OP_UNLINKAT:
        io_uring_prep_unlinkat(sqe, op->fd, slot->paths, op->arg);
        break;
    case YR_OP_MKDIRAT:
        io_uring_prep_mkdirat(sqe, op->fd, slot->paths, (mode_t)op->mode);
        break;
    case YR_OP_CANCEL:
        io_uring_prep_cancel64(sqe, op->addr, 0);
        break;
    default:
        assert(op->op == YR_OP_NOP);
        io_uring_prep_nop(sqe);
        break;
    }
}

/* The flags that operations share with io_uring under other names. */
static unsigned sqe_flags(unsigned flags)
{
    return (flags & YR_FIXED_FILE ? IOSQE_FIXED_FILE : 0u) |
           (flags & YR_LINK ? IOSQE_IO_LINK : 0u) |
           (flags & YR_HARDLINK ? IOSQE_IO_HARDLINK : 0u) |
           (flags & YR_ASYNC ? IOSQE_ASYNC : 0u) | (flags & YR_DRAIN ? IOSQE_IO_DRAIN : 0u);
}

/* The next submission entry; the caller has made sure that there is one. A polling kernel may have posted
 * completions of operations whose entries it gives back only a moment later, when it is through with all that
 * it took: then that is waited for. */
static struct io_uring_sqe *next_entry(struct yr_ring *ring)
{
    struct io_uring_sqe *sqe;

    while ((sqe = io_uring_get_sqe(&ring->ring)) == NULL) {
        assert(ring->setup_flags & IORING_SETUP_SQPOLL);
        (void)io_uring_sqring_wait(&ring->ring);
        (void)sched_yield(); /* where the kernel sees room in what it has not been told of yet */
    }
    return sqe;
}

/* Fills the next submission entry for `slot`. */
static void fill_entry(struct yr_ring *ring, struct slot *slot, const struct yr_op *op)
{
    struct io_uring_sqe *sqe = next_entry(ring);
    unsigned flags = op->flags;

    slot->op = op->op;
    slot->replaced = ring->rule_count > 0 && injected(ring, op->op, true, &slot->result);
    if (!slot->replaced) {
        prepare(sqe, slot, op);
    } else if (slot->result < 0) { /* must fail in the kernel too, so that a chain breaks */
        io_uring_prep_read(sqe, -1, NULL, 0, 0);
        flags &= ~(unsigned)YR_FIXED_FILE;
    } else {
        io_uring_prep_nop(sqe);
        flags &= ~(unsigned)YR_FIXED_FILE;
    }
    io_uring_sqe_set_flags(sqe, sqe_flags(flags));
    io_uring_sqe_set_data64(sqe, slot_tag(ring, slot));
}

/* Room for `count` entries, submitting what is queued if that makes it. */
static bool entries_free(struct yr_ring *ring, unsigned count)
{
    if (io_uring_sq_space_left(&ring->ring) >= count)
        return true;
    (void)yr_submit(ring);
    return io_uring_sq_space_left(&ring->ring) >= count;
}

/* A whole chain (mostly: one operation) or nothing. 1, 0 for no room, or -ENOMEM. */
static int queue_chain(struct yr_ring *ring, const struct yr_op *ops, unsigned length)
{
    uint32_t taken = NONE; /* the chain's slots, linked in reverse through next_free */
    uint32_t ordered = NONE;

    if (ring->free_count < length || !entries_free(ring, length))
        return 0;
    for (unsigned i = 0; i < length; i++) {
        struct slot *slot = slot_take(ring);
        int error = keep_arguments(slot, &ops[i]);

        slot->user_data = ops[i].user_data;
        slot->next_free = taken;
        taken = (uint32_t)(slot - ring->slots);
        if (error == 0)
            continue;
        while (taken != NONE) {
            slot = &ring->slots[taken];
            taken = slot->next_free;
            slot_release(ring, slot);
        }
        return error;
    }
    while (taken != NONE) {
        uint32_t next = ring->slots[taken].next_free;

        ring->slots[taken].next_free = ordered;
        ordered = taken;
        taken = next;
    }
    for (unsigned i = 0; i < length; i++) {
        struct slot *slot = &ring->slots[ordered];

        ordered = slot->next_free;
        fill_entry(ring, slot, &ops[i]);
    }
    return 1;
}

int yr_queue(struct yr_ring *ring, unsigned n, const struct yr_op *ops)
{
    unsigned done = 0;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n > INT_MAX || (n > 0 && ops == NULL))
        return -EINVAL;
    for (unsigned i = 0; i < n; i++) {
        error = ops[i].op == YR_OP_CANCEL ? -EINVAL : check_op(ring, &ops[i]);
        if (error != 0)
            return error;
    }
    for (unsigned i = 0; i < n;) {
        unsigned length = chain_length(ops, n, i);

        if (length == 0)
            return -EINVAL;
        if (length > ring->ring.sq.ring_entries || length > ring->max_inflight)
            return -E2BIG;
        i += length;
    }
    while (done < n) {
        unsigned length = chain_length(ops, n, done);
        int queued = queue_chain(ring, ops + done, length);

        if (queued < 0 && done == 0)
            return queued;
        if (queued <= 0)
            break;
        done += length;
    }
    return (int)done;
}

/* Columns to operations; one loop for reads and writes. */
static int queue_columns(struct yr_ring *ring, uint8_t kind, unsigned n, const int32_t *fds,
                         const uint64_t *addrs, const uint32_t *lens, const uint64_t *offs,
                         const uint64_t *user_data, const uint8_t *flags, const uint16_t *buffers)
{
    unsigned done = 0;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n > INT_MAX || fds == NULL || addrs == NULL || lens == NULL || offs == NULL ||
        user_data == NULL)
        return -EINVAL;
    for (int checking = 1; checking >= 0; checking--) {
        for (unsigned i = 0; i < n; i++) {
            struct yr_op op = {
                .op = kind,
                .flags = flags != NULL ? flags[i] : 0,
                .buffer = buffers != NULL ? buffers[i] : 0,
                .fd = fds[i],
                .addr = addrs[i],
                .len = lens[i],
                .off = offs[i],
                .user_data = user_data[i],
            };

            if (checking) {
                error = op.flags & (YR_LINK | YR_HARDLINK) ? -EINVAL : check_op(ring, &op);
                if (error != 0)
                    return error;
                continue;
            }
            error = queue_chain(ring, &op, 1);
            if (error < 0 && done == 0)
                return error;
            if (error <= 0)
                return (int)done;
            done++;
        }
    }
    return (int)done;
}

int yr_queue_reads(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                   const uint32_t *lens, const uint64_t *offs, const uint64_t *user_data,
                   const uint8_t *flags, const uint16_t *buffers)
{
    return queue_columns(ring, YR_OP_READ, n, fds, addrs, lens, offs, user_data, flags, buffers);
}

int yr_queue_writes(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                    const uint32_t *lens, const uint64_t *offs, const uint64_t *user_data,
                    const uint8_t *flags, const uint16_t *buffers)
{
    return queue_columns(ring, YR_OP_WRITE, n, fds, addrs, lens, offs, user_data, flags, buffers);
}

int yr_cancel(struct yr_ring *ring, uint64_t target, uint64_t user_data)
{
    struct yr_op op = {.op = YR_OP_CANCEL, .fd = -1, .user_data = user_data};
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (!ring->supported[YR_OP_CANCEL])
        return -EOPNOTSUPP;
    for (uint32_t i = 0; i < ring->max_inflight; i++) {
        const struct slot *slot = &ring->slots[i];

        if (!slot->busy || slot->user_data != target || slot->op == YR_OP_CANCEL)
            continue;
        op.addr = slot_tag(ring, slot);
        return queue_chain(ring, &op, 1);
    }
    return -ENOENT;
}

/* -- reaping --------------------------------------------------------------------------------- */

/* Looks at completions without taking them; enters the kernel only where that is needed. */
static unsigned peek(struct yr_ring *ring, struct io_uring_cqe **cqes, unsigned max)
{
    if (IO_URING_READ_ONCE(*ring->ring.sq.kflags) & IORING_SQ_CQ_OVERFLOW)
        ring->counters.overflows++;
    if ((ring->setup_flags & IORING_SETUP_IOPOLL) && inflight(ring) > 0)
        (void)io_uring_get_events(&ring->ring);
    return io_uring_peek_batch_cqe(&ring->ring, cqes, max);
}

/* liburing's own timeouts (kernels before 5.11) complete in our queue. */
static bool is_foreign(const struct io_uring_cqe *cqe)
{
    return cqe->user_data == LIBURING_UDATA_TIMEOUT;
}

/* Read empty before reaping, so that whatever comes after wakes the loop again. Completing what
 * is only due in the kernel signals once more, so that is done before, or each round of the loop
 * would be followed by an empty one. */
static void clear_eventfd(struct yr_ring *ring)
{
    uint64_t value;

    if (ring->event_fd < 0)
        return;
    if (IO_URING_READ_ONCE(*ring->ring.sq.kflags) & IORING_SQ_TASKRUN)
        (void)io_uring_get_events(&ring->ring);
    if (read(ring->event_fd, &value, sizeof(value)) < 0)
        return; /* EAGAIN: it was empty */
}

int yr_reap(struct yr_ring *ring, unsigned max, uint64_t *user_data, int32_t *results,
            uint32_t *flags)
{
    struct io_uring_cqe *cqes[REAP_AT_ONCE];
    unsigned done = 0;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (max > INT_MAX || (max > 0 && (user_data == NULL || results == NULL)))
        return -EINVAL;
    clear_eventfd(ring);
    while (done < max) {
        unsigned part = max - done < REAP_AT_ONCE ? max - done : REAP_AT_ONCE;
        unsigned found = peek(ring, cqes, part);

        if (found == 0)
            break;
        for (unsigned i = 0; i < found; i++) {
            struct slot *slot;

            if (is_foreign(cqes[i]))
                continue;
            slot = slot_of_tag(ring, cqes[i]->user_data);
            user_data[done] = slot->user_data;
            results[done] = filter_result(ring, slot, cqes[i]->res);
            if (flags != NULL)
                flags[done] = cqes[i]->flags;
            slot_release(ring, slot);
            ring->counters.completed++;
            done++;
        }
        io_uring_cq_advance(&ring->ring, found);
    }
    return (int)done;
}

int yr_turn(struct yr_ring *ring, unsigned max, uint64_t *user_data, int32_t *results,
            uint32_t *flags)
{
    int error = yr_submit(ring);

    if (error < 0 && !passing(error))
        return error;
    return yr_reap(ring, max, user_data, results, flags);
}

/* -- whole batches --------------------------------------------------------------------------- */

enum sync_state { SYNC_WAITS, SYNC_READY, SYNC_RUNS, SYNC_DONE };

/* One descriptor that is made durable after the writes to it. */
struct sync {
    int32_t fd;
    uint32_t index;   /* into the caller's columns */
    uint32_t writes;  /* to this descriptor, in all */
    uint32_t waiting; /* of these, not ended yet */
    uint8_t state;
    bool linked; /* runs in a chain behind its only write */
    bool redo;   /* what runs does not cover the write: once more after it */
};

struct batch {
    struct yr_ring *ring;
    uint8_t kind; /* YR_OP_READ or YR_OP_WRITE */
    uint8_t flags;
    uint16_t buffer;
    unsigned n;
    unsigned window;
    unsigned next;    /* first request not started */
    unsigned running; /* operations in flight */
    int failed;       /* the ring's error after which nothing is started any more */
    const int32_t *fds;
    const uint64_t *offs;
    const uint64_t *addrs;
    const uint64_t *lens;
    const uint32_t *first; /* pieces of writes, or NULL */
    int64_t *results;      /* bytes so far, then the result */
    uint64_t chunk;        /* yr_read_chunked: all columns have one row, this long a piece */
    struct sync *syncs;    /* sorted by descriptor */
    unsigned nsync;
    unsigned syncs_ready;
    unsigned next_sync; /* where to look for a ready one */
    int32_t *sync_results;
};

/* A request's place in the file and its length, whichever form the batch has. */
struct span {
    int32_t fd;
    uint64_t off;
    uint64_t len;
};

static struct span span_of(const struct batch *b, unsigned i)
{
    struct span span;

    if (b->chunk > 0) {
        uint64_t start = i * b->chunk;

        span.fd = b->fds[0];
        span.off = b->offs[0] + start;
        span.len = b->lens[0] - start < b->chunk ? b->lens[0] - start : b->chunk;
        return span;
    }
    span.fd = b->fds[i];
    span.off = b->offs[i];
    span.len = 0;
    if (b->first == NULL) {
        span.len = b->lens[i];
    } else {
        for (uint32_t k = b->first[i]; k < b->first[i + 1]; k++)
            span.len += b->lens[k];
    }
    return span;
}

/* Memory of a request in one piece, `done` bytes on. */
static uint64_t address_of(const struct batch *b, unsigned i, uint64_t done)
{
    if (b->chunk > 0)
        return b->addrs[0] + i * b->chunk + done;
    return b->addrs[b->first != NULL ? b->first[i] : i] + done;
}

/* The vector of a write from `done` on; fewer pieces than there are make a short write, which is
 * resumed, so neither the limit of pieces nor want of memory needs an error. */
static unsigned load_vector(const struct batch *b, struct slot *slot, uint64_t done)
{
    uint32_t from = b->first[slot->request], to = b->first[slot->request + 1];
    unsigned room, count = 0;
    uint64_t total = 0;

    room = slot_vector(slot, to - from) && slot->vector != slot->inline_vector ? MAX_VECTOR
                                                                              : INLINE_VECTOR;
    for (uint32_t k = from; k < to && count < room && total < YR_MAX_IO; k++) {
        uint64_t part = b->lens[k];

        if (done >= part) {
            done -= part;
            continue;
        }
        part -= done;
        if (part > YR_MAX_IO - total)
            part = YR_MAX_IO - total;
        slot->vector[count].iov_base = pointer(b->addrs[k] + done);
        slot->vector[count].iov_len = (size_t)part;
        count++;
        total += part;
        done = 0;
    }
    slot->asked = (uint32_t)total;
    return count;
}

/* Queue the rest of the request in `slot`. */
static void start_transfer(struct batch *b, struct slot *slot, unsigned extra_flags)
{
    unsigned i = slot->request;
    uint64_t done = (uint64_t)b->results[i];
    struct span span = span_of(b, i);
    uint64_t rest = span.len - done;
    struct yr_op op = {
        .op = b->kind,
        .flags = (uint8_t)((b->flags & OP_FLAGS) | extra_flags),
        .buffer = b->buffer,
        .fd = span.fd,
        .off = span.off + done,
    };

    assert(rest > 0);
    if (b->first != NULL && b->first[i + 1] - b->first[i] > 1) {
        op.op = YR_OP_WRITEV;
        op.flags &= (uint8_t)~YR_FIXED_BUFFER;
        op.len = load_vector(b, slot, done);
    } else {
        op.addr = address_of(b, i, done);
        op.len = rest < YR_MAX_IO ? rest : YR_MAX_IO;
        slot->asked = (uint32_t)op.len;
    }
    fill_entry(b->ring, slot, &op);
}

/* A slot for a batch's operation; the window never exceeds what there is. */
static struct slot *batch_slot(struct batch *b, uint32_t request, bool sync)
{
    struct slot *slot = slot_take(b->ring);

    assert(slot != NULL);
    slot->request = request;
    slot->sync = sync;
    slot->user_data = request;
    b->running++;
    return slot;
}

static void start_sync(struct batch *b, unsigned s)
{
    struct yr_op op = {
        .op = YR_OP_FDATASYNC,
        .flags = (uint8_t)(b->flags & (YR_FIXED_FILE | YR_ASYNC)),
        .fd = b->syncs[s].fd,
    };

    b->syncs[s].state = SYNC_RUNS;
    fill_entry(b->ring, batch_slot(b, s, true), &op);
}

static void sync_ready(struct batch *b, struct sync *sync)
{
    sync->state = SYNC_READY;
    b->syncs_ready++;
}

/* The sync that waits for writes to `fd`, or NULL. */
static struct sync *sync_of(const struct batch *b, int32_t fd)
{
    unsigned low = 0, high = b->nsync;

    while (low < high) {
        unsigned middle = low + (high - low) / 2;

        if (b->syncs[middle].fd == fd)
            return &b->syncs[middle];
        if (b->syncs[middle].fd < fd)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

/* A request has its result; the last write to a descriptor lets its sync go. */
static void finish(struct batch *b, unsigned i, int64_t result)
{
    b->results[i] = result;
    if (b->nsync > 0) {
        struct sync *sync = sync_of(b, span_of(b, i).fd);

        if (sync != NULL && --sync->waiting == 0 && sync->state == SYNC_WAITS)
            sync_ready(b, sync);
    }
}

static void start_request(struct batch *b, unsigned i)
{
    struct span span = span_of(b, i);
    struct sync *sync = b->nsync > 0 ? sync_of(b, span.fd) : NULL;
    struct slot *slot;

    if (span.len == 0) {
        finish(b, i, 0);
        return;
    }
    slot = batch_slot(b, i, false);
    /* Alone on its descriptor and small enough for one operation: write and sync in one chain. */
    if (sync != NULL && sync->writes == 1 && span.len <= YR_MAX_IO && b->running < b->window &&
        (b->first == NULL || b->first[i + 1] - b->first[i] <= INLINE_VECTOR)) {
        start_transfer(b, slot, YR_LINK);
        sync->linked = true;
        start_sync(b, (unsigned)(sync - b->syncs));
    } else {
        start_transfer(b, slot, 0);
    }
}

/* Start as much as the window allows: syncs first, somebody is waiting longest for those. */
static void fill_window(struct batch *b)
{
    while (b->failed == 0 && b->running < b->window) {
        if (b->syncs_ready > 0) {
            while (b->syncs[b->next_sync].state != SYNC_READY)
                b->next_sync = (b->next_sync + 1) % b->nsync;
            b->syncs_ready--;
            start_sync(b, b->next_sync);
        } else if (b->next < b->n) {
            start_request(b, b->next++);
        } else {
            break;
        }
    }
}

/* Errors of single operations that are worth another attempt. */
static bool again(struct slot *slot, int32_t result)
{
    if (result != -EINTR && result != -EAGAIN && result != -ECANCELED)
        return false;
    return slot->retries++ < MAX_RETRIES;
}

/* A sync has completed; whether it counts depends on what became of the write before it. */
static void sync_done(struct batch *b, struct slot *slot, int32_t result)
{
    struct sync *sync = &b->syncs[slot->request];
    bool once_more = sync->redo || sync->waiting > 0 || (sync->linked && result == -ECANCELED);

    sync->linked = false;
    sync->redo = false;
    if (once_more && b->failed == 0) {
        slot_release(b->ring, slot);
        b->running--;
        sync->state = SYNC_WAITS;
        if (sync->waiting == 0)
            sync_ready(b, sync);
        return;
    }
    if (!once_more && b->failed == 0 && again(slot, result)) {
        struct yr_op op = {
            .op = YR_OP_FDATASYNC,
            .flags = (uint8_t)((b->flags & YR_FIXED_FILE) | YR_ASYNC),
            .fd = sync->fd,
        };

        b->ring->counters.retried++;
        fill_entry(b->ring, slot, &op);
        return;
    }
    slot_release(b->ring, slot);
    b->running--;
    sync->state = SYNC_DONE;
    b->sync_results[sync->index] = once_more ? b->failed : result < 0 ? result : 0;
}

/* The sync in the chain behind a write that did not end at once does not cover the write. */
static void not_covered(struct batch *b, unsigned i)
{
    struct sync *sync = b->nsync > 0 ? sync_of(b, span_of(b, i).fd) : NULL;

    if (sync != NULL && sync->linked)
        sync->redo = true;
}

/* A transfer has completed: done, or resumed, or repeated. */
static void transfer_done(struct batch *b, struct slot *slot, int32_t result)
{
    unsigned i = slot->request;
    uint64_t total = span_of(b, i).len;
    int64_t final = result;
    bool more = false;

    if (result > 0) {
        uint64_t done = (uint64_t)b->results[i] + (uint64_t)result;

        assert((uint32_t)result <= slot->asked && done <= total);
        b->results[i] = final = (int64_t)done;
        more = done < total;
        /* Direct reads end unaligned only at the end of the file, and cannot go on from there. */
        if (more && (b->flags & YR_DIRECT) && b->kind == YR_OP_READ && result % SECTOR != 0)
            more = false;
        if (more) {
            slot->retries = 0;
            b->ring->counters.resumed++;
        }
    } else if (result == 0 && b->kind == YR_OP_READ) {
        final = b->results[i];
    } else {
        more = again(slot, result == 0 ? -EAGAIN : result);
        if (more)
            b->ring->counters.retried++;
        if (result == 0)
            final = -EIO; /* a write that makes no progress */
    }
    if (result != (int32_t)slot->asked)
        not_covered(b, i);
    if (more && b->failed == 0) {
        /* What cannot be done without waiting, time and again, is for a worker to wait for. */
        start_transfer(b, slot, slot->retries > 1 ? YR_ASYNC : 0);
        return;
    }
    slot_release(b->ring, slot);
    b->running--;
    finish(b, i, more ? b->failed : final);
}

/* Take every completion that is there; how many. */
static unsigned reap_batch(struct batch *b)
{
    struct io_uring_cqe *cqes[REAP_AT_ONCE];
    unsigned found, total = 0;

    while ((found = peek(b->ring, cqes, REAP_AT_ONCE)) > 0) {
        for (unsigned i = 0; i < found; i++) {
            struct slot *slot;
            int32_t result;

            if (is_foreign(cqes[i]))
                continue;
            slot = slot_of_tag(b->ring, cqes[i]->user_data);
            result = filter_result(b->ring, slot, cqes[i]->res);
            b->ring->counters.completed++;
            if (slot->sync)
                sync_done(b, slot, result);
            else
                transfer_done(b, slot, result);
        }
        io_uring_cq_advance(&b->ring->ring, found);
        total += found;
    }
    return total;
}

/* Take back what the kernel has not taken, so that nothing of it can start later. */
static void withdraw(struct batch *b)
{
    struct io_uring_sq *sq = &b->ring->ring.sq;
    unsigned head = *sq->khead;

    for (unsigned at = head; at != sq->sqe_tail; at++) {
        struct io_uring_sqe *sqe = &sq->sqes[at & sq->ring_mask];
        struct slot *slot;

        if (sqe->user_data == LIBURING_UDATA_TIMEOUT)
            continue;
        slot = slot_of_tag(b->ring, sqe->user_data);
        if (slot->sync) {
            b->syncs[slot->request].state = SYNC_DONE;
            b->sync_results[b->syncs[slot->request].index] = b->failed;
        } else {
            finish(b, slot->request, b->failed);
        }
        slot_release(b->ring, slot);
        b->running--;
    }
    sq->sqe_head = sq->sqe_tail = head;
    IO_URING_WRITE_ONCE(*sq->ktail, head);
}

/* Wait for one completion without submitting; false if even that is impossible. */
static bool wait_for_one(struct batch *b)
{
    struct io_uring_cqe *cqe;
    int error;

    b->ring->counters.enters++;
    error = io_uring_wait_cqe(&b->ring->ring, &cqe);
    return error == 0 || passing(error);
}

/* Nothing more is started; the ring is given up only if the kernel holds what it cannot return. */
static void give_up(struct batch *b, int error)
{
    b->failed = error;
    if (b->ring->setup_flags & IORING_SETUP_SQPOLL)
        return;
    withdraw(b);
}

/* After a failed submission: go on, wait, or give up. */
static void submission_failed(struct batch *b, int error, unsigned *waits)
{
    unsigned queued = io_uring_sq_ready(&b->ring->ring);

    if (error == -EINTR)
        return;
    if (!passing(error)) {
        give_up(b, error);
    } else if (b->running > queued) { /* what runs will make room */
        if (!wait_for_one(b))
            give_up(b, error);
    } else if (*waits < MAX_WAITS) {
        struct timespec pause = {.tv_nsec = 1000000L << *waits};

        if (*waits == MAX_WAITS - 1)
            pause.tv_nsec = 500000000L;
        (*waits)++;
        (void)nanosleep(&pause, NULL);
    } else {
        give_up(b, error);
    }
}

/* Requests that were never started, or are lost with a ring that broke. */
static void fail_rest(struct batch *b)
{
    for (unsigned i = b->next; i < b->n; i++)
        b->results[i] = b->failed;
    for (unsigned s = 0; s < b->nsync; s++)
        if (b->syncs[s].state != SYNC_DONE)
            b->sync_results[b->syncs[s].index] = b->failed;
    for (uint32_t k = 0; b->running > 0 && k < b->ring->max_inflight; k++) {
        const struct slot *slot = &b->ring->slots[k];

        if (slot->busy && !slot->sync)
            b->results[slot->request] = b->failed;
    }
}

/* The loop of all batches. Ends with nothing in flight, or with the ring marked as broken. */
static void run_batch(struct batch *b)
{
    unsigned waits = 0;

    for (;;) {
        unsigned want;
        int result;

        fill_window(b);
        if (b->running == 0)
            break;
        /* While there is more to start, a quarter of the window at a time keeps the device busy
         * with few system calls; at the end everything is waited for. */
        want = b->next < b->n || b->syncs_ready > 0 ? b->running / 4 : b->running;
        if (want == 0)
            want = 1;
        if (b->failed != 0) {
            if (!wait_for_one(b)) {
                b->ring->broken = (uint32_t)-b->failed;
                break;
            }
            (void)reap_batch(b);
            continue;
        }
        result = enter(b->ring, want, -1);
        if (result >= 0)
            waits = 0;
        if (reap_batch(b) == 0 && result < 0)
            submission_failed(b, result, &waits);
    }
    if (b->failed != 0)
        fail_rest(b);
    assert(b->ring->broken != 0 || inflight(b->ring) == 0);
}

/* What all batch helpers ask of the ring and of their common arguments. */
static int check_batch(const struct yr_ring *ring, unsigned n, unsigned flags, unsigned buffer)
{
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n > INT_MAX || (flags & ~(unsigned)BATCH_FLAGS) != 0)
        return -EINVAL;
    if ((flags & YR_FIXED_BUFFER) ? buffer >= ring->buffers : buffer != 0)
        return -EINVAL;
    if (ring->broken != 0)
        return -(int)ring->broken;
    return inflight(ring) == 0 ? 0 : -EBUSY;
}

static int check_fds(const struct yr_ring *ring, unsigned n, const int32_t *fds, unsigned flags)
{
    if (n > 0 && fds == NULL)
        return -EINVAL;
    if (flags & YR_FIXED_FILE)
        for (unsigned i = 0; i < n; i++)
            if (fds[i] < 0 || (uint32_t)fds[i] >= ring->files)
                return -EINVAL;
    return 0;
}

/* Lengths and offsets whose sum has no place in a file are refused before they wrap around. */
static int check_span(uint64_t addr, uint64_t len, uint64_t off)
{
    if (len > INT64_MAX || off > INT64_MAX || len > INT64_MAX - off)
        return -EINVAL;
    return addr == 0 && len > 0 ? -EINVAL : 0;
}

/* How much may run at once: every operation has an entry, a slot and a place to complete. */
static unsigned window_of(const struct yr_ring *ring, unsigned asked)
{
    unsigned window = ring->ring.sq.ring_entries;

    if (window > ring->max_inflight)
        window = ring->max_inflight;
    if (window > ring->ring.cq.ring_entries)
        window = ring->ring.cq.ring_entries;
    return asked > 0 && asked < window ? asked : window;
}

int yr_read_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                  const uint64_t *lens, const uint64_t *offs, int64_t *results, unsigned flags,
                  unsigned buffer)
{
    struct batch b;
    int error = check_batch(ring, n, flags, buffer);

    if (error == 0)
        error = check_fds(ring, n, fds, flags);
    if (error != 0 || n == 0)
        return error;
    if (addrs == NULL || lens == NULL || offs == NULL || results == NULL)
        return -EINVAL;
    for (unsigned i = 0; i < n; i++) {
        error = check_span(addrs[i], lens[i], offs[i]);
        if (error != 0)
            return error;
    }
    memset(results, 0, n * sizeof(*results));
    b = (struct batch){
        .ring = ring,
        .kind = YR_OP_READ,
        .flags = (uint8_t)flags,
        .buffer = (uint16_t)buffer,
        .n = n,
        .window = window_of(ring, 0),
        .fds = fds,
        .offs = offs,
        .addrs = addrs,
        .lens = lens,
        .results = results,
    };
    run_batch(&b);
    return 0;
}

static int compare_syncs(const void *left, const void *right)
{
    int32_t a = ((const struct sync *)left)->fd, b = ((const struct sync *)right)->fd;

    return (a > b) - (a < b);
}

/* The descriptors to be synced, sorted, with the number of writes that each waits for. */
static int make_syncs(struct batch *b, unsigned nsync, const int32_t *fds)
{
    if (nsync == 0)
        return 0;
    b->syncs = calloc(nsync, sizeof(*b->syncs));
    if (b->syncs == NULL)
        return -ENOMEM;
    b->nsync = nsync;
    for (unsigned s = 0; s < nsync; s++) {
        b->syncs[s].fd = fds[s];
        b->syncs[s].index = s;
    }
    qsort(b->syncs, nsync, sizeof(*b->syncs), compare_syncs);
    for (unsigned s = 1; s < nsync; s++)
        if (b->syncs[s].fd == b->syncs[s - 1].fd)
            return -EINVAL;
    for (unsigned i = 0; i < b->n; i++) {
        struct sync *sync = sync_of(b, b->fds[i]);

        if (sync != NULL)
            sync->waiting = ++sync->writes;
    }
    for (unsigned s = 0; s < nsync; s++)
        if (b->syncs[s].writes == 0)
            sync_ready(b, &b->syncs[s]);
    return 0;
}

static int check_writes(unsigned n, const uint64_t *offs, const uint32_t *first,
                        const uint64_t *addrs, const uint64_t *lens)
{
    for (unsigned i = 0; i < n; i++) {
        uint32_t from = first != NULL ? first[i] : i;
        uint32_t to = first != NULL ? first[i + 1] : i + 1;
        uint64_t total = 0;

        if (to < from)
            return -EINVAL;
        for (uint32_t k = from; k < to; k++) {
            if (check_span(addrs[k], lens[k], total) != 0)
                return -EINVAL;
            total += lens[k];
        }
        if (check_span(1, total, offs[i]) != 0)
            return -EINVAL;
    }
    return 0;
}

int yr_write_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *offs,
                   const uint32_t *first, const uint64_t *addrs, const uint64_t *lens,
                   int64_t *results, unsigned flags, unsigned buffer, unsigned nsync,
                   const int32_t *sync_fds, int32_t *sync_results)
{
    struct batch b;
    int error = check_batch(ring, n, flags, buffer);

    if (error == 0)
        error = check_fds(ring, n, fds, flags);
    if (error == 0)
        error = check_fds(ring, nsync, sync_fds, flags);
    if (error != 0)
        return error;
    if (n > 0 && (offs == NULL || addrs == NULL || lens == NULL || results == NULL))
        return -EINVAL;
    if (nsync > MAX_SYNCS || (nsync > 0 && sync_results == NULL))
        return -EINVAL;
    error = check_writes(n, offs, first, addrs, lens);
    if (error != 0)
        return error;
    b = (struct batch){
        .ring = ring,
        .kind = YR_OP_WRITE,
        .flags = (uint8_t)flags,
        .buffer = (uint16_t)buffer,
        .n = n,
        .window = window_of(ring, 0),
        .fds = fds,
        .offs = offs,
        .addrs = addrs,
        .lens = lens,
        .first = first,
        .results = results,
        .sync_results = sync_results,
    };
    error = make_syncs(&b, nsync, sync_fds);
    if (error == 0) {
        if (n > 0)
            memset(results, 0, n * sizeof(*results));
        run_batch(&b);
    }
    free(b.syncs);
    return error;
}

int64_t yr_read_chunked(struct yr_ring *ring, int32_t fd, uint64_t addr, uint64_t len,
                        uint64_t off, uint64_t chunk, unsigned window, unsigned flags,
                        unsigned buffer)
{
    struct batch b;
    uint64_t count;
    int64_t total = 0;
    int error = check_batch(ring, 1, flags, buffer);

    if (error == 0)
        error = check_fds(ring, 1, &fd, flags);
    if (error == 0)
        error = check_span(addr, len, off);
    if (error == 0 && (chunk == 0 || chunk > YR_MAX_IO))
        error = -EINVAL;
    if (error != 0 || len == 0)
        return error;
    count = (len - 1) / chunk + 1;
    if (count > INT_MAX)
        return -EINVAL;
    b = (struct batch){
        .ring = ring,
        .kind = YR_OP_READ,
        .flags = (uint8_t)flags,
        .buffer = (uint16_t)buffer,
        .n = (unsigned)count,
        .window = window_of(ring, window),
        .fds = &fd,
        .offs = &off,
        .addrs = &addr,
        .lens = &len,
        .chunk = chunk,
        .results = calloc((size_t)count, sizeof(int64_t)),
    };
    if (b.results == NULL)
        return -ENOMEM;
    run_batch(&b);
    for (unsigned i = 0; i < b.n; i++) {
        if (b.results[i] < 0) {
            total = b.results[i];
            break;
        }
        total += b.results[i];
        if ((uint64_t)b.results[i] < span_of(&b, i).len)
            break;
    }
    free(b.results);
    return total;
}

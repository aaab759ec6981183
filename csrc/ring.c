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

#define MAX_DEPTH 32768u
#define MAX_INFLIGHT (1u << 20)
#define MAX_BUFFERS 64u
#define MAX_FILES 32768u
#define MAX_RULES 16u
#define MAX_RETRIES 16u
#define MAX_WAITS 10u /* 1 ms, 2 ms, ... about one second in all */
#define REAP_AT_ONCE 64u

/* One operation before it becomes a submission entry. Which fields are used depends on `op`. */
struct operation {
    uint8_t op;
    uint8_t flags; /* YR_FIXED_FILE, YR_FIXED_BUFFER */
    uint16_t buffer;
    int32_t fd; /* or the directory that `path` begins at */
    bool async; /* straight to a kernel worker, no attempt in place */
    uint32_t len;
    void *memory;
    uint64_t off;
    const char *path;
    int32_t new_fd; /* renaming: the directory that `new_path` begins at */
    const char *new_path;
    int arg; /* mode of a new directory, flags of unlinking */
};

/* What is remembered of an operation in flight. The kernel only sees the slot's number. */
struct slot {
    uint64_t user_data; /* the caller's; in batches the number of the request */
    uint32_t next_free;
    uint32_t asked; /* batches: bytes that this operation transfers if it is not short */
    int32_t result; /* the injected one, if `replaced` */
    uint8_t op;
    uint8_t retries;
    bool busy;
    bool replaced;
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
    uint32_t buffers; /* registered ones */
    uint32_t files;   /* places for registered ones */
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

/* gettid(), by its system call: only newer C libraries have the function. */
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

/* Errors of io_uring_enter that go away once something has completed. */
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

/* -- slots --------------------------------------------------------------------------------- */

static uint64_t tag_of(const struct yr_ring *ring, const struct slot *slot)
{
    return (uint64_t)(slot - ring->slots);
}

static struct slot *slot_of_tag(const struct yr_ring *ring, uint64_t tag)
{
    assert(tag < ring->max_inflight && ring->slots[tag].busy);
    return &ring->slots[tag];
}

/* The caller has made sure that a slot is free. */
static struct slot *slot_take(struct yr_ring *ring, uint64_t user_data)
{
    struct slot *slot = &ring->slots[ring->first_free];

    assert(ring->free_count > 0 && !slot->busy);
    ring->first_free = slot->next_free;
    ring->free_count--;
    *slot = (struct slot){.user_data = user_data, .busy = true};
    return slot;
}

static void slot_release(struct yr_ring *ring, struct slot *slot)
{
    assert(slot->busy);
    slot->busy = false;
    slot->next_free = ring->first_free;
    ring->first_free = (uint32_t)(slot - ring->slots);
    ring->free_count++;
    assert(ring->free_count <= ring->max_inflight);
}

/* -- injection ----------------------------------------------------------------------------- */

static bool rule_matches(const struct rule *rule, uint8_t op)
{
    return rule->op == op || (rule->op == YR_OP_ANY && op != YR_OP_SUBMIT);
}

/* Every matching rule counts down, so that rules do not affect each other; the first one that is due acts. */
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

int yr_inject(struct yr_ring *ring, unsigned op, uint64_t skip, uint64_t count, int32_t result, int instead)
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
    if (slot->replaced)
        return slot->result;
    if (!injected(ring, slot->op, false, &other))
        return result;
    if (other < 0)
        return other;
    return result >= 0 && other < result ? other : result;
}

/* -- creating and freeing ------------------------------------------------------------------ */

/* Sets of flags for the kernel, the best first. No flags are tried that were not asked for. */
static unsigned setup_candidates(uint32_t flags, unsigned *sets)
{
    const unsigned coop = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    unsigned single = flags & YR_ONE_THREAD ? IORING_SETUP_SINGLE_ISSUER : 0;
    unsigned polled = flags & YR_SQPOLL ? IORING_SETUP_SQPOLL : 0;
    unsigned count = 0;

    if (polled) {
        sets[count++] = polled | single;
    } else {
        if (single) {
            sets[count++] = single | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
            sets[count++] = single | coop;
        }
        sets[count++] = coop;
        sets[count++] = 0;
    }
    for (unsigned i = 0; i < count; i++)
        sets[i] |= IORING_SETUP_SUBMIT_ALL; /* which only saves system calls */
    sets[count++] = polled;
    return count;
}

/* Really make a ring: the only probe that containers, sysctls and limits cannot fool. */
static int setup_ring(struct yr_ring *ring, uint32_t depth, uint32_t flags)
{
    unsigned sets[8];
    unsigned count = setup_candidates(flags, sets);
    int result = -EINVAL;

    for (unsigned i = 0; i < count && result == -EINVAL; i++) {
        struct io_uring_params params = {.flags = sets[i]};

        result = io_uring_queue_init_params(depth, &ring->ring, &params);
        ring->setup_flags = params.flags;
    }
    return result;
}

/* Asks which operations the kernel has; one that can't be asked (before 5.6) has none of use here. */
static int probe_ring(struct yr_ring *ring)
{
    static const uint8_t opcodes[YR_OP_COUNT] = {
        [YR_OP_NOP] = IORING_OP_NOP,           [YR_OP_READ] = IORING_OP_READ,
        [YR_OP_WRITE] = IORING_OP_WRITE,       [YR_OP_FDATASYNC] = IORING_OP_FSYNC,
        [YR_OP_MKDIRAT] = IORING_OP_MKDIRAT,   [YR_OP_RENAMEAT] = IORING_OP_RENAMEAT,
        [YR_OP_UNLINKAT] = IORING_OP_UNLINKAT,
    };
    struct io_uring_probe *probe = io_uring_get_probe_ring(&ring->ring);

    if (probe == NULL)
        return -EOPNOTSUPP;
    for (unsigned op = 0; op < YR_OP_COUNT; op++)
        ring->supported[op] = io_uring_opcode_supported(probe, opcodes[op]) != 0;
    io_uring_free_probe(probe);
    return 0;
}

static int make_slots(struct yr_ring *ring, uint32_t count)
{
    ring->slots = calloc(count, sizeof(*ring->slots));
    if (ring->slots == NULL)
        return -ENOMEM;
    ring->max_inflight = ring->free_count = count;
    for (uint32_t i = 0; i < count; i++)
        ring->slots[i].next_free = i + 1;
    return 0;
}

static int open_ring(struct yr_ring *ring, uint32_t depth, uint32_t max_inflight, uint32_t flags)
{
    int error;

    ring->pid = getpid();
    ring->tid = thread_id();
    ring->event_fd = -1;
    error = setup_ring(ring, depth, flags);
    if (error != 0)
        return error;
    error = probe_ring(ring);
    if (error == 0)
        error = make_slots(ring, max_inflight);
    if (error != 0) {
        io_uring_queue_exit(&ring->ring);
        return error;
    }
    /* Saves looking the descriptor up in each call, but belongs to one thread. */
    if (ring->setup_flags & IORING_SETUP_SINGLE_ISSUER)
        (void)io_uring_register_ring_fd(&ring->ring);
    return 0;
}

int yr_create(struct yr_ring **result, uint32_t depth, uint32_t max_inflight, uint32_t flags)
{
    struct yr_ring *ring;
    int error;

    if (result == NULL || depth == 0 || depth > MAX_DEPTH)
        return -EINVAL;
    if (max_inflight == 0 || max_inflight > MAX_INFLIGHT || (flags & ~(YR_ONE_THREAD | YR_SQPOLL)) != 0)
        return -EINVAL;
    *result = NULL;
    ring = calloc(1, sizeof(*ring));
    if (ring == NULL)
        return -ENOMEM;
    error = open_ring(ring, depth, max_inflight, flags);
    if (error != 0)
        free(ring);
    else
        *result = ring;
    return error;
}

int yr_destroy(struct yr_ring *ring, int force)
{
    if (ring == NULL)
        return 0;
    if (inflight(ring) > 0 && getpid() == ring->pid && !force)
        return -EBUSY;
    /* For another process's ring this only undoes our own mappings and closes our own descriptors. */
    io_uring_queue_exit(&ring->ring);
    if (ring->event_fd >= 0)
        close(ring->event_fd);
    free(ring->slots);
    free(ring);
    return 0;
}

/* -- what a ring tells and can be told ------------------------------------------------------- */

int yr_info(const struct yr_ring *ring, struct yr_info *info)
{
    if (ring == NULL || info == NULL)
        return -EINVAL;
    *info = ring->counters;
    info->setup_flags = ring->setup_flags;
    info->sq_entries = ring->ring.sq.ring_entries;
    info->cq_entries = ring->ring.cq.ring_entries;
    info->max_inflight = ring->max_inflight;
    info->inflight = inflight(ring);
    info->queued = io_uring_sq_ready(&ring->ring);
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

/* -- registered buffers and files ---------------------------------------------------------- */

int yr_buffers_register(struct yr_ring *ring, unsigned n, const uint64_t *addrs, const uint64_t *lens)
{
    struct iovec vector[MAX_BUFFERS];
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n == 0 || n > MAX_BUFFERS || addrs == NULL || lens == NULL)
        return -EINVAL;
    if (ring->buffers != 0)
        return -EBUSY;
    for (unsigned i = 0; i < n; i++)
        vector[i] = (struct iovec){pointer(addrs[i]), (size_t)lens[i]};
    error = io_uring_register_buffers(&ring->ring, vector, n);
    if (error == 0)
        ring->buffers = n;
    return error;
}

int yr_files_register(struct yr_ring *ring, unsigned count)
{
    int *fds;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (count == 0 || count > MAX_FILES)
        return -EINVAL;
    if (ring->files != 0)
        return -EBUSY;
    fds = malloc(count * sizeof(*fds));
    if (fds == NULL)
        return -ENOMEM;
    memset(fds, 0xff, count * sizeof(*fds)); /* -1: an empty place, also before 5.19 made such tables */
    error = io_uring_register_files(&ring->ring, fds, count);
    free(fds);
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

/* -- entering the kernel --------------------------------------------------------------------- */

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

/* The only place that submits: it counts the calls, and tests can make them fail. */
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
    if (after < before) /* liburing's own timeout operation on old kernels is not counted */
        ring->counters.submitted += before - after;
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
    if (count > inflight(ring)) /* never wait for more than can come */
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
    /* If the same call has submitted something, a signal looks like a timeout. */
    if (result < 0 && result != -ETIME && result != -EINTR && ready == 0)
        return result;
    return (int)ready;
}

/* -- queueing -------------------------------------------------------------------------------- */

/* The operation's own part of a submission entry. */
static void prepare(struct io_uring_sqe *sqe, const struct operation *op)
{
    bool fixed = (op->flags & YR_FIXED_BUFFER) != 0;

    switch (op->op) {
    case YR_OP_READ:
        if (fixed)
            io_uring_prep_read_fixed(sqe, op->fd, op->memory, op->len, op->off, op->buffer);
        else
            io_uring_prep_read(sqe, op->fd, op->memory, op->len, op->off);
        break;
    case YR_OP_WRITE:
        if (fixed)
            io_uring_prep_write_fixed(sqe, op->fd, op->memory, op->len, op->off, op->buffer);
        else
            io_uring_prep_write(sqe, op->fd, op->memory, op->len, op->off);
        break;
    case YR_OP_FDATASYNC:
        io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
        break;
    case YR_OP_MKDIRAT:
        io_uring_prep_mkdirat(sqe, op->fd, op->path, (mode_t)op->arg);
        break;
    case YR_OP_RENAMEAT:
        io_uring_prep_renameat(sqe, op->fd, op->path, op->new_fd, op->new_path, 0);
        break;
    case YR_OP_UNLINKAT:
        io_uring_prep_unlinkat(sqe, op->fd, op->path, op->arg);
        break;
    default:
        assert(op->op == YR_OP_NOP);
        io_uring_prep_nop(sqe);
        break;
    }
    io_uring_sqe_set_flags(sqe, (op->flags & YR_FIXED_FILE ? IOSQE_FIXED_FILE : 0u) |
                                    (op->async ? IOSQE_ASYNC : 0u));
}

/* The next submission entry; the caller has made sure that there is one. A polling kernel may post
 * completions a moment before it gives back the entries of those operations: then wait for these. */
static struct io_uring_sqe *next_entry(struct yr_ring *ring)
{
    struct io_uring_sqe *sqe;

    while ((sqe = io_uring_get_sqe(&ring->ring)) == NULL) {
        assert(ring->setup_flags & IORING_SETUP_SQPOLL);
        (void)io_uring_sqring_wait(&ring->ring);
        (void)sched_yield(); /* if the kernel did not wait: it sees room, not knowing yet what is queued */
    }
    return sqe;
}

/* Fills the next submission entry for `slot`. */
static void fill_entry(struct yr_ring *ring, struct slot *slot, const struct operation *op)
{
    struct io_uring_sqe *sqe = next_entry(ring);

    slot->op = op->op;
    slot->replaced = ring->rule_count > 0 && injected(ring, op->op, true, &slot->result);
    if (slot->replaced)
        io_uring_prep_nop(sqe);
    else
        prepare(sqe, op);
    io_uring_sqe_set_data64(sqe, tag_of(ring, slot));
}

/* Whether there is room for one more operation; submits what is queued if that makes room. */
static bool has_room(struct yr_ring *ring)
{
    if (ring->free_count == 0)
        return false;
    if (io_uring_sq_space_left(&ring->ring) == 0)
        (void)yr_submit(ring);
    return io_uring_sq_space_left(&ring->ring) > 0;
}

/* Reads as the caller gives them, one a row. */
struct columns {
    const int32_t *fds;
    const uint64_t *addrs;
    const uint32_t *lens;
    const uint64_t *offs;
    const uint8_t *flags;    /* NULL: none */
    const uint16_t *buffers; /* NULL: the first */
};

static struct operation read_of(const struct columns *columns, unsigned i)
{
    return (struct operation){
        .op = YR_OP_READ,
        .flags = columns->flags != NULL ? columns->flags[i] : 0,
        .buffer = columns->buffers != NULL ? columns->buffers[i] : 0,
        .fd = columns->fds[i],
        .memory = pointer(columns->addrs[i]),
        .len = columns->lens[i],
        .off = columns->offs[i],
    };
}

static bool read_is_sound(const struct yr_ring *ring, const struct operation *read)
{
    if ((read->flags & ~(YR_FIXED_FILE | YR_FIXED_BUFFER)) != 0)
        return false;
    if ((read->flags & YR_FIXED_FILE) && (read->fd < 0 || (uint32_t)read->fd >= ring->files))
        return false;
    if ((read->flags & YR_FIXED_BUFFER) && read->buffer >= ring->buffers)
        return false;
    return read->len <= YR_MAX_IO && read->off <= INT64_MAX && (read->memory != NULL || read->len == 0);
}

int yr_queue_reads(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                   const uint32_t *lens, const uint64_t *offs, const uint64_t *user_data,
                   const uint8_t *flags, const uint16_t *buffers)
{
    const struct columns columns = {fds, addrs, lens, offs, flags, buffers};
    struct operation read;
    unsigned done;
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (n > INT_MAX || !fds || !addrs || !lens || !offs || !user_data)
        return -EINVAL;
    /* Refuse everything that is known to be wrong before anything is queued. */
    for (unsigned i = 0; i < n; i++) {
        read = read_of(&columns, i);
        if (!read_is_sound(ring, &read))
            return -EINVAL;
    }
    for (done = 0; done < n && has_room(ring); done++) {
        read = read_of(&columns, done);
        fill_entry(ring, slot_take(ring, user_data[done]), &read);
    }
    return (int)done;
}

/* -- reaping --------------------------------------------------------------------------------- */

/* Looks at completions without taking them; enters the kernel only where that is needed. */
static unsigned peek(struct yr_ring *ring, struct io_uring_cqe **cqes, unsigned max)
{
    if (IO_URING_READ_ONCE(*ring->ring.sq.kflags) & IORING_SQ_CQ_OVERFLOW)
        ring->counters.overflows++;
    return io_uring_peek_batch_cqe(&ring->ring, cqes, max);
}

/* liburing's own timeouts (kernels before 5.11) complete in our queue. */
static bool is_foreign(uint64_t tag)
{
    return tag == LIBURING_UDATA_TIMEOUT;
}

/* Read it empty before reaping, so that later completions wake the loop again. First let the kernel
 * complete what is due: that signals too, and if it came later, an empty round of the loop would follow
 * each one. */
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

int yr_reap(struct yr_ring *ring, unsigned max, uint64_t *user_data, int32_t *results)
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

            if (is_foreign(cqes[i]->user_data))
                continue;
            slot = slot_of_tag(ring, cqes[i]->user_data);
            user_data[done] = slot->user_data;
            results[done] = filter_result(ring, slot, cqes[i]->res);
            slot_release(ring, slot);
            ring->counters.completed++;
            done++;
        }
        io_uring_cq_advance(&ring->ring, found);
    }
    return (int)done;
}

/* -- trying out ------------------------------------------------------------------------------ */

/* Operations that need the ring for themselves want it idle and sound, and supported by the kernel. */
static int check_idle(const struct yr_ring *ring, uint8_t op)
{
    int error = check_owner(ring);

    if (error != 0)
        return error;
    if (!ring->supported[op])
        return -EOPNOTSUPP;
    if (ring->broken != 0)
        return -(int)ring->broken;
    return inflight(ring) == 0 ? 0 : -EBUSY;
}

int yr_try_out(struct yr_ring *ring, int64_t timeout_ns)
{
    const struct operation nothing = {.op = YR_OP_NOP, .fd = -1};
    uint64_t user_data;
    int32_t result;
    int found = check_idle(ring, YR_OP_NOP);

    if (found != 0)
        return found;
    fill_entry(ring, slot_take(ring, 0), &nothing);
    found = yr_wait(ring, 1, timeout_ns);
    if (found == 1)
        found = yr_reap(ring, 1, &user_data, &result);
    if (found == 1)
        return result;
    return found < 0 ? found : -ETIME;
}

/* -- whole batches --------------------------------------------------------------------------- */

/* Requests in columns; each takes one operation, or more if a transfer is short. */
struct batch {
    struct yr_ring *ring;
    uint8_t op;
    int32_t buffer; /* the registered one that all memory lies in, or -1 */
    unsigned n;
    unsigned window;
    unsigned next;    /* first request not started */
    unsigned running; /* operations in flight */
    int failed;       /* the ring's error, after which nothing more is started */
    const int32_t *fds;
    const uint64_t *addrs; /* these three: transfers only */
    const uint64_t *lens;
    const uint64_t *offs;
    const struct operation *alone; /* instead of columns: the one request */
    int64_t *results;              /* bytes so far, then the result */
};

/* The operation for the rest of request `i`. */
static struct operation rest_of(const struct batch *b, unsigned i)
{
    uint64_t done = (uint64_t)b->results[i], rest;
    struct operation op = {.op = b->op};

    if (b->alone != NULL)
        return *b->alone;
    op.fd = b->fds[i];
    if (b->lens == NULL)
        return op;
    rest = b->lens[i] - done;
    assert(rest > 0);
    op.memory = pointer(b->addrs[i] + done);
    op.len = (uint32_t)(rest < YR_MAX_IO ? rest : YR_MAX_IO);
    op.off = b->offs[i] + done;
    if (b->buffer >= 0) {
        op.flags = YR_FIXED_BUFFER;
        op.buffer = (uint16_t)b->buffer;
    }
    return op;
}

/* Queue what is left of the request in `slot`. */
static void start_rest(struct batch *b, struct slot *slot)
{
    struct operation op = rest_of(b, (unsigned)slot->user_data);

    slot->asked = op.len;
    /* After repeated failures to do it without waiting, a worker has to wait for it. */
    op.async = slot->retries > 1;
    fill_entry(b->ring, slot, &op);
}

/* Start as much as the window allows, for which there are always slots and entries. */
static void fill_window(struct batch *b)
{
    while (b->failed == 0 && b->running < b->window && b->next < b->n) {
        unsigned i = b->next++;

        if (b->lens != NULL && b->lens[i] == 0)
            continue; /* its result is 0 already */
        b->running++;
        start_rest(b, slot_take(b->ring, i));
    }
}

/* Whether to repeat a failed operation; also a write that makes no progress. */
static bool again(struct batch *b, struct slot *slot, int32_t result)
{
    bool passes = result == 0 || result == -EINTR || result == -EAGAIN || result == -ECANCELED;

    if (!passes || slot->retries == MAX_RETRIES)
        return false;
    slot->retries++;
    b->ring->counters.retried++;
    return true;
}

/* Count transferred bytes. True if the request has more to transfer. */
static bool resumes(struct batch *b, struct slot *slot, int32_t result)
{
    unsigned i = (unsigned)slot->user_data;

    b->results[i] += result;
    assert((uint32_t)result <= slot->asked && (uint64_t)b->results[i] <= b->lens[i]);
    if ((uint64_t)b->results[i] == b->lens[i])
        return false;
    slot->retries = 0;
    b->ring->counters.resumed++;
    return true;
}

/* An operation has completed: finish its request, go on with it, or repeat the operation. */
static void operation_done(struct batch *b, struct slot *slot, int32_t result)
{
    int64_t *outcome = &b->results[slot->user_data];
    bool more;

    if (result > 0)
        more = resumes(b, slot, result);
    else if (result == 0 && slot->op != YR_OP_WRITE)
        more = false; /* the end of the file, or done */
    else
        more = again(b, slot, result);
    if (more && b->failed == 0) {
        start_rest(b, slot);
        return;
    }
    if (more)
        *outcome = b->failed;
    else if (result < 0)
        *outcome = result;
    else if (result == 0 && slot->op == YR_OP_WRITE)
        *outcome = -EIO;
    slot_release(b->ring, slot);
    b->running--;
}

/* Take every completion that is there. Returns how many. */
static unsigned reap_batch(struct batch *b)
{
    struct io_uring_cqe *cqes[REAP_AT_ONCE];
    unsigned found, total = 0;

    while ((found = peek(b->ring, cqes, REAP_AT_ONCE)) > 0) {
        for (unsigned i = 0; i < found; i++) {
            struct slot *slot;

            if (is_foreign(cqes[i]->user_data))
                continue;
            slot = slot_of_tag(b->ring, cqes[i]->user_data);
            b->ring->counters.completed++;
            operation_done(b, slot, filter_result(b->ring, slot, cqes[i]->res));
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
        uint64_t tag = sq->sqes[at & sq->ring_mask].user_data;
        struct slot *slot;

        if (is_foreign(tag))
            continue;
        slot = slot_of_tag(b->ring, tag);
        b->results[slot->user_data] = b->failed;
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

/* Start nothing more. The ring is given up only if operations stay with the kernel for good. */
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
    } else if (b->running > queued) { /* running operations will make room */
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

/* Fail the requests that were never started, or are lost with a broken ring. */
static void fail_rest(struct batch *b)
{
    for (unsigned i = b->next; i < b->n; i++)
        b->results[i] = b->failed;
    for (uint32_t k = 0; b->running > 0 && k < b->ring->max_inflight; k++)
        if (b->ring->slots[k].busy)
            b->results[b->ring->slots[k].user_data] = b->failed;
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
        /* While there is more to start, waiting for a quarter of the window keeps the device busy
         * with few system calls; at the end, wait for everything. */
        want = b->next < b->n ? b->running / 4 : b->running;
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

/* How many may run at once: each operation needs an entry, a slot and a place for its completion. */
static unsigned window_of(const struct yr_ring *ring)
{
    unsigned window = ring->ring.sq.ring_entries;

    if (window > ring->max_inflight)
        window = ring->max_inflight;
    return window < ring->ring.cq.ring_entries ? window : ring->ring.cq.ring_entries;
}

/* Checks the ring, and the arguments that all batches have in common. */
static int check_batch(const struct batch *b)
{
    int error = check_idle(b->ring, b->op);

    if (error != 0 || b->n == 0)
        return error;
    return b->n > INT_MAX || b->fds == NULL || b->results == NULL ? -EINVAL : 0;
}

/* Refuses lengths and offsets whose sum is beyond any file, before they wrap around. */
static bool span_is_sound(uint64_t addr, uint64_t len, uint64_t off)
{
    return len <= INT64_MAX && off <= INT64_MAX - len && (addr != 0 || len == 0);
}

static int check_transfers(const struct batch *b)
{
    int error = check_batch(b);

    if (error != 0)
        return error;
    if (b->buffer < -1 || (b->buffer >= 0 && (uint32_t)b->buffer >= b->ring->buffers))
        return -EINVAL;
    if (b->n > 0 && (b->addrs == NULL || b->lens == NULL || b->offs == NULL))
        return -EINVAL;
    for (unsigned i = 0; i < b->n; i++)
        if (!span_is_sound(b->addrs[i], b->lens[i], b->offs[i]))
            return -EINVAL;
    return 0;
}

/* A batch whose arguments were found to be `error`. */
static int run_checked(struct batch *b, int error)
{
    if (error != 0 || b->n == 0)
        return error;
    memset(b->results, 0, b->n * sizeof(*b->results));
    b->window = window_of(b->ring);
    run_batch(b);
    return 0;
}

int yr_read_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                  const uint64_t *lens, const uint64_t *offs, int64_t *results, int32_t buffer)
{
    struct batch b = {
        .ring = ring,
        .op = YR_OP_READ,
        .buffer = buffer,
        .n = n,
        .fds = fds,
        .addrs = addrs,
        .lens = lens,
        .offs = offs,
        .results = results,
    };

    return run_checked(&b, check_transfers(&b));
}

int yr_write_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, const uint64_t *addrs,
                   const uint64_t *lens, const uint64_t *offs, int64_t *results, int32_t buffer)
{
    struct batch b = {
        .ring = ring,
        .op = YR_OP_WRITE,
        .buffer = buffer,
        .n = n,
        .fds = fds,
        .addrs = addrs,
        .lens = lens,
        .offs = offs,
        .results = results,
    };

    return run_checked(&b, check_transfers(&b));
}

int yr_sync_batch(struct yr_ring *ring, unsigned n, const int32_t *fds, int64_t *results)
{
    struct batch b = {.ring = ring, .op = YR_OP_FDATASYNC, .n = n, .fds = fds, .results = results};

    return run_checked(&b, check_batch(&b));
}

/* -- paths ----------------------------------------------------------------------------------- */

/* A batch of one: it waits, so the caller's strings are there for as long as they are needed. */
static int run_alone(struct yr_ring *ring, const struct operation *op)
{
    int64_t result = 0;
    struct batch b = {.ring = ring, .op = op->op, .n = 1, .alone = op, .results = &result};
    int error = check_idle(ring, op->op);

    if (op->path == NULL || (op->op == YR_OP_RENAMEAT && op->new_path == NULL))
        error = -EINVAL;
    error = run_checked(&b, error);
    return error != 0 ? error : (int)result;
}

int yr_make_directory(struct yr_ring *ring, int32_t at, const char *path, uint32_t mode)
{
    const struct operation op = {.op = YR_OP_MKDIRAT, .fd = at, .path = path, .arg = (int)mode};

    return run_alone(ring, &op);
}

int yr_rename(struct yr_ring *ring, int32_t at, const char *path, int32_t new_at, const char *new_path)
{
    const struct operation op = {
        .op = YR_OP_RENAMEAT,
        .fd = at,
        .path = path,
        .new_fd = new_at,
        .new_path = new_path,
    };

    return run_alone(ring, &op);
}

int yr_unlink(struct yr_ring *ring, int32_t at, const char *path, int flags)
{
    const struct operation op = {.op = YR_OP_UNLINKAT, .fd = at, .path = path, .arg = flags};

    return run_alone(ring, &op);
}

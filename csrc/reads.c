/* The short reads of an event loop: what backends/reads.py does, compiled.
 *
 * It never touches a ring. It keeps the reads that wait, gives those that begin a slot of memory and
 * writes them down in the columns that yr_queue_reads() takes, and turns completions into results.
 * Every read that did not come back whole is handed to the Python code, which does it once more.
 *
 * A slot belongs to the kernel from the moment its read was queued until its completion was taken,
 * whatever becomes of the future meanwhile. Results are copies, and a slot is wiped before it is
 * used again. One thread uses it: that of the loop.
 */
#include "reads.h"

#include "layout.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define FIRST_ROOM 64u

struct read {
    PyObject *future; /* NULL in a slot that is free */
    uint64_t offset;
    uint32_t length;
    int32_t fd;
};

/* One read a row, as yr_queue_reads() takes them. */
struct columns {
    int32_t *files;
    uint64_t *addresses;
    uint32_t *lengths;
    uint64_t *offsets;
    uint64_t *numbers;
    uint8_t *flags;
    uint16_t *tables;
};

typedef struct {
    PyObject_HEAD
    unsigned char *memory; /* `slots` pieces of it, `stride` bytes apart; the owner keeps it alive */
    size_t stride;
    uint32_t slots, free_count, staged;
    uint32_t *free_slots; /* a stack */
    struct read *running; /* by slot */
    struct columns columns;
    struct read *waiting; /* a queue in a circle: the first at `head` */
    size_t room, head, count;
    PyObject *is_done, *is_cancelled, *set_result; /* names of methods */
} Reads;

static void *table_of(uint32_t count, size_t size)
{
    return PyMem_Calloc(count ? count : 1, size);
}

static void free_slots(Reads *self)
{
    struct columns *columns = &self->columns;
    PyMem_Free(self->free_slots);
    PyMem_Free(self->running);
    PyMem_Free(columns->files);
    PyMem_Free(columns->addresses);
    PyMem_Free(columns->lengths);
    PyMem_Free(columns->offsets);
    PyMem_Free(columns->numbers);
    PyMem_Free(columns->flags);
    PyMem_Free(columns->tables);
    self->free_slots = NULL;
    self->running = NULL;
    memset(columns, 0, sizeof *columns);
    self->slots = self->free_count = self->staged = 0;
}

static bool make_slots(Reads *self, uint32_t count, uint8_t flags)
{
    struct columns *columns = &self->columns;
    self->free_slots = table_of(count, sizeof *self->free_slots);
    self->running = table_of(count, sizeof *self->running);
    columns->files = table_of(count, sizeof *columns->files);
    columns->addresses = table_of(count, sizeof *columns->addresses);
    columns->lengths = table_of(count, sizeof *columns->lengths);
    columns->offsets = table_of(count, sizeof *columns->offsets);
    columns->numbers = table_of(count, sizeof *columns->numbers);
    columns->flags = table_of(count, sizeof *columns->flags);
    columns->tables = table_of(count, sizeof *columns->tables);
    if (!self->free_slots || !self->running || !columns->files || !columns->addresses || !columns->lengths ||
        !columns->offsets || !columns->numbers || !columns->flags || !columns->tables) {
        free_slots(self);
        PyErr_NoMemory();
        return false;
    }
    self->slots = self->free_count = count;
    for (uint32_t i = 0; i < count; i++)
        self->free_slots[i] = count - 1 - i;
    memset(columns->flags, flags, count);
    return true;
}

static uint32_t running_count(const Reads *self)
{
    return self->slots - self->free_count;
}

static struct read *waiting_at(const Reads *self, size_t i)
{
    return &self->waiting[(self->head + i) % self->room];
}

static PyObject *reads_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    (void)args, (void)keywords;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Reads *self = (Reads *)allocate(type, 0);
    if (!self)
        return NULL;
    self->is_done = PyUnicode_InternFromString("done");
    self->is_cancelled = PyUnicode_InternFromString("cancelled");
    self->set_result = PyUnicode_InternFromString("set_result");
    if (!self->is_done || !self->is_cancelled || !self->set_result) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int reads_traverse(Reads *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    for (uint32_t i = 0; i < self->slots; i++)
        Py_VISIT(self->running[i].future);
    for (size_t i = 0; i < self->count; i++)
        Py_VISIT(waiting_at(self, i)->future);
    return 0;
}

static int reads_clear(Reads *self)
{
    for (uint32_t i = 0; i < self->slots; i++)
        Py_CLEAR(self->running[i].future);
    while (self->count) {
        PyObject *future = waiting_at(self, --self->count)->future;
        Py_DECREF(future);
    }
    return 0;
}

static void reads_dealloc(Reads *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack(self);
    (void)reads_clear(self);
    free_slots(self);
    PyMem_Free(self->waiting);
    Py_XDECREF(self->is_done);
    Py_XDECREF(self->is_cancelled);
    Py_XDECREF(self->set_result);
    free_object(self);
    Py_DECREF(type);
}

/* -- slots ------------------------------------------------------------------------------------ */

static PyObject *reads_equip(Reads *self, PyObject *args)
{
    unsigned long long address;
    unsigned int stride, count;
    unsigned char flags;
    if (!PyArg_ParseTuple(args, "KIIb", &address, &stride, &count, &flags))
        return NULL;
    if (running_count(self)) {
        PyErr_SetString(PyExc_RuntimeError, "reads are under way");
        return NULL;
    }
    free_slots(self);
    if (!make_slots(self, count, flags))
        return NULL;
    self->memory = (unsigned char *)(uintptr_t)address;
    self->stride = stride;
    struct columns *columns = &self->columns;
    return Py_BuildValue("KKKKKKK", (unsigned long long)(uintptr_t)columns->files,
                         (unsigned long long)(uintptr_t)columns->addresses,
                         (unsigned long long)(uintptr_t)columns->lengths,
                         (unsigned long long)(uintptr_t)columns->offsets,
                         (unsigned long long)(uintptr_t)columns->numbers,
                         (unsigned long long)(uintptr_t)columns->flags,
                         (unsigned long long)(uintptr_t)columns->tables);
}

/* -- asking ----------------------------------------------------------------------------------- */

/* Make room for one more waiting read. */
static bool make_room(Reads *self)
{
    if (self->count < self->room)
        return true;
    size_t room = self->room ? 2 * self->room : FIRST_ROOM;
    struct read *waiting = PyMem_Calloc(room, sizeof *waiting);
    if (!waiting) {
        PyErr_NoMemory();
        return false;
    }
    for (size_t i = 0; i < self->count; i++)
        waiting[i] = *waiting_at(self, i);
    PyMem_Free(self->waiting);
    self->waiting = waiting;
    self->room = room;
    self->head = 0;
    return true;
}

static PyObject *reads_add(Reads *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "expected future, fd, length and offset");
        return NULL;
    }
    struct read read = {.future = args[0]};
    read.fd = (int32_t)PyLong_AsLong(args[1]);
    read.length = (uint32_t)PyLong_AsUnsignedLong(args[2]);
    read.offset = PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred() || !make_room(self))
        return NULL;
    Py_INCREF(read.future);
    *waiting_at(self, self->count++) = read;
    return PyLong_FromSize_t(self->count);
}

/* -- to the kernel ---------------------------------------------------------------------------- */

/* Whether `method` of `future` returns true. A failure counts as true: then nobody can be told anything. */
static bool says(PyObject *future, PyObject *method)
{
    PyObject *answer = PyObject_CallMethodObjArgs(future, method, NULL);
    if (!answer)
        PyErr_WriteUnraisable(future);
    bool yes = answer != Py_False;
    Py_XDECREF(answer);
    return yes;
}

static void stage_one(Reads *self, const struct read *read)
{
    struct columns *columns = &self->columns;
    uint32_t slot = self->free_slots[--self->free_count], row = self->staged++;
    self->running[slot] = *read;
    columns->files[row] = read->fd;
    columns->addresses[row] = (uint64_t)(uintptr_t)(self->memory + slot * self->stride);
    columns->lengths[row] = read->length;
    columns->offsets[row] = read->offset;
    columns->numbers[row] = OURS | slot;
}

static PyObject *reads_stage(Reads *self, PyObject *most)
{
    size_t room = PyLong_AsSize_t(most);
    if (PyErr_Occurred())
        return NULL;
    self->staged = 0;
    while (self->count && self->free_count && self->staged < room) {
        struct read read = *waiting_at(self, 0);
        self->head = (self->head + 1) % self->room;
        self->count--;
        if (says(read.future, self->is_cancelled))
            Py_DECREF(read.future);
        else
            stage_one(self, &read);
    }
    return PyLong_FromUnsignedLong(self->staged);
}

static PyObject *reads_unstage(Reads *self, PyObject *queued)
{
    size_t kept = PyLong_AsSize_t(queued);
    if (PyErr_Occurred())
        return NULL;
    while (self->staged > kept) {
        uint32_t slot = (uint32_t)(self->columns.numbers[self->staged - 1] & ~OURS);
        if (!make_room(self))
            return NULL;
        self->head = (self->head + self->room - 1) % self->room;
        self->count++;
        *waiting_at(self, 0) = self->running[slot];
        self->running[slot].future = NULL;
        self->free_slots[self->free_count++] = slot;
        self->staged--;
    }
    Py_INCREF(Py_None);
    return Py_None;
}

/* -- from the kernel -------------------------------------------------------------------------- */

static void deliver(Reads *self, PyObject *future, PyObject *data)
{
    if (says(future, self->is_done))
        return;
    PyObject *answer = PyObject_CallMethodObjArgs(future, self->set_result, data, NULL);
    if (!answer)
        PyErr_WriteUnraisable(future);
    Py_XDECREF(answer);
}

/* Take a read out of its slot, and wipe the slot. Returns the result if it is whole, else NULL. */
static PyObject *empty_slot(Reads *self, uint32_t slot, int32_t result)
{
    struct read *read = &self->running[slot];
    unsigned char *memory = self->memory + slot * self->stride;
    PyObject *data = NULL;
    if (result >= 0 && (uint32_t)result == read->length)
        data = PyBytes_FromStringAndSize((char *)memory, result);
    memset(memory, 0, read->length);
    read->future = NULL;
    self->free_slots[self->free_count++] = slot;
    return data;
}

static bool append(PyObject *list, PyObject *item)
{
    bool done = item && !PyList_Append(list, item);
    Py_XDECREF(item);
    return done;
}

static PyObject *reads_complete(Reads *self, PyObject *args)
{
    unsigned long long numbers_address, results_address;
    Py_ssize_t count;
    int wanted;
    if (!PyArg_ParseTuple(args, "KKnp", &numbers_address, &results_address, &count, &wanted))
        return NULL;
    const uint64_t *numbers = (const uint64_t *)(uintptr_t)numbers_address;
    const int32_t *results = (const int32_t *)(uintptr_t)results_address;
    PyObject *others = PyList_New(0);
    bool failed = !others;
    for (Py_ssize_t i = 0; i < count && !failed; i++) {
        uint32_t slot = (uint32_t)(numbers[i] & ~OURS);
        if (!(numbers[i] & OURS)) {
            failed = !append(others, Py_BuildValue("iK", (int)results[i], (unsigned long long)numbers[i]));
            continue;
        }
        if (slot >= self->slots || !self->running[slot].future)
            continue;
        struct read read = self->running[slot];
        PyObject *data = empty_slot(self, slot, results[i]);
        if (data && wanted) {
            deliver(self, read.future, data);
        } else if (!data) {
            PyErr_Clear(); /* no memory: read it again, as if it had come back in part */
            failed = !append(others,
                             Py_BuildValue("iOiIK", (int)results[i], read.future, (int)read.fd,
                                           (unsigned int)read.length, (unsigned long long)read.offset));
        }
        Py_XDECREF(data);
        Py_DECREF(read.future);
    }
    if (failed)
        Py_CLEAR(others);
    return others;
}

/* -- giving up -------------------------------------------------------------------------------- */

static PyObject *listed(const struct read *read)
{
    return Py_BuildValue("OiIK", read->future, (int)read->fd, (unsigned int)read->length,
                         (unsigned long long)read->offset);
}

static PyObject *reads_take_all(Reads *self, PyObject *unused)
{
    (void)unused;
    PyObject *all = PyList_New(0);
    bool failed = !all;
    for (uint32_t i = 0; i < self->slots && !failed; i++)
        failed = self->running[i].future && !append(all, listed(&self->running[i]));
    for (size_t i = 0; i < self->count && !failed; i++)
        failed = !append(all, listed(waiting_at(self, i)));
    if (failed) {
        Py_CLEAR(all);
        return NULL;
    }
    (void)reads_clear(self);
    free_slots(self);
    return all;
}

static PyObject *get_running(Reads *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(running_count(self));
}

static PyObject *get_waiting(Reads *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(self->count);
}

static PyMethodDef methods[] = {
    {"equip", (PyCFunction)reads_equip, METH_VARARGS,
     "equip(address, stride, count, flags)\n--\n\nGive it memory for so many reads at once. "
     "The addresses of the columns, in the order of yr_queue_reads()."},
    {"add", (PyCFunction)(void (*)(void))reads_add, METH_FASTCALL,
     "add(future, fd, length, offset)\n--\n\nOne more read that waits. How many do."},
    {"stage", (PyCFunction)reads_stage, METH_O,
     "stage(most)\n--\n\nWrite the next reads into the columns; how many. Cancelled ones are dropped."},
    {"unstage", (PyCFunction)reads_unstage, METH_O,
     "unstage(queued)\n--\n\nOnly so many of them were queued: the others wait again, in their order."},
    {"complete", (PyCFunction)reads_complete, METH_VARARGS,
     "complete(numbers, results, count, wanted)\n--\n\nTake completions from two arrays at these addresses, and set "
     "results if they are still wanted.\nA list of the others: (result, number) of reads that are not of this "
     "object,\n(result, future, fd, length, offset) of those that are not whole."},
    {"take_all", (PyCFunction)reads_take_all, METH_NOARGS,
     "(future, fd, length, offset) of all reads under way, then of those that wait; none are left."},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef attributes[] = {{"running", (getter)get_running, NULL, "How many are the kernel's.", NULL},
                                   {"waiting", (getter)get_waiting, NULL, "How many have not begun.", NULL},
                                   {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot slots[] = {{Py_tp_new, reads_new},
                              {Py_tp_dealloc, reads_dealloc},
                              {Py_tp_traverse, reads_traverse},
                              {Py_tp_clear, reads_clear},
                              {Py_tp_methods, methods},
                              {Py_tp_getset, attributes},
                              {0, NULL}};

static PyType_Spec spec = {
    .name = "yatagarasu_cache._core.Reads",
    .basicsize = sizeof(Reads),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

PyObject *yc_reads_type(void)
{
    return PyType_FromSpec(&spec);
}

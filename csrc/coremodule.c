/* The core as the Python module yatagarasu_cache._core. core.py says what its methods are for.
 *
 * Written against the stable interface of CPython and not through cffi: a value is read straight
 * into the `bytes` that is returned, which saves a copy and half of the cost of a call.
 * No formats with '#' and no Py_RETURN_...: their meaning depends on the headers, which may be newer
 * than the interpreter.
 */
#include <Python.h>

#include "core.h"
#include "pack.h"
#include "reads.h"
#include "walk.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined Py_LIMITED_API && Py_LIMITED_API + 0 < 0x030b0000
/* Part of the stable interface from CPython 3.11 on; 3.10 has them, and the same structure, as well. */
typedef struct {
    void *buf;
    PyObject *obj;
    Py_ssize_t len, itemsize;
    int readonly, ndim;
    char *format;
    Py_ssize_t *shape, *strides, *suboffsets;
    void *internal;
} Py_buffer;
PyAPI_FUNC(int) PyObject_GetBuffer(PyObject *object, Py_buffer *buffer, int flags);
PyAPI_FUNC(void) PyBuffer_Release(Py_buffer *buffer);
#define PyBUF_SIMPLE 0
#define PyBUF_WRITABLE 1
#endif

/* Up to this length a value in the page cache is read while holding the interpreter's lock: releasing
 * it and acquiring it again costs more, and beside a busy thread very much more. */
#define SHORT_VALUE 32768u
#define PREFETCHED 256 /* reads of a batch that are announced to the disk beforehand */
#define SHOWN 512 /* entries that one step of a walk gives at most */
#define NUMBER_KEY 9   /* bytes of an encoded key that is a number: its type, and eight */
#define HUGE_PAGES ((uintptr_t)2 << 20) /* memory for long values is asked for in these */

/* A view and what it keeps alive. Counted, because calls give up the interpreter's lock. */
struct mapping {
    struct yc_view view;
    size_t size;
    int64_t looked;
    PyObject *files, *path, *lock_path;
    unsigned users;
    bool no_nowait; /* this file system can't tell whether a read would wait */
};

typedef struct {
    PyObject_HEAD
    struct mapping *mapping;
    unsigned long long hits, misses; /* since they were last asked for */
    unsigned long long due;          /* `tell` is called at so many of both, */
    unsigned long long told;         /* or USES_NANOSECONDS after this time */
    PyObject *tell;                  /* or NULL */
    unsigned long long owner;        /* the owner of the segment that is appended to */
} Core;

/* A byte of a page that the kernel wipes in children: 0 there, until everything is renewed. If the kernel
 * can't do that, the process id tells. One for the process, not for each interpreter. */
static volatile unsigned char *ours;
static pid_t process;

static void begin_process(void)
{
    process = getpid();
#ifdef MADV_WIPEONFORK
    if (!ours) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        void *map = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED)
            return;
        /* An emulator may accept any advice, even one that does not exist. */
        if (madvise(map, page, -1) == 0 || madvise(map, page, MADV_WIPEONFORK))
            munmap(map, page);
        else
            ours = map;
    }
    if (ours)
        *ours = 1;
#endif
}

/* True in a child whose parent forked without Python's hooks: what was opened is the parent's. */
static inline bool is_forked(void)
{
    return ours ? !*ours : getpid() != process;
}

static PyObject *another(PyObject *object)
{
    Py_INCREF(object);
    return object;
}

static bool bytes_of(PyObject *object, const void **bytes, Py_ssize_t *length)
{
    char *start;
    if (PyBytes_AsStringAndSize(object, &start, length))
        return false;
    *bytes = start;
    return true;
}

static struct mapping *new_mapping(void)
{
    struct mapping *mapping = PyMem_Calloc(1, sizeof *mapping);
    if (mapping)
        mapping->users = 1;
    else
        PyErr_NoMemory();
    return mapping;
}

static void release(struct mapping *mapping)
{
    if (!mapping || --mapping->users)
        return;
    if (mapping->view.map)
        munmap(mapping->view.map, mapping->size);
    Py_XDECREF(mapping->files);
    Py_XDECREF(mapping->path);
    Py_XDECREF(mapping->lock_path);
    PyMem_Free(mapping);
}

static void replace_mapping(Core *self, struct mapping *mapping)
{
    struct mapping *old = self->mapping;
    self->mapping = mapping;
    release(old);
}

static PyObject *core_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    (void)args, (void)keywords;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Core *self = (Core *)allocate(type, 0);
    if (self && !(self->mapping = new_mapping())) {
        Py_DECREF(self);
        return NULL;
    }
    if (self)
        self->due = USES_MOST;
    return (PyObject *)self;
}

static void core_dealloc(Core *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self->mapping);
    Py_XDECREF(self->tell);
    free_object(self);
    Py_DECREF(type);
}

static PyObject *core_attach(Core *self, PyObject *args)
{
    int fd, writable;
    Py_ssize_t size;
    unsigned long long table_word, table_capacity, seed;
    PyObject *files, *path, *lock_path;
    if (!PyArg_ParseTuple(args, "inKKKOpSS", &fd, &size, &table_word, &table_capacity, &seed, &files,
                          &writable, &path, &lock_path))
        return NULL;
    if (!PyByteArray_Check(files) || !table_capacity ||
        (unsigned long long)PyByteArray_Size(files) / 8 != table_capacity || size < HEADER_BYTES) {
        PyErr_SetString(PyExc_ValueError, "files must be a bytearray of table_capacity words");
        return NULL;
    }
    struct mapping *mapping = new_mapping();
    if (!mapping)
        return NULL;
    int protection = PROT_READ | (writable ? PROT_WRITE : 0);
    void *map = mmap(NULL, (size_t)size, protection, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        release(mapping);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    mapping->files = another(files);
    mapping->path = another(path);
    mapping->lock_path = another(lock_path);
    mapping->size = (size_t)size;
    mapping->view = (struct yc_view){
        .map = map,
        .words = (uint64_t)size / 8,
        .table_word = table_word,
        .table_capacity = table_capacity,
        .seed = seed,
        .files = PyByteArray_AsString(files),
        .writable = writable,
        .fd = fd,
        .path = PyBytes_AsString(path),
        .lock_path = PyBytes_AsString(lock_path),
        .looked = &mapping->looked,
    };
    replace_mapping(self, mapping);
    return another(Py_None);
}

static PyObject *core_detach(Core *self, PyObject *unused)
{
    (void)unused;
    struct mapping *mapping = new_mapping();
    if (!mapping)
        return NULL;
    replace_mapping(self, mapping);
    Py_CLEAR(self->tell);
    return another(Py_None);
}

/* A tuple of new objects, or NULL if one of them is NULL; several times as fast as Py_BuildValue(). Takes the
 * references. */
static PyObject *tuple_of(PyObject **parts, Py_ssize_t count)
{
    PyObject *result = PyTuple_New(count);
    bool failed = !result;
    for (Py_ssize_t i = 0; i < count; i++) {
        failed |= !parts[i];
        if (result)
            failed |= PyTuple_SetItem(result, i, parts[i]) != 0;
        else
            Py_XDECREF(parts[i]);
    }
    if (failed)
        Py_CLEAR(result);
    return result;
}

/* Call `tell`, then return `result`. By now the uses are counted, and the call's work is done, because `tell`
 * may attach another mapping. Takes the reference. */
static PyObject *tell_uses(Core *self, uint64_t now, PyObject *result)
{
    self->due = self->hits + self->misses + USES_MORE;
    self->told = now;
    PyObject *tell = another(self->tell), *done = result ? PyObject_CallNoArgs(tell) : NULL;
    Py_DECREF(tell);
    if (done)
        Py_DECREF(done);
    else
        Py_CLEAR(result);
    return result;
}

static inline PyObject *used(Core *self, uint64_t now, PyObject *result)
{
    bool due = self->hits + self->misses >= self->due || now - self->told >= USES_NANOSECONDS;
    return due && self->tell ? tell_uses(self, now, result) : result;
}

/* Read the value that was found into `bytes`, and its record's head into `head`; true if it is there and
 * right. */
static bool load_value(struct mapping *mapping, const struct yc_found *found, char *head, void *bytes,
                       uint64_t now, bool wait)
{
    bool is_short = found->length <= SHORT_VALUE, loaded = false;
    if (is_short && !mapping->no_nowait) {
        int done = yc_read_nowait(found, head, bytes);
        if (done > 0)
            return yc_verify(&mapping->view, found, bytes, now);
        mapping->no_nowait = done < 0;
    }
    if (!wait && is_short)
        return false;
    mapping->users++;
    Py_BEGIN_ALLOW_THREADS
    loaded = (wait ? yc_read(found, head, bytes) : yc_read_nowait(found, head, bytes) > 0) &&
             yc_verify(&mapping->view, found, bytes, now);
    Py_END_ALLOW_THREADS
    release(mapping);
    return loaded;
}

static Py_ssize_t encode_key_at(PyObject *key, char *encoded, Py_ssize_t room, int depth);

/* Eight bytes, the lowest first. */
static void put_word(char *to, uint64_t word)
{
    for (int i = 0; i < 8; i++)
        to[i] = (char)(word >> 8 * i);
}

/* A number of 64 bits, a bool or None: at most NUMBER_KEY bytes, which are all written. */
static Py_ssize_t encode_number(PyObject *key, char *encoded)
{
    uint64_t word;
    if (PyLong_CheckExact(key)) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(key, &overflow);
        if (overflow)
            return 0;
        encoded[0] = *KEY_INT;
        put_word(encoded + 1, (uint64_t)number);
        Py_ssize_t length = 1; /* the shortest two's complement */
        for (uint64_t rest = (uint64_t)(number < 0 ? ~number : number) >> 7; rest; rest >>= 8)
            length++;
        return length + 1;
    }
    if (PyFloat_CheckExact(key)) {
        double number = PyFloat_AsDouble(key) + 0.0; /* no -0.0 */
        if (number != number)
            return 0;
        encoded[0] = *KEY_FLOAT;
        memcpy(&word, &number, sizeof word);
        put_word(encoded + 1, word);
        return NUMBER_KEY;
    }
    if (key != Py_None && key != Py_True && key != Py_False)
        return 0;
    encoded[0] = key == Py_None ? *KEY_NONE : key == Py_True ? *KEY_TRUE : *KEY_FALSE;
    return 1;
}

/* A tuple that `depth` - 1 others hold: each part behind its length, which takes two bytes. */
static Py_ssize_t encode_tuple(PyObject *key, char *encoded, Py_ssize_t room, int depth)
{
    Py_ssize_t count = PyTuple_Size(key), end = 1;
    if (depth > MAX_KEY_DEPTH)
        return 0;
    encoded[0] = *KEY_TUPLE;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *part = PyTuple_GetItem(key, i);
        Py_ssize_t left = room - end - 2, length;
        if (left < NUMBER_KEY)
            return 0;
        if (!(length = encode_number(part, encoded + end + 2)))
            length = encode_key_at(part, encoded + end + 2, left, depth);
        if (!length)
            return 0;
        encoded[end] = (char)(length & 0xFF);
        encoded[end + 1] = (char)(length >> 8);
        end += length + 2;
    }
    return end;
}

/* A str, bytes or tuple that takes `room` bytes at most, of which there is one; `depth` tuples hold it. */
static Py_ssize_t encode_key_at(PyObject *key, char *encoded, Py_ssize_t room, int depth)
{
    Py_ssize_t length;
    const char *text = NULL;
    char *bytes;
    if (PyUnicode_CheckExact(key)) {
        text = PyUnicode_AsUTF8AndSize(key, &length);
        encoded[0] = *KEY_STR;
    } else if (PyBytes_CheckExact(key)) {
        text = PyBytes_AsStringAndSize(key, &bytes, &length) ? NULL : bytes;
        encoded[0] = *KEY_BYTES;
    } else {
        return PyTuple_CheckExact(key) ? encode_tuple(key, encoded, room, depth + 1) : 0;
    }
    if (!text) /* lone surrogates */
        PyErr_Clear();
    if (!text || length >= room)
        return 0;
    memcpy(encoded + 1, text, (size_t)length);
    return length + 1;
}

/* codec.encode_key() for a short str, bytes or tuple, into `encoded`. Returns the length; 0 for other keys, among
 * them numbers that stand alone, and for what is no key. */
static Py_ssize_t encode_key(PyObject *key, char *encoded)
{
    return encode_key_at(key, encoded, SHORT_KEY, 0);
}

/* Memory for a value: what is to be written to by whoever gets it is a bytearray. */
static PyObject *new_value(uint64_t length, uint32_t flags, char **bytes)
{
    bool is_array = (flags & CODEC_FLAGS) == KIND_ARRAY;
    PyObject *value = is_array ? PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)length)
                               : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (value)
        *bytes = is_array ? PyByteArray_AsString(value) : PyBytes_AsString(value);
    return value;
}

/* A value as it is returned: bytes with no flags of the codec's as they are. Takes the reference. */
static PyObject *with_flags(PyObject *value, uint32_t flags)
{
    flags &= CODEC_FLAGS;
    return flags != KIND_BYTES ? Py_BuildValue("(NI)", value, (unsigned int)flags) : value;
}

/* Look up args: (key, now). NULL if it is found, or with an error (then found->fd is -1); else what to
 * return. The key is encoded into `buffer`, unless it is `encoded`. */
static PyObject *look_up(Core *self, PyObject *const *args, Py_ssize_t count, bool encoded, char *buffer,
                         struct yc_found *found, uint64_t *now)
{
    char *key = buffer;
    Py_ssize_t key_length;
    found->fd = -1;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected key and now");
        return NULL;
    }
    *now = PyLong_AsUnsignedLongLong(args[1]);
    if (encoded && PyBytes_AsStringAndSize(args[0], &key, &key_length))
        return NULL;
    if (PyErr_Occurred())
        return NULL;
    if (is_forked() || (!encoded && !(key_length = encode_key(args[0], buffer))))
        return another(Py_NotImplemented);
    switch (yc_find(&self->mapping->view, key, (uint64_t)key_length, *now, found)) {
    case YC_MISS:
        self->misses++;
        found->fd = -1;
        return used(self, *now, another(Py_None));
    case YC_FOUND:
        return NULL;
    default:
        found->fd = -1;
        return another(Py_NotImplemented);
    }
}

static PyObject *get(Core *self, PyObject *const *args, Py_ssize_t count, bool encoded, bool wait)
{
    struct yc_found found;
    uint64_t now = 0;
    char key[SHORT_KEY], head[YC_READ_BYTES], *bytes;
    PyObject *other = look_up(self, args, count, encoded, key, &found, &now);
    if (found.fd < 0)
        return other;
    PyObject *value = new_value(found.length, found.flags, &bytes);
    if (!value)
        return NULL;
    if (!load_value(self->mapping, &found, head, bytes, now, wait)) {
        Py_DECREF(value);
        return another(Py_NotImplemented);
    }
    self->hits++;
    return used(self, now, with_flags(value, found.flags));
}

/* (value, flags, metadata) of what was found; NULL with an error, or without one if it is not plain. */
static PyObject *load_with_meta(struct mapping *mapping, const struct yc_found *found, uint64_t now,
                                bool wait)
{
    char head[YC_READ_BYTES], *bytes;
    const char *meta;
    PyObject *value = new_value(found->length, found->flags, &bytes);
    if (!value)
        return NULL;
    if (load_value(mapping, found, head, bytes, now, wait)) {
        int64_t length = yc_meta(&mapping->view, found, head, &meta);
        if (length >= 0) {
            PyObject *parts[] = {value, PyLong_FromUnsignedLong(found->flags),
                                 PyBytes_FromStringAndSize(meta, (Py_ssize_t)length)};
            return tuple_of(parts, sizeof parts / sizeof *parts);
        }
    }
    Py_DECREF(value);
    return NULL;
}

static PyObject *core_get_with_meta(Core *self, PyObject *const *args, Py_ssize_t count)
{
    struct yc_found found;
    uint64_t now = 0;
    char key[SHORT_KEY];
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "expected key, now and wait");
        return NULL;
    }
    PyObject *other = look_up(self, args, 2, false, key, &found, &now);
    if (found.fd < 0)
        return other;
    struct mapping *mapping = self->mapping; /* others may attach another meanwhile */
    mapping->users++;
    PyObject *result = load_with_meta(mapping, &found, now, args[2] == Py_True);
    release(mapping);
    if (!result)
        return PyErr_Occurred() ? NULL : another(Py_NotImplemented);
    self->hits++;
    return used(self, now, result);
}

static PyObject *core_get(Core *self, PyObject *const *args, Py_ssize_t count)
{
    return get(self, args, count, false, true);
}

static PyObject *core_get_encoded(Core *self, PyObject *const *args, Py_ssize_t count)
{
    return get(self, args, count, true, true);
}

static PyObject *core_get_nowait(Core *self, PyObject *const *args, Py_ssize_t count)
{
    return get(self, args, count, false, false);
}

/* A value of a batch that is not in memory. */
struct waiting {
    struct yc_found found;
    Py_ssize_t at; /* in the batch */
    PyObject *value;
    char *bytes; /* those of `value` */
    char *key;
    bool right;
};

static void forget(struct waiting *waiting)
{
    Py_DECREF(waiting->value);
    PyMem_Free(waiting->key);
}

static void read_waiting(const struct yc_view *view, struct waiting *waiting, Py_ssize_t count, uint64_t now)
{
    char head[YC_READ_BYTES];
    for (Py_ssize_t i = 0, told = 0; i < count; i++) {
        for (; count > 1 && told < count && told < i + PREFETCHED; told++)
            yc_prefetch(&waiting[told].found);
        waiting[i].right = yc_read(&waiting[i].found, head, waiting[i].bytes) &&
                           yc_verify(view, &waiting[i].found, waiting[i].bytes, now);
    }
}

/* One key of a batch: its result, or NULL with `waiting` filled, or NULL with an error. */
static PyObject *get_at_once(Core *self, PyObject *key, uint64_t now, struct waiting *waiting)
{
    struct mapping *mapping = self->mapping;
    struct yc_found *found = &waiting->found;
    char encoded[SHORT_KEY], head[YC_READ_BYTES];
    Py_ssize_t length = encode_key(key, encoded);
    if (!length)
        return another(Py_NotImplemented);
    switch (yc_find(&mapping->view, encoded, (uint64_t)length, now, found)) {
    case YC_MISS:
        self->misses++;
        return another(Py_None);
    case YC_UNOPENED:
        return PyLong_FromUnsignedLong(found->segment);
    case YC_FOUND:
        break;
    default:
        return another(Py_NotImplemented);
    }
    if (!(waiting->value = new_value(found->length, found->flags, &waiting->bytes)))
        return NULL;
    waiting->key = NULL;
    if (found->length <= SHORT_VALUE && !mapping->no_nowait) {
        int done = yc_read_nowait(found, head, waiting->bytes);
        mapping->no_nowait = done < 0;
        if (done > 0 && yc_verify(&mapping->view, found, waiting->bytes, now)) {
            self->hits++;
            return with_flags(waiting->value, found->flags);
        }
    }
    if (!(waiting->key = PyMem_Malloc((size_t)length))) { /* it is needed after `encoded` is gone */
        Py_DECREF(waiting->value);
        return PyErr_NoMemory();
    }
    memcpy(waiting->key, encoded, (size_t)length);
    found->key = waiting->key;
    return NULL;
}

/* Put the results of those that waited into their places. False with an error. */
static bool take_waiting(Core *self, PyObject *results, struct waiting *waiting, Py_ssize_t count)
{
    bool failed = false;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *value = waiting[i].value;
        PyMem_Free(waiting[i].key);
        if (waiting[i].right) {
            self->hits++;
            value = with_flags(value, waiting[i].found.flags);
        } else {
            Py_DECREF(value);
            value = another(Py_NotImplemented);
        }
        failed |= !value || PyList_SetItem(results, waiting[i].at, value);
    }
    return !failed;
}

static PyObject *core_get_many(Core *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "expected a list of keys and now");
        return NULL;
    }
    uint64_t now = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    Py_ssize_t keys = PyList_Size(args[0]), waits = 0;
    PyObject *results = PyList_New(keys);
    struct waiting *waiting = PyMem_Malloc((size_t)(keys + 1) * sizeof *waiting);
    struct mapping *mapping = self->mapping; /* the one in use, while others may attach another */
    bool failed = !results || !waiting;
    mapping->users++;
    for (Py_ssize_t i = 0; i < keys && !failed; i++) {
        PyObject *result = get_at_once(self, PyList_GetItem(args[0], i), now, &waiting[waits]);
        if (!result && PyErr_Occurred()) {
            failed = true;
        } else if (!result && self->mapping == mapping) {
            waiting[waits++].at = i;
        } else {
            if (!result) {
                forget(&waiting[waits]);
                result = another(Py_NotImplemented);
            }
            failed = PyList_SetItem(results, i, result);
        }
    }
    if (waits && !failed) {
        Py_BEGIN_ALLOW_THREADS
        read_waiting(&mapping->view, waiting, waits, now);
        Py_END_ALLOW_THREADS
        failed = !take_waiting(self, results, waiting, waits);
    } else {
        while (waits)
            forget(&waiting[--waits]);
    }
    release(mapping);
    PyMem_Free(waiting);
    if (failed) {
        Py_XDECREF(results);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    return used(self, now, results);
}

static PyObject *holds(Core *self, PyObject *const *args, Py_ssize_t count, bool encoded)
{
    char buffer[SHORT_KEY], head[YC_READ_BYTES], *key = buffer;
    struct yc_found found;
    Py_ssize_t length;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected key and now");
        return NULL;
    }
    uint64_t now = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || (encoded && PyBytes_AsStringAndSize(args[0], &key, &length)))
        return NULL;
    if (!encoded)
        length = encode_key(args[0], buffer);
    int status = YC_OTHER;
    if (length && !is_forked())
        status = yc_holds(&self->mapping->view, key, (uint64_t)length, now, &found, head);
    return another(status == YC_FOUND ? Py_True : status == YC_MISS ? Py_False : Py_NotImplemented);
}

static PyObject *core_holds(Core *self, PyObject *const *args, Py_ssize_t count)
{
    return holds(self, args, count, false);
}

static PyObject *core_holds_encoded(Core *self, PyObject *const *args, Py_ssize_t count)
{
    return holds(self, args, count, true);
}

static PyObject *core_meta(Core *self, PyObject *const *args, Py_ssize_t count)
{
    char head[YC_READ_BYTES], *key;
    const char *meta;
    struct yc_found found;
    Py_ssize_t key_length;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected key and now");
        return NULL;
    }
    uint64_t now = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(args[0], &key, &key_length))
        return NULL;
    if (is_forked())
        return another(Py_NotImplemented);
    const struct yc_view *view = &self->mapping->view;
    int status = yc_holds(view, key, (uint64_t)key_length, now, &found, head);
    int64_t length = status == YC_FOUND ? yc_meta(view, &found, head, &meta) : -1;
    if (length >= 0)
        return PyBytes_FromStringAndSize(meta, (Py_ssize_t)length);
    return another(status == YC_MISS ? Py_None : Py_NotImplemented);
}

static PyObject *core_place(Core *self, PyObject *const *args, Py_ssize_t count)
{
    struct yc_found found;
    uint64_t now = 0;
    char key[SHORT_KEY];
    PyObject *other = look_up(self, args, count, false, key, &found, &now);
    if (found.fd < 0)
        return other;
    return Py_BuildValue("iKKKKKIIN", found.fd, found.length, found.offset, found.low, found.high,
                         found.value_sum, (unsigned int)found.flags, (unsigned int)found.head,
                         PyBytes_FromStringAndSize(key, (Py_ssize_t)found.key_length));
}

static PyObject *core_accept(Core *self, PyObject *const *args, Py_ssize_t count)
{
    struct yc_found found;
    unsigned long long length, offset, low, high, sum;
    unsigned int flags, head;
    char *data;
    Py_ssize_t size, key_length;
    PyObject *key;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "expected place, data and now");
        return NULL;
    }
    uint64_t now = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(args[1], &data, &size) ||
        !PyArg_ParseTuple(args[0], "iKKKKKIIS", &found.fd, &length, &offset, &low, &high, &sum, &flags, &head,
                          &key) ||
        !bytes_of(key, &found.key, &key_length))
        return NULL;
    found.key_length = (uint64_t)key_length;
    found.head = head < YC_HEAD_BYTES ? head : YC_HEAD_BYTES;
    found.offset = offset;
    found.length = length;
    found.low = low;
    found.high = high;
    found.value_sum = sum;
    found.flags = flags;
    if ((uint64_t)size != found.length || !yc_verify_late(&self->mapping->view, &found, data, now))
        return another(Py_NotImplemented);
    PyObject *value = another(args[1]);
    if ((flags & CODEC_FLAGS) == KIND_ARRAY) { /* the ring's result is bytes: the one copy that it costs */
        Py_DECREF(value);
        if (!(value = PyByteArray_FromStringAndSize(data, size)))
            return NULL;
    }
    self->hits++;
    return used(self, now, with_flags(value, found.flags));
}

static PyObject *core_counted(Core *self, PyObject *unused)
{
    (void)unused;
    PyObject *result = Py_BuildValue("KK", self->hits, self->misses);
    if (result) {
        self->hits = self->misses = 0;
        self->due = USES_MOST;
    }
    return result;
}

static PyObject *core_use(Core *self, PyObject *args)
{
    unsigned long long hits, misses, now;
    if (!PyArg_ParseTuple(args, "KKK", &hits, &misses, &now))
        return NULL;
    self->hits += hits;
    self->misses += misses;
    return used(self, now, another(Py_None));
}

static PyObject *core_tell(Core *self, PyObject *args)
{
    PyObject *tell, *old = self->tell;
    unsigned long long now;
    if (!PyArg_ParseTuple(args, "OK", &tell, &now))
        return NULL;
    self->tell = another(tell);
    self->told = now;
    Py_XDECREF(old);
    return another(Py_None);
}

static PyObject *core_own(Core *self, PyObject *args)
{
    return PyArg_ParseTuple(args, "K", &self->owner) ? another(Py_None) : NULL;
}

/* The arguments of put() and set(). */
enum { A_FD, A_SEGMENT, A_OFFSET, A_LOCK_FD, A_NOW, A_ENTRY, A_STOP_AFTER, A_COUNT };

static PyObject *os_error(const struct yc_record *record)
{
    errno = -record->error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* What put() returns of a record that was appended. Takes the reference. */
static PyObject *appended(const struct yc_entry *entry, const struct yc_end *end,
                          const struct yc_record *record, PyObject *unshown)
{
    PyObject *parts[] = {PyBytes_FromStringAndSize(record->listed, (Py_ssize_t)record->listed_bytes),
                         PyLong_FromUnsignedLongLong(end->offset + yc_record_bytes(entry)),
                         PyLong_FromUnsignedLongLong(yc_room_for(entry)), unshown};
    return tuple_of(parts, sizeof parts / sizeof *parts);
}

/* What remove() returns of a removal that was logged. */
static PyObject *removed(bool existed)
{
    PyObject *parts[] = {PyBool_FromLong(existed), PyLong_FromLong(YC_REMOVAL_BYTES)};
    return tuple_of(parts, sizeof parts / sizeof *parts);
}

static PyObject *put(Core *self, PyObject *const *args, const struct yc_entry *entry,
                     struct yc_record *record)
{
    struct yc_end end = {
        .fd = (int)PyLong_AsLong(args[A_FD]),
        .lock_fd = (int)PyLong_AsLong(args[A_LOCK_FD]),
        .segment = PyLong_AsUnsignedLongLong(args[A_SEGMENT]),
        .offset = PyLong_AsUnsignedLongLong(args[A_OFFSET]),
    };
    uint64_t now = PyLong_AsUnsignedLongLong(args[A_NOW]);
    if (PyErr_Occurred())
        return NULL;
    if (is_forked())
        return another(Py_NotImplemented);
    record->owner = self->owner;
    struct mapping *mapping = self->mapping;
    int status;
    mapping->users++;
    Py_BEGIN_ALLOW_THREADS
    status = yc_put(&mapping->view, entry, &end, now, record);
    Py_END_ALLOW_THREADS
    release(mapping);
    const uint64_t *slot = record->slot;
    switch (status) {
    case YC_INSTALLED:
        return appended(entry, &end, record, another(Py_None));
    case YC_APPENDED:
        return appended(entry, &end, record,
                        Py_BuildValue("(KKKKKKKK)NK", slot[0], slot[1], slot[2], slot[3], slot[4], slot[5],
                                      slot[6], slot[7],
                                      PyBytes_FromStringAndSize(entry->tag, (Py_ssize_t)entry->tag_length),
                                      record->epoch));
    case YC_FAILED:
        return os_error(record);
    default:
        return another(Py_NotImplemented);
    }
}

/* Key, tag, metadata and value of an entry. False if they are not plain, or with an error. */
static bool named(struct yc_entry *entry, PyObject *key, PyObject *tag, PyObject *meta, PyObject *payload)
{
    Py_ssize_t key_length, tag_length, meta_length, length;
    if (!bytes_of(key, &entry->key, &key_length) || !bytes_of(tag, &entry->tag, &tag_length) ||
        !bytes_of(meta, &entry->meta, &meta_length) || !bytes_of(payload, &entry->payload, &length) ||
        key_length > YC_MAX_NAMES || tag_length > YC_MAX_NAMES || meta_length > YC_MAX_NAMES)
        return false;
    entry->key_length = (uint32_t)key_length;
    entry->tag_length = (uint32_t)tag_length;
    entry->meta_length = (uint32_t)meta_length;
    entry->length = (uint64_t)length;
    return true;
}

/* What an Item has from its part `first` on: the digest may be left out. False if it is not plain, or with an
 * error. */
static bool entry_of_item(PyObject *item, Py_ssize_t first, struct yc_entry *entry)
{
    PyObject *parts[ITEM_COUNT];
    if (!PyTuple_Check(item) || PyTuple_Size(item) != ITEM_COUNT - first)
        return false;
    for (Py_ssize_t i = first; i < ITEM_COUNT; i++)
        parts[i] = PyTuple_GetItem(item, i - first);
    if (!PyBytes_CheckExact(parts[ITEM_KEY]) || !PyBytes_CheckExact(parts[ITEM_TAG]) ||
        !PyBytes_CheckExact(parts[ITEM_META]) || !PyBytes_CheckExact(parts[ITEM_PAYLOAD]) ||
        !named(entry, parts[ITEM_KEY], parts[ITEM_TAG], parts[ITEM_META], parts[ITEM_PAYLOAD]))
        return false;
    entry->flags = (uint32_t)PyLong_AsUnsignedLong(parts[ITEM_FLAGS]);
    entry->expires = PyLong_AsUnsignedLongLong(parts[ITEM_EXPIRES]);
    return !PyErr_Occurred();
}

static PyObject *core_put(Core *self, PyObject *const *args, Py_ssize_t count)
{
    struct yc_entry entry;
    struct yc_record record;
    if (count != A_COUNT && count != A_STOP_AFTER) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
        return NULL;
    }
    if (!entry_of_item(args[A_ENTRY], ITEM_KEY, &entry))
        return PyErr_Occurred() ? NULL : another(Py_NotImplemented);
    record.stop_after = count == A_COUNT ? PyLong_AsLongLong(args[A_STOP_AFTER]) : -1;
    return put(self, args, &entry, &record);
}

/* Let the RANK_BYTES of an entry's metadata from `at` on, its place in an order that others keep, be those of
 * the live entry of its key; without one, what is behind all that are there. False if the live entry's metadata
 * differ otherwise, or can't be told just now. */
static bool keep_rank(const struct yc_view *view, const struct yc_entry *entry, char *meta, uint64_t at,
                      uint64_t now)
{
    char head[YC_READ_BYTES];
    const char *before;
    struct yc_found found;
    int status = yc_holds(view, entry->key, entry->key_length, now, &found, head);
    if (status == YC_MISS) {
        uint64_t next = yc_clock(view) + 1;
        memcpy(meta + at, &next, RANK_BYTES);
        return true;
    }
    if (status != YC_FOUND || yc_meta(view, &found, head, &before) != entry->meta_length)
        return false;
    memcpy(meta + at, before + at, RANK_BYTES);
    return !memcmp(meta, before, entry->meta_length);
}

/* (key, value, tag, metadata, where its rank begins or None) of an entry that is not encoded; or an error. */
enum { E_KEY, E_VALUE, E_TAG, E_META, E_RANK, E_PARTS };

static PyObject *core_set(Core *self, PyObject *const *args, Py_ssize_t count)
{
    struct yc_entry entry = {.flags = KIND_BYTES};
    struct yc_record record;
    Py_ssize_t value, meta_length;
    const void *meta;
    char encoded[SHORT_KEY], encoded_tag[SHORT_KEY], ranked[SHORT_META];
    if (count != A_STOP_AFTER) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
        return NULL;
    }
    if (!PyTuple_Check(args[A_ENTRY]) || PyTuple_Size(args[A_ENTRY]) != E_PARTS ||
        !bytes_of(PyTuple_GetItem(args[A_ENTRY], E_VALUE), &entry.payload, &value) ||
        !bytes_of(PyTuple_GetItem(args[A_ENTRY], E_META), &meta, &meta_length)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "the entry must be (key, value, tag, meta, rank)");
        return NULL;
    }
    PyObject *tag = PyTuple_GetItem(args[A_ENTRY], E_TAG);
    if (!(entry.key_length = (uint32_t)encode_key(PyTuple_GetItem(args[A_ENTRY], E_KEY), encoded)) ||
        meta_length > SHORT_META ||
        (tag != Py_None && !(entry.tag_length = (uint32_t)encode_key(tag, encoded_tag))))
        return another(Py_NotImplemented);
    entry.key = encoded;
    entry.tag = encoded_tag;
    entry.length = (uint64_t)value;
    entry.meta = memcpy(ranked, meta, (size_t)meta_length);
    entry.meta_length = (uint32_t)meta_length;
    if (PyTuple_GetItem(args[A_ENTRY], E_RANK) != Py_None) {
        uint64_t at = PyLong_AsUnsignedLongLong(PyTuple_GetItem(args[A_ENTRY], E_RANK));
        uint64_t now = PyLong_AsUnsignedLongLong(args[A_NOW]);
        if (PyErr_Occurred())
            return NULL;
        if (at > entry.meta_length || entry.meta_length - at < RANK_BYTES || is_forked() ||
            !keep_rank(&self->mapping->view, &entry, ranked, at, now))
            return another(Py_NotImplemented);
    }
    record.stop_after = -1;
    return put(self, args, &entry, &record);
}

/* A list of the footer's entries of records that were appended at `offset`. */
static PyObject *listed_many(const struct yc_entry *entries, size_t count, uint64_t offset,
                             const char *records)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; i < count && list; i++) {
        Py_ssize_t length = (Py_ssize_t)yc_list(&entries[i], 0, NULL, NULL);
        PyObject *listed = PyBytes_FromStringAndSize(NULL, length);
        if (listed)
            (void)yc_list(&entries[i], offset, records, PyBytes_AsString(listed));
        if (!listed || PyList_SetItem(list, (Py_ssize_t)i, listed))
            Py_CLEAR(list);
        offset += yc_record_bytes(&entries[i]);
        records += yc_record_bytes(&entries[i]);
    }
    return list;
}

static PyObject *append_many(Core *self, const struct yc_entry *entries, size_t count,
                             const struct yc_end *end, uint64_t now)
{
    struct mapping *mapping = self->mapping;
    uint64_t bytes = yc_batch_bytes(entries, count), epoch = yc_epoch(&mapping->view);
    PyObject *slots = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * SLOT_BYTES)), *result = NULL;
    char *records = PyMem_Malloc(bytes);
    int status = YC_OTHER, error = 0;
    if (!slots || !records) {
        Py_XDECREF(slots);
        PyMem_Free(records);
        return PyErr_NoMemory();
    }
    uint64_t *words = (uint64_t *)(void *)PyBytes_AsString(slots);
    mapping->users++;
    Py_BEGIN_ALLOW_THREADS
    status = yc_append_many(&mapping->view, entries, count, end, now, records, words, &error);
    Py_END_ALLOW_THREADS
    release(mapping);
    if (status == YC_FAILED) {
        errno = -error;
        PyErr_SetFromErrno(PyExc_OSError);
    } else if (status == YC_OTHER) {
        result = another(Py_NotImplemented);
    } else {
        PyObject *listed = listed_many(entries, count, end->offset, records);
        if (listed)
            result = Py_BuildValue("NOKK", listed, slots, (unsigned long long)epoch,
                                   (unsigned long long)(end->offset + bytes));
    }
    PyMem_Free(records);
    Py_DECREF(slots);
    return result;
}

static PyObject *core_append_many(Core *self, PyObject *args)
{
    struct yc_end end = {.lock_fd = -1};
    unsigned long long segment, offset, now;
    PyObject *items, *result = NULL;
    if (!PyArg_ParseTuple(args, "iKKOK", &end.fd, &segment, &offset, &items, &now))
        return NULL;
    if (!PyList_Check(items)) {
        PyErr_SetString(PyExc_TypeError, "expected a list of items");
        return NULL;
    }
    end.segment = segment;
    end.offset = offset;
    Py_ssize_t count = PyList_Size(items);
    struct yc_entry *entries = PyMem_Calloc((size_t)count + 1, sizeof *entries);
    if (!entries)
        return PyErr_NoMemory();
    bool plain = true;
    for (Py_ssize_t i = 0; i < count && plain; i++)
        plain = entry_of_item(PyList_GetItem(items, i), 0, &entries[i]);
    if (plain)
        result = append_many(self, entries, (size_t)count, &end, now);
    else if (!PyErr_Occurred())
        result = another(Py_NotImplemented);
    PyMem_Free(entries);
    return result;
}

static PyObject *core_install_many(Core *self, PyObject *args)
{
    PyObject *slots, *tag_hashes;
    Py_ssize_t first, bytes, hash_bytes;
    unsigned long long epoch;
    const void *words, *hashes;
    if (!PyArg_ParseTuple(args, "SSnK", &slots, &tag_hashes, &first, &epoch) ||
        !bytes_of(slots, &words, &bytes) || !bytes_of(tag_hashes, &hashes, &hash_bytes))
        return NULL;
    if (first < 0 || first > bytes / SLOT_BYTES ||
        (hash_bytes && hash_bytes / TAG_HASH_BYTES != bytes / SLOT_BYTES)) {
        PyErr_SetString(PyExc_ValueError, "there are not so many slots");
        return NULL;
    }
    struct mapping *mapping = self->mapping;
    size_t done;
    mapping->users++;
    Py_BEGIN_ALLOW_THREADS
    done = yc_install_many(&mapping->view, (const uint64_t *)words + first * SLOT_WORDS,
                           hash_bytes ? (const uint32_t *)hashes + first : NULL,
                           (size_t)(bytes / SLOT_BYTES - first), epoch, self->owner);
    Py_END_ALLOW_THREADS
    release(mapping);
    return PyLong_FromSize_t(done);
}

static PyObject *core_renew_tags(Core *self, PyObject *args)
{
    unsigned long long part, now;
    bool done = false;
    if (!PyArg_ParseTuple(args, "KK", &part, &now))
        return NULL;
    if (!is_forked()) {
        struct mapping *mapping = self->mapping;
        mapping->users++;
        Py_BEGIN_ALLOW_THREADS
        done = yc_renew_tags(&mapping->view, part, now);
        Py_END_ALLOW_THREADS
        release(mapping);
    }
    return PyBool_FromLong(done);
}

enum { R_FD, R_SEGMENT, R_LOCK_FD, R_KEY, R_OWN_SEGMENT, R_OWN_END, R_NOW, R_STOP_AFTER, R_COUNT };

static PyObject *core_remove(Core *self, PyObject *const *args, Py_ssize_t count)
{
    struct yc_record record;
    const void *key;
    Py_ssize_t key_length;
    if (count != R_COUNT && count != R_STOP_AFTER) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
        return NULL;
    }
    if (!bytes_of(args[R_KEY], &key, &key_length))
        return NULL;
    struct yc_end log = {
        .fd = (int)PyLong_AsLong(args[R_FD]),
        .lock_fd = (int)PyLong_AsLong(args[R_LOCK_FD]),
        .segment = PyLong_AsUnsignedLongLong(args[R_SEGMENT]),
    };
    struct yc_end own = {
        .segment = PyLong_AsUnsignedLongLong(args[R_OWN_SEGMENT]),
        .offset = PyLong_AsUnsignedLongLong(args[R_OWN_END]),
    };
    uint64_t now = PyLong_AsUnsignedLongLong(args[R_NOW]);
    record.stop_after = count == R_COUNT ? PyLong_AsLongLong(args[R_STOP_AFTER]) : -1;
    if (PyErr_Occurred())
        return NULL;
    if (is_forked())
        return another(Py_NotImplemented);
    struct mapping *mapping = self->mapping;
    int status;
    mapping->users++;
    Py_BEGIN_ALLOW_THREADS
    status = yc_remove(&mapping->view, key, (uint64_t)key_length, &log, &own, now, &record);
    Py_END_ALLOW_THREADS
    release(mapping);
    switch (status) {
    case YC_MISS:
        return another(Py_None);
    case YC_FOUND:
        return removed(true);
    case YC_EXPIRED:
        return removed(false);
    default:
        return another(Py_NotImplemented);
    }
}

/* (encoded key, slot) of an entry. */
static PyObject *shown(const struct yc_shown *found)
{
    PyObject *slot[SLOT_WORDS];
    for (int i = 0; i < SLOT_WORDS; i++)
        slot[i] = PyLong_FromUnsignedLongLong(found->slot[i]);
    PyObject *parts[] = {PyBytes_FromStringAndSize(found->key, (Py_ssize_t)found->key_length),
                         tuple_of(slot, SLOT_WORDS)};
    return tuple_of(parts, 2);
}

static PyObject *shown_many(const struct yc_shown *found, int64_t count)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (int64_t i = 0; i < count && list; i++) {
        PyObject *one = shown(&found[i]);
        if (!one || PyList_SetItem(list, (Py_ssize_t)i, one))
            Py_CLEAR(list);
    }
    return list;
}

/* A step of a walk. args: (data, base, at, segment, prefix, before). */
static PyObject *walk(Core *self, PyObject *args,
                      int64_t (*step)(const struct yc_view *, const struct yc_walk *, uint64_t *, uint64_t *,
                                      struct yc_shown *, uint64_t))
{
    PyObject *data, *prefix, *result = NULL;
    unsigned long long base, start, segment, before;
    const void *bytes, *begin;
    Py_ssize_t length, prefix_length;
    if (!PyArg_ParseTuple(args, "SKKKSK", &data, &base, &start, &segment, &prefix, &before) ||
        !bytes_of(data, &bytes, &length) || !bytes_of(prefix, &begin, &prefix_length))
        return NULL;
    struct yc_walk walk = {bytes, (uint64_t)length, base, segment, begin, (uint64_t)prefix_length, before};
    struct yc_shown *found = PyMem_Malloc(SHOWN * sizeof *found);
    struct mapping *mapping = self->mapping;
    int64_t count = YC_OTHER;
    uint64_t at = start, looked = 0;
    if (!found)
        return PyErr_NoMemory();
    if (!is_forked()) {
        mapping->users++;
        Py_BEGIN_ALLOW_THREADS
        count = step(&mapping->view, &walk, &at, &looked, found, SHOWN);
        Py_END_ALLOW_THREADS
        release(mapping);
    }
    if (count == YC_OTHER)
        result = another(Py_NotImplemented);
    else
        result = Py_BuildValue("NKK", shown_many(found, count), (unsigned long long)at,
                               (unsigned long long)looked);
    PyMem_Free(found);
    return result;
}

static PyObject *core_walk_footer(Core *self, PyObject *args)
{
    return walk(self, args, yc_walk_footer);
}

static PyObject *core_walk_records(Core *self, PyObject *args)
{
    return walk(self, args, yc_walk_records);
}

static PyMethodDef core_methods[] = {
    {"attach", (PyCFunction)core_attach, METH_VARARGS,
     "attach(fd, size, table_word, table_capacity, seed, files, writable)\n--\n\n"
     "Map an index. Calls under way in other threads keep the mapping that they have."},
    {"detach", (PyCFunction)core_detach, METH_NOARGS, "Let go of the mapping: everything is NotImplemented."},
    {"get", (PyCFunction)(void (*)(void))core_get, METH_FASTCALL,
     "get(key, now)\n--\n\nThe verified value of a key, or (value, flags); None for a miss;\n"
     "NotImplemented if it, or the key, is not plain. Hits and misses are counted."},
    {"get_encoded", (PyCFunction)(void (*)(void))core_get_encoded, METH_FASTCALL,
     "get_encoded(key, now)\n--\n\nThe same of an encoded key."},
    {"counted", (PyCFunction)core_counted, METH_NOARGS, "Hits and misses since this was last asked."},
    {"use", (PyCFunction)core_use, METH_VARARGS,
     "use(hits, misses, now)\n--\n\nCount what others found or did not find."},
    {"tell", (PyCFunction)core_tell, METH_VARARGS,
     "tell(function, now)\n--\n\nFrom now on function() is called when uses should be asked for, until detach()."},
    {"own", (PyCFunction)core_own, METH_VARARGS,
     "own(token)\n--\n\nWhom the segment belongs to that is appended to from now on."},
    {"get_nowait", (PyCFunction)(void (*)(void))core_get_nowait, METH_FASTCALL,
     "get_nowait(key, now)\n--\n\nThe same without waiting for a disk: NotImplemented instead."},
    {"get_with_meta", (PyCFunction)(void (*)(void))core_get_with_meta, METH_FASTCALL,
     "get_with_meta(key, now, wait)\n--\n\nget() with (value, flags, metadata); unless `wait` without waiting for a "
     "disk."},
    {"get_many", (PyCFunction)(void (*)(void))core_get_many, METH_FASTCALL,
     "get_many(keys, now)\n--\n\nA list of what get() gives for each of a list of keys; a segment's number if it\n"
     "has to be opened first. What is not in memory is read in one batch."},
    {"holds", (PyCFunction)(void (*)(void))core_holds, METH_FASTCALL,
     "holds(key, now)\n--\n\nWhether there is a live entry; NotImplemented as for get(). Nothing is counted."},
    {"holds_encoded", (PyCFunction)(void (*)(void))core_holds_encoded, METH_FASTCALL,
     "holds_encoded(key, now)\n--\n\nThe same of an encoded key."},
    {"meta", (PyCFunction)(void (*)(void))core_meta, METH_FASTCALL,
     "meta(key, now)\n--\n\nThe metadata of an encoded key's live entry; None if there is none; NotImplemented as for\n"
     "get(). Nothing is counted."},
    {"place", (PyCFunction)(void (*)(void))core_place, METH_FASTCALL,
     "place(key, now)\n--\n\nWhere the value of a key is, to be read by others: (descriptor, length, offset, ...).\n"
     "None for a miss; NotImplemented as for get()."},
    {"accept", (PyCFunction)(void (*)(void))core_accept, METH_FASTCALL,
     "accept(place, data, now)\n--\n\nWhat get() returns, if `data` was read from there and is right; else NotImplemented."},
    {"put", (PyCFunction)(void (*)(void))core_put, METH_FASTCALL,
     "put(fd, segment, offset, lock_fd, now, entry, stop_after=-1)\n--\n\n"
     "Append an entry, (encoded key, tag, meta, payload, flags, expires), and show it: (its entry in the footer, where\n"
     "the next record begins, bytes that were asked for, None); NotImplemented. Instead of None there is (slot, tag,\n"
     "epoch) if the index was left as it was."},
    {"set", (PyCFunction)(void (*)(void))core_set, METH_FASTCALL,
     "set(fd, segment, offset, lock_fd, now, entry)\n--\n\n"
     "put() of a key and a tag that are not encoded, and a bytes value: (key, value, tag or None, meta, rank). The "
     "8 bytes of `meta` from `rank` on, if that is not None, are those of the live entry; NotImplemented if that one's "
     "metadata differ otherwise. Without one they are more than all before."},
    {"append_many", (PyCFunction)core_append_many, METH_VARARGS,
     "append_many(fd, segment, offset, items, now)\n--\n\nAppend records by one write: (their entries in the footer, "
     "their slots, epoch, where the next record begins); NotImplemented."},
    {"install_many", (PyCFunction)core_install_many, METH_VARARGS,
     "install_many(slots, tag_hashes, first, epoch)\n--\n\nShow records from `first` on while the lock is held: how "
     "many, until one is not plain."},
    {"renew_tags", (PyCFunction)core_renew_tags, METH_VARARGS,
     "renew_tags(part, now)\n--\n\nMake a partition's tag table anew while the lock is held. False, and nothing was done, if "
     "that is not plain."},
    {"walk_footer", (PyCFunction)core_walk_footer, METH_VARARGS,
     "walk_footer(entries, tail, at, segment, prefix, before)\n--\n\nThe next of a footer's entries that are shown: ([(key, "
     "slot)], where the next entry is, how many were looked at).\nNotImplemented if something is not plain."},
    {"walk_records", (PyCFunction)core_walk_records, METH_VARARGS,
     "walk_records(data, base, at, segment, prefix, before)\n--\n\nThe same of records, up to the first that is none or not "
     "whole."},
    {"remove", (PyCFunction)(void (*)(void))core_remove, METH_FASTCALL,
     "remove(fd, segment, lock_fd, key, own_segment, own_end, now, stop_after=-1)\n--\n\n"
     "(whether there was an entry that had not expired, bytes logged); None if nothing was done; NotImplemented."},
    {NULL, NULL, 0, NULL}};

static PyType_Slot core_slots[] = {{Py_tp_new, core_new},
                                   {Py_tp_dealloc, core_dealloc},
                                   {Py_tp_methods, core_methods},
                                   {0, NULL}};

static PyType_Spec core_spec = {
    .name = "yatagarasu_cache._core.Core",
    .basicsize = sizeof(Core),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};

static PyObject *module_digest(PyObject *module, PyObject *args)
{
    PyObject *object;
    const void *key;
    Py_ssize_t length;
    unsigned long long seed;
    uint64_t digest[2];
    (void)module;
    if (!PyArg_ParseTuple(args, "SK", &object, &seed) || !bytes_of(object, &key, &length))
        return NULL;
    yc_digest(key, (uint64_t)length, seed, digest);
    return Py_BuildValue("KK", digest[0], digest[1]);
}

static PyObject *module_value_sum(PyObject *module, PyObject *args)
{
    PyObject *object;
    const void *payload;
    Py_ssize_t length;
    unsigned long long low;
    unsigned int flags;
    (void)module;
    if (!PyArg_ParseTuple(args, "SKI", &object, &low, &flags) || !bytes_of(object, &payload, &length))
        return NULL;
    return PyLong_FromUnsignedLongLong(yc_value_sum(payload, (uint64_t)length, low, flags));
}

/* Ask for large pages for a long value, where they are given on request: getting its memory page by page
 * takes longer than filling it. */
static void ask_for_huge_pages(char *bytes, size_t length)
{
#ifdef MADV_HUGEPAGE
    uintptr_t from = ((uintptr_t)bytes + HUGE_PAGES - 1) & ~(HUGE_PAGES - 1);
    uintptr_t to = ((uintptr_t)bytes + length) & ~(HUGE_PAGES - 1);
    if (from < to)
        madvise(bytes + (from - (uintptr_t)bytes), to - from, MADV_HUGEPAGE);
#else
    (void)bytes, (void)length;
#endif
}

/* Memory for the sums of the chunks of so many bytes; NULL with an error. */
static PyObject *new_sums(uint64_t length, uint64_t **sums)
{
    PyObject *list = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(YC_CHUNKS(length) * CHUNK_SUM_BYTES));
    if (list)
        *sums = (uint64_t *)(void *)PyBytes_AsString(list);
    return list;
}

/* What reading `length` bytes returns, of which so many were `done`. Takes the reference to `result`. */
static PyObject *read_result(int64_t done, uint64_t length, PyObject *result)
{
    if (!result || done == (int64_t)length)
        return result;
    Py_DECREF(result);
    if (done >= 0)
        return another(Py_None);
    errno = (int)-done;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *module_read_chunks(PyObject *module, PyObject *args)
{
    int fd;
    Py_ssize_t length;
    unsigned long long start, seed;
    unsigned int flags;
    uint64_t *sums = NULL;
    int64_t done;
    char *bytes = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "iKnKI", &fd, &start, &length, &seed, &flags))
        return NULL;
    PyObject *list = new_sums((uint64_t)length, &sums);
    PyObject *value = list ? new_value((uint64_t)length, flags, &bytes) : NULL;
    if (!value) {
        Py_XDECREF(list);
        return NULL;
    }
    ask_for_huge_pages(bytes, (size_t)length);
    Py_BEGIN_ALLOW_THREADS
    done = yc_read_chunks(fd, start, bytes, true, (uint64_t)length, seed, sums);
    Py_END_ALLOW_THREADS
    return read_result(done, (uint64_t)length, Py_BuildValue("NN", value, list));
}

static PyObject *module_read_chunks_into(PyObject *module, PyObject *args)
{
    int fd;
    unsigned long long start, seed;
    uint64_t *sums = NULL;
    int64_t done = 0;
    Py_buffer buffer;
    PyObject *object;
    (void)module;
    if (!PyArg_ParseTuple(args, "iKOK", &fd, &start, &object, &seed) ||
        PyObject_GetBuffer(object, &buffer, PyBUF_WRITABLE))
        return NULL;
    uint64_t length = (uint64_t)buffer.len;
    PyObject *list = new_sums(length, &sums);
    if (list) {
        Py_BEGIN_ALLOW_THREADS
        done = yc_read_chunks(fd, start, buffer.buf, true, length, seed, sums);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer);
    return read_result(done, length, list);
}

static PyObject *module_sum_chunks(PyObject *module, PyObject *args)
{
    int fd;
    Py_ssize_t length;
    unsigned long long start, seed;
    uint64_t *sums = NULL;
    int64_t done = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "iKnK", &fd, &start, &length, &seed))
        return NULL;
    PyObject *list = new_sums((uint64_t)length, &sums);
    char *scratch = list ? PyMem_Malloc(YC_SCRATCH_BYTES) : NULL;
    if (!scratch) {
        Py_XDECREF(list);
        return list ? PyErr_NoMemory() : NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    done = yc_read_chunks(fd, start, scratch, false, (uint64_t)length, seed, sums);
    Py_END_ALLOW_THREADS
    PyMem_Free(scratch);
    return read_result(done, (uint64_t)length, list);
}

/* Write the buffers that were got to a new file: the sums of their chunks. */
static PyObject *write_buffers(int fd, const Py_buffer *buffers, struct yc_part *parts, Py_ssize_t count,
                               uint64_t seed)
{
    uint64_t length = 0, *sums = NULL;
    int error;
    for (Py_ssize_t i = 0; i < count; i++) {
        parts[i] = (struct yc_part){buffers[i].buf, (uint64_t)buffers[i].len};
        length += parts[i].length;
    }
    PyObject *list = new_sums(length, &sums);
    if (!list)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = yc_write_file(fd, parts, (size_t)count, seed, sums);
    Py_END_ALLOW_THREADS
    if (!error)
        return list;
    Py_DECREF(list);
    errno = -error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *module_write_file(PyObject *module, PyObject *args)
{
    int fd;
    PyObject *list, *result = NULL;
    unsigned long long seed;
    (void)module;
    if (!PyArg_ParseTuple(args, "iOK", &fd, &list, &seed))
        return NULL;
    if (!PyTuple_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple of buffers");
        return NULL;
    }
    Py_ssize_t count = PyTuple_Size(list), got = 0;
    Py_buffer *buffers = PyMem_Malloc((size_t)(count + 1) * sizeof *buffers);
    struct yc_part *parts = PyMem_Malloc((size_t)(count + 1) * sizeof *parts);
    if (!buffers || !parts)
        PyErr_NoMemory();
    else
        while (got < count && !PyObject_GetBuffer(PyTuple_GetItem(list, got), &buffers[got], PyBUF_SIMPLE))
            got++;
    if (got == count && !PyErr_Occurred())
        result = write_buffers(fd, buffers, parts, count, seed);
    while (got)
        PyBuffer_Release(&buffers[--got]);
    PyMem_Free(buffers);
    PyMem_Free(parts);
    return result;
}

static PyObject *module_begin_process(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    begin_process();
    return another(Py_None);
}

static PyMethodDef module_methods[] = {
    {"begin_process", module_begin_process, METH_NOARGS,
     "Everything was renewed after a fork: calls are answered again."},
    {"read_chunks", module_read_chunks, METH_VARARGS,
     "read_chunks(fd, start, length, seed, flags)\n--\n\n(content, the sums of its chunks); None if the "
     "file is shorter."},
    {"read_chunks_into", module_read_chunks_into, METH_VARARGS,
     "read_chunks_into(fd, start, buffer, seed)\n--\n\nThe same with memory of the caller's: the sums."},
    {"sum_chunks", module_sum_chunks, METH_VARARGS,
     "sum_chunks(fd, start, length, seed)\n--\n\nThe same of what is read and not kept."},
    {"write_file", module_write_file, METH_VARARGS,
     "write_file(fd, parts, seed)\n--\n\nWrite a new file of these buffers; the sums of its chunks."},
    {"pack", (PyCFunction)(void (*)(void))yc_pack, METH_FASTCALL,
     "pack(value, most, watch, extensions)\n--\n\nA plain value as msgpack; NotImplemented if it is not plain, None if it takes "
     "more bytes than `most`.\nwatch(value, most) is called once it takes many, and may raise. With `extensions` (tag, bytes) are taken "
     "too."},
    {"digest", module_digest, METH_VARARGS, "digest(key, seed)\n--\n\nFor tests: format.key_digest()."},
    {"value_sum", module_value_sum, METH_VARARGS,
     "value_sum(payload, low, flags)\n--\n\nFor tests: format.value_sum()."},
    {NULL, NULL, 0, NULL}};

static int add_type(PyObject *module, const char *name, PyObject *type)
{
    if (!type || !PyModule_AddObject(module, name, type))
        return type ? 0 : -1;
    Py_DECREF(type);
    return -1;
}

static int module_exec(PyObject *module)
{
    begin_process();
    if (add_type(module, "Core", PyType_FromSpec(&core_spec)) || add_type(module, "Reads", yc_reads_type()))
        return -1;
    if (PyModule_AddIntConstant(module, "ABI_VERSION", ABI_VERSION) ||
        PyModule_AddIntConstant(module, "MAX_NAMES", YC_MAX_NAMES))
        return -1;
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_doc = "get and put of plain entries, compiled. Used through yatagarasu_cache.store.core only.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_definition);
}

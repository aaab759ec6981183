/* Plain values as msgpack, of bounded length: what codec/msgpack.py does with ormsgpack where this is missing.
 *
 * It takes list and dict with str keys, nested, and in them str, bytes, float, bool, None and int of 64 bits.
 * The types must be exactly these, so that what comes back is what went in, without further checks.
 * Everything else sends the caller down the ordinary path. The bytes are those of ormsgpack.
 *
 * Signals are let in now and then, so the user's code may run in the middle: references are held to all
 * that is being walked over, and a container that has changed goes down the ordinary path as well.
 */
#include "pack.h"

#include "layout.h"

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define FIRST_BYTES 4096 /* on the stack */
#define HEAD_BYTES 16 /* the most that a head or a number takes */
#define WATCH_BYTES (1 << 24) /* from this length on, `watch` is asked whether to go on */
#define SIGNALS_EVERY 65536 /* items */

enum status { DONE, NOT_PLAIN, TOO_LONG, FAILED };

struct packer {
    char *bytes; /* `first`, or allocated */
    size_t length, room;
    uint64_t most, watch_at;
    PyObject *const *args; /* value, most, watch: watch(value, most) raises what is to be raised instead */
    bool extensions;
    unsigned items;
    char first[FIRST_BYTES];
};

static inline enum status pack_any(struct packer *self, PyObject *value, int depth);

/* Make room for `more` bytes and a head behind them. The user's code may run. */
static enum status grow(struct packer *self, size_t more)
{
    size_t wanted = self->length + more + HEAD_BYTES;
    if (self->length + more > self->most)
        return TOO_LONG;
    if (wanted > self->watch_at) {
        self->watch_at = UINT64_MAX;
        PyObject *answer = PyObject_CallFunctionObjArgs(self->args[2], self->args[0], self->args[1], NULL);
        if (!answer)
            return FAILED;
        Py_DECREF(answer);
    }
    size_t room = wanted + (wanted >> 1);
    char *bytes = PyMem_Realloc(self->bytes == self->first ? NULL : self->bytes, room);
    if (!bytes) {
        PyErr_NoMemory();
        return FAILED;
    }
    if (self->bytes == self->first)
        memcpy(bytes, self->first, self->length);
    self->bytes = bytes;
    self->room = room;
    return DONE;
}

/* Put `tag`, then `size` bytes of `number`, the most significant first. There is room. */
static inline void put(struct packer *self, unsigned tag, uint64_t number, int size)
{
    char *at = self->bytes + self->length;
    at[0] = (char)tag;
    for (int i = 0; i < size; i++)
        at[1 + i] = (char)(number >> 8 * (size - 1 - i));
    self->length += 1 + (size_t)size;
}

static inline void put_unsigned(struct packer *self, uint64_t number)
{
    if (number < 0x80)
        put(self, (unsigned)number, 0, 0);
    else if (number <= UINT8_MAX)
        put(self, 0xCC, number, 1);
    else if (number <= UINT16_MAX)
        put(self, 0xCD, number, 2);
    else if (number <= UINT32_MAX)
        put(self, 0xCE, number, 4);
    else
        put(self, 0xCF, number, 8);
}

static void put_signed(struct packer *self, int64_t number)
{
    if (number >= 0)
        put_unsigned(self, (uint64_t)number);
    else if (number >= -32)
        put(self, (unsigned)(number & 0xFF), 0, 0);
    else if (number >= INT8_MIN)
        put(self, 0xD0, (uint64_t)number, 1);
    else if (number >= INT16_MIN)
        put(self, 0xD1, (uint64_t)number, 2);
    else if (number >= INT32_MIN)
        put(self, 0xD2, (uint64_t)number, 4);
    else
        put(self, 0xD3, (uint64_t)number, 8);
}

/* Any int. One beyond 64 bits is not plain. */
static enum status pack_int(struct packer *self, PyObject *value)
{
    int beyond;
    long long number = PyLong_AsLongLongAndOverflow(value, &beyond);
    if (!beyond) {
        put_signed(self, number);
        return DONE;
    }
    if (beyond < 0)
        return NOT_PLAIN;
    unsigned long long high = PyLong_AsUnsignedLongLong(value);
    if (high == ULLONG_MAX && PyErr_Occurred()) {
        PyErr_Clear();
        return NOT_PLAIN;
    }
    put_unsigned(self, high);
    return DONE;
}

/* Bytes of `owner` as they are. */
static inline enum status append(struct packer *self, PyObject *owner, const char *bytes, Py_ssize_t length)
{
    enum status status = DONE;
    if (self->length + (size_t)length + HEAD_BYTES > self->room) {
        Py_INCREF(owner);
        status = grow(self, (size_t)length);
        if (status == DONE)
            memcpy(self->bytes + self->length, bytes, (size_t)length);
        Py_DECREF(owner);
    } else {
        memcpy(self->bytes + self->length, bytes, (size_t)length);
    }
    if (status == DONE)
        self->length += (size_t)length;
    return status;
}

/* A length behind its tag: `tag`, or one of the two after it, for 1, 2 or 4 bytes of length. */
static enum status pack_length(struct packer *self, unsigned tag, Py_ssize_t length)
{
    if ((uint64_t)length > UINT32_MAX)
        return NOT_PLAIN;
    if (length <= UINT8_MAX)
        put(self, tag, (uint64_t)length, 1);
    else if (length <= UINT16_MAX)
        put(self, tag + 1, (uint64_t)length, 2);
    else
        put(self, tag + 2, (uint64_t)length, 4);
    return DONE;
}

static enum status pack_str(struct packer *self, PyObject *value)
{
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(value, &length);
    if (!text) { /* lone surrogates, or no memory */
        if (PyErr_ExceptionMatches(PyExc_MemoryError))
            return FAILED;
        PyErr_Clear();
        return NOT_PLAIN;
    }
    if (length < 32)
        put(self, 0xA0 | (unsigned)length, 0, 0);
    else if (pack_length(self, 0xD9, length) != DONE)
        return NOT_PLAIN;
    return append(self, value, text, length);
}

static enum status pack_binary(struct packer *self, PyObject *value)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(value, &bytes, &length))
        return FAILED;
    if (pack_length(self, 0xC4, length) != DONE)
        return NOT_PLAIN;
    return append(self, value, bytes, length);
}

static enum status pack_float(struct packer *self, PyObject *value)
{
    double number = PyFloat_AsDouble(value);
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    put(self, 0xCB, bits, 8);
    return DONE;
}

/* The head of a list or a dict: `small` with up to 15 items, else `large` or the tag behind it. */
static enum status pack_head(struct packer *self, unsigned small, unsigned large, Py_ssize_t items)
{
    if ((uint64_t)items > UINT32_MAX)
        return NOT_PLAIN;
    if (items < 16)
        put(self, small | (unsigned)items, 0, 0);
    else if (items <= UINT16_MAX)
        put(self, large, (uint64_t)items, 2);
    else
        put(self, large + 1, (uint64_t)items, 4);
    return DONE;
}

static enum status pack_list(struct packer *self, PyObject *list, int depth)
{
    Py_ssize_t items = PyList_Size(list);
    enum status status = pack_head(self, 0x90, 0xDC, items);
    for (Py_ssize_t i = 0; i < items && status == DONE; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (!item) {
            PyErr_Clear();
            return NOT_PLAIN;
        }
        status = pack_any(self, item, depth + 1);
    }
    return status == DONE && PyList_Size(list) != items ? NOT_PLAIN : status;
}

static enum status pack_dict(struct packer *self, PyObject *dict, int depth)
{
    PyObject *key, *value;
    Py_ssize_t items = PyDict_Size(dict), at = 0, done = 0;
    enum status status = pack_head(self, 0x80, 0xDE, items);
    while (status == DONE && PyDict_Next(dict, &at, &key, &value)) {
        if (Py_TYPE(key) != &PyUnicode_Type || ++done > items)
            return NOT_PLAIN;
        Py_INCREF(value);
        status = pack_any(self, key, depth);
        if (status == DONE)
            status = pack_any(self, value, depth + 1);
        Py_DECREF(value);
    }
    return status == DONE && (done != items || PyDict_Size(dict) != items) ? NOT_PLAIN : status;
}

/* (tag, bytes): an extension. */
static enum status pack_extension(struct packer *self, PyObject *pair)
{
    char *bytes;
    Py_ssize_t length;
    PyObject *first = PyTuple_GetItem(pair, 0), *second = PyTuple_GetItem(pair, 1);
    long tag = second ? PyLong_AsLong(first) : -1;
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(second, &bytes, &length))
        return FAILED;
    int power = 0;
    while (power < 5 && length != 1 << power)
        power++;
    if (power < 5)
        put(self, 0xD4 + (unsigned)power, 0, 0);
    else if (pack_length(self, 0xC7, length) != DONE)
        return NOT_PLAIN;
    put(self, (unsigned)tag & 0xFF, 0, 0);
    return append(self, second, bytes, length);
}

static enum status pack_container(struct packer *self, PyObject *value, int depth)
{
    enum status status;
    if (depth >= DEEPEST)
        return NOT_PLAIN;
    Py_INCREF(value);
    status = PyList_CheckExact(value) ? pack_list(self, value, depth) : pack_dict(self, value, depth);
    Py_DECREF(value);
    return status;
}

/* There is room for a head. */
static inline enum status pack_now(struct packer *self, PyObject *value, int depth)
{
    PyTypeObject *type = Py_TYPE(value);
    if (type == &PyUnicode_Type)
        return pack_str(self, value);
    if (type == &PyLong_Type)
        return pack_int(self, value);
    if (type == &PyFloat_Type)
        return pack_float(self, value);
    if (type == &PyList_Type || type == &PyDict_Type)
        return pack_container(self, value, depth);
    if (type == &PyBytes_Type)
        return pack_binary(self, value);
    if (type == &PyTuple_Type && self->extensions)
        return pack_extension(self, value);
    if (value != Py_None && type != &PyBool_Type)
        return NOT_PLAIN;
    put(self, value == Py_None ? 0xC0 : value == Py_True ? 0xC3 : 0xC2, 0, 0);
    return DONE;
}

/* Let signals in, and make room. Holds `value`, which the user's code may remove from its container. */
static enum status pack_after_pause(struct packer *self, PyObject *value, int depth)
{
    enum status status = DONE;
    Py_INCREF(value);
    if (!(self->items % SIGNALS_EVERY) && PyErr_CheckSignals())
        status = FAILED;
    if (status == DONE && self->length + HEAD_BYTES > self->room)
        status = grow(self, 0);
    if (status == DONE)
        status = pack_now(self, value, depth);
    Py_DECREF(value);
    return status;
}

static inline enum status pack_any(struct packer *self, PyObject *value, int depth)
{
    if (!(++self->items % SIGNALS_EVERY) || self->length + HEAD_BYTES > self->room)
        return pack_after_pause(self, value, depth);
    return pack_now(self, value, depth);
}

static PyObject *packed(const struct packer *self, enum status status)
{
    PyObject *other = status == NOT_PLAIN ? Py_NotImplemented : Py_None;
    if (status == FAILED)
        return NULL;
    if (status == DONE && self->length <= self->most)
        return PyBytes_FromStringAndSize(self->bytes, (Py_ssize_t)self->length);
    Py_INCREF(other);
    return other;
}

PyObject *yc_pack(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct packer packer;
    (void)module;
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "expected value, most, watch and extensions");
        return NULL;
    }
    packer.bytes = packer.first;
    packer.length = 0;
    packer.room = FIRST_BYTES;
    packer.most = PyLong_AsUnsignedLongLong(args[1]);
    packer.watch_at = WATCH_BYTES;
    packer.args = args;
    packer.extensions = args[3] == Py_True;
    packer.items = 0;
    if (PyErr_Occurred())
        return NULL;
    PyObject *result = packed(&packer, pack_any(&packer, args[0], 0));
    if (packer.bytes != packer.first)
        PyMem_Free(packer.bytes);
    return result;
}

#ifndef YATAGARASU_PACK_H
#define YATAGARASU_PACK_H

#include <Python.h>

/* pack(value, most, watch, extensions): see codec/msgpack.py, which has the same in Python. */
PyObject *yc_pack(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif

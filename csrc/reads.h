#ifndef YATAGARASU_READS_H
#define YATAGARASU_READS_H

#include <Python.h>

/* The type yatagarasu_cache._core.Reads; NULL with an error. */
PyObject *yc_reads_type(void);

#endif

"""How the compiled modules are built. `setup.py` uses it; the package that is installed has none of it.

    modules    what each of the two modules is made of
    machine    what this machine has for them: a compiler, headers, libraries
    plan       what is done about each, and why: the switches meet the machine
    ring_c     the C that cffi writes for the io_uring module, kept as csrc/_ring.c

Nothing beyond the standard library is imported until a module is really to be built, so that a
machine without a compiler, or without liburing or xxHash, gets an answer (a `Plan` that says why
not) and never a traceback.

    YATAGARASU_IO_URING=auto            build the io_uring module if that is possible (default)
    YATAGARASU_IO_URING=require         build it, or fail and say what is missing
    YATAGARASU_IO_URING=off             do not build it
    YATAGARASU_COMPILED_CORE=auto|require|off   the same of the core module
    YATAGARASU_LIBURING=auto            link liburing statically if that works, else dynamically (default)
    YATAGARASU_LIBURING=static|shared   only that
    YATAGARASU_WERROR=1                 compiler warnings are errors
"""

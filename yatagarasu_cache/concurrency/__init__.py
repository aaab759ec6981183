"""Threads, tasks, forks and processes beside each other: what the rest of the package locks and waits with.

* among processes: `file_locks`, `key_locks` (by key, released by the kernel);
* among threads and tasks: `locks`, `in_flight` (work that others wait for), `bells` (which wake them);
* what comes in between: `forks`, `interruption` (exceptions of signal handlers), `cancelling` (of tasks).
"""

"""Values that are computed by functions of the caller's, and what else keys are locked for.

* `once`: `get_or_set`, for threads (`Once`) and, in `aio_once`, for tasks (`AsyncOnce`), on its `terms`. What
  they do is the same and stands in `steps`; how they wait, and call the function, in `ways` and `aio_ways`;
* `background`: threads that compute anew what has expired;
* `memoize`: decorated functions; `call_keys`: the keys of their calls, made of `names` and of `digests` of
  arguments that are no keys;
* `key_lock`, `aio_key_lock`: `lock` and `semaphore`; `throttling`, `aio_throttling`: `throttle`.

What all handles of the process share is not here, but in `concurrency.key_locks` and `concurrency.in_flight`:
there is one of each for a directory (`store.sharing`).
"""

# WriterLock, Writing: one thread writes to a cache at a time. Taking the lock and giving it back are one C call each:
# a signal handler, which runs between bytecodes, finds it either not taken or already certain to be given back.

cdef extern from *:
    """
    /* 1, 2, ... for each thread that asks. Unlike a pthread_t, the number of a thread that is gone never returns. */
    static unsigned long long fc_this_thread(void) {
        static _Thread_local unsigned long long mine;
        static unsigned long long last;
        if (!mine) mine = __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
        return mine;
    }
    """
    unsigned long long fc_this_thread() nogil

cdef unsigned long long FORKS = 0           # between the first process and this one
cdef unsigned long long FORKING_THREAD = 0  # the only one that this process had at its start


def _after_fork():
    global FORKS, FORKING_THREAD
    FORKS += 1
    FORKING_THREAD = fc_this_thread()


os.register_at_fork(after_in_child=_after_fork)


@cython.final
@cython.auto_pickle(False)
cdef class WriterLock:
    """Which thread may write to a cache; that one may take it again. Rows of a cache share it."""
    cdef unsigned long long owner  # 0: nobody
    cdef unsigned long long forks  # FORKS when it was taken
    cdef ptrdiff_t depth

    cdef bint take(self) noexcept:
        cdef unsigned long long me = fc_this_thread()
        cdef bint taken
        with cython.critical_section(self):
            # After a fork, what a thread held that is not in this process is nobody's.
            taken = not self.owner or self.owner == me or (self.forks != FORKS and self.owner != FORKING_THREAD)
            if taken:
                if self.owner != me:
                    self.owner, self.forks, self.depth = me, FORKS, 0
                self.depth += 1
        return taken

    cdef void give_back(self, unsigned long long owner) noexcept:
        with cython.critical_section(self):
            if self.owner == owner:
                self.depth -= 1
                if not self.depth:
                    self.owner = 0


@cython.final
@cython.no_gc  # so that `locks` is still there in __dealloc__
@cython.auto_pickle(False)
cdef class Writing:
    """`with Writing(locks):` keeps other threads from writing to all those caches, or raises RuntimeError."""
    cdef tuple locks
    cdef unsigned long long owner
    cdef ptrdiff_t times

    def __init__(self, tuple locks not None):
        for lock in locks:
            if type(lock) is not WriterLock:
                raise TypeError(f"Writing: locks hold a {type(lock).__name__}, expected WriterLocks")
        self.locks = locks

    def __enter__(self):
        cdef unsigned long long me = fc_this_thread()
        cdef Py_ssize_t i
        for i in range(len(self.locks)):
            if not (<WriterLock>self.locks[i]).take():
                self.give_back(i, me)
                raise RuntimeError("KVCache: another thread is writing to this cache")
        self.owner = me
        self.times += 1

    def __exit__(self, *error):
        self.leave()

    def __dealloc__(self):
        while self.times:  # an interrupt came between __enter__ and the block
            self.leave()

    cdef void leave(self) noexcept:
        if self.times:
            self.times -= 1
            self.give_back(len(self.locks), self.owner)

    cdef void give_back(self, Py_ssize_t count, unsigned long long owner) noexcept:
        cdef Py_ssize_t i
        for i in range(count):
            (<WriterLock>self.locks[i]).give_back(owner)

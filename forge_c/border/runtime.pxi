# The ISA, the threads, Ctrl-C, and the clockwork of fc.roofline().

cdef extern from "Python.h":
    int check_signals "PyErr_CheckSignals"() noexcept


cdef int poll() noexcept nogil:
    with gil:
        return check_signals()


fc_set_poll(poll)

KV_CHUNK = FC_KV_CHUNK


def isa() -> str:
    """Name of the ISA whose kernels run."""
    return fc_isa().decode()


def available_isas() -> tuple:
    """Names that `use_isa` takes on this CPU, best first."""
    return tuple([fc_isa_name(i).decode() for i in range(fc_num_isas()) if fc_isa_name(i) != NULL])


def use_isa(name) -> None:
    """Run the kernels of this ISA from now on. ValueError if this CPU or this build has none of that name."""
    cdef str text = str(name)  # not looked up in available_isas(), which asks the system for what only others need
    if "\0" in text or fc_use_isa(text.encode(errors="replace")) != 0:
        raise ValueError(f"use_isa: {name!r} does not run here, expected one of {', '.join(available_isas())}")


def get_num_threads() -> int:
    """Threads that an op uses at most."""
    return fc_get_num_threads()


def set_num_threads(n) -> None:
    """Use at most n threads from now on, n >= 1; more than there are cores is allowed."""
    count = integer("set_num_threads", "n", n)
    if not 1 <= count <= 4096:
        raise ValueError(f"set_num_threads: n is {n}, expected 1 to 4096")
    fc_set_num_threads(<int>count)


cdef dict CACHES = {"l2": FC_CACHE_L2, "last": FC_CACHE_LAST}


def _cache_bytes(str which) -> int:
    """Bytes of the cache "l2" or "last", as the system tells or `_set_cache_bytes` said."""
    return fc_cache_bytes(<fc_cache><int>CACHES[which])


def _set_cache_bytes(str which, ptrdiff_t size) -> None:
    """Choose blocks and streaming as for a cache of `size` bytes; 0: as the system tells. For tests: no bit changes."""
    if size < 0:
        raise ValueError(f"_set_cache_bytes: size is {size}, expected 0 or more")
    fc_set_cache_bytes(<fc_cache><int>CACHES[which], size)


def _bound_cpus() -> frozenset:
    """CPUs that OpenMP binds threads to; empty where it binds none."""
    cdef int cpus[4096]
    cdef int count = min(fc_bound_cpus(cpus, 4096), 4096)
    return frozenset([cpus[i] for i in range(count)])


def _openmp() -> str:
    return fc_openmp().decode()


def _build() -> str:
    return fc_build().decode()


def _peak_ops(str what not None, ptrdiff_t iterations) -> float:
    """Run `iterations` of the peak loop on every thread; the number of operations done, 0 where there is no unit."""
    cdef fc_peak peak = {"fp32": FC_PEAK_F32, "bf16": FC_PEAK_BF16, "int8": FC_PEAK_I8, "int4": FC_PEAK_I4}[what]
    cdef double ops
    with nogil:
        ops = fc_peak_ops(peak, iterations)
    return ops


def _read_bytes(cnp.ndarray data not None) -> float:
    cdef float total
    cdef fc_status status
    cdef ptrdiff_t size = cnp.PyArray_NBYTES(data)
    with nogil:
        status = fc_read_bytes(cnp.PyArray_DATA(data), size, &total)
    check("roofline", status)
    return total


def _copy_bytes(cnp.ndarray out not None, cnp.ndarray data not None) -> None:
    cdef fc_status status
    cdef ptrdiff_t size = cnp.PyArray_NBYTES(data)
    if cnp.PyArray_NBYTES(out) < size:
        raise ValueError(f"_copy_bytes: out has {cnp.PyArray_NBYTES(out)} bytes, expected {size}")
    with nogil:
        status = fc_copy_bytes(cnp.PyArray_DATA(out), cnp.PyArray_DATA(data), size)
    check("roofline", status)

# What ops that return (y, state) share


cdef tuple pair_of_outs(str fn, object out):
    if out is None:
        return None, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{fn}: out is a {type(out).__name__}, expected a pair (y, state)")
    return out


cdef int outs_apart(str fn, cnp.ndarray y, cnp.ndarray new_state, str arg, cnp.ndarray a, bint y_may,
                    bint state_may=False) except -1:
    """No output over an input, apart from what may be it."""
    if a is not None:
        no_overlap(fn, "out", y, arg, a, y_may)
        no_overlap(fn, "out[1]", new_state, arg, a, state_may)
    return 0


cdef inline const void *data_of(cnp.ndarray a) noexcept:
    return NULL if a is None else cnp.PyArray_DATA(a)

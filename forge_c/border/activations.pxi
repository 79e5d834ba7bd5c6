# relu, silu, gelu and the gated products swiglu, geglu


cdef ptrdiff_t split_last(int nd, cnp.ndarray a, fc_rows *rows, int count) noexcept:
    """Row length; a wholly contiguous block of arrays counts as one row, which drivers cut where they like."""
    cdef ptrdiff_t n = cnp.PyArray_DIM(a, nd - 1) if nd else 1
    cdef ptrdiff_t size = cnp.PyArray_ITEMSIZE(a)
    cdef int i
    if rows.ndim == 1:
        for i in range(count):
            if rows.stride[i][0] != n * size:
                return n
        n *= rows.shape[0]
        rows.ndim = 0
    return n


cdef cnp.ndarray activate(str fn, fc_activation f, object x, object out):
    cdef cnp.ndarray xa = viewed(fn, "x", x)
    cdef int t = float_type(fn, "x", xa)
    cdef int nd = cnp.PyArray_NDIM(xa)
    cdef cnp.ndarray y
    cdef fc_rows rows
    cdef fc_status status
    cdef ptrdiff_t n
    contiguous_last(fn, "x", xa)
    y = result(fn, out, nd, cnp.PyArray_DIMS(xa), t)
    if out is not None:
        no_overlap(fn, "out", y, "x", xa, True)
    if cnp.PyArray_SIZE(xa):
        collapse(fn, &rows, nd - 1, 2, y, xa)
        n = split_last(nd, xa, &rows, 2)
        with nogil:
            status = fc_activate(f, <fc_dtype>t, cnp.PyArray_DATA(y), cnp.PyArray_DATA(xa), &rows, n)
        check(fn, status)
    return y


cdef cnp.ndarray glu(str fn, fc_activation f, object gate, object up, object out):
    cdef cnp.ndarray a = viewed(fn, "gate", gate)
    cdef int t = float_type(fn, "gate", a)
    cdef cnp.ndarray b = viewed(fn, "up", up)
    cdef int nd = cnp.PyArray_NDIM(a)
    cdef cnp.ndarray y
    cdef fc_rows rows
    cdef fc_status status
    cdef ptrdiff_t n
    same_type(fn, "up", b, t)
    same_shape(fn, "up", b, a)
    contiguous_last(fn, "gate", a)
    contiguous_last(fn, "up", b)
    y = result(fn, out, nd, cnp.PyArray_DIMS(a), t)
    if out is not None:
        no_overlap(fn, "out", y, "gate", a, True)
        no_overlap(fn, "out", y, "up", b, True)
    if cnp.PyArray_SIZE(a):
        collapse(fn, &rows, nd - 1, 3, y, a, b)
        n = split_last(nd, a, &rows, 3)
        with nogil:
            status = fc_glu(f, <fc_dtype>t, cnp.PyArray_DATA(y), cnp.PyArray_DATA(a), cnp.PyArray_DATA(b), &rows, n)
        check(fn, status)
    return y


cdef fc_activation gelu_kind(str fn, object approximate) except *:
    if isinstance(approximate, str) and approximate in ("none", "tanh"):
        return FC_GELU if approximate == "none" else FC_GELU_TANH
    raise ValueError(f"{fn}: approximate is {approximate!r}, expected 'none' or 'tanh'")


def relu(x, out=None):
    """max(x, 0), elementwise. x of any shape, float32, float16 or bfloat16; `out` may be x.

    >>> relu(np.array([-1.0, 2.0], np.float32))
    array([0., 2.], dtype=float32)
    """
    return activate("relu", FC_RELU, x, out)


def silu(x, out=None):
    """x / (1 + exp(-x)), elementwise; also called Swish (arXiv 1702.03118). x of any shape; `out` may be x.

    >>> silu(np.array([0.0, 1.0], np.float32)).round(4)
    array([0.    , 0.7311], dtype=float32)
    """
    return activate("silu", FC_SILU, x, out)


def gelu(x, approximate="none", out=None):
    """x * Phi(x), elementwise (arXiv 1606.08415); approximate="tanh" is the tanh form. x of any shape; `out` may be x.

    >>> gelu(np.array([0.0, 1.0], np.float32)).round(4)
    array([0.    , 0.8413], dtype=float32)
    """
    return activate("gelu", gelu_kind("gelu", approximate), x, out)


def swiglu(gate, up, *, out=None):
    """silu(gate) * up, elementwise (arXiv 2002.05202). Two arrays of one shape and dtype; `out` may be either.

    >>> swiglu(np.array([1.0], np.float32), np.array([2.0], np.float32)).round(4)
    array([1.4621], dtype=float32)
    """
    return glu("swiglu", FC_SILU, gate, up, out)


def geglu(gate, up, approximate="none", out=None):
    """gelu(gate) * up, elementwise (arXiv 2002.05202). Two arrays of one shape and dtype; `out` may be either.

    >>> geglu(np.array([1.0], np.float32), np.array([2.0], np.float32)).round(4)
    array([1.6827], dtype=float32)
    """
    return glu("geglu", gelu_kind("geglu", approximate), gate, up, out)

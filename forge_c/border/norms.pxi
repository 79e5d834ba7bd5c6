# rms_norm, layer_norm, softmax


cdef cnp.ndarray norm_output(str fn, object out, cnp.ndarray x, int t):
    cdef cnp.ndarray y = result(fn, out, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), t)
    if out is not None:
        no_overlap(fn, "out", y, "x", x, True)
    return y


cdef tuple norm_outputs(str fn, object out, cnp.ndarray x, int t, cnp.ndarray residual):
    """(y, h): out= is a pair."""
    cdef object y = None
    cdef object h = None
    cdef cnp.ndarray ya
    cdef cnp.ndarray ha
    if out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"{fn}: out is a {type(out).__name__}, expected a pair (y, h) because residual is given")
        y, h = out
    ya = norm_output(fn, y, x, t)
    ha = result(fn, h, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), t, "out[1]")
    if out is not None:
        no_overlap(fn, "out", ya, "residual", residual, True)
        no_overlap(fn, "out[1]", ha, "x", x, True)
        no_overlap(fn, "out[1]", ha, "residual", residual, True)
        no_overlap(fn, "out[1]", ha, "out[0]", ya, False)
    return ya, ha


cdef int not_over(str fn, cnp.ndarray y, cnp.ndarray h, str arg, object given) except -1:
    """No output over a parameter, as the caller has it: kernels may read a float32 copy."""
    cdef cnp.ndarray a = viewed(fn, arg, given)
    no_overlap(fn, "out", y, arg, a, False)
    if h is not None:
        no_overlap(fn, "out[1]", h, arg, a, False)
    return 0


cdef cnp.ndarray norm_input(str fn, str arg, object x):
    cdef cnp.ndarray a = viewed(fn, arg, x)
    float_type(fn, arg, a)
    if cnp.PyArray_NDIM(a) == 0:
        raise ValueError(f"{fn}: {arg} has shape (), expected at least one axis")
    contiguous_last(fn, arg, a)
    return a


cdef cnp.ndarray norm_residual(str fn, object residual, cnp.ndarray x, int t):
    cdef cnp.ndarray a
    if residual is None:
        return None
    a = viewed(fn, "residual", residual)
    same_type(fn, "residual", a, t)
    same_shape(fn, "residual", a, x)
    contiguous_last(fn, "residual", a)
    return a


cdef float norm_eps(str fn, object eps) except? -1:
    cdef double value = number(fn, "eps", eps)
    if not value >= 0:
        raise ValueError(f"{fn}: eps is {eps}, expected a number >= 0")
    return <float>value


def rms_norm(x, weight=None, eps=1e-6, *, weight_offset=0.0, residual=None, out=None):
    """x / sqrt(mean(x**2) + eps) * (weight_offset + weight) over the last axis (arXiv 1910.07467).

    x (..., dim) float32, float16 or bfloat16; weight (dim,) or None (no scaling). Arithmetic is float32; the result
    has x's shape and dtype. weight_offset=1 is Gemma's zero-centred weight. With `residual`, like x,
    h = x + residual is rounded to x's dtype and normalised, and (y, h) is returned.
    `out` is an array like x, or a pair (y, h) with a residual; it may be x or the residual itself.
    Raises TypeError for another dtype, ValueError for a wrong shape, a last axis that is not contiguous, or overlap.

    >>> rms_norm(np.array([3.0, 4.0], np.float32), eps=0.0).round(4)
    array([0.8485, 1.1314], dtype=float32)
    """
    cdef cnp.ndarray xa = norm_input("rms_norm", "x", x)
    cdef int t = dtype_index(xa)
    cdef int nd = cnp.PyArray_NDIM(xa)
    cdef ptrdiff_t n = cnp.PyArray_DIM(xa, nd - 1)
    cdef cnp.ndarray w = parameter("rms_norm", "weight", weight, n)
    cdef cnp.ndarray res = norm_residual("rms_norm", residual, xa, t)
    cdef float epsilon = norm_eps("rms_norm", eps)
    cdef float offset = <float>number("rms_norm", "weight_offset", weight_offset)
    cdef cnp.ndarray y
    cdef cnp.ndarray h = None
    cdef const float *wp = floats(w)
    cdef fc_rows rows
    cdef fc_status status
    if res is None:
        y = norm_output("rms_norm", out, xa, t)
    else:
        y, h = norm_outputs("rms_norm", out, xa, t, res)
    if out is not None and w is not None:
        not_over("rms_norm", y, h, "weight", weight)
    if cnp.PyArray_SIZE(xa):
        collapse("rms_norm", &rows, nd - 1, 4, y, h, xa, res)
        with nogil:
            status = fc_rms_norm(<fc_dtype>t, cnp.PyArray_DATA(y), NULL if h is None else cnp.PyArray_DATA(h),
                                 cnp.PyArray_DATA(xa), NULL if res is None else cnp.PyArray_DATA(res), wp,
                                 &rows, n, epsilon, offset)
        check("rms_norm", status)
    return y if res is None else (y, h)


def layer_norm(x, weight=None, bias=None, eps=1e-5, *, residual=None, out=None):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (arXiv 1607.06450).

    x (..., dim) float32, float16 or bfloat16; weight, bias (dim,) or None. Arithmetic is float32; the result has x's
    shape and dtype. With `residual`, h = x + residual is normalised and (y, h) is returned; `out` as in rms_norm.

    >>> layer_norm(np.array([1.0, 3.0], np.float32), eps=0.0)
    array([-1.,  1.], dtype=float32)
    """
    cdef cnp.ndarray xa = norm_input("layer_norm", "x", x)
    cdef int t = dtype_index(xa)
    cdef int nd = cnp.PyArray_NDIM(xa)
    cdef ptrdiff_t n = cnp.PyArray_DIM(xa, nd - 1)
    cdef cnp.ndarray w = parameter("layer_norm", "weight", weight, n)
    cdef cnp.ndarray b = parameter("layer_norm", "bias", bias, n)
    cdef cnp.ndarray res = norm_residual("layer_norm", residual, xa, t)
    cdef float epsilon = norm_eps("layer_norm", eps)
    cdef cnp.ndarray y
    cdef cnp.ndarray h = None
    cdef const float *wp = floats(w)
    cdef const float *bp = floats(b)
    cdef fc_rows rows
    cdef fc_status status
    if res is None:
        y = norm_output("layer_norm", out, xa, t)
    else:
        y, h = norm_outputs("layer_norm", out, xa, t, res)
    if out is not None and w is not None:
        not_over("layer_norm", y, h, "weight", weight)
    if out is not None and b is not None:
        not_over("layer_norm", y, h, "bias", bias)
    if cnp.PyArray_SIZE(xa):
        collapse("layer_norm", &rows, nd - 1, 4, y, h, xa, res)
        with nogil:
            status = fc_layer_norm(<fc_dtype>t, cnp.PyArray_DATA(y), NULL if h is None else cnp.PyArray_DATA(h),
                                   cnp.PyArray_DATA(xa), NULL if res is None else cnp.PyArray_DATA(res), wp, bp,
                                   &rows, n, epsilon)
        check("layer_norm", status)
    return y if res is None else (y, h)


def softmax(x, out=None):
    """exp(x - max(x)) / sum(exp(x - max(x))) over the last axis.

    x (..., n) float32, float16 or bfloat16; the result has x's shape and dtype; `out` may be x.

    >>> softmax(np.zeros(4, np.float32))
    array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    cdef cnp.ndarray xa = norm_input("softmax", "x", x)
    cdef int t = dtype_index(xa)
    cdef int nd = cnp.PyArray_NDIM(xa)
    cdef ptrdiff_t n = cnp.PyArray_DIM(xa, nd - 1)
    cdef cnp.ndarray y = result("softmax", out, nd, cnp.PyArray_DIMS(xa), t)
    cdef fc_rows rows
    cdef fc_status status
    if out is not None:
        no_overlap("softmax", "out", y, "x", xa, True)
    if cnp.PyArray_SIZE(xa):
        collapse("softmax", &rows, nd - 1, 2, y, xa)
        with nogil:
            status = fc_softmax(<fc_dtype>t, cnp.PyArray_DATA(y), cnp.PyArray_DATA(xa), &rows, n)
        check("softmax", status)
    return y

# causal_conv1d, and what ops over channels with a state share


cdef cnp.ndarray sequence_input(str fn, str arg, object x):
    """(batch, seq, channels)"""
    cdef cnp.ndarray a = viewed(fn, arg, x)
    float_type(fn, arg, a)
    if cnp.PyArray_NDIM(a) != 3:
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected (batch, seq, channels)")
    contiguous_last(fn, arg, a)
    return a


cdef cnp.ndarray channel_parameter(str fn, str arg, object value, ptrdiff_t channels, str columns, bint widen):
    """A parameter (channels, columns) of any strides; widen: as float32."""
    cdef cnp.ndarray a = viewed(fn, arg, value)
    cdef cnp.ndarray wide
    cdef int t = float_type(fn, arg, a)
    if cnp.PyArray_NDIM(a) != 2 or cnp.PyArray_DIM(a, 0) != channels:
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected ({channels}, {columns})")
    if widen and t != FC_F32:
        a = np.ascontiguousarray(a)
        wide = new_array(2, cnp.PyArray_DIMS(a), FC_F32)
        fc_convert(<fc_dtype>t, <float *>cnp.PyArray_DATA(wide), cnp.PyArray_DATA(a), cnp.PyArray_SIZE(a))
        return wide
    if cnp.PyArray_DIM(a, 1) > 1 and cnp.PyArray_STRIDE(a, 1) != cnp.PyArray_ITEMSIZE(a):
        return np.ascontiguousarray(a)
    return a


cdef cnp.ndarray state_input(str fn, object state, cnp.npy_intp *dims):
    cdef cnp.ndarray a
    if state is None:
        return None
    a = viewed(fn, "state", state)
    same_type(fn, "state", a, FC_F32)
    if cnp.PyArray_NDIM(a) != 3 or not cnp.PyArray_CompareLists(cnp.PyArray_DIMS(a), dims, 3):
        raise ValueError(f"{fn}: state has shape {shape_of(a)}, expected {(dims[0], dims[1], dims[2])}")
    contiguous_last(fn, "state", a)
    return a


cdef inline void two_strides(ptrdiff_t *strides, cnp.ndarray a) noexcept:
    if a is not None:
        strides[0], strides[1] = cnp.PyArray_STRIDE(a, 0), cnp.PyArray_STRIDE(a, 1)


def causal_conv1d(x, weight, bias=None, *, activation=None, state=None, out=None):
    """y[t] = bias + sum over k < width of weight[:, k] * x[t - width + 1 + k], for each channel; (y, state).

    x (batch, seq, channels) float32, float16 or bfloat16; weight (channels, width), bias (channels,) or None;
    activation None or "silu", applied to y. What lies before x is `state` (batch, width - 1, channels) float32, the
    last width - 1 inputs so far; None: zeros. The state after x is returned: given with the next call, it continues
    the sequence, in the same bits however it is cut. Arithmetic is float32; y has x's shape and dtype.
    The given state is not written to. `out` is a pair (y, state), either of which may be None; out[1] may be the
    given state itself, which then becomes the new one.

    >>> x = np.arange(1, 5, dtype=np.float32).reshape(1, 4, 1)
    >>> y, state = causal_conv1d(x, np.array([[1, 0, 10]], np.float32))
    >>> y.ravel(), state.ravel()
    (array([10., 20., 31., 42.], dtype=float32), array([3., 4.], dtype=float32))
    """
    cdef str fn = "causal_conv1d"
    cdef cnp.ndarray xa = sequence_input(fn, "x", x)
    cdef int t = dtype_index(xa)
    cdef cnp.ndarray w = channel_parameter(fn, "weight", weight, cnp.PyArray_DIM(xa, 2), "width", False)
    cdef cnp.ndarray b
    cdef cnp.ndarray old
    cdef cnp.ndarray y
    cdef cnp.ndarray new
    cdef cnp.npy_intp dims[3]
    cdef fc_conv1d_args a
    cdef fc_status status
    if cnp.PyArray_DIM(w, 1) < 1:
        raise ValueError(f"{fn}: weight has shape {shape_of(w)}, expected ({w.shape[0]}, width) with a width of 1 or "
                         "more")
    if activation is not None and not (isinstance(activation, str) and activation == "silu"):
        raise ValueError(f"{fn}: activation is {activation!r}, expected None or 'silu'")
    b = parameter(fn, "bias", bias, cnp.PyArray_DIM(xa, 2))
    dims[0], dims[1], dims[2] = cnp.PyArray_DIM(xa, 0), cnp.PyArray_DIM(w, 1) - 1, cnp.PyArray_DIM(xa, 2)
    old = state_input(fn, state, dims)
    first, second = pair_of_outs(fn, out)
    y = result(fn, first, 3, cnp.PyArray_DIMS(xa), t)
    new = result(fn, second, 3, dims, FC_F32, "out[1]")
    if out is not None:
        no_overlap(fn, "out[1]", new, "out[0]", y, False)
        outs_apart(fn, y, new, "x", xa, False)
        outs_apart(fn, y, new, "weight", viewed(fn, "weight", weight), False)
        outs_apart(fn, y, new, "bias", None if bias is None else viewed(fn, "bias", bias), False)
        outs_apart(fn, y, new, "state", old, False, True)
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    a.type = <fc_dtype>t
    a.batch, a.seq, a.channels = cnp.PyArray_DIM(xa, 0), cnp.PyArray_DIM(xa, 1), cnp.PyArray_DIM(xa, 2)
    a.width = cnp.PyArray_DIM(w, 1)
    a.out, a.x = cnp.PyArray_DATA(y), cnp.PyArray_DATA(xa)
    a.new_state, a.state = <float *>cnp.PyArray_DATA(new), <const float *>data_of(old)
    a.layout, a.weight_type, a.weight = FC_COLS, <fc_dtype>dtype_index(w), cnp.PyArray_DATA(w)
    a.ldw = cnp.PyArray_STRIDE(w, 0)
    a.bias = floats(b)
    a.silu = activation is not None
    two_strides(a.out_stride, y)
    two_strides(a.x_stride, xa)
    two_strides(a.new_state_stride, new)
    two_strides(a.state_stride, old)
    if a.batch and a.channels:
        with nogil:
            status = fc_conv1d(&a)
        check(fn, status)
    return y, new

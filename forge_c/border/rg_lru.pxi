# rg_lru


def rg_lru(x, input_gate, recurrence_gate, param, *, reset=None, state=None, out=None):
    """Griffin's recurrence over tokens, the RG-LRU (arXiv 2402.19427); (y, state). For each channel:

        a = exp(-8 * softplus(param) * sigmoid(recurrence_gate))
        h = a * h + sqrt(1 - a**2) * sigmoid(input_gate) * x, or sigmoid(input_gate) * x at a reset
        y = h

    x, input_gate, recurrence_gate (batch, seq, channels) float32, float16 or bfloat16, all alike; param (channels,).
    `reset` (batch, seq) bool says at which tokens a sequence begins, None: at none; nothing of what was before them
    goes on. `state` (batch, channels) float32 is h before the first token, None: zeros; h after the last one is
    returned: given with the next call, it continues the sequence, in the same bits however it is cut. Arithmetic is
    float32, and 1 - a keeps its accuracy where a is near 1; a state or an a below 2**-126 is 0. y has x's shape and
    dtype.
    The given state is not written to. `out` is a pair (y, state), either of which may be None; out[0] may be x or one
    of its gates itself, out[1] the given state itself, which then becomes the new one.

    >>> x, wide = np.full((1, 3, 1), 2, np.float32), np.full((1, 3, 1), 50, np.float32)
    >>> half = np.full(1, np.log(2 ** 0.125 - 1), np.float32)
    >>> y, state = rg_lru(x, wide, wide, half, reset=np.array([[True, False, True]]))
    >>> y.ravel().round(3), state.ravel()
    (array([2.   , 2.732, 2.   ], dtype=float32), array([2.], dtype=float32))
    """
    cdef str fn = "rg_lru"
    cdef cnp.ndarray xa = sequence_input(fn, "x", x)
    cdef ptrdiff_t channels = cnp.PyArray_DIM(xa, 2)
    cdef cnp.ndarray ia = like_tokens(fn, "input_gate", viewed(fn, "input_gate", input_gate), xa, channels)
    cdef cnp.ndarray ra = like_tokens(fn, "recurrence_gate", viewed(fn, "recurrence_gate", recurrence_gate), xa,
                                      channels)
    cdef cnp.ndarray pa = parameter(fn, "param", viewed(fn, "param", param), channels)
    cdef cnp.ndarray begins = flags_of_tokens(fn, "reset", reset, xa)
    cdef cnp.ndarray old = shaped(fn, "state", state, (xa.shape[0], channels), FC_F32)
    cdef cnp.ndarray y
    cdef cnp.ndarray new
    cdef cnp.npy_intp dims[2]
    cdef fc_rg_lru_args a
    cdef fc_status status
    dims[0], dims[1] = cnp.PyArray_DIM(xa, 0), channels
    first, second = pair_of_outs(fn, out)
    y = result(fn, first, 3, cnp.PyArray_DIMS(xa), dtype_index(xa))
    new = result(fn, second, 2, dims, FC_F32, "out[1]")
    if out is not None:
        states_apart(fn, y, new, {"x": x, "input_gate": input_gate, "recurrence_gate": recurrence_gate, "param": param,
                                  "reset": reset}, ("x", "input_gate", "recurrence_gate"), old)
    memset(&a, 0, sizeof(a))
    a.size, a.type = sizeof(a), <fc_dtype>dtype_index(xa)
    a.batch, a.seq, a.channels = dims[0], cnp.PyArray_DIM(xa, 1), channels
    a.out, a.new_state, a.state = cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(new), floats(old)
    a.x, a.input_gate, a.recurrence_gate = data_of(xa), data_of(ia), data_of(ra)
    a.param, a.reset = floats(pa), <const uint8_t *>data_of(begins)
    two_strides(a.out_stride, y)
    two_strides(a.x_stride, xa)
    two_strides(a.input_gate_stride, ia)
    two_strides(a.recurrence_gate_stride, ra)
    two_strides(a.reset_stride, begins)
    a.new_state_stride = cnp.PyArray_STRIDE(new, 0)
    a.state_stride = 0 if old is None else cnp.PyArray_STRIDE(old, 0)
    if a.batch and a.channels:
        with nogil:
            status = fc_rg_lru(&a)
        check(fn, status)
    return y, new


cdef cnp.ndarray flags_of_tokens(str fn, str arg, object value, cnp.ndarray x):
    """bool (batch, seq), as x has them, of any strides; None stays None."""
    cdef cnp.ndarray a
    if value is None:
        return None
    a = viewed(fn, arg, value)
    if cnp.PyArray_TYPE(a) != cnp.NPY_BOOL:
        raise TypeError(f"{fn}: {arg} has dtype {a.dtype}, expected bool")
    if shape_of(a) != (x.shape[0], x.shape[1]):
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected {(x.shape[0], x.shape[1])}")
    return a

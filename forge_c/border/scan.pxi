# selective_scan


cdef cnp.ndarray like_tokens(str fn, str arg, object value, cnp.ndarray u, ptrdiff_t last):
    """An array (batch, seq, last) of u's dtype; None stays None."""
    cdef cnp.ndarray a
    if value is None:
        return None
    a = viewed(fn, arg, value)
    same_type(fn, arg, a, dtype_index(u))
    if (cnp.PyArray_NDIM(a) != 3 or cnp.PyArray_DIM(a, 0) != cnp.PyArray_DIM(u, 0)
            or cnp.PyArray_DIM(a, 1) != cnp.PyArray_DIM(u, 1) or cnp.PyArray_DIM(a, 2) != last):
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected {(u.shape[0], u.shape[1], last)}")
    contiguous_last(fn, arg, a)
    return a


cdef int scan_outs_apart(str fn, cnp.ndarray y, cnp.ndarray new, dict tokenwise, dict parameters,
                         cnp.ndarray state) except -1:
    """y may be u, delta or z, and the new state the given one; parameters as the caller has them."""
    no_overlap(fn, "out[1]", new, "out[0]", y, False)
    for arg, a in tokenwise.items():
        outs_apart(fn, y, new, arg, a, arg in ("u", "delta", "z"))
    for arg, value in parameters.items():
        if value is not None:
            outs_apart(fn, y, new, arg, viewed(fn, arg, value), False)
    return outs_apart(fn, y, new, "state", state, False, True)


def selective_scan(u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, state=None, out=None):
    """Mamba's scan over tokens (arXiv 2312.00752); (y, state). For each channel and its n states h:

        delta = delta + delta_bias, with delta_softplus log(1 + exp(delta + delta_bias))
        h = exp(delta * A) * h + delta * B * u
        y = (sum(h * C) + D * u) * silu(z)

    u, delta, z (batch, seq, channels) and B, C (batch, seq, n) float32, float16 or bfloat16, all alike; A (channels,
    n); D, delta_bias (channels,) or None; z None: no gate. `state` (batch, channels, n) float32 is h before the first
    token, None: zeros; h after the last one is returned: given with the next call, it continues the sequence, in the
    same bits however it is cut. Arithmetic is float32; a state below 2**-126, or exp below 2**-125, is 0. y has u's
    shape and dtype.
    The given state is not written to. `out` is a pair (y, state), either of which may be None; out[0] may be u, delta
    or z itself, out[1] the given state itself, which then becomes the new one.

    >>> one = np.ones((1, 3, 1), np.float32)
    >>> y, state = selective_scan(one, one, np.zeros((1, 2), np.float32), *np.ones((2, 1, 3, 2), np.float32))
    >>> y.ravel(), state
    (array([2., 4., 6.], dtype=float32), array([[[3., 3.]]], dtype=float32))
    """
    cdef str fn = "selective_scan"
    cdef cnp.ndarray ua = sequence_input(fn, "u", u)
    cdef ptrdiff_t channels = cnp.PyArray_DIM(ua, 2)
    cdef cnp.ndarray da = like_tokens(fn, "delta", delta, ua, channels)
    cdef cnp.ndarray za = like_tokens(fn, "z", z, ua, channels)
    cdef cnp.ndarray aa = channel_parameter(fn, "A", A, channels, "n", True)
    cdef ptrdiff_t n = cnp.PyArray_DIM(aa, 1)
    cdef cnp.ndarray ba = like_tokens(fn, "B", B, ua, n)
    cdef cnp.ndarray ca = like_tokens(fn, "C", C, ua, n)
    cdef cnp.ndarray dp = parameter(fn, "D", D, channels)
    cdef cnp.ndarray bias = parameter(fn, "delta_bias", delta_bias, channels)
    cdef bint softplus = flag(fn, "delta_softplus", delta_softplus)
    cdef cnp.ndarray old
    cdef cnp.ndarray y
    cdef cnp.ndarray new
    cdef cnp.npy_intp dims[3]
    cdef fc_scan_args a
    cdef fc_status status
    dims[0], dims[1], dims[2] = cnp.PyArray_DIM(ua, 0), channels, n
    old = state_input(fn, state, dims)
    first, second = pair_of_outs(fn, out)
    y = result(fn, first, 3, cnp.PyArray_DIMS(ua), dtype_index(ua))
    new = result(fn, second, 3, dims, FC_F32, "out[1]")
    if out is not None:
        scan_outs_apart(fn, y, new, {"u": ua, "delta": da, "B": ba, "C": ca, "z": za},
                        {"A": A, "D": D, "delta_bias": delta_bias}, old)
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    a.type = <fc_dtype>dtype_index(ua)
    a.batch, a.seq, a.channels, a.n = cnp.PyArray_DIM(ua, 0), cnp.PyArray_DIM(ua, 1), channels, n
    a.out, a.new_state = cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(new)
    a.u, a.delta, a.b, a.c, a.z = data_of(ua), data_of(da), data_of(ba), data_of(ca), data_of(za)
    a.a, a.lda, a.d, a.delta_bias = floats(aa), cnp.PyArray_STRIDE(aa, 0), floats(dp), floats(bias)
    a.state, a.delta_softplus = <const float *>data_of(old), softplus
    two_strides(a.out_stride, y)
    two_strides(a.u_stride, ua)
    two_strides(a.delta_stride, da)
    two_strides(a.b_stride, ba)
    two_strides(a.c_stride, ca)
    two_strides(a.z_stride, za)
    two_strides(a.new_state_stride, new)
    two_strides(a.state_stride, old)
    if a.batch and a.channels:
        with nogil:
            status = fc_selective_scan(&a)
        check(fn, status)
    return y, new

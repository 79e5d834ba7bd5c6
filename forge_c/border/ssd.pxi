# ssd_scan, and what ops over heads with a state share


cdef inline void outer_strides(ptrdiff_t *strides, cnp.ndarray a, int count=3) noexcept:
    cdef int i
    if a is not None:
        for i in range(count):
            strides[i] = cnp.PyArray_STRIDE(a, i)


cdef cnp.ndarray shaped(str fn, str arg, object value, tuple shape, int t, bint contiguous=True):
    """value of this shape, None in which stands for any size; of dtype t, or with -1 of any float. None stays None."""
    cdef cnp.ndarray a
    if value is None:
        return None
    a = viewed(fn, arg, value)
    if t < 0:
        float_type(fn, arg, a)
    else:
        same_type(fn, arg, a, t)
    given = shape_of(a)
    if len(given) != len(shape) or any([n is not None and n != m for n, m in zip(shape, given)]):
        words = ", ".join(["n" if n is None else str(n) for n in shape])
        raise ValueError(f"{fn}: {arg} has shape {given}, expected ({words})")
    if contiguous:
        contiguous_last(fn, arg, a)
    return a


cdef cnp.ndarray head_input(str fn, str arg, object x, str axes):
    """(batch, seq, heads, channels)"""
    cdef cnp.ndarray a = viewed(fn, arg, x)
    float_type(fn, arg, a)
    if cnp.PyArray_NDIM(a) != 4:
        raise ValueError(f"{fn}: {arg} has shape {shape_of(a)}, expected {axes}")
    contiguous_last(fn, arg, a)
    return a


cdef int states_apart(str fn, cnp.ndarray y, cnp.ndarray new_state, dict given, tuple y_may,
                      cnp.ndarray state) except -1:
    """No output over an argument as the caller has it, but y over those of y_may, the new state over the old."""
    no_overlap(fn, "out[1]", new_state, "out[0]", y, False)
    for arg, value in given.items():
        if value is not None:
            outs_apart(fn, y, new_state, arg, viewed(fn, arg, value), arg in y_may)
    return outs_apart(fn, y, new_state, "state", state, False, True)


cdef int ssd_limits(fc_ssd_scan_args *a, object dt_limit) except -1:
    cdef double lo, hi
    if dt_limit is None:
        a.dt_min, a.dt_max = 0, INFINITY
        return 0
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2:
        raise TypeError(f"ssd_scan: dt_limit is {dt_limit!r}, expected a pair of numbers")
    lo, hi = number("ssd_scan", "dt_limit[0]", dt_limit[0]), number("ssd_scan", "dt_limit[1]", dt_limit[1])
    if not lo <= hi:
        raise ValueError(f"ssd_scan: dt_limit is {dt_limit!r}, expected the smaller number first")
    a.dt_min, a.dt_max = <float>lo, <float>hi
    return 0


cdef int ssd_sizes(fc_ssd_scan_args *a, cnp.ndarray x, object B) except -1:
    cdef cnp.ndarray b = viewed("ssd_scan", "B", B)
    a.batch, a.seq, a.heads, a.p = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    if cnp.PyArray_NDIM(b) != 4:
        raise ValueError(f"ssd_scan: B has shape {shape_of(b)}, expected (batch, seq, groups, n)")
    a.groups, a.n = b.shape[2], b.shape[3]
    if a.groups == 0 or a.heads % a.groups:
        raise ValueError(f"ssd_scan: x has {a.heads} heads, expected a multiple of B's {a.groups} groups")
    return 0


def ssd_scan(x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, dt_limit=None, state=None, out=None):
    """Mamba-2's scan over tokens (arXiv 2405.21060); (y, state). For each head, whose state h is (p, n):

        dt = clip(dt + dt_bias, *dt_limit), with dt_softplus clip(log(1 + exp(dt + dt_bias)), *dt_limit)
        h = exp(dt * A) * h + dt * x[:, None] * B
        y = (h @ C + D * x) * silu(z)

    x, z (batch, seq, heads, p) and B, C (batch, seq, groups, n) float32, float16 or bfloat16, all alike; head h reads
    group h // (heads // groups). dt (batch, seq, heads) of any strides; A, D, dt_bias (heads,); D, dt_bias and z may
    be None. `state` (batch, heads, p, n) float32 is h before the first token, None: zeros; h after the last one is
    returned: given with the next call, it continues the sequence, in the same bits however it is cut. Arithmetic is
    float32, where a state under 2**-126 counts as 0; y has x's shape and dtype. dt_limit is (0, inf) by default;
    (-inf, inf) lets a negative dt through.
    The given state is not written to. `out` is a pair (y, state), either of which may be None; out[0] may be x or z
    itself, out[1] the given state itself, which then becomes the new one.

    >>> one = np.ones((1, 3, 1, 1), np.float32)
    >>> y, state = ssd_scan(one, one[..., 0], np.zeros(1, np.float32), *np.ones((2, 1, 3, 1, 2), np.float32))
    >>> y.ravel(), state.ravel()
    (array([2., 4., 6.], dtype=float32), array([3., 3.], dtype=float32))
    """
    cdef str fn = "ssd_scan"
    cdef cnp.ndarray xa = head_input(fn, "x", x, "(batch, seq, heads, p)")
    cdef int t = dtype_index(xa)
    cdef cnp.ndarray da, ba, ca, za, aa, skip, bias, old, y, new
    cdef fc_ssd_scan_args a
    cdef fc_status status
    cdef cnp.npy_intp dims[4]
    memset(&a, 0, sizeof(a))
    a.size, a.type = sizeof(a), <fc_dtype>t
    ssd_sizes(&a, xa, B)
    ssd_limits(&a, dt_limit)
    a.dt_softplus = flag(fn, "dt_softplus", dt_softplus)
    da = shaped(fn, "dt", dt, (a.batch, a.seq, a.heads), -1, False)
    if da is None:
        raise TypeError("ssd_scan: dt is a NoneType, expected a NumPy array")
    ba = shaped(fn, "B", B, (a.batch, a.seq, a.groups, a.n), t)
    ca = shaped(fn, "C", viewed(fn, "C", C), (a.batch, a.seq, a.groups, a.n), t)
    za = shaped(fn, "z", z, (a.batch, a.seq, a.heads, a.p), t)
    aa = parameter(fn, "A", viewed(fn, "A", A), a.heads)
    skip, bias = parameter(fn, "D", D, a.heads), parameter(fn, "dt_bias", dt_bias, a.heads)
    old = shaped(fn, "state", state, (a.batch, a.heads, a.p, a.n), FC_F32)
    dims[0], dims[1], dims[2], dims[3] = a.batch, a.heads, a.p, a.n
    first, second = pair_of_outs(fn, out)
    y, new = result(fn, first, 4, cnp.PyArray_DIMS(xa), t), result(fn, second, 4, dims, FC_F32, "out[1]")
    if out is not None:
        states_apart(fn, y, new, {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias},
                     ("x", "z"), old)
    a.dt_type = <fc_dtype>dtype_index(da)
    a.out, a.new_state = cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(new)
    a.x, a.dt, a.b, a.c, a.z = data_of(xa), data_of(da), data_of(ba), data_of(ca), data_of(za)
    a.a, a.d, a.dt_bias, a.state = floats(aa), floats(skip), floats(bias), floats(old)
    outer_strides(a.out_stride, y)
    outer_strides(a.x_stride, xa)
    outer_strides(a.dt_stride, da)
    outer_strides(a.b_stride, ba)
    outer_strides(a.c_stride, ca)
    outer_strides(a.z_stride, za)
    outer_strides(a.state_stride, old)
    outer_strides(a.new_state_stride, new)
    with nogil:
        status = fc_ssd_scan(&a)
    check(fn, status)
    return y, new

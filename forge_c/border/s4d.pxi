# s4d_scan, s4d_kernel


cdef cnp.ndarray complexes(str fn, str arg, object value, tuple shape, bint copy):
    """complex64 of this shape, None in which stands for any size; contiguous, or with copy made so."""
    cdef cnp.ndarray a = viewed(fn, arg, value)
    if cnp.PyArray_TYPE(a) != cnp.NPY_COMPLEX64 or not cnp.PyArray_ISNOTSWAPPED(a):
        raise TypeError(f"{fn}: {arg} has dtype {a.dtype}, expected complex64; pass {arg}.astype(np.complex64)")
    given = shape_of(a)
    if len(given) != len(shape) or any([n is not None and n != m for n, m in zip(shape, given)]):
        words = ", ".join([{0: "channels", 1: "n"}.get(i, "n") if n is None else str(n) for i, n in enumerate(shape)])
        raise ValueError(f"{fn}: {arg} has shape {given}, expected ({words})")
    if copy:
        return np.ascontiguousarray(a)
    contiguous_last(fn, arg, a)
    return a


cdef int s4d_method(str fn, object method) except -1:
    """Whether it is the bilinear one."""
    if not isinstance(method, str) or method not in ("zoh", "bilinear"):
        raise ValueError(f"{fn}: method is {method!r}, expected 'zoh' or 'bilinear'")
    return method == "bilinear"


cdef tuple s4d_system(str fn, fc_s4d_modes_args *s, object A, object B, object C, object dt, object method,
                      object channels):
    """The arrays that s points to, to be held during the call."""
    cdef cnp.ndarray a = complexes(fn, "A", A, (channels, None), True)
    cdef cnp.ndarray b = complexes(fn, "B", B, shape_of(a), True)
    cdef cnp.ndarray c = complexes(fn, "C", C, shape_of(a), True)
    cdef cnp.ndarray step = parameter(fn, "dt", viewed(fn, "dt", dt), a.shape[0])
    memset(s, 0, sizeof(s[0]))
    s.size, s.channels, s.n, s.bilinear = sizeof(s[0]), a.shape[0], a.shape[1], s4d_method(fn, method)
    s.a, s.b, s.c, s.dt = <const float *>data_of(a), <const float *>data_of(b), <const float *>data_of(c), floats(step)
    return a, b, c, step


cdef cnp.ndarray s4d_modes(str fn, fc_s4d_modes_args *s):
    cdef ptrdiff_t count = fc_s4d_modes_floats(s.channels, s.n)
    cdef cnp.ndarray modes = np.zeros(count, np.float32)
    cdef fc_status status
    s.modes = <float *>cnp.PyArray_DATA(modes)
    with nogil:
        status = fc_s4d_modes(s)
    check(fn, status)
    return modes


def s4d_kernel(A, B, C, dt, length, *, method="zoh"):
    """K (channels, length) float32 of the convolution that s4d_scan is: y[t] = sum over l of K[l] * u[t - l].

    K[l] = sum over n of 2 * real(C * dA**l * dB), with A, B, C (channels, n) complex64 and dt (channels,). method
    "zoh": dA = exp(dt * A), dB = (dA - 1) / A * B; "bilinear": dA = (1 + dt * A / 2) / (1 - dt * A / 2),
    dB = dt / (1 - dt * A / 2) * B. Made in float64 and rounded once.

    >>> one = np.ones((1, 1), np.complex64)
    >>> s4d_kernel(-one, one, one / 2, np.full(1, 0.5, np.float32), 3).round(4)
    array([[0.3935, 0.2387, 0.1447]], dtype=float32)
    """
    cdef str fn = "s4d_kernel"
    cdef fc_s4d_modes_args s
    cdef cnp.ndarray y
    cdef cnp.npy_intp dims[2]
    cdef fc_status status
    held = s4d_system(fn, &s, A, B, C, dt, method, None)
    count = integer(fn, "length", length)
    if not 0 <= count <= PY_SSIZE_T_MAX // (4 * max(s.channels, 1)):
        raise ValueError(f"{fn}: length is {count}, expected 0 to {PY_SSIZE_T_MAX // (4 * max(s.channels, 1))}")
    dims[0], dims[1] = s.channels, count
    y = new_array(2, dims, FC_F32)
    if cnp.PyArray_SIZE(y):
        with nogil:
            status = fc_s4d_kernel(<float *>cnp.PyArray_DATA(y), &s, dims[1])
        check(fn, status)
    return y


cdef tuple s4d_run(str fn, object u, cnp.ndarray modes, ptrdiff_t n, object D, object state, object out, dict given):
    """(y, state) of a system whose modes are made."""
    cdef cnp.ndarray ua = viewed(fn, "u", u)
    cdef int t = dtype_index(ua)
    cdef cnp.ndarray skip, old, y, new
    cdef fc_s4d_scan_args a
    cdef fc_status status
    cdef ptrdiff_t channels = ua.shape[2]
    memset(&a, 0, sizeof(a))
    a.size, a.type = sizeof(a), <fc_dtype>t
    a.batch, a.seq, a.channels, a.n = ua.shape[0], ua.shape[1], channels, n
    skip = parameter(fn, "D", D, channels)
    shape = (a.batch, a.channels, a.n)
    old = None if state is None else complexes(fn, "state", state, shape, False)
    first, second = pair_of_outs(fn, out)
    y = result(fn, first, 3, cnp.PyArray_DIMS(ua), t)
    new = np.empty(shape, np.complex64) if second is None else s4d_new_state(fn, second, shape)
    if out is not None:
        states_apart(fn, y, new, {"u": u, "D": D, **given}, ("u",), old)
    a.out, a.new_state, a.u, a.modes = cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(new), data_of(ua), floats(modes)
    a.d, a.state = floats(skip), <const float *>data_of(old)
    outer_strides(a.out_stride, y, 2)
    outer_strides(a.u_stride, ua, 2)
    outer_strides(a.state_stride, old, 2)
    outer_strides(a.new_state_stride, new, 2)
    with nogil:
        status = fc_s4d_scan(&a)
    check(fn, status)
    return y, new


cdef cnp.ndarray s4d_new_state(str fn, object out, tuple shape):
    not_masked(fn, "out[1]", out)
    if not cnp.PyArray_Check(out):
        raise TypeError(f"{fn}: out[1] is a {type(out).__name__}, expected a NumPy array")
    complexes(fn, "out[1]", out, shape, False)
    if not out.flags.writeable:
        raise ValueError(f"{fn}: out[1] is read-only")
    return out


def s4d_scan(u, A, B, C, dt, D=None, *, method="zoh", state=None, out=None):
    """A diagonal state space over tokens (S4D, arXiv 2206.11893); (y, state). For each channel and its n modes x:

        x = dA * x + dB * u
        y = sum of 2 * real(C * x) + D * u

    u (batch, seq, channels) float32, float16 or bfloat16; A, B, C (channels, n) complex64, dt (channels,), which with
    `method` give dA and dB as s4d_kernel says; D (channels,) or None. `state` (batch, channels, n) complex64 is x
    before the first token, None: zeros; x after the last one is returned: given with the next call, it continues the
    sequence, in the same bits however it is cut. Arithmetic is float32, dA carried in two floats, a state under 2**-126
    counts as 0; y has u's shape and dtype.
    The given state is not written to. `out` is a pair (y, state), either of which may be None; out[0] may be u itself,
    out[1] the given state itself, which then becomes the new one.

    >>> one = np.ones((1, 1), np.complex64)
    >>> u = np.array([1, 0, 0], np.float32).reshape(1, 3, 1)
    >>> y, state = s4d_scan(u, -one, one, one / 2, np.full(1, 0.5, np.float32))
    >>> y.ravel().round(4)
    array([0.3935, 0.2387, 0.1447], dtype=float32)
    """
    cdef str fn = "s4d_scan"
    cdef cnp.ndarray ua = viewed(fn, "u", u)
    cdef fc_s4d_modes_args s
    float_type(fn, "u", ua)
    if cnp.PyArray_NDIM(ua) != 3:
        raise ValueError(f"{fn}: u has shape {shape_of(ua)}, expected (batch, seq, channels)")
    contiguous_last(fn, "u", ua)
    held = s4d_system(fn, &s, A, B, C, dt, method, ua.shape[2])
    return s4d_run(fn, ua, s4d_modes(fn, &s), s.n, D, state, out, {"A": A, "B": B, "C": C, "dt": dt})


def _s4d_modes(A, B, C, dt, method="zoh"):
    """What s4d_scan makes of the parameters at every call, for layers that keep them."""
    cdef fc_s4d_modes_args s
    held = s4d_system("s4d_scan", &s, A, B, C, dt, method, None)
    return s4d_modes("s4d_scan", &s)


def _s4d_scan(u, modes, n, D=None, *, state=None, out=None):
    """s4d_scan of what _s4d_modes made of n modes a channel; u (batch, seq, channels) is not checked."""
    return s4d_run("s4d_scan", u, modes, n, D, state, out, {})

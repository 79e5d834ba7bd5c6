# gated_delta


cdef int delta_rule(object rule, object g, object beta) except -1:
    """The rule's name, and that what it takes is there, and nothing else."""
    if not isinstance(rule, str) or rule not in ("gated_delta", "gated", "delta", "linear"):
        raise ValueError(f"gated_delta: rule is {rule!r}, expected one of gated_delta, gated, delta, linear")
    for name, value, taken in (("g", g, "gated" in rule), ("beta", beta, "delta" in rule)):
        if (value is not None) != taken:
            raise ValueError(f"gated_delta: {name} is {'given' if value is not None else 'None'}, expected "
                             f"{'an array' if taken else 'None'} with rule={rule!r}")
    return 0


cdef int delta_sizes(fc_gated_delta_args *a, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v) except -1:
    a.batch, a.seq, a.q_heads, a.n = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    a.k_heads, a.heads, a.p = k.shape[2], v.shape[2], v.shape[3]
    if k.shape[0] != a.batch or k.shape[1] != a.seq or k.shape[3] != a.n:
        raise ValueError(f"gated_delta: k has shape {shape_of(k)}, expected ({a.batch}, {a.seq}, k_heads, {a.n})")
    if v.shape[0] != a.batch or v.shape[1] != a.seq:
        raise ValueError(f"gated_delta: v has shape {shape_of(v)}, expected ({a.batch}, {a.seq}, heads, p)")
    if a.k_heads == 0 or a.heads % a.k_heads:
        raise ValueError(f"gated_delta: v has {a.heads} heads, expected a multiple of k's {a.k_heads}")
    if a.q_heads == 0 or (a.heads % a.q_heads if a.q_heads <= a.heads else a.heads == 0 or a.q_heads % a.heads):
        raise ValueError(f"gated_delta: q has {a.q_heads} heads, expected a multiple or a divisor of v's {a.heads}")
    return 0


def gated_delta(q, k, v, g=None, beta=None, *, rule="gated_delta", scale=None, state=None, out=None):
    """Linear attention with a decay (arXiv 2312.06635), the delta rule (arXiv 2102.11174) or both (arXiv 2412.06464),
    token after token; (y, state). For each head of v, whose state S is (n, p):

        S = exp(g) * S                                  rules gated, gated_delta
        u = v, or beta * (v - S.T @ k)                  rules delta, gated_delta
        S = S + k[:, None] * u
        y = scale * S.T @ q

    q, k (batch, seq, heads, n) and v (batch, seq, heads, p) float32, float16 or bfloat16, all alike. Head h of v reads
    head h // (v's heads // k's heads) of k, and so of q where q has fewer; where q has more, its head h reads state
    h // (q's heads // v's heads), and y has q's heads. g (batch, seq, v's heads), or with n numbers for each head one
    for each row of S; beta (batch, seq, v's heads); both of any float dtype, and given where the rule takes them.
    scale is n**-0.5 by default. `state` (batch, v's heads, n, p) float32 is S before the first token, None: zeros; S
    after the last one is returned: given with the next call, it continues the sequence, in the same bits however it is
    cut. Arithmetic is float32, where a state under 2**-126 counts as 0; y (batch, seq, the larger of both heads, p) has
    q's dtype.
    The given state is not written to. `out` is a pair (y, state), either of which may be None; out[0] may be v itself,
    out[1] the given state itself, which then becomes the new one.

    >>> one = np.ones((1, 3, 1, 1), np.float32)
    >>> y, state = gated_delta(one, one, 4 * one, beta=0.5 * one[..., 0], rule="delta")
    >>> y.ravel(), state.ravel()
    (array([2. , 3. , 3.5], dtype=float32), array([3.5], dtype=float32))
    """
    cdef str fn = "gated_delta"
    cdef cnp.ndarray qa = head_input(fn, "q", q, "(batch, seq, heads, n)")
    cdef cnp.ndarray ka = head_input(fn, "k", k, "(batch, seq, heads, n)")
    cdef cnp.ndarray va = head_input(fn, "v", v, "(batch, seq, heads, p)")
    cdef int t = dtype_index(qa)
    cdef cnp.ndarray ga, ba, old, y, new
    cdef fc_gated_delta_args a
    cdef fc_status status
    cdef cnp.npy_intp dims[4]
    memset(&a, 0, sizeof(a))
    a.size, a.type = sizeof(a), <fc_dtype>t
    same_type(fn, "k", ka, t)
    same_type(fn, "v", va, t)
    delta_rule(rule, g, beta)
    delta_sizes(&a, qa, ka, va)
    a.scale = <float>(number(fn, "scale", scale) if scale is not None else a.n ** -0.5 if a.n else 1.0)
    a.each_n = g is not None and cnp.PyArray_NDIM(viewed(fn, "g", g)) == 4
    per_head = (a.batch, a.seq, a.heads)
    ga = shaped(fn, "g", g, (*per_head, a.n) if a.each_n else per_head, -1, a.each_n)
    ba = shaped(fn, "beta", beta, per_head, -1, False)
    old = shaped(fn, "state", state, (a.batch, a.heads, a.n, a.p), FC_F32)
    first, second = pair_of_outs(fn, out)
    dims[0], dims[1], dims[2], dims[3] = a.batch, a.seq, max(a.heads, a.q_heads) if a.heads else 0, a.p
    y = result(fn, first, 4, dims, t)
    dims[1], dims[2] = a.heads, a.n
    new = result(fn, second, 4, dims, FC_F32, "out[1]")
    if out is not None:
        states_apart(fn, y, new, {"q": q, "k": k, "v": v, "g": g, "beta": beta}, ("v",), old)
    a.g_type = <fc_dtype>(dtype_index(ga) if ga is not None else FC_F32)
    a.beta_type = <fc_dtype>(dtype_index(ba) if ba is not None else FC_F32)
    a.out, a.new_state, a.state = cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(new), floats(old)
    a.q, a.k, a.v, a.g, a.beta = data_of(qa), data_of(ka), data_of(va), data_of(ga), data_of(ba)
    outer_strides(a.out_stride, y)
    outer_strides(a.q_stride, qa)
    outer_strides(a.k_stride, ka)
    outer_strides(a.v_stride, va)
    outer_strides(a.g_stride, ga)
    outer_strides(a.beta_stride, ba)
    outer_strides(a.state_stride, old)
    outer_strides(a.new_state_stride, new)
    with nogil:
        status = fc_gated_delta(&a)
    check(fn, status)
    return y, new

# route_tokens, and what mixture of depths does besides: logits alone, and the way back


cdef cnp.ndarray router_logits(str fn, cnp.ndarray x, object weight):
    """(batch, seq) float32 of x (batch, seq, n)."""
    cdef cnp.ndarray w
    cdef cnp.ndarray logits
    cdef fc_rows rows
    cdef fc_status status
    cdef int t = float_type(fn, "x", x)
    cdef ptrdiff_t n
    cdef const float *wp
    if cnp.PyArray_NDIM(x) != 3:
        raise ValueError(f"{fn}: x has shape {shape_of(x)}, expected (batch, seq, channels)")
    contiguous_last(fn, "x", x)
    n = cnp.PyArray_DIM(x, 2)
    if weight is None:
        raise TypeError(f"{fn}: weight is None, expected an array ({n},)")
    w = parameter(fn, "weight", weight, n)
    wp, logits = floats(w), new_array(2, cnp.PyArray_DIMS(x), FC_F32)
    if cnp.PyArray_SIZE(logits):
        collapse(fn, &rows, 2, 2, logits, x)
        with nogil:
            status = fc_router_logits(<fc_dtype>t, <float *>cnp.PyArray_DATA(logits), cnp.PyArray_DATA(x), wp, &rows,
                                      n)
        check(fn, status)
    return logits


def route_tokens(x, weight, *, capacity=0.125):
    """The tokens of each sequence that go through a block of routed depth (arXiv 2404.02258): (indices, gate).

    x (batch, seq, channels) float32, float16 or bfloat16; weight (channels,). A token's logit is r = x . weight, in
    float32. Of each sequence the c = int(capacity * seq) tokens with the largest logits are chosen, at least one of a
    sequence that has any; 0 < capacity <= 1. indices (batch, c) int64 ascend; gate (batch, c) float32 are their logits.
    Of equal logits the one of the lower index is chosen, and a NaN is less than any number.

    Which tokens are chosen depends on those after them: a model that writes token by token decides otherwise, see
    forge_c.nn.MixtureOfDepths.

    >>> x = np.array([[[3.0], [1.0], [2.0], [3.0]]], np.float32)
    >>> route_tokens(x, np.ones(1, np.float32), capacity=0.5)
    (array([[0, 3]]), array([[3., 3.]], dtype=float32))
    """
    cdef cnp.ndarray logits
    cdef cnp.ndarray indices
    cdef cnp.ndarray gate
    cdef cnp.npy_intp dims[2]
    cdef ptrdiff_t seq
    cdef fc_status status
    cdef double share = number("route_tokens", "capacity", capacity)
    if not 0 < share <= 1:
        raise ValueError(f"route_tokens: capacity is {capacity!r}, expected a number above 0 and at most 1")
    logits = router_logits("route_tokens", viewed("route_tokens", "x", x), weight)
    dims[0], seq = cnp.PyArray_DIM(logits, 0), cnp.PyArray_DIM(logits, 1)
    dims[1] = min(seq, max(<ptrdiff_t>(share * seq), 1))
    indices, gate = cnp.PyArray_EMPTY(2, dims, cnp.NPY_INT64, 0), new_array(2, dims, FC_F32)
    with nogil:
        status = fc_largest_logits(<int64_t *>cnp.PyArray_DATA(indices), <float *>cnp.PyArray_DATA(gate),
                                   <const float *>cnp.PyArray_DATA(logits), dims[0], seq, dims[1])
    check("route_tokens", status)
    return indices, gate


def _router_logits(x, weight):
    """x . weight in float32 (batch, seq): x (batch, seq, channels), weight (channels,)."""
    return router_logits("router logits", viewed("router logits", "x", x), weight)


def _gate_update(cnp.ndarray out not None, cnp.ndarray y not None, cnp.ndarray gate not None, rows):
    """out[rows[i]] = (1 - gate[i]) out[rows[i]] + gate[i] y[i]; out (tokens, n), y (M, n) of its dtype, rows (M,) no
    two of which are equal, gate (M,) float32."""
    cdef str fn = "gate update"
    cdef fc_rows r
    cdef fc_status status
    cdef int t = float_type(fn, "out", out)
    cdef cnp.ndarray index
    cdef cnp.ndarray g
    cdef const float *gp
    cdef ptrdiff_t n
    cdef int i
    same_type(fn, "y", y, t)
    if cnp.PyArray_NDIM(out) != 2 or cnp.PyArray_NDIM(y) != 2 or out.shape[1] != y.shape[1]:
        raise ValueError(f"{fn}: out has shape {shape_of(out)} and y {shape_of(y)}, expected (tokens, n) and (rows, n)")
    contiguous_last(fn, "out", out)
    contiguous_last(fn, "y", y)
    index, g = row_index(fn, "rows", rows, out.shape[0]), parameter(fn, "gate", gate, y.shape[0])
    if index.size != y.shape[0] or not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError(f"{fn}: rows is {rows!r}, expected {y.shape[0]} rows of an out that can be written to")
    no_overlap(fn, "out", out, "y", y, False)
    gp, n = floats(g), out.shape[1]
    memset(&r, 0, sizeof(r))
    r.size, r.ndim, r.shape[0] = sizeof(r), 1, y.shape[0]
    for i in range(2):
        r.stride[i][0], r.index[i] = cnp.PyArray_STRIDE(out, 0), <const int64_t *>cnp.PyArray_DATA(index)
    r.stride[2][0] = cnp.PyArray_STRIDE(y, 0)
    if cnp.PyArray_SIZE(y):
        with nogil:
            status = fc_gate_update(<fc_dtype>t, cnp.PyArray_DATA(out), cnp.PyArray_DATA(out), cnp.PyArray_DATA(y),
                                    gp, &r, n)
        check(fn, status)

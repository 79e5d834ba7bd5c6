# rope


cdef cnp.ndarray rope_positions(object positions, ptrdiff_t batch, ptrdiff_t seq):
    cdef cnp.ndarray p = viewed("rope", "positions", positions)
    if p.dtype.kind not in "iu":
        raise TypeError(f"rope: positions has dtype {p.dtype}, expected integers")
    if shape_of(p) != (seq,) and shape_of(p) != (batch, seq):
        raise ValueError(f"rope: positions has shape {shape_of(p)}, expected ({seq},) or ({batch}, {seq})")
    return private_ints(p)


cdef int positions_inside(const int64_t *p, ptrdiff_t count, ptrdiff_t limit, object positions) except -1:
    cdef ptrdiff_t i
    for i in range(count):
        if p[i] < 0 or p[i] >= limit:
            given = given_number(p[i], viewed("rope", "positions", positions))
            raise IndexError(f"rope: position {given} is outside the table of {limit} positions")
    return 0


def rope(x, table, *, start_pos=0, positions=None, interleaved=False, out=None):
    """Rotary position embedding (arXiv 2104.09864).

    x (batch, seq, heads, head_dim) or (batch, seq, head_dim), any strides on the outer axes; table a RopeTable with
    table.dim <= head_dim: the first table.dim channels turn, the rest are copied. Positions are
    start_pos .. start_pos + seq - 1, or `positions` (seq,) or (batch, seq). Pairs are (i, i + dim/2), or (2i, 2i + 1)
    with interleaved=True. The result has x's shape and dtype; `out` may be x.
    A position outside the table is an IndexError.

    >>> from forge_c import rope_table
    >>> x = np.array([[[1.0, 0.0]]], np.float32)
    >>> rope(x, rope_table(2, 8), start_pos=1).round(4)
    array([[[0.5403, 0.8415]]], dtype=float32)
    """
    cdef cnp.ndarray xa = viewed("rope", "x", x)
    cdef int t = float_type("rope", "x", xa)
    cdef int nd = cnp.PyArray_NDIM(xa)
    cdef cnp.ndarray cos
    cdef cnp.ndarray sin
    cdef cnp.ndarray y
    cdef cnp.ndarray p = None
    cdef fc_rope_args a
    cdef fc_status status
    cdef ptrdiff_t limit
    cdef int i
    if nd != 3 and nd != 4:
        raise ValueError(f"rope: x has shape {shape_of(xa)}, expected (batch, seq, heads, head_dim) or "
                         "(batch, seq, head_dim)")
    contiguous_last("rope", "x", xa)
    if not isinstance(table, RopeTable):
        raise TypeError(f"rope: table is a {type(table).__name__}, expected a RopeTable")
    cos, sin = table.cos, table.sin
    y = result("rope", out, nd, cnp.PyArray_DIMS(xa), t)
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    a.type = <fc_dtype>t
    a.batch, a.seq = cnp.PyArray_DIM(xa, 0), cnp.PyArray_DIM(xa, 1)
    a.heads = cnp.PyArray_DIM(xa, 2) if nd == 4 else 1
    a.head_dim = cnp.PyArray_DIM(xa, nd - 1)
    limit, a.rotary_pairs = cnp.PyArray_DIM(cos, 0), cnp.PyArray_DIM(cos, 1)
    if 2 * a.rotary_pairs > a.head_dim:
        raise ValueError(f"rope: table has dim {2 * a.rotary_pairs}, expected at most x's head_dim {a.head_dim}")
    if out is not None:
        no_overlap("rope", "out", y, "x", xa, True)
        no_overlap("rope", "out", y, "table.cos", cos, False)
        no_overlap("rope", "out", y, "table.sin", sin, False)
    if positions is not None:
        p = rope_positions(positions, a.batch, a.seq)
        if out is not None:
            no_overlap("rope", "out", y, "positions", viewed("rope", "positions", positions), False)
        positions_inside(<const int64_t *>cnp.PyArray_DATA(p), cnp.PyArray_SIZE(p), limit, positions)
        a.positions = <const int64_t *>cnp.PyArray_DATA(p)
        a.positions_stride = a.seq if cnp.PyArray_NDIM(p) == 2 else 0
    else:
        start_pos = integer("rope", "start_pos", start_pos)
        if a.seq and (start_pos < 0 or start_pos > limit - a.seq):
            raise IndexError(f"rope: positions {start_pos} to {start_pos + a.seq - 1} are outside the table of "
                             f"{limit} positions")
        a.start_pos = start_pos if a.seq else 0
    for i in range(nd - 1):
        a.x_stride[i], a.out_stride[i] = cnp.PyArray_STRIDE(xa, i), cnp.PyArray_STRIDE(y, i)
    a.out, a.x = cnp.PyArray_DATA(y), cnp.PyArray_DATA(xa)
    a.cos, a.sin = <const float *>cnp.PyArray_DATA(cos), <const float *>cnp.PyArray_DATA(sin)
    a.interleaved = flag("rope", "interleaved", interleaved)
    if cnp.PyArray_SIZE(xa):
        with nogil:
            status = fc_rope(&a)
        check("rope", status)
    return y

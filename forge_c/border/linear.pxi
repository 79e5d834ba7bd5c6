# PackedWeight, linear, gated_linear, embedding

cdef extern from "formats.h" nogil:
    enum:
        FC_PANEL
        FC_LINE
        FC_ANY_GROUP
    struct fc_format:
        const char *name
        int packed, bits, k_step, group, block_groups, scale_bytes, minimum_bytes, zero, block_lines
    const fc_format fc_formats[FC_LAYOUTS]

cdef dict LAYOUTS = {fc_formats[i].name.decode(): i for i in range(FC_LAYOUTS) if fc_formats[i].packed}


def _weight_formats():
    """Name -> the row of src_c/formats.h, of each packed format; group None: the weight's."""
    rows = {}
    for name, i in LAYOUTS.items():
        f = fc_formats[<int>i]
        rows[name] = {"bits": f.bits, "k_step": f.k_step, "group": None if f.group == FC_ANY_GROUP else f.group,
                      "block_groups": f.block_groups, "scale_bytes": f.scale_bytes,
                      "minimum_bytes": f.minimum_bytes, "zero": f.zero, "block_lines": f.block_lines}
    return {"panel": FC_PANEL, "line": FC_LINE, "rows": rows}


cdef tuple packed_shape(object shape):
    """(in_features, out_features), two numbers."""
    try:
        k, n = shape
    except MemoryError:
        raise
    except Exception:
        raise TypeError(f"PackedWeight: shape is {shape!r}, expected (in_features, out_features)") from None
    k, n = integer("PackedWeight", "shape", k), integer("PackedWeight", "shape", n)
    if max(k, n) > PY_SSIZE_T_MAX - FC_PANEL:  # which is added to them
        raise ValueError(f"PackedWeight: shape is {shape}, which cannot be addressed")
    return max(k, -1), max(n, -1)


cdef class PackedWeight:
    """A weight matrix in the layout that the kernels stream; made by `pack` and `pack_gated`, opaque to everyone else.

    .shape (in_features, out_features), .dtype the format's name, .group_size (rows that share a scale, or None),
    .activations (how inputs are rounded, see `pack`, or None), .gated, .nbytes, .unpack() -> float32 (in, out).
    """
    cdef readonly tuple shape
    cdef readonly str dtype
    cdef readonly bint gated
    cdef readonly object group_size
    cdef readonly object activations
    cdef readonly cnp.ndarray data
    cdef fc_layout layout
    cdef fc_rounds rounding
    cdef ptrdiff_t k, n, group

    def __array__(self, *args, **kwargs):
        raise TypeError("PackedWeight is no array: multiply by linear(x, weight), or decode it with weight.unpack()")

    def __init__(self, data, shape, dtype, gated=False, group_size=None, activations=None):
        from forge_c.formats.layout import ROWS_OF, Format
        self.gated = flag("PackedWeight", "gated", gated)
        cdef ptrdiff_t sides = 2 if self.gated else 1
        f = Format.checked("PackedWeight", dtype, group_size, ROWS_OF)
        self.layout = LAYOUTS[f.name]
        self.k, self.n = packed_shape(shape)
        if self.k < 0 or self.n < 0 or self.n % sides:
            raise ValueError(f"PackedWeight: shape is {shape}, expected (in_features, out_features)"
                             f"{', a pair of equal width' if self.gated else ''}")
        self.shape = (self.k, self.n)
        self.dtype = f.dtype
        self.group_size = f.group
        self.group = f.group or 0
        self.activations = f.checked_activations("PackedWeight", activations)
        self.rounding = FC_ROUND_I12 if self.activations == "int12" else FC_ROUND_I8
        cdef ptrdiff_t panels = (self.n // sides + FC_PANEL - 1) // FC_PANEL * sides
        if not cnp.PyArray_Check(data):
            raise TypeError(f"PackedWeight: data is a {type(data).__name__}, expected a NumPy array")
        if data.nbytes != panels * f.panel_bytes(self.k) or not data.flags.c_contiguous:
            raise ValueError(f"PackedWeight: data has {data.nbytes} bytes, expected those that pack() "
                             f"makes for {self.shape}")
        self.data = data.reshape(-1).view(np.uint8).reshape(panels, f.panel_bytes(self.k))
        self.data.flags.writeable = False

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def unpack(self):
        """What the kernel multiplies by, as a float32 array of .shape."""
        from forge_c.packing import unpack
        return unpack(self)

    def __reduce__(self):
        return PackedWeight, (np.array(self.data), self.shape, self.dtype, self.gated, self.group_size,
                              self.activations)

    def __repr__(self):
        from forge_c.formats.layout import Format
        usual = Format(self.dtype, self.group_size).checked_activations("PackedWeight", None)
        return (f"PackedWeight(shape={self.shape}, dtype='{self.dtype}'"
                f"{f', group_size={self.group_size}' if self.group_size else ''}"
                f"{f', activations={self.activations!r}' if self.activations != usual else ''}"
                f"{', gated=True' if self.gated else ''})")


def pack_columns(cnp.ndarray out not None, cnp.ndarray columns not None):
    """out (panels, panel bytes) uint8, each panel contiguous <- columns (n, k), float32 or bfloat16, k contiguous: the
    lines of that format. For formats/quantize.py."""
    cdef fc_status status
    cdef fc_dtype t = <fc_dtype>dtype_index(columns)
    with nogil:
        status = fc_pack_columns(t, cnp.PyArray_DATA(out), cnp.PyArray_STRIDE(out, 0), cnp.PyArray_DATA(columns),
                                 cnp.PyArray_STRIDE(columns, 0), cnp.PyArray_DIM(columns, 1),
                                 cnp.PyArray_DIM(columns, 0))
    check("pack", status)


def search_scales(cnp.ndarray out not None, cnp.ndarray columns not None, cnp.ndarray importance not None,
                  ptrdiff_t group, int groups, bint minima, int zero, int top):
    """out (n, k / (group groups), lines) float32 <- what turns integers back into columns (n, k), see forge.h, all
    contiguous float32. For formats/quantize.py."""
    cdef fc_search_args a
    cdef fc_status status
    a.size, a.out, a.w = sizeof(a), <float *>cnp.PyArray_DATA(out), <const float *>cnp.PyArray_DATA(columns)
    a.ldw, a.importance = cnp.PyArray_STRIDE(columns, 0), <const float *>cnp.PyArray_DATA(importance)
    a.n, a.k, a.group, a.groups = cnp.PyArray_DIM(columns, 0), cnp.PyArray_DIM(columns, 1), group, groups
    a.minima, a.zero, a.top = minima, zero, top
    with nogil:
        status = fc_search_scales(&a)
    check("pack", status)


cdef cnp.ndarray linear_weight(str fn, object weight, fc_linear_args *a):
    """Fill in the layout of `weight`; the array that must outlive the call."""
    cdef cnp.ndarray w
    cdef PackedWeight packed
    cdef ptrdiff_t size
    if isinstance(weight, PackedWeight):
        packed = weight
        a.layout, a.k, a.n, a.group = packed.layout, packed.k, packed.n, packed.group
        a.rounding = packed.rounding
        a.weight = cnp.PyArray_DATA(packed.data)
        return packed.data
    w = viewed(fn, "weight", weight)
    a.weight_type = <fc_dtype>float_type(fn, "weight", w)
    if cnp.PyArray_NDIM(w) != 2:
        raise ValueError(f"{fn}: weight has shape {shape_of(w)}, expected (in_features, out_features)")
    a.k, a.n = cnp.PyArray_DIM(w, 0), cnp.PyArray_DIM(w, 1)
    a.weight = cnp.PyArray_DATA(w)
    size = cnp.PyArray_ITEMSIZE(w)
    if a.n <= 1 or cnp.PyArray_STRIDE(w, 1) == size:
        a.layout, a.ldw = FC_ROWS, cnp.PyArray_STRIDE(w, 0)
    elif a.k <= 1 or cnp.PyArray_STRIDE(w, 0) == size:
        a.layout, a.ldw = FC_COLS, cnp.PyArray_STRIDE(w, 1)
    else:
        raise ValueError(f"{fn}: weight has strides {w.strides[0], w.strides[1]} bytes, expected {size} on one axis; "
                         "pass np.ascontiguousarray(weight)")
    return w


cdef cnp.ndarray run_linear(str fn, object x, object weight, object bias, object residual, object out, bint gated,
                            fc_activation activation):
    cdef fc_linear_args a
    cdef fc_rows rows
    cdef fc_status status
    cdef cnp.ndarray xa = viewed(fn, "x", x)
    cdef cnp.ndarray w
    cdef cnp.ndarray b = None
    cdef cnp.ndarray res = None
    cdef cnp.ndarray y
    cdef int t = float_type(fn, "x", xa)
    cdef int nd = cnp.PyArray_NDIM(xa)
    cdef cnp.npy_intp dims[64]
    cdef int i
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    a.type, a.gated, a.activation, a.rows = <fc_dtype>t, gated, activation, &rows
    w = linear_weight(fn, weight, &a)
    if gated:
        a.n //= 2
    if nd == 0 or cnp.PyArray_DIM(xa, nd - 1) != a.k:
        raise ValueError(f"{fn}: x has shape {shape_of(xa)}, expected (..., {a.k}) for a weight of shape "
                         f"{(a.k, 2 * a.n if gated else a.n)}")
    contiguous_last(fn, "x", xa)
    for i in range(nd - 1):
        dims[i] = cnp.PyArray_DIM(xa, i)
    dims[nd - 1] = a.n
    if gated and bias is not None:
        b = gated_bias(fn, bias, a.n)
    else:
        b = parameter(fn, "bias", bias, a.n)
    y = result(fn, out, nd, dims, t)
    if residual is not None:
        res = viewed(fn, "residual", residual)
        same_type(fn, "residual", res, t)
        same_shape(fn, "residual", res, y)
        contiguous_last(fn, "residual", res)
    if out is not None:
        no_overlap(fn, "out", y, "x", xa, False)
        no_overlap(fn, "out", y, "weight", w, False)
        if b is not None:
            no_overlap(fn, "out", y, "bias", viewed(fn, "bias", bias), False)
        if res is not None:
            no_overlap(fn, "out", y, "residual", res, True)
    if cnp.PyArray_SIZE(y) == 0:
        return y
    collapse(fn, &rows, nd - 1, 3, y, xa, res)
    a.m = cnp.PyArray_SIZE(y) // a.n
    a.out, a.x = cnp.PyArray_DATA(y), cnp.PyArray_DATA(xa)
    a.residual = NULL if res is None else cnp.PyArray_DATA(res)
    a.bias = floats(b)
    with nogil:
        status = fc_linear(&a)
    check(fn, status)
    return y


def linear(x, weight, bias=None, *, residual=None, out=None):
    """x @ weight + bias + residual.

    x (..., in_features) float32, float16 or bfloat16; weight (in_features, out_features): a PackedWeight, or an
    ndarray of any of these dtypes with one contiguous axis (so `w.T` of a torch weight works as it is); bias
    (out_features,) or None; residual and the result (..., out_features) in x's dtype. Accumulation is float32, each
    output one chain over in_features, so a row's bits do not depend on the other rows. A weight that is used more than
    once should be packed: a plain one is streamed past a few rows, or made into panels at every call, and is then up to
    a third slower than NumPy's BLAS from 8 rows on; w.T of torch's layout is the faster one up to 32 rows. With a
    bfloat16 PackedWeight, x is rounded to bfloat16; with an integer one, each row of x is rounded to integers as its
    `activations` say, see pack, and a row that holds a NaN or an infinity gives NaN. `out` may be the residual itself,
    and shares no memory with anything else.

    >>> linear(np.ones((2, 3), np.float32), np.eye(3, 2, dtype=np.float32), np.array([1, 2], np.float32))
    array([[2., 3.],
           [2., 3.]], dtype=float32)
    """
    if isinstance(weight, PackedWeight) and (<PackedWeight>weight).gated:
        raise TypeError("linear: weight is a pair from pack_gated, expected one matrix; use gated_linear")
    return run_linear("linear", x, weight, bias, residual, out, False, FC_RELU)


cdef dict GATES = {"relu": FC_RELU, "silu": FC_SILU, "gelu": FC_GELU, "gelu_tanh": FC_GELU_TANH}


cdef cnp.ndarray gated_bias(str fn, object bias, ptrdiff_t n):
    cdef cnp.ndarray b = viewed(fn, "bias", bias)
    float_type(fn, "bias", b)
    if shape_of(b) != (2, n):
        raise ValueError(f"{fn}: bias has shape {shape_of(b)}, expected (2, {n})")
    return np.ascontiguousarray(b, dtype=np.float32)


def gated_linear(x, weight, bias=None, *, activation="silu", out=None):
    """f(x @ gate + bias[0]) * (x @ up + bias[1]) in one pass: the hidden layer of a gated MLP
    (arXiv 2002.05202).

    x (..., in_features); weight from pack_gated(gate, up), both (in_features, hidden); bias (2, hidden) or
    None; activation "silu", "gelu", "gelu_tanh" or "relu". The result is (..., hidden) in x's dtype; the two products
    are never in memory. dtypes and `out` as in linear.

    >>> from forge_c import pack_gated
    >>> w = np.eye(2, dtype=np.float32)
    >>> gated_linear(np.ones((1, 2), np.float32), pack_gated(w, w)).round(4)
    array([[0.7311, 0.7311]], dtype=float32)
    """
    if not isinstance(weight, PackedWeight) or not (<PackedWeight>weight).gated:
        raise TypeError(f"gated_linear: weight is a {type(weight).__name__}, expected a pair from pack_gated")
    if not isinstance(activation, str) or activation not in GATES:
        raise ValueError(f"gated_linear: activation is {activation!r}, expected one of {', '.join(GATES)}")
    return run_linear("gated_linear", x, weight, bias, None, out, True, GATES[activation])


cdef cnp.ndarray row_index(str fn, str arg, object value, ptrdiff_t rows):
    """Whole numbers below `rows` (M,) as int64 of our own; None stays None."""
    if value is None:
        return None
    given = np.asarray(value)
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise TypeError(f"{fn}: {arg} has dtype {given.dtype} and shape {given.shape}, expected whole numbers (rows,)")
    ints = private_ints(given)
    if ints.size and (ints.min() < 0 or ints.max() >= rows):
        raise IndexError(f"{fn}: {arg} holds {ints.min() if ints.min() < 0 else ints.max()}, expected 0 to {rows - 1}")
    return ints


def _linear_rows(x, weight, bias=None, *, x_rows=None, out_rows=None, out_scale=None, activation=None, out=None):
    """linear, or gated_linear where `activation` is not None, of the rows x[x_rows]; with `out_rows` those are added:
    out[out_rows[i]] += out_scale[i] * (x[x_rows[i]] @ weight + bias), i after i, however often a row is named."""
    cdef str fn = "linear rows"
    cdef fc_linear_args a
    cdef fc_rows rows
    cdef fc_status status
    cdef cnp.npy_intp dims[2]
    cdef cnp.ndarray xa = viewed(fn, "x", x)
    cdef int t = float_type(fn, "x", xa)
    cdef bint gated = activation is not None
    cdef cnp.ndarray w, b, y, taken, added, scale
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    memset(&rows, 0, sizeof(rows))
    rows.size = sizeof(rows)
    if isinstance(weight, PackedWeight) and weight.gated != gated or gated and not isinstance(weight, PackedWeight):
        raise TypeError(f"{fn}: weight is {weight!r}, expected {'a pair' if gated else 'one matrix'}")
    w = linear_weight(fn, weight, &a)
    a.n //= 2 if gated else 1
    if cnp.PyArray_NDIM(xa) != 2 or cnp.PyArray_DIM(xa, 1) != a.k:
        raise ValueError(f"{fn}: x has shape {shape_of(xa)}, expected (rows, {a.k})")
    contiguous_last(fn, "x", xa)
    taken = row_index(fn, "x_rows", x_rows, cnp.PyArray_DIM(xa, 0))
    dims[0], dims[1] = cnp.PyArray_DIM(xa, 0) if taken is None else taken.size, a.n
    rows.ndim, rows.shape[0], a.m = 1, dims[0], dims[0]
    if out_rows is not None:
        if out is None or gated:
            raise TypeError(f"{fn}: out_rows is given, expected an out to add to and no activation")
        dims[0] = len(out)
    y = result(fn, out, 2, dims, t)
    added = row_index(fn, "out_rows", out_rows, dims[0])
    b = gated_bias(fn, bias, a.n) if gated and bias is not None else parameter(fn, "bias", bias, a.n)
    scale = parameter(fn, "out_scale", out_scale, a.m)
    if (added is not None and added.size != a.m) or (scale is not None and added is None):
        raise ValueError(f"{fn}: out_rows is {out_rows!r}, expected {a.m} rows of out")
    no_overlap(fn, "out", y, "x", xa, False)
    no_overlap(fn, "out", y, "weight", w, False)
    a.type, a.gated, a.activation, a.rows = <fc_dtype>t, gated, <fc_activation><int>GATES[activation or "relu"], &rows
    a.out, a.x, a.bias, a.out_scale = cnp.PyArray_DATA(y), cnp.PyArray_DATA(xa), floats(b), floats(scale)
    rows.stride[0][0], rows.stride[1][0] = cnp.PyArray_STRIDE(y, 0), cnp.PyArray_STRIDE(xa, 0)
    if taken is not None:
        rows.index[1] = <const int64_t *>cnp.PyArray_DATA(taken)
    if added is not None:
        a.residual, rows.stride[2][0] = a.out, rows.stride[0][0]
        rows.index[0] = rows.index[2] = <const int64_t *>cnp.PyArray_DATA(added)
    if a.m and a.n:
        with nogil:
            status = fc_linear(&a)
        check(fn, status)
    return y


cdef int ids_inside(const int64_t *ids, ptrdiff_t count, ptrdiff_t limit, tuple shape, cnp.ndarray given) except -1:
    cdef ptrdiff_t i
    for i in range(count):
        if ids[i] < 0 or ids[i] >= limit:
            where = tuple([int(v) for v in np.unravel_index(i, shape)]) if shape else ()
            raise IndexError(f"embedding: id {given_number(ids[i], given)} at {where} is outside the table of "
                             f"{limit} rows")
    return 0


cdef int dtype_named(str fn, object dtype) except -1:
    """fc_dtype of what np.dtype() makes of an argument."""
    try:
        given = np.dtype(dtype)
    except MemoryError:
        raise
    except Exception:
        raise TypeError(f"{fn}: dtype is {dtype!r}, expected float32, float16 or bfloat16") from None
    if given not in DTYPES:
        raise TypeError(f"{fn}: dtype is {given}, expected float32, float16 or bfloat16")
    return DTYPES.index(given)


cdef int one_matrix(str fn, str arg, PackedWeight w) except -1:
    if w.gated:
        raise TypeError(f"{fn}: {arg} is a pair from pack_gated, expected one matrix")
    return 0


def embedding(ids, table, *, scale=1.0, dtype=None, out=None):
    """table[ids] * scale, checked: an id outside 0 .. num - 1 is an IndexError, never a wrap.

    ids: integers of any shape; table (num, dim) float32, float16 or bfloat16, or a PackedWeight of shape (dim, num),
    the projection of tied weights, whose rows are then those of `table.unpack().T`; the result is ids.shape + (dim,) in
    `dtype`, by default the table's, or float32 from a packed one.

    >>> embedding([1, 0], np.array([[1, 2], [3, 4]], np.float32))
    array([[3., 4.],
           [1., 2.]], dtype=float32)
    """
    cdef cnp.ndarray ia = listed("embedding", "ids", ids)
    cdef cnp.ndarray given
    cdef cnp.ndarray ta
    cdef PackedWeight packed = None
    cdef int t = FC_F32
    cdef int out_t
    cdef float factor = <float>number("embedding", "scale", scale)
    cdef cnp.ndarray y
    cdef fc_status status
    cdef cnp.npy_intp dims[MAX_AXES]
    cdef int i, nd
    cdef ptrdiff_t count, n, rows, ld
    if isinstance(table, PackedWeight):
        packed = table
        one_matrix("embedding", "table", packed)
        ta, rows, n = packed.data, packed.n, packed.k
    else:
        ta = viewed("embedding", "table", table)
        t = float_type("embedding", "table", ta)
        if cnp.PyArray_NDIM(ta) != 2:
            raise ValueError(f"embedding: table has shape {shape_of(ta)}, expected (num, dim)")
        contiguous_last("embedding", "table", ta)
        rows, n = cnp.PyArray_DIM(ta, 0), cnp.PyArray_DIM(ta, 1)
    if ia.dtype.kind not in "iu" and ia.size:
        raise TypeError(f"embedding: ids has dtype {ia.dtype}, expected integers")
    out_t = t if dtype is None else dtype_named("embedding", dtype)
    nd = cnp.PyArray_NDIM(ia)
    if nd >= MAX_AXES:
        raise ValueError(f"embedding: ids has {nd} axes, expected at most {MAX_AXES - 1}")
    given, ia = ia, private_ints(ia)
    for i in range(nd):
        dims[i] = cnp.PyArray_DIM(ia, i)
    dims[nd] = n
    count, ld = cnp.PyArray_SIZE(ia), cnp.PyArray_STRIDE(ta, 0)
    y = result("embedding", out, nd + 1, dims, out_t)
    if not cnp.PyArray_IS_C_CONTIGUOUS(y):
        raise ValueError("embedding: out is not C-contiguous")
    no_overlap("embedding", "out", y, "table", ta, False)
    no_overlap("embedding", "out", y, "ids", given, False)
    ids_inside(<const int64_t *>cnp.PyArray_DATA(ia), count, rows, shape_of(ia), given)
    if cnp.PyArray_SIZE(y) == 0:
        return y
    with nogil:
        if packed is not None:
            status = fc_embedding_packed(packed.layout, packed.group, <fc_dtype>out_t, cnp.PyArray_DATA(y),
                                         cnp.PyArray_DATA(ta), <const int64_t *>cnp.PyArray_DATA(ia), count, n, factor)
        else:
            status = fc_embedding(<fc_dtype>t, <fc_dtype>out_t, cnp.PyArray_DATA(y), cnp.PyArray_DATA(ta),
                                  <const int64_t *>cnp.PyArray_DATA(ia), count, n, ld, factor)
    check("embedding", status)
    return y

# attention, merge_attention


cdef cnp.ndarray attention_input(str arg, object x):
    cdef cnp.ndarray a = viewed("attention", arg, x)
    float_type("attention", arg, a)
    if cnp.PyArray_NDIM(a) != 4:
        raise ValueError(f"attention: {arg} has shape {shape_of(a)}, expected 4 axes (batch, seq, heads, dim)")
    contiguous_last("attention", arg, a)
    return a


cdef cnp.ndarray attention_kv_lens(object kv_lens, ptrdiff_t batch, ptrdiff_t kv_len):
    cdef cnp.ndarray a = viewed("attention", "kv_lens", kv_lens)
    cdef cnp.ndarray given
    cdef ptrdiff_t b
    cdef int64_t *p
    if a.dtype.kind not in "iu":
        raise TypeError(f"attention: kv_lens has dtype {a.dtype}, expected integers")
    if shape_of(a) != (batch,):
        raise ValueError(f"attention: kv_lens has shape {shape_of(a)}, expected ({batch},)")
    given, a = a, private_ints(a)
    p = <int64_t *>cnp.PyArray_DATA(a)
    for b in range(batch):
        if p[b] < 0 or p[b] > kv_len:
            raise ValueError(f"attention: kv_lens[{b}] is {given_number(p[b], given)}, expected 0 to {kv_len}")
    return a


cdef cnp.ndarray attention_mask(object mask, fc_attention_args *a):
    """The mask broadcast to (batch, heads, q_len, kv_len), its last axis contiguous or of stride 0."""
    cdef cnp.ndarray m = viewed("attention", "mask", mask)
    cdef int i
    shape = (a.batch, a.heads, a.q_len, a.kv_len)
    a.mask_is_bool = cnp.PyArray_TYPE(m) == cnp.NPY_BOOL
    if not a.mask_is_bool:
        if dtype_index(m) < 0:
            raise TypeError(f"attention: mask has dtype {m.dtype}, expected bool, float32, float16 or bfloat16")
        a.mask_type = <fc_dtype>dtype_index(m)
    if m.ndim and m.shape[m.ndim - 1] > 1 and m.strides[m.ndim - 1] not in (0, m.itemsize):
        m = np.ascontiguousarray(m)
    try:
        m = np.broadcast_to(m, shape)
    except ValueError:
        raise ValueError(f"attention: mask has shape {shape_of(viewed('attention', 'mask', mask))}, expected one that "
                         f"broadcasts to (batch, heads, q_len, kv_len) = {shape}") from None
    for i in range(4):
        a.mask_stride[i] = cnp.PyArray_STRIDE(m, i)
    a.mask = cnp.PyArray_DATA(m)
    return m


cdef int attention_queries(fc_attention_args *a, cnp.ndarray q) except -1:
    """Sizes and strides of q (batch, seq, heads, dim)."""
    a.batch, a.q_len, a.heads, a.head_dim = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    a.q_type, a.q = <fc_dtype>dtype_index(q), cnp.PyArray_DATA(q)
    a.q_stride[0], a.q_stride[1], a.q_stride[2] = q.strides[0], q.strides[1], q.strides[2]
    return 0


cdef int attention_heads(fc_attention_args *a) except -1:
    if a.kv_heads == 0 or a.heads % a.kv_heads:
        raise ValueError(f"attention: q has {a.heads} heads, expected a multiple of k's {a.kv_heads} heads")
    return 0


cdef int attention_arrays(fc_attention_args *a, cnp.ndarray k, cnp.ndarray v) except -1:
    """Sizes and strides of k, v (batch, seq, heads, dim)."""
    a.kv_len, a.kv_heads, a.v_dim = k.shape[1], k.shape[2], v.shape[3]
    if k.shape[0] != a.batch or k.shape[3] != a.head_dim:
        raise ValueError(f"attention: k has shape {shape_of(k)}, expected ({a.batch}, kv_len, kv_heads, {a.head_dim})")
    if v.shape[0] != a.batch or v.shape[1] != a.kv_len or v.shape[2] != a.kv_heads:
        raise ValueError(f"attention: v has shape {shape_of(v)}, expected ({a.batch}, {a.kv_len}, {a.kv_heads}, v_dim)")
    attention_heads(a)
    a.kv_type = <fc_dtype>dtype_index(k)
    a.k_stride[0], a.k_stride[1], a.k_stride[2] = k.strides[0], k.strides[1], k.strides[2]
    a.v_stride[0], a.v_stride[1], a.v_stride[2] = v.strides[0], v.strides[1], v.strides[2]
    a.k, a.v = cnp.PyArray_DATA(k), cnp.PyArray_DATA(v)
    return 0


cdef ptrdiff_t attention_window(object window) except -1:
    """0: none. One of 2^63 or more hides nothing."""
    if window is None:
        return 0
    size = integer("attention", "window", window)
    if size < 1:
        raise ValueError(f"attention: window is {size}, expected at least 1")
    return size if size <= PY_SSIZE_T_MAX else 0


cdef float attention_softcap(object softcap) except? -1:
    """0: none."""
    cdef float cap
    if softcap is None:
        return 0
    if not number("attention", "softcap", softcap) > 0:
        raise ValueError(f"attention: softcap is {softcap}, expected a number > 0")
    cap = <float>number("attention", "softcap", softcap)
    if not 0 < cap < INFINITY:
        raise ValueError(f"attention: softcap is {softcap}, expected a finite number that float32 does not round to 0")
    return cap


cdef fc_precision attention_precision(str function, str arg, object precision) except <fc_precision>-1:
    """What products are made in."""
    if precision is None:
        return FC_PRECISION_AUTO
    if not isinstance(precision, str):
        raise TypeError(f"{function}: {arg} is a {type(precision).__name__}, expected None or a name: float32, "
                        "bfloat16, int8")
    if precision == "float32":
        return FC_PRECISION_F32
    if precision == "bfloat16":
        return FC_PRECISION_BF16
    if precision == "int8":
        return FC_PRECISION_I8
    raise ValueError(f"{function}: {arg} is {precision!r}, expected None, float32, bfloat16 or int8")


cdef tuple attention_cache(object cache, fc_attention_args *a, object kv_lens, object window):
    """(pages, lengths) of a KVCache, to be held during the call. Another thread may append meanwhile: the lengths are
    copied first, and nothing else is asked how many tokens there are."""
    cdef KVPages pages
    cdef cnp.ndarray lengths
    try:
        lengths, pages, held = cache._lengths.copy(), cache._pages, cache.window
    except AttributeError:
        raise TypeError(f"attention: v is None and k is a {type(cache).__name__}, expected arrays k and v, "
                        "or a KVCache as k") from None
    if kv_lens is not None:
        raise ValueError("attention: kv_lens is given with a KVCache, which knows its own lengths")
    a.cache, a.kv_heads, a.v_dim = &pages.c, pages.c.kv_heads, pages.c.v_dim
    if lengths.shape[0] != a.batch or pages.c.head_dim != a.head_dim:
        raise ValueError(f"attention: q has shape ({a.batch}, {a.q_len}, {a.heads}, {a.head_dim}), expected batch "
                         f"{lengths.shape[0]} and head_dim {pages.c.head_dim} as the KVCache")
    attention_heads(a)
    a.kv_len = lengths.max() if a.batch else 0
    if held is not None:
        if window is not None and window > held:
            raise ValueError(f"attention: window is {window}, expected at most the cache's {held}")
        a.window = a.window or attention_window(held)
    return pages, lengths


cdef cnp.ndarray attention_positions(str arg, object positions, ptrdiff_t batch, ptrdiff_t n, str axis):
    """(n,) or (batch, n) as int64, copied, not yet known to be ascending."""
    cdef cnp.ndarray a = viewed("attention", arg, positions)
    if a.dtype.kind not in "iu":
        raise TypeError(f"attention: {arg} has dtype {a.dtype}, expected integers")
    if shape_of(a) != (n,) and shape_of(a) != (batch, n):
        raise ValueError(f"attention: {arg} has shape {shape_of(a)}, expected ({axis},) = ({n},) or "
                         f"(batch, {axis}) = ({batch}, {n})")
    if a.dtype.kind == "u" and a.size and a.max() > PY_SSIZE_T_MAX:
        raise ValueError(f"attention: {arg} holds {a.max()}, expected at most {PY_SSIZE_T_MAX}")
    return private_ints(a)


cdef int attention_ascending(str arg, cnp.ndarray a, ptrdiff_t n, const int64_t *lens) except -1:
    """Each row ascends, equal neighbours allowed; of keys, the valid ones of the row."""
    cdef const int64_t *p = <const int64_t *>cnp.PyArray_DATA(a)
    cdef ptrdiff_t rows = cnp.PyArray_DIM(a, 0) if cnp.PyArray_NDIM(a) == 2 else 1
    cdef ptrdiff_t b, i, valid
    for b in range(rows):
        valid = n if lens == NULL or cnp.PyArray_NDIM(a) == 1 else lens[b]
        for i in range(1, valid):
            if p[b * n + i] < p[b * n + i - 1]:
                at = f"{b}, {i}" if cnp.PyArray_NDIM(a) == 2 else f"{i}"
                raise ValueError(f"attention: {arg}[{at}] is {p[b * n + i]} after {p[b * n + i - 1]}, expected "
                                 "positions that ascend")
    return 0


cdef cnp.ndarray attention_last_positions(cnp.ndarray kv, fc_attention_args *a):
    """(batch, q_len): where the last q_len of each row's keys lie."""
    cdef cnp.ndarray lens = np.empty(a.batch, np.int64)
    cdef ptrdiff_t b
    for b in range(a.batch):
        (<int64_t *>cnp.PyArray_DATA(lens))[b] = a.kv_len if a.kv_lens == NULL else a.kv_lens[b]
    if a.batch and lens.min() < a.q_len:
        raise ValueError(f"attention: kv_positions is given without q_positions, and a row of {lens.min()} keys has no "
                         f"last {a.q_len}: pass q_positions")
    last = lens[:, None] - a.q_len + np.arange(a.q_len)
    return np.take_along_axis(np.broadcast_to(kv, (a.batch, a.kv_len)), last, axis=1)


cdef tuple attention_placed(fc_attention_args *a, object q_positions, object kv_positions):
    """(q_positions, kv_positions) that a points to, to be held during the call, or None where the default holds."""
    cdef cnp.ndarray qp = None
    cdef cnp.ndarray kp = None
    if a.cache != NULL and a.cache.ring and (q_positions is not None or kv_positions is not None):
        raise ValueError("attention: q_positions or kv_positions is given with a KVCache that has a window, which "
                         "knows only the last positions; expected a KVCache without one")
    if kv_positions is not None:
        kp = attention_positions("kv_positions", kv_positions, a.batch, a.kv_len, "kv_len")
        attention_ascending("kv_positions", kp, a.kv_len, a.kv_lens)
        a.kv_positions = <const int64_t *>cnp.PyArray_DATA(kp)
        a.kv_positions_stride = a.kv_len if cnp.PyArray_NDIM(kp) == 2 else 0
    if q_positions is not None:
        qp = attention_positions("q_positions", q_positions, a.batch, a.q_len, "q_len")
        attention_ascending("q_positions", qp, a.q_len, NULL)
    elif kp is not None:
        qp = attention_last_positions(kp, a)
    if qp is not None:
        a.q_positions = <const int64_t *>cnp.PyArray_DATA(qp)
        a.q_positions_stride = a.q_len if cnp.PyArray_NDIM(qp) == 2 else 0
    return qp, kp


cdef int attention_apart(cnp.ndarray y, dict given) except -1:
    """No output over an input, as the caller has it: kernels may read a copy."""
    for name, value in given.items():
        if value is not None:
            no_overlap("attention", "out", y, name, viewed("attention", name, value), False)
    return 0


cdef int run_attention(fc_attention_args *a, cnp.ndarray y, cnp.ndarray lse) except -1:
    cdef fc_status status
    a.out = cnp.PyArray_DATA(y)
    a.out_stride[0], a.out_stride[1], a.out_stride[2] = y.strides[0], y.strides[1], y.strides[2]
    if lse is not None:
        a.lse = <float *>cnp.PyArray_DATA(lse)
    if a.batch and a.q_len and a.heads and (a.v_dim or lse is not None):
        with nogil:
            status = fc_attention(a)
        check("attention", status)
    return 0


def attention(q, k, v=None, *, causal=False, scale=None, mask=None, window=None, softcap=None, sinks=None, kv_lens=None,
              q_positions=None, kv_positions=None, precision=None, return_lse=False, out=None):
    """softmax(softcap(scale * q @ k.T) + mask) @ v with online softmax; no (q_len, kv_len) matrix is ever in memory.

    q (batch, q_len, heads, head_dim); k (batch, kv_len, kv_heads, head_dim); v (batch, kv_len, kv_heads, v_dim), where
    query head h reads key/value head h // (heads // kv_heads); or k a KVCache and v None. Outer axes may have any
    strides: torch's (batch, heads, seq, head_dim) is q.transpose(0, 2, 1, 3), without a copy; as it is, it would be
    taken for other sizes where they fit. float32, float16 or bfloat16; k and v share a dtype; arithmetic is float32;
    the result (batch, q_len, heads, v_dim) has q's dtype.

    scale: head_dim**-0.5 by default. The q_len queries are the last positions of kv_len (or of kv_lens[b]).
    causal: query i sees keys j <= i + kv_len - q_len. window=W: only keys j > i + kv_len - q_len - W (W keys with
    itself). mask: bool (True = attend) or float added after the softcap, broadcastable to
    (batch, heads, q_len, kv_len). A key that the mask hides (False, -inf) counts for nothing, whatever it holds.
    q_positions (q_len,) or (batch, q_len), kv_positions (kv_len,) or (batch, kv_len): ascending integers, equal ones
    allowed. causal is kv_position <= q_position, window kv_position > q_position - W. By default keys lie at
    0 .. kv_len - 1 and the queries are the last of them; a KVCache holds 0, 1, 2, ... Keys are summed in chunks of the
    arrays' 256, so positions that say what the default does give its bits.
    softcap c: c * tanh(s / c). sinks (heads,): one more logit in each row's denominator. kv_lens (batch,): valid keys.
    precision: what q k^T and weights v are multiplied in, softmax and sums being float32: None, that of k and v
    (float16 and float32 in float32, bfloat16 as an int8 or bfloat16 cache's in their own); "float32"; "bfloat16", all
    four rounded to it; "int8", bytes with a scale for each token and head, and for a query's weights of 64 keys, after
    H q, H k and H v with Hadamard's matrix H, which changes nothing but spreads large channels, and, without mask and
    window, less the mean of the 256-key chunk's earlier keys: 1 to 2 % of error where bfloat16 makes 0.3
    (docs/accuracy.md). A row depends on the keys that it sees alone, and has the same bits whole, in pieces and token
    by token, in any batch and on any threads. A KVCache of another dtype is converted in each call, once for all of
    its queries: a few queries at a time are slower so than in the cache's own.
    A row that sees no key gives 0. With return_lse the result is (out, lse): lse (batch, q_len, heads) float32 is the
    log of the softmax's denominator, sinks included, -inf for an empty row.

    >>> q = np.zeros((1, 1, 2, 4), np.float32)
    >>> kv = np.arange(8, dtype=np.float32).reshape(1, 2, 1, 4)
    >>> attention(q, kv, kv)
    array([[[[2., 3., 4., 5.],
             [2., 3., 4., 5.]]]], dtype=float32)
    """
    cdef fc_attention_args a
    cdef cnp.ndarray qa = attention_input("q", q)
    cdef cnp.ndarray ka = None
    cdef cnp.ndarray va = None
    cdef cnp.ndarray lens = None
    cdef cnp.ndarray ma = None
    cdef cnp.ndarray sa
    cdef cnp.ndarray y
    cdef cnp.ndarray lse = None
    cdef KVPages pages = None
    cdef cnp.npy_intp dims[4]
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    a.softcap, return_lse = attention_softcap(softcap), flag("attention", "return_lse", return_lse)
    a.window, a.causal = attention_window(window), flag("attention", "causal", causal)
    a.precision = attention_precision("attention", "precision", precision)
    attention_queries(&a, qa)
    if v is None:
        pages, lens = attention_cache(k, &a, kv_lens, window)
    else:
        ka, va = attention_input("k", k), attention_input("v", v)
        same_type("attention", "v", va, dtype_index(ka))
        attention_arrays(&a, ka, va)
        if kv_lens is not None:
            lens = attention_kv_lens(kv_lens, a.batch, a.kv_len)
    if lens is not None:
        a.kv_lens = <const int64_t *>cnp.PyArray_DATA(lens)
    placed = attention_placed(&a, q_positions, kv_positions)
    if mask is not None:
        ma = attention_mask(mask, &a)
    sa = parameter("attention", "sinks", sinks, a.heads)
    a.sinks = floats(sa)
    a.scale = <float>(number("attention", "scale", scale) if scale is not None
                      else a.head_dim ** -0.5 if a.head_dim else 1.0)
    dims[0], dims[1], dims[2], dims[3] = a.batch, a.q_len, a.heads, a.v_dim
    y = result("attention", out, 4, dims, a.q_type)
    if out is not None:
        attention_apart(y, {"q": q, "k": k if v is not None else None, "v": v, "mask": mask, "kv_lens": kv_lens,
                            "sinks": sinks, "q_positions": q_positions, "kv_positions": kv_positions})
    if return_lse:
        lse = cnp.PyArray_EMPTY(3, dims, cnp.NPY_FLOAT32, 0)
    run_attention(&a, y, lse)
    return (y, lse) if return_lse else y


cdef int attention_carried(fc_attention_args *a, cnp.ndarray carried) except -1:
    """carried (batch, q_len, heads, v_dim + 2) float32, any stride from batch to batch."""
    same_type("fold_attention", "carried", carried, FC_F32)
    shape = (a.batch, a.q_len, a.heads, a.v_dim + 2)
    if shape_of(carried) != shape or not carried.flags.writeable:
        raise ValueError(f"fold_attention: carried has shape {shape_of(carried)}, expected {shape}, writable")
    if carried.size and not (carried[0].flags.c_contiguous):
        raise ValueError("fold_attention: carried[0] is not C-contiguous")
    a.carried, a.carried_stride = <float *>cnp.PyArray_DATA(carried), carried.strides[0]
    return 0


def fold_attention(q, k, v, cnp.ndarray carried not None, q_positions, *, causal=False, scale=None, window=None,
                   softcap=None, precision=None, sinks=None, out=None, lse=None):
    """What rows carry (batch, q_len, heads, v_dim + 2: o, max, sum; to begin: max -inf, sum 0) <- with these keys.

    k may be a KVCache, v None then. The keys lie at 0, 1, 2, .. and q_positions (q_len,) counts from the first of them,
    which is a multiple of 256 of all keys; pieces come in the keys' order. With out (and lse), which end it, carried
    stays and out has the bits of attention over all keys. Not public: the package above it checks what it is given.
    """
    cdef fc_attention_args a
    cdef cnp.ndarray qa = attention_input("q", q)
    cdef cnp.ndarray ka
    cdef cnp.ndarray va
    cdef cnp.ndarray lens = None
    cdef KVPages pages = None
    cdef cnp.ndarray y = out
    cdef cnp.ndarray sa
    cdef fc_status status
    memset(&a, 0, sizeof(a))
    a.size = sizeof(a)
    a.softcap, a.window = attention_softcap(softcap), attention_window(window)
    a.causal = flag("attention", "causal", causal)
    a.precision = attention_precision("attention", "precision", precision)
    attention_queries(&a, qa)
    if v is None:
        pages, lens = attention_cache(k, &a, None, window)
        a.kv_lens = <const int64_t *>cnp.PyArray_DATA(lens)
    else:
        ka, va = attention_input("k", k), attention_input("v", v)
        same_type("attention", "v", va, dtype_index(ka))
        attention_arrays(&a, ka, va)
    attention_carried(&a, carried)
    placed = attention_placed(&a, q_positions, None)
    sa = parameter("attention", "sinks", sinks, a.heads)
    a.sinks = floats(sa)
    a.scale = <float>(number("attention", "scale", scale) if scale is not None
                      else a.head_dim ** -0.5 if a.head_dim else 1.0)
    if y is not None:
        a.finish = True
        same_shape("fold_attention", "out", y, carried[..., 2:])
        same_type("fold_attention", "out", y, a.q_type)
        contiguous_last("fold_attention", "out", y)
        run_attention(&a, y, lse)
    elif a.batch and a.q_len and a.heads:
        with nogil:
            status = fc_attention(&a)
        check("attention", status)


def fold_parts(cnp.ndarray carried not None, cnp.ndarray parts not None):
    """carried (rows, v_dim + 2) <- what fold_attention carries over more chunks, from parts (chunks, rows, v_dim + 2),
    each carried from an empty beginning over one chunk; both float32 and C-contiguous. Not public, like fold_attention.
    """
    cdef fc_status status
    cdef ptrdiff_t rows = carried.shape[0], chunks = parts.shape[0]
    cdef ptrdiff_t e = carried.shape[1] - 2
    same_type("fold_parts", "carried", carried, FC_F32)
    same_type("fold_parts", "parts", parts, FC_F32)
    if shape_of(parts) != (chunks, rows, e + 2) or not (carried.flags.c_contiguous and parts.flags.c_contiguous):
        raise ValueError(f"fold_parts: parts has shape {shape_of(parts)}, expected (chunks, {rows}, {e + 2}), "
                         "contiguous")
    if rows and chunks:
        with nogil:
            status = fc_fold_attention(<float *>cnp.PyArray_DATA(carried), <const float *>cnp.PyArray_DATA(parts),
                                       chunks, rows, e)
        check("fold_parts", status)


cdef cnp.ndarray merge_part(str arg, object x, cnp.ndarray like):
    cdef cnp.ndarray a = viewed("merge_attention", arg, x)
    same_type("merge_attention", arg, a, float_type("merge_attention", "out_a", like))
    same_shape("merge_attention", arg, a, like)
    return np.ascontiguousarray(a)


cdef cnp.ndarray merge_lse(str arg, object x, cnp.ndarray like):
    cdef cnp.ndarray a = viewed("merge_attention", arg, x)
    same_type("merge_attention", arg, a, FC_F32)
    expected = shape_of(like)[:like.ndim - 1]
    if shape_of(a) != expected:
        raise ValueError(f"merge_attention: {arg} has shape {shape_of(a)}, expected {expected}")
    return np.ascontiguousarray(a)


def merge_attention(out_a, lse_a, out_b, lse_b):
    """The attention over two disjoint sets of keys, from the attention and lse over each; exact.

    out_a, out_b (..., v_dim) of one shape and dtype; lse_a, lse_b (...) float32, -inf where a part saw no key.
    Returns (out, lse). Sinks, which are no keys, must be in at most one of the parts.

    >>> a = np.ones((1, 1, 1, 2), np.float32); lse = np.zeros((1, 1, 1), np.float32)
    >>> merge_attention(a, lse, 3 * a, lse)
    (array([[[[2., 2.]]]], dtype=float32), array([[[0.6931472]]], dtype=float32))
    """
    cdef cnp.ndarray like = viewed("merge_attention", "out_a", out_a)
    cdef cnp.ndarray a, b, la, lb, y, lse
    cdef int nd = cnp.PyArray_NDIM(like)
    cdef ptrdiff_t n, rows
    cdef fc_status status
    cdef int t = float_type("merge_attention", "out_a", like)
    if nd == 0:
        raise ValueError("merge_attention: out_a has shape (), expected at least one axis")
    a, b = merge_part("out_a", out_a, like), merge_part("out_b", out_b, like)
    la, lb = merge_lse("lse_a", lse_a, like), merge_lse("lse_b", lse_b, like)
    y = new_array(nd, cnp.PyArray_DIMS(like), t)
    lse = new_array(nd - 1, cnp.PyArray_DIMS(like), FC_F32)
    n, rows = cnp.PyArray_DIM(like, nd - 1), cnp.PyArray_SIZE(lse)
    with nogil:
        status = fc_merge_attention(<fc_dtype>t, cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(lse),
                                    cnp.PyArray_DATA(a), <const float *>cnp.PyArray_DATA(la), cnp.PyArray_DATA(b),
                                    <const float *>cnp.PyArray_DATA(lb), rows, n)
    check("merge_attention", status)
    return y, lse

# Tokens into a KVCache's storage; forge_c.cache checks them.

def store_tokens(cnp.ndarray store, cnp.ndarray tokens, cnp.ndarray start, cnp.ndarray count, bint ring):
    """store (batch, heads, slots, n) float32 or bfloat16 <- the first count[b] of tokens (batch, seq, heads, n), which
    have the positions from start[b] on: slot = position, or position % slots in a ring. Nothing is checked here."""
    cdef fc_append_args a
    cdef fc_status status
    cdef int i
    if cnp.PyArray_NDIM(tokens) and cnp.PyArray_STRIDE(tokens, 3) != cnp.PyArray_ITEMSIZE(tokens):
        tokens = np.ascontiguousarray(tokens)
    memset(&a, 0, sizeof(a))
    a.from_type, a.to_type = <fc_dtype>dtype_index(tokens), <fc_dtype>dtype_index(store)
    a.from_, a.to = cnp.PyArray_DATA(tokens), cnp.PyArray_DATA(store)
    for i in range(3):
        a.from_stride[i] = cnp.PyArray_STRIDE(tokens, i)
    a.to_stride[0], a.to_stride[1], a.to_stride[2] = store.strides[0], store.strides[2], store.strides[1]
    a.start, a.count = <const int64_t *>cnp.PyArray_DATA(start), <const int64_t *>cnp.PyArray_DATA(count)
    a.batch, a.seq, a.heads, a.n = tokens.shape[0], tokens.shape[1], tokens.shape[2], tokens.shape[3]
    a.ring = store.shape[2] if ring else 0
    if cnp.PyArray_SIZE(tokens):
        with nogil:
            status = fc_append(&a)
        check("KVCache.append", status)

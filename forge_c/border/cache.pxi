# KVPages: the pages of a key/value cache as src_c sees them; forge_c.state.kv decides and checks.

cdef dict KV_TYPES = {"float32": FC_KV_F32, "bfloat16": FC_KV_BF16, "int8": FC_KV_I8}


cdef class KVPages:
    """Where the tokens of each row lie: table (batch, pages_a_row) of page addresses, in a layout that forge.h defines.

    ring: position p lies in page p // KV_CHUNK % pages_a_row. The memory behind the addresses is
    kept alive by the caller. Nothing is checked here.
    """
    cdef fc_kv_cache c
    cdef readonly cnp.ndarray table
    cdef readonly str dtype

    def __init__(self, str dtype not None, ptrdiff_t kv_heads, ptrdiff_t head_dim, ptrdiff_t v_dim, bint ring,
                 cnp.ndarray table=None):
        if dtype not in KV_TYPES:
            raise ValueError(f"KVPages: dtype is {dtype!r}, expected one of {', '.join(KV_TYPES)}")
        self.dtype = dtype
        self.c.size = sizeof(fc_kv_cache)
        self.c.type, self.c.kv_heads, self.c.head_dim, self.c.v_dim = KV_TYPES[dtype], kv_heads, head_dim, v_dim
        self.c.ring = ring
        if table is not None:
            self.table, self.c.pages_a_row = table, table.shape[1]
            self.c.pages = <void **>cnp.PyArray_DATA(table)

    def __reduce__(self):
        raise TypeError("KVPages: addresses are neither pickled nor copied; KVCache.copy() copies what lies there, "
                        "KVCache.save() writes it to a file")

    def with_table(self, cnp.ndarray table not None):
        """The same layout over other pages."""
        return KVPages(self.dtype, self.c.kv_heads, self.c.head_dim, self.c.v_dim, self.c.ring, table)

    @property
    def page_nbytes(self):
        """Bytes of a page."""
        return fc_kv_page_bytes(&self.c)

    @property
    def kv_heads(self):
        return self.c.kv_heads

    @property
    def head_dim(self):
        return self.c.head_dim

    @property
    def v_dim(self):
        return self.c.v_dim

    cdef int check_table(self) except -1:
        if self.table is None:
            raise ValueError("KVPages: there is no table of pages")
        return 0

    def append(self, cnp.ndarray k not None, cnp.ndarray v not None, cnp.ndarray start not None,
               cnp.ndarray count not None, table=None, bint interleaved=False):
        """k, v (batch, seq, heads, dim) of one float dtype: the first count[b] tokens to the positions from start[b] on,
        keys through the RopeTable first if there is one."""
        cdef fc_append_args a
        cdef fc_status status
        cdef cnp.ndarray cos
        cdef cnp.ndarray sin
        cdef int i
        self.check_table()
        if cnp.PyArray_STRIDE(k, 3) != cnp.PyArray_ITEMSIZE(k):
            k = np.ascontiguousarray(k)
        if cnp.PyArray_STRIDE(v, 3) != cnp.PyArray_ITEMSIZE(v):
            v = np.ascontiguousarray(v)
        memset(&a, 0, sizeof(a))
        a.size, a.cache, a.type = sizeof(a), &self.c, <fc_dtype>dtype_index(k)
        a.k, a.v = cnp.PyArray_DATA(k), cnp.PyArray_DATA(v)
        for i in range(3):
            a.k_stride[i], a.v_stride[i] = cnp.PyArray_STRIDE(k, i), cnp.PyArray_STRIDE(v, i)
        a.batch, a.seq = k.shape[0], k.shape[1]
        a.start, a.count = <const int64_t *>cnp.PyArray_DATA(start), <const int64_t *>cnp.PyArray_DATA(count)
        if table is not None:
            cos, sin = table.cos, table.sin
            a.cos, a.sin, a.rotary_pairs, a.interleaved = floats(cos), floats(sin), cnp.PyArray_DIM(cos, 1), interleaved
        if a.batch and a.seq:
            with nogil:
                status = fc_append(&a)
            check("KVCache.append", status)

    def read(self, ptrdiff_t row, ptrdiff_t start, ptrdiff_t seq):
        """(k, v) of `seq` tokens of a row from position start on: (seq, heads, dim) float32."""
        self.check_table()
        cdef cnp.ndarray k = np.empty((seq, self.c.kv_heads, self.c.head_dim), np.float32)
        cdef cnp.ndarray v = np.empty((seq, self.c.kv_heads, self.c.v_dim), np.float32)
        cdef fc_status status
        with nogil:
            status = fc_kv_read(&self.c, row, start, seq, <float *>cnp.PyArray_DATA(k), <float *>cnp.PyArray_DATA(v))
        check("KVCache", status)
        return k, v

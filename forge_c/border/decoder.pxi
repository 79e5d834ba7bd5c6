# DecoderBlock and decode: whole blocks of a model in one call, for forge_c.models.
from libc.stdlib cimport free, malloc


cdef class DecoderBlock:
    """The weights and choices of one block, as src_c takes them. See fc_block in forge.h; None is an absent norm.

    Vectors are float32 and, like the PackedWeights, kept alive. turned: whether queries and keys go through RoPE.
    """
    cdef fc_block c
    cdef list held
    cdef readonly bint turned

    def __init__(self, *, ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t head_dim, PackedWeight qkv, PackedWeight out,
                 PackedWeight gate_up, PackedWeight down, input_norm, mlp_norm, q_norm=None, k_norm=None,
                 post_attention_norm=None, post_mlp_norm=None, qkv_bias=None, out_bias=None, gate_up_bias=None,
                 down_bias=None, str activation="silu", double eps=1e-6, double norm_offset=0.0,
                 double residual_scale=1.0, double attention_scale=1.0, double softcap=0.0, bint turned=True):
        memset(&self.c, 0, sizeof(self.c))
        self.held = []
        self.turned = turned
        self.c.heads, self.c.kv_heads, self.c.head_dim = heads, kv_heads, head_dim
        self.c.hidden, self.c.inner = qkv.k, down.k
        shapes = {"qkv": (qkv.shape, (qkv.k, (heads + 2 * kv_heads) * head_dim)),
                  "out": (out.shape, (heads * head_dim, qkv.k)),
                  "gate_up": (gate_up.shape, (qkv.k, 2 * down.k)), "down": (down.shape, (down.k, qkv.k))}
        for name, (shape, expected) in shapes.items():
            if shape != expected:
                raise ValueError(f"DecoderBlock: {name} has shape {shape}, expected {expected}")
        if not gate_up.gated:
            raise TypeError("DecoderBlock: gate_up is one matrix, expected a pair from pack_gated")
        self.c.qkv = self.matrix(qkv, self.vector("qkv_bias", qkv_bias, qkv.n))
        self.c.out = self.matrix(out, self.vector("out_bias", out_bias, out.n))
        self.c.gate_up = self.matrix(gate_up, self.vector("gate_up_bias", None if gate_up_bias is None else
                                                          np.reshape(gate_up_bias, -1), gate_up.n))
        self.c.down = self.matrix(down, self.vector("down_bias", down_bias, down.n))
        self.c.input_norm = self.vector("input_norm", input_norm, qkv.k)
        self.c.mlp_norm = self.vector("mlp_norm", mlp_norm, qkv.k)
        self.c.q_norm = self.vector("q_norm", q_norm, head_dim)
        self.c.k_norm = self.vector("k_norm", k_norm, head_dim)
        self.c.post_attention_norm = self.vector("post_attention_norm", post_attention_norm, qkv.k)
        self.c.post_mlp_norm = self.vector("post_mlp_norm", post_mlp_norm, qkv.k)
        self.c.activation = GATES[activation]
        self.c.eps, self.c.norm_offset, self.c.residual_scale = <float>eps, <float>norm_offset, <float>residual_scale
        self.c.attention_scale, self.c.softcap = <float>attention_scale, <float>softcap

    cdef const float *vector(self, str name, object value, ptrdiff_t n) except? NULL:
        cdef cnp.ndarray a
        if value is None:
            return NULL
        a = parameter("DecoderBlock", name, value, n)
        self.held.append(a)
        return floats(a)

    cdef fc_matrix matrix(self, PackedWeight w, const float *bias) noexcept:
        cdef fc_matrix m
        self.held.append(w)
        m.layout, m.data, m.group, m.bias = w.layout, cnp.PyArray_DATA(w.data), w.group, bias
        return m


cdef int block_cache(fc_block_cache *c, object cache) except -1:
    cdef KVPages pages = cache._pages
    window = cache.window
    c.kv, c.window = pages.c, window or 0
    return 0


def decode(cnp.ndarray x, list blocks, list caches, cnp.ndarray start, table):
    """x (batch, seq, hidden) float32, in place, through `blocks`; the tokens join `caches` after the start (batch,)
    that each row holds, with the RoPE positions start, start + 1, ... The caches' lengths are left to the caller, who
    has also seen to it that there is room. table: a RopeTable for at least as many positions."""
    cdef ptrdiff_t n = len(blocks)
    cdef ptrdiff_t batch = cnp.PyArray_DIM(x, 0)
    cdef ptrdiff_t seq = cnp.PyArray_DIM(x, 1)
    cdef ptrdiff_t i
    cdef fc_status status
    cdef DecoderBlock block
    cdef cnp.ndarray cos = table.cos
    cdef cnp.ndarray sin = table.sin
    cdef ptrdiff_t last
    cdef fc_block *b
    cdef fc_block_cache *c
    last = start.max() + seq - 1 if batch else 0
    if seq and last >= cnp.PyArray_DIM(cos, 0):
        raise IndexError(f"decode: position {last} is outside the table of {cnp.PyArray_DIM(cos, 0)}")
    b = <fc_block *>malloc(n * (sizeof(fc_block) + sizeof(fc_block_cache)) + 1)
    if b == NULL:
        raise MemoryError("decode: no memory for scratch")
    c = <fc_block_cache *>(b + n)
    try:
        for i in range(n):
            block = blocks[i]
            b[i] = block.c
            if block.turned:
                b[i].cos, b[i].sin, b[i].half = floats(cos), floats(sin), cnp.PyArray_DIM(cos, 1)
            block_cache(c + i, caches[i])
        if seq and batch:
            with nogil:
                status = fc_decode(b, c, n, <float *>cnp.PyArray_DATA(x), batch, seq,
                                   <const int64_t *>cnp.PyArray_DATA(start))
            check("decode", status)
    finally:
        free(b)

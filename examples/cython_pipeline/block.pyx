# cython: language_level=3, boundscheck=False, wraparound=False
"""A LLaMA block over NumPy weights that is fed its own output, token by token, with no Python in between."""
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from forge_c cimport _c

import numpy as np


cdef class Block:
    """One block and its cache. Weights lie as in checkpoints, (out_features, in_features) float32: qkv ((heads +
    2 kv_heads) head_dim, hidden), out (hidden, heads head_dim), gate and up (inner, hidden), down (hidden, inner).
    Norms (hidden); cos and sin (positions, head_dim / 2). Shapes are not checked."""
    cdef _c.fc_block c
    cdef _c.fc_block_cache cache
    cdef list held
    cdef int64_t length, room

    def __init__(self, const float[:, ::1] qkv, const float[:, ::1] out, const float[:, ::1] gate,
                 const float[:, ::1] up, const float[:, ::1] down, const float[::1] input_norm,
                 const float[::1] mlp_norm, const float[:, ::1] cos, const float[:, ::1] sin, *, int heads,
                 int kv_heads):
        memset(&self.c, 0, sizeof(self.c))
        self.held = [input_norm, mlp_norm, cos, sin]
        self.length, self.room = 0, cos.shape[0]
        self.c.hidden, self.c.inner, self.c.heads, self.c.kv_heads = qkv.shape[1], gate.shape[0], heads, kv_heads
        self.c.head_dim = qkv.shape[0] // (heads + 2 * kv_heads)
        self.c.input_norm, self.c.mlp_norm = &input_norm[0], &mlp_norm[0]
        self.c.qkv, self.c.out, self.c.down = self.packed(qkv), self.packed(out), self.packed(down)
        self.c.gate_up = self.packed(gate, up)
        self.c.activation, self.c.eps, self.c.residual_scale = _c.FC_SILU, 1e-6, 1
        self.c.attention_scale = <float>(self.c.head_dim ** -0.5)
        self.c.cos, self.c.sin, self.c.half = &cos[0, 0], &sin[0, 0], cos.shape[1]
        self.new_cache()

    cdef float *zeros(self, ptrdiff_t count) except NULL:
        """(count) on a cache line, alive as long as the block."""
        cdef object memory = np.zeros(count + 16, np.float32)
        cdef float[::1] aligned = memory[-memory.ctypes.data % 64 // 4:]
        self.held.append(memory)
        return &aligned[0]

    cdef _c.fc_matrix packed(self, const float[:, ::1] w, const float[:, ::1] beside=None) except *:
        """w (n, k) as panels (n / 16, k, 16); with another weight beside it, panels of the two take turns."""
        cdef ptrdiff_t n = w.shape[0], k = w.shape[1], panel = k * 16, panels = (n + 15) // 16
        cdef ptrdiff_t stride = panel if beside is None else 2 * panel
        cdef float *data = self.zeros(panels * stride)
        _c.fc_pack_columns(_c.FC_F32, data, stride * 4, &w[0, 0], k * 4, k, n)
        if beside is not None:
            _c.fc_pack_columns(_c.FC_F32, data + panel, stride * 4, &beside[0, 0], k * 4, k, n)
        cdef _c.fc_matrix m
        m.layout, m.data, m.group, m.bias = _c.FC_PACKED_F32, data, 0, NULL
        return m

    cdef void new_cache(self) except *:
        """One row with room for self.room tokens, in pages of FC_KV_CHUNK."""
        memset(&self.cache, 0, sizeof(self.cache))
        self.cache.kv.type, self.cache.kv.kv_heads = _c.FC_KV_F32, self.c.kv_heads
        self.cache.kv.head_dim, self.cache.kv.v_dim = self.c.head_dim, self.c.head_dim
        self.cache.kv.pages_a_row = (self.room + _c.FC_KV_CHUNK - 1) // _c.FC_KV_CHUNK
        cdef ptrdiff_t i, page = _c.fc_kv_page_bytes(&self.cache.kv) // 4
        cdef float *memory = self.zeros(self.cache.kv.pages_a_row * page)
        table = np.empty(self.cache.kv.pages_a_row, np.uintp)
        cdef size_t[::1] pages = table
        for i in range(self.cache.kv.pages_a_row):
            pages[i] = <size_t>(memory + i * page)
        self.held.append(table)
        self.cache.kv.pages = <void **>&pages[0]

    def decode(self, first, int tokens):
        """What the block makes of `first` (hidden) and then, token by token, of the RMSNorm of its last output:
        (tokens, hidden). The tokens join those of earlier calls."""
        if self.length + tokens > self.room:
            raise ValueError(f"decode: {tokens} tokens after {self.length}, expected at most {self.room} in all")
        y = np.empty((tokens, self.c.hidden), np.float32)
        cdef float[:, ::1] out = y
        cdef float[::1] x = np.array(first, np.float32)
        cdef ptrdiff_t t, n = self.c.hidden
        cdef _c.fc_status status = _c.FC_OK
        cdef _c.fc_rows one_row
        memset(&one_row, 0, sizeof(one_row))
        with nogil:
            for t in range(tokens):
                memcpy(&out[t, 0], &x[0], n * sizeof(float))
                status = _c.fc_decode(&self.c, &self.cache, 1, &out[t, 0], 1, 1, &self.length)
                if status != _c.FC_OK:
                    break
                self.length += 1
                _c.fc_rms_norm(_c.FC_F32, &x[0], NULL, &out[t, 0], NULL, NULL, &one_row, n, self.c.eps, 0)
        if status != _c.FC_OK:
            raise MemoryError("decode: no memory for scratch")
        return y


def isa_and_threads():
    """What the library in use says: the same as forge_c, since both call one library."""
    return _c.fc_isa().decode(), _c.fc_get_num_threads()

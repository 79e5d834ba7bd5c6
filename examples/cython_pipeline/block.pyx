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
    cdef _c.fc_attention_weights attention
    cdef _c.fc_mlp_weights mlp
    cdef _c.fc_layer layer
    cdef _c.fc_model model
    cdef _c.fc_kv_cache kv
    cdef _c.fc_attention_state state
    cdef void *states[1]
    cdef _c.fc_workspace *workspace
    cdef list held
    cdef int64_t length, room

    def __init__(self, const float[:, ::1] qkv, const float[:, ::1] out, const float[:, ::1] gate,
                 const float[:, ::1] up, const float[:, ::1] down, const float[::1] input_norm,
                 const float[::1] mlp_norm, const float[:, ::1] cos, const float[:, ::1] sin, *, int heads,
                 int kv_heads):
        self.held = [input_norm, mlp_norm, cos, sin]
        self.length, self.room = 0, cos.shape[0]
        memset(&self.attention, 0, sizeof(self.attention))
        self.attention.heads, self.attention.kv_heads = heads, kv_heads
        self.attention.head_dim = qkv.shape[0] // (heads + 2 * kv_heads)
        self.attention.scale = <float>(self.attention.head_dim ** -0.5)
        self.attention.qkv[0], self.attention.qkv_columns[0] = self.packed(qkv), qkv.shape[0]
        self.attention.out = self.packed(out)
        self.mlp.inner, self.mlp.activation = gate.shape[0], _c.FC_SILU
        self.mlp.up, self.mlp.down = self.packed(gate, up), self.packed(down)
        memset(&self.layer, 0, sizeof(self.layer))
        self.layer.residual_scale = 1
        self.layer.mixer.kind, self.layer.mixer.weights = _c.FC_ATTENTION, &self.attention
        self.layer.mlp.kind, self.layer.mlp.weights = _c.FC_GATED_MLP, &self.mlp
        self.layer.mixer.norm.kind, self.layer.mixer.norm.weight = _c.FC_RMS_NORM, &input_norm[0]
        self.layer.mlp.norm.kind, self.layer.mlp.norm.weight = _c.FC_RMS_NORM, &mlp_norm[0]
        self.layer.mixer.norm.eps = self.layer.mlp.norm.eps = 1e-6
        memset(&self.model, 0, sizeof(self.model))
        self.model.hidden, self.model.layers, self.model.n_layers = qkv.shape[1], &self.layer, 1
        self.new_cache()
        self.state.kv, self.state.cos, self.state.sin = &self.kv, &cos[0, 0], &sin[0, 0]
        self.state.rotary_pairs = cos.shape[1]
        self.states[0] = &self.state

    def __cinit__(self):
        self.workspace = _c.fc_workspace_new()
        if self.workspace == NULL:
            raise MemoryError("Block: no memory")

    def __dealloc__(self):
        _c.fc_workspace_free(self.workspace)

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
        memset(&self.kv, 0, sizeof(self.kv))
        self.kv.size = sizeof(_c.fc_kv_cache)
        self.kv.type, self.kv.kv_heads = _c.FC_KV_F32, self.attention.kv_heads
        self.kv.head_dim, self.kv.v_dim = self.attention.head_dim, self.attention.head_dim
        self.kv.pages_a_row = (self.room + _c.FC_KV_CHUNK - 1) // _c.FC_KV_CHUNK
        cdef ptrdiff_t i, page = _c.fc_kv_page_bytes(&self.kv) // 4
        cdef float *memory = self.zeros(self.kv.pages_a_row * page)
        table = np.empty(self.kv.pages_a_row, np.uintp)
        cdef size_t[::1] pages = table
        for i in range(self.kv.pages_a_row):
            pages[i] = <size_t>(memory + i * page)
        self.held.append(table)
        self.kv.pages = <void **>&pages[0]

    def decode(self, first, int tokens):
        """What the block makes of `first` (hidden) and then, token by token, of the RMSNorm of its last output:
        (tokens, hidden). The tokens join those of earlier calls."""
        if self.length + tokens > self.room:
            raise ValueError(f"decode: {tokens} tokens after {self.length}, expected at most {self.room} in all")
        y = np.empty((tokens, self.model.hidden), np.float32)
        cdef float[:, ::1] out = y
        cdef float[::1] x = np.array(first, np.float32)
        cdef ptrdiff_t t, n = self.model.hidden
        cdef _c.fc_status status = _c.FC_OK
        cdef _c.fc_rows one_row
        cdef _c.fc_forward_args token
        memset(&one_row, 0, sizeof(one_row))
        one_row.size = sizeof(one_row)
        memset(&token, 0, sizeof(token))
        token.size, token.model, token.states, token.workspace = sizeof(token), &self.model, self.states, self.workspace
        token.batch, token.seq, token.start = 1, 1, &self.length
        with nogil:
            for t in range(tokens):
                memcpy(&out[t, 0], &x[0], n * sizeof(float))
                token.x = &out[t, 0]
                status = _c.fc_forward(&token)
                if status != _c.FC_OK:
                    break
                self.length += 1
                _c.fc_rms_norm(_c.FC_F32, &x[0], NULL, &out[t, 0], NULL, NULL, &one_row, n, 1e-6, 0)
        if status != _c.FC_OK:
            raise MemoryError("decode: no memory for scratch")
        return y


def isa_and_threads():
    """What the library in use says: the same as forge_c, since both call one library."""
    return _c.fc_isa().decode(), _c.fc_get_num_threads()

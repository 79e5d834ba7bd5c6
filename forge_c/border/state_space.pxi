# Parts of layers with a recurrent state, and where the state lies.


cdef fc_status relay_python(void *relay, int written) noexcept nogil:
    with gil:
        return relay_with(<object>relay, written)


cdef fc_status relay_with(object relay, bint written) noexcept:
    try:
        relay(written)
        return FC_OK
    except BaseException as error:  # it stays set, as in called_with
        PyErr_SetObject(type(error), error)
        return FC_INTERRUPTED


cdef class RecurrentSlots:
    """What a layer remembers of each row: memory (batch, slots, floats) float32, and the slots (batch,) int64 that a
    pass reads, -1 for zeros, and writes. For a StateTable. relay(written): a function that is called before a pass
    reads the state, with False, and when what it writes is whole, with True."""
    cdef fc_recurrent_state c
    cdef readonly cnp.ndarray memory
    cdef readonly cnp.ndarray source
    cdef readonly cnp.ndarray target
    cdef readonly object relay
    cdef ptrdiff_t rows

    def __init__(self, cnp.ndarray memory not None, cnp.ndarray source not None, cnp.ndarray target not None,
                 relay=None):
        if (memory.dtype != np.float32 or cnp.PyArray_NDIM(memory) != 3 or not cnp.PyArray_IS_C_CONTIGUOUS(memory)
                or not cnp.PyArray_ISWRITEABLE(memory)):
            raise ValueError(f"RecurrentSlots: memory is {memory.dtype} {shape_of(memory)}, expected float32 (batch, "
                             "slots, floats), contiguous")
        self.rows = cnp.PyArray_DIM(memory, 0)
        for name, slots in (("source", source), ("target", target)):
            if slots.dtype != np.int64 or shape_of(slots) != (self.rows,) or not slots.flags.c_contiguous:
                raise ValueError(f"RecurrentSlots: {name} is {slots.dtype} {shape_of(slots)}, expected int64 "
                                 f"({self.rows},)")
        self.memory, self.source, self.target = memory, source, target
        self.c.memory = <float *>cnp.PyArray_DATA(memory)
        self.c.slots, self.c.floats = cnp.PyArray_DIM(memory, 1), cnp.PyArray_DIM(memory, 2)
        self.c.from_ = <const int64_t *>cnp.PyArray_DATA(source)
        self.c.to = <const int64_t *>cnp.PyArray_DATA(target)
        self.relay = relay
        if relay is not None:
            self.c.relay, self.c.self = relay_python, <void *>relay

    cdef int check(self, ptrdiff_t i, ptrdiff_t batch, ptrdiff_t floats) except -1:
        """Whether a pass of so many rows may take it as state i."""
        cdef ptrdiff_t b
        if self.rows != batch or self.c.floats != floats:
            raise ValueError(f"forward: state {i} has {self.rows} rows of {self.c.floats} floats, expected {batch} of "
                             f"{floats}")
        for b in range(batch):
            if (self.c.from_[b] >= self.c.slots or not 0 <= self.c.to[b] < self.c.slots
                    or self.c.from_[b] == self.c.to[b]):
                raise ValueError(f"forward: state {i} goes from slot {self.c.from_[b]} to {self.c.to[b]} of "
                                 f"{self.c.slots} in row {b}, expected two of them")
        return 0


cdef class RecurrentPart(Part):
    """What the kinds share: floats of a slot, vectors, the convolution."""
    cdef readonly ptrdiff_t floats

    cdef const float *vector(self, str name, object value, ptrdiff_t n) except? NULL:
        """(n,), kept; None: NULL."""
        cdef cnp.ndarray a = parameter(type(self).__name__, name, None if value is None else np.reshape(value, -1), n)
        if a is None:
            return NULL
        self.keep(a)
        return floats(a)

    cdef fc_conv_weights convolution(self, PackedWeight w, object bias, ptrdiff_t channels) except *:
        cdef fc_conv_weights c
        memset(&c, 0, sizeof(c))
        if w.dtype != "float32" or w.gated or w.n != channels or w.k < 1:
            raise ValueError(f"{type(self).__name__}: conv is {w!r}, expected a PackedWeight (width, {channels}) of "
                             "float32")
        self.keep(w)
        self.params += w.k * w.n
        c.width, c.panels = w.k, <const float *>cnp.PyArray_DATA(w.data)
        c.bias = self.vector("conv_bias", bias, channels)
        return c


cdef class MambaPart(RecurrentPart):
    """Mamba: in_proj (hidden, 2 inner), conv (width, inner) float32, x_proj (inner, rank + 2 n), dt_proj (rank, inner),
    a (inner, n), d and dt_bias (inner,), out_proj (inner, hidden); norms of dt (rank), B and C (n), or None."""
    cdef fc_mamba_weights w

    def __init__(self, PackedWeight in_proj not None, PackedWeight conv not None, PackedWeight x_proj not None,
                 PackedWeight dt_proj not None, PackedWeight out_proj not None, *, a, d, dt_bias, conv_bias=None,
                 in_bias=None, out_bias=None, Norm norm=None, Norm post_norm=None, Norm dt_norm=None,
                 Norm b_norm=None, Norm c_norm=None, over=None):
        cdef ptrdiff_t inner = channels_here(over, out_proj), rank = dt_proj.k, n = (x_proj.n - dt_proj.k) // 2
        memset(&self.w, 0, sizeof(self.w))
        self.begin(FC_MAMBA, &self.w, hidden_of(over, out_proj), norm, post_norm, over)
        self.w.inner, self.w.n, self.w.rank = inner, n, rank
        self.w.in_ = self.matrix("in_proj", in_proj, (self.hidden, 2 * inner), in_bias)
        self.w.x = self.matrix("x_proj", x_proj, (inner if self.c.inner == NULL else self.c.inner.n, rank + 2 * n),
                               None)
        self.w.dt = self.matrix("dt_proj", dt_proj, (rank, inner), None)
        self.w.out = self.last("out_proj", out_proj, inner, out_bias)
        self.w.conv = self.convolution(conv, conv_bias, inner)
        self.w.a, self.w.d = self.vector("a", a, inner * n), self.vector("d", d, inner)
        self.w.dt_bias = self.vector("dt_bias", dt_bias, inner)
        self.w.dt_norm = self.normed("dt_norm", dt_norm, rank)
        self.w.b_norm, self.w.c_norm = self.normed("b_norm", b_norm, n), self.normed("c_norm", c_norm, n)
        if self.w.a == NULL:
            raise TypeError("MambaPart: a is None, expected an array")
        self.floats = (self.w.conv.width - 1 + n) * inner
        self.arguments = {"in_proj": in_proj, "conv": conv, "x_proj": x_proj, "dt_proj": dt_proj, "out_proj": out_proj,
                          "a": a, "d": d, "dt_bias": dt_bias, "conv_bias": conv_bias, "in_bias": in_bias,
                          "out_bias": out_bias, "norm": norm, "post_norm": post_norm, "dt_norm": dt_norm,
                          "b_norm": b_norm, "c_norm": c_norm}


cdef class Mamba2Part(RecurrentPart):
    """Mamba-2, inner = heads head_dim: in_proj (hidden, 2 inner + 2 groups n + heads), conv (width, inner + 2 groups n)
    float32, a, d and dt_bias (heads,), out_proj (inner, hidden); inner_norm: of each group's channels, its weight
    (inner,), or None."""
    cdef fc_mamba2_weights w

    def __init__(self, PackedWeight in_proj not None, PackedWeight conv not None, PackedWeight out_proj not None, *,
                 ptrdiff_t heads, ptrdiff_t groups, ptrdiff_t n, a, d, dt_bias, conv_bias=None, in_bias=None,
                 out_bias=None, dt_min=0.0, dt_max=None, Norm norm=None, Norm post_norm=None, Norm inner_norm=None,
                 bint norm_before_gate=False):
        cdef ptrdiff_t inner = out_proj.k, channels = out_proj.k + 2 * groups * n
        memset(&self.w, 0, sizeof(self.w))
        if heads < 1 or groups < 1 or heads % groups or inner % heads or n < 0:
            raise ValueError(f"Mamba2Part: heads is {heads} and groups {groups}, expected a divisor of {inner}, and "
                             "one of that")
        self.begin(FC_MAMBA2, &self.w, out_proj.n, norm, post_norm)
        self.w.heads, self.w.head_dim, self.w.groups, self.w.n = heads, inner // heads, groups, n
        self.w.in_ = self.matrix("in_proj", in_proj, (self.hidden, inner + channels + heads), in_bias)
        self.w.out = self.matrix("out_proj", out_proj, (inner, self.hidden), out_bias)
        self.w.conv = self.convolution(conv, conv_bias, channels)
        self.w.a, self.w.d = self.vector("a", a, heads), self.vector("d", d, heads)
        self.w.dt_bias = self.vector("dt_bias", dt_bias, heads)
        self.w.norm = self.normed("inner_norm", inner_norm, inner)
        if self.w.a == NULL or (inner_norm is not None and inner_norm.weight is None):
            raise TypeError("Mamba2Part: a, or the weight of inner_norm, is None, expected an array")
        self.w.dt_min, self.w.dt_max = <float>dt_min, INFINITY if dt_max is None else <float>dt_max
        self.w.norm_before_gate = norm_before_gate
        self.floats = (self.w.conv.width - 1) * channels + inner * n
        self.arguments = {"in_proj": in_proj, "conv": conv, "out_proj": out_proj, "heads": heads, "groups": groups,
                          "n": n, "a": a, "d": d, "dt_bias": dt_bias, "conv_bias": conv_bias, "in_bias": in_bias,
                          "out_bias": out_bias, "dt_min": dt_min, "dt_max": dt_max, "norm": norm,
                          "post_norm": post_norm, "inner_norm": inner_norm, "norm_before_gate": norm_before_gate}


cdef class ShortConvPart(RecurrentPart):
    """A gated convolution: in_proj (hidden, 3 channels), conv (width, channels) float32, out_proj (channels, hidden).
    """
    cdef fc_short_conv_weights w

    def __init__(self, PackedWeight in_proj not None, PackedWeight conv not None, PackedWeight out_proj not None, *,
                 conv_bias=None, in_bias=None, out_bias=None, Norm norm=None, Norm post_norm=None, over=None):
        cdef ptrdiff_t channels = channels_here(over, out_proj)
        memset(&self.w, 0, sizeof(self.w))
        self.begin(FC_SHORT_CONV, &self.w, hidden_of(over, out_proj), norm, post_norm, over)
        self.w.channels = channels
        self.w.in_ = self.matrix("in_proj", in_proj, (self.hidden, 3 * channels), in_bias)
        self.w.out = self.last("out_proj", out_proj, channels, out_bias)
        self.w.conv = self.convolution(conv, conv_bias, channels)
        self.floats = (self.w.conv.width - 1) * channels
        self.arguments = {"in_proj": in_proj, "conv": conv, "out_proj": out_proj, "conv_bias": conv_bias,
                          "in_bias": in_bias, "out_bias": out_bias, "norm": norm, "post_norm": post_norm}


cdef class RGLRUPart(RecurrentPart):
    """Griffin's recurrence, width = heads block: in_proj (hidden, 2 width), conv (width, width of the convolution)
    float32, out_proj (width, hidden); gates: 2 heads matrices (block, block), those of the input before those of the
    recurrence, gate_bias (2 width,) or None; param (width,)."""
    cdef fc_rg_lru_weights w
    cdef fc_matrix *gates

    def __init__(self, PackedWeight in_proj not None, PackedWeight conv not None, gates not None,
                 PackedWeight out_proj not None, *, ptrdiff_t heads, param, str activation not None="gelu_tanh",
                 gate_bias=None, conv_bias=None, in_bias=None, out_bias=None, Norm norm=None, Norm post_norm=None,
                 over=None):
        cdef ptrdiff_t width = channels_here(over, out_proj), g
        cdef object flat = None if gate_bias is None else np.reshape(gate_bias, -1)
        memset(&self.w, 0, sizeof(self.w))
        if heads < 1 or width % heads or len(gates) != 2 * heads or (flat is not None and len(flat) != 2 * width):
            raise ValueError(f"RGLRUPart: heads is {heads}, with {len(gates)} gates, expected a divisor of {width}, "
                             "two for each of them, and biases of as many channels")
        self.begin(FC_RG_LRU, &self.w, hidden_of(over, out_proj), norm, post_norm, over)
        self.w.heads, self.w.block, self.w.activation = heads, width // heads, GATES[activation]
        self.w.in_ = self.matrix("in_proj", in_proj, (self.hidden, 2 * width), in_bias)
        self.w.out = self.last("out_proj", out_proj, width, out_bias)
        self.w.conv = self.convolution(conv, conv_bias, width)
        self.w.param = self.vector("param", param, width)
        if self.w.param == NULL:
            raise TypeError("RGLRUPart: param is None, expected an array")
        self.gates = <fc_matrix *>PyMem_Malloc(2 * heads * sizeof(fc_matrix))
        if self.gates == NULL:
            raise MemoryError("RGLRUPart: no memory")
        for g in range(2 * heads):
            self.gates[g] = self.matrix("gates", gates[g], (self.w.block, self.w.block), None if flat is None else
                                        flat[g * self.w.block:(g + 1) * self.w.block])
        self.w.gates = self.gates
        self.floats = self.w.conv.width * width
        self.arguments = {"in_proj": in_proj, "conv": conv, "gates": gates, "out_proj": out_proj, "heads": heads,
                          "param": param, "activation": activation, "gate_bias": gate_bias, "conv_bias": conv_bias,
                          "in_bias": in_bias, "out_bias": out_bias, "norm": norm, "post_norm": post_norm}

    def __dealloc__(self):
        PyMem_Free(self.gates)

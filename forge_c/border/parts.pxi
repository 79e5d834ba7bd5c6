# The parts of a model's layers: what src_c/decoder takes of each, with what keeps it alive.
from libc.string cimport memcpy
from cpython.exc cimport PyErr_SetObject

cdef dict NORMS = {"rms": FC_RMS_NORM, "layer": FC_LAYER_NORM}


cdef class Norm:
    """kind "rms" or "layer" over n channels, weight and bias (n,) or None; offset as rms_norm's weight_offset."""
    cdef fc_norm c
    cdef readonly ptrdiff_t n
    cdef readonly cnp.ndarray weight
    cdef readonly cnp.ndarray bias
    cdef readonly dict arguments  # that make another

    def __init__(self, str kind not None, ptrdiff_t n, weight=None, bias=None, *, double eps=1e-6, double offset=0.0):
        self.n = n
        self.weight, self.bias = parameter("Norm", "weight", weight, n), parameter("Norm", "bias", bias, n)
        self.c.kind, self.c.eps, self.c.offset = NORMS[kind], <float>eps, <float>offset
        self.c.weight, self.c.bias = floats(self.weight), floats(self.bias)
        self.arguments = {"kind": kind, "n": n, "weight": self.weight, "bias": self.bias, "eps": eps, "offset": offset}

    @property
    def nbytes(self):
        return sum([a.nbytes for a in (self.weight, self.bias) if a is not None])


cdef fc_matrix matrix_of(PackedWeight w) noexcept:
    cdef fc_matrix m
    m.layout, m.data, m.group, m.rounding, m.bias = w.layout, cnp.PyArray_DATA(w.data), w.group, w.rounding, NULL
    return m


cdef class Part:
    """A part of a layer as src_c takes it: what it holds stays alive with it. norm: of what goes in; post_norm: of what
    comes out; None: absent. over: of a part whose heads or channels are a share, (inner, ranks): Ranks by columns of
    what its last matrix takes in, and of the part's result, of which that matrix has columns; or (None, Ranks), whose
    sum the result is a term of, with the last bias in one of them."""
    cdef fc_part c
    cdef list held
    cdef readonly ptrdiff_t hidden
    cdef readonly object nbytes
    cdef readonly object params  # weights of its matrices
    cdef readonly dict arguments  # that make another; None where Python code computes it

    cdef int begin(self, fc_part_kind kind, const void *weights, ptrdiff_t hidden, Norm norm, Norm post_norm,
                   object over=None) except -1:
        self.c.kind, self.c.weights, self.hidden = kind, weights, hidden
        self.held, self.nbytes, self.params = [], 0, 0
        self.c.norm, self.c.post_norm = self.normed("norm", norm, hidden), self.normed("post_norm", post_norm, hidden)
        if over is not None:
            self.held += over
            self.c.inner = NULL if over[0] is None else &(<Ranks?>over[0]).c
            self.c.ranks = &(<Ranks?>over[1]).c
        return 0

    cdef fc_matrix last(self, str name, PackedWeight w, ptrdiff_t channels, object bias) except *:
        """The matrix whose results are the part's, all of them or a share, of this rank's channels, or of all."""
        cdef tuple shape = (channels, self.hidden)
        if self.c.inner != NULL:
            shape = (self.c.inner.n, self.c.ranks.count)
        return self.matrix(name, w, shape, bias)

    cdef int keep(self, object value) except -1:
        self.held.append(value)
        self.nbytes += value.nbytes
        return 0

    cdef fc_norm normed(self, str name, Norm norm, ptrdiff_t n) except *:
        cdef fc_norm none
        memset(&none, 0, sizeof(none))
        if norm is None:
            return none
        if norm.n != n:
            raise ValueError(f"{type(self).__name__}: {name} has {norm.n} channels, expected {n}")
        self.keep(norm)
        return norm.c

    cdef tuple beside(self, str name, object given, int most):
        """One PackedWeight, or a sequence of at most so many."""
        if isinstance(given, PackedWeight):
            return (given,)
        if not isinstance(given, tuple | list) or not 0 < len(given) <= most or not all([
                isinstance(w, PackedWeight) and (len(given) == 1 or not w.gated) for w in given]):
            raise TypeError(f"{type(self).__name__}: {name} is {given!r}, expected a PackedWeight, or up to {most} "
                            "of them side by side")
        return tuple(given)

    cdef fc_matrix matrix(self, str name, PackedWeight w, tuple shape, object bias) except *:
        cdef fc_matrix m
        cdef cnp.ndarray b = None
        if w.shape != shape:
            raise ValueError(f"{type(self).__name__}: {name} has shape {w.shape}, expected {shape}")
        if bias is not None:
            b = parameter(type(self).__name__, name + "_bias", np.reshape(bias, -1), shape[1])
            self.keep(b)
        self.keep(w)
        self.params += shape[0] * shape[1]
        m = matrix_of(w)
        m.bias = floats(b)
        return m


cdef class AttentionPart(Part):
    """Grouped-query attention: qkv (width, (heads + 2 kv_heads) head_dim), one matrix or up to three side by side, out
    (heads head_dim, hidden); width: channels of what goes in, hidden unless said; q_norm and k_norm act on each head,
    before RoPE; so does balance, (heads + kv_heads, head_dim), which queries and keys are multiplied by where the cache
    is int8. precision: as in attention; set_precision changes it."""
    cdef fc_attention_weights w

    def __init__(self, qkv not None, PackedWeight out not None, *, ptrdiff_t heads, ptrdiff_t kv_heads,
                 ptrdiff_t head_dim, Norm norm=None, Norm post_norm=None, Norm q_norm=None, Norm k_norm=None,
                 qkv_bias=None, balance=None, out_bias=None, double scale=1.0, double softcap=0.0, window=None,
                 ptrdiff_t width=0, precision=None, over=None):
        cdef cnp.ndarray by
        memset(&self.w, 0, sizeof(self.w))
        self.begin(FC_ATTENTION, &self.w, hidden_of(over, out), None, post_norm, over)
        self.w.width = width or self.hidden
        self.c.norm = self.normed("norm", norm, self.w.width)
        self.w.heads, self.w.kv_heads, self.w.head_dim = heads, kv_heads, head_dim
        self.project(self.beside("qkv", qkv, 3), (heads + 2 * kv_heads) * head_dim, qkv_bias)
        self.w.out = self.last("out", out, heads * head_dim, out_bias)
        self.w.q_norm, self.w.k_norm = self.normed("q_norm", q_norm, head_dim), self.normed("k_norm", k_norm, head_dim)
        if balance is not None:
            by = np.ascontiguousarray(balance, np.float32)
            if by.size != (heads + kv_heads) * head_dim:
                raise ValueError(f"AttentionPart: balance has {by.size} values, expected "
                                 f"{(heads + kv_heads) * head_dim}")
            self.keep(by)
            self.w.balance = floats(by)
        self.w.scale, self.w.softcap, self.w.window = <float>scale, <float>softcap, window or 0
        self.arguments = {"qkv": qkv, "out": out, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
                          "norm": norm, "post_norm": post_norm, "q_norm": q_norm, "k_norm": k_norm,
                          "qkv_bias": qkv_bias, "balance": balance, "out_bias": out_bias, "scale": scale,
                          "softcap": softcap, "window": window, "width": width}
        self.set_precision(precision)

    @property
    def precision(self):
        return self.arguments["precision"]

    def set_precision(self, value):
        self.w.precision = attention_precision("AttentionPart", "precision", value)
        self.arguments["precision"] = value

    cdef int project(self, tuple matrices, ptrdiff_t columns, object bias) except -1:
        """The matrices into w.qkv, `columns` in all."""
        cdef PackedWeight w
        cdef ptrdiff_t first = 0
        cdef object flat = None if bias is None else np.reshape(bias, -1)
        if sum([(<PackedWeight>m).n for m in matrices]) != columns:
            raise ValueError(f"AttentionPart: qkv has shapes {[m.shape for m in matrices]}, expected {columns} columns")
        if flat is not None and len(flat) != columns:
            raise ValueError(f"AttentionPart: qkv_bias has {len(flat)} values, expected {columns}")
        for i, w in enumerate(matrices):
            biases = None if flat is None else flat[first:first + w.n]
            self.w.qkv[i] = self.matrix("qkv", w, (self.w.width, w.n), biases)
            self.w.qkv_columns[i] = w.n
            first += w.n
        return 0


cdef class MLPPart(Part):
    """down(f(gate) * up) if `up` is a pair from pack_gated, (hidden, 2 inner), or (gate, up), each (hidden, inner);
    else down(f(up)), (hidden, inner), of which f may be "relu2", the square of relu."""
    cdef fc_mlp_weights w

    def __init__(self, up not None, PackedWeight down not None, *, str activation not None="silu",
                 Norm norm=None, Norm post_norm=None, up_bias=None, down_bias=None, over=None):
        cdef object biases = up_bias
        cdef tuple sides = self.beside("up", up, 2)
        cdef PackedWeight first = sides[0]
        cdef ptrdiff_t inner = channels_here(over, down)
        cdef tuple shape = (hidden_of(over, down), 2 * inner if first.gated else inner)
        cdef bint gated = first.gated or len(sides) == 2
        memset(&self.w, 0, sizeof(self.w))
        self.begin(FC_GATED_MLP if gated else FC_MLP, &self.w, shape[0], norm, post_norm, over)
        self.w.inner, self.w.squared = inner, activation == "relu2" and not gated
        self.w.activation = GATES["relu" if self.w.squared else activation]
        if len(sides) == 1:
            self.w.up = self.matrix("up", first, shape, up_bias)
        else:
            gate_bias, up_bias = (None, None) if up_bias is None else np.reshape(up_bias, (2, -1))
            self.w.gate = self.matrix("gate", first, shape, gate_bias)
            self.w.up = self.matrix("up", sides[1], shape, up_bias)
        self.w.down = self.last("down", down, inner, down_bias)
        self.arguments = {"up": up, "down": down, "activation": activation, "norm": norm, "post_norm": post_norm,
                          "up_bias": biases, "down_bias": down_bias}


cdef class CalledPart(Part):
    """A part in Python: call(x (batch, seq, hidden) float32, state, start (batch,)) -> the same shape. x is normalised;
    state is what the StateTable holds for the layer; start[b]: tokens of row b before these."""
    cdef fc_called w

    def __init__(self, ptrdiff_t hidden, call, *, Norm norm=None, Norm post_norm=None):
        self.begin(FC_CALLED, &self.w, hidden, norm, post_norm)
        self.held.append(call)
        self.w.call, self.w.self = call_python, <void *>call


cdef class Router:
    """Which tokens go through a layer (mixture of depths): weight (hidden,); those whose logit x . weight is above
    threshold, or, with a predictor, those for which silu(x up + up_bias) . down + down_bias is above 0: up (hidden,
    inner), up_bias and down (inner,)."""
    cdef fc_router c
    cdef readonly ptrdiff_t hidden
    cdef readonly object nbytes
    cdef readonly object params  # weights of its matrix
    cdef readonly dict arguments  # that make another
    cdef list held

    def __init__(self, weight not None, double threshold=0.0, *, PackedWeight up=None, up_bias=None, down=None,
                 double down_bias=0.0):
        cdef cnp.ndarray w = parameter("Router", "weight", weight, np.size(weight))
        cdef cnp.ndarray b, d
        self.hidden, self.held = w.shape[0], [w]
        self.c.weight, self.c.threshold, self.params = floats(w), <float>threshold, 0
        if up is not None:
            one_matrix("Router", "up", up)
            if up.k != self.hidden:
                raise ValueError(f"Router: up has shape {up.shape}, expected ({self.hidden}, inner)")
            if down is None:
                raise TypeError(f"Router: down is None, expected an array ({up.n},)")
            b, d = parameter("Router", "up_bias", up_bias, up.n), parameter("Router", "down", down, up.n)
            self.c.inner, self.c.up, self.c.down, self.c.down_bias = up.n, matrix_of(up), floats(d), <float>down_bias
            self.c.up.bias = floats(b)
            self.held += [up, d] if b is None else [up, d, b]
            self.params = up.n * self.hidden
        self.nbytes = sum([one.nbytes for one in self.held])
        self.arguments = {"weight": weight, "threshold": threshold, "up": up, "up_bias": up_bias, "down": down,
                          "down_bias": down_bias}


cdef fc_status call_python(void *call, void *state, float *out, const float *x, ptrdiff_t batch, ptrdiff_t seq,
                           ptrdiff_t hidden, const int64_t *start) noexcept nogil:
    with gil:
        return called_with(<object>call, None if state == NULL else <object>state, out, x, batch, seq, hidden, start)


cdef fc_status called_with(object call, object state, float *out, const float *x, ptrdiff_t batch, ptrdiff_t seq,
                           ptrdiff_t hidden, const int64_t *start) noexcept:
    cdef cnp.npy_intp dims[3]
    cdef cnp.ndarray a, y, before
    try:
        dims[0], dims[1], dims[2] = batch, seq, hidden
        a, before = new_array(3, dims, FC_F32), cnp.PyArray_EMPTY(1, dims, cnp.NPY_INT64, 0)
        memcpy(cnp.PyArray_DATA(a), x, cnp.PyArray_NBYTES(a))
        memcpy(cnp.PyArray_DATA(before), start, cnp.PyArray_NBYTES(before))
        y = np.ascontiguousarray(call(a, state, before), np.float32)
        same_shape("CalledPart", "its result", y, a)
        memcpy(out, cnp.PyArray_DATA(y), cnp.PyArray_NBYTES(y))
        return FC_OK
    except BaseException as error:  # it stays set, as if a signal's handler had raised it
        PyErr_SetObject(type(error), error)
        return FC_INTERRUPTED

# A model's forward pass in one call, for forge_c.models: parts of layers, the model, and where its state lies.
from libc.string cimport memcpy
from cpython.exc cimport PyErr_SetObject
from cpython.mem cimport PyMem_Free, PyMem_Malloc

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
    comes out; None: absent. over: of a part whose heads or channels are a share, (inner, ranks): Ranks by columns of what
    its last matrix takes in, and of the part's result, of which that matrix has columns; or (None, Ranks), whose sum the
    result is a term of, with the last bias in one of them."""
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


cdef fc_status attend_python(void *attend, float *out, const float *qkv, ptrdiff_t batch, ptrdiff_t seq,
                             ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t head_dim) noexcept nogil:
    with gil:
        return attend_with(<object>attend, out, qkv, batch, seq, heads, kv_heads, head_dim)


cdef fc_status attend_with(object attend, float *out, const float *qkv, ptrdiff_t batch, ptrdiff_t seq,
                           ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t head_dim) noexcept:
    cdef cnp.npy_intp dims[4]
    cdef cnp.ndarray y
    cdef object both  # sliced
    try:
        dims[0], dims[1], dims[2], dims[3] = batch, seq, heads + 2 * kv_heads, head_dim
        both = cnp.PyArray_SimpleNewFromData(4, dims, cnp.NPY_FLOAT32, <void *>qkv)
        both.flags.writeable = False
        dims[2] = heads
        y = cnp.PyArray_SimpleNewFromData(4, dims, cnp.NPY_FLOAT32, out)
        attend(both[:, :, :heads], both[:, :, heads:heads + kv_heads], both[:, :, heads + kv_heads:], y)
        return FC_OK
    except BaseException as error:  # it stays set, as in called_with
        PyErr_SetObject(type(error), error)
        return FC_INTERRUPTED


cdef class AttentionState:
    """The pages of a layer's keys and values, and the table by which it rotates them, or None. For a StateTable.
    attend(q (batch, seq, heads, head_dim), k, v (batch, seq, kv_heads, head_dim), out, as q): a function that keeps k
    and v and writes out, in the place of the pages, whose dtype alone counts then; float32 in the pass's own memory,
    which is gone after it."""
    cdef fc_attention_state c
    cdef readonly KVPages pages
    cdef readonly object table
    cdef readonly object attend
    cdef readonly ptrdiff_t positions  # that it can rotate

    def __init__(self, KVPages pages not None, table=None, attend=None):
        self.pages, self.c.kv, self.attend = pages, &pages.c, attend
        if attend is not None:
            self.c.attend, self.c.self = attend_python, <void *>attend
        self.rotate_by(table)

    def rotate_by(self, table):
        """Another RopeTable, for more positions."""
        cdef cnp.ndarray cos
        cdef cnp.ndarray sin
        self.table, self.positions = table, PY_SSIZE_T_MAX
        if table is not None:
            cos, sin = table.cos, table.sin
            self.c.cos, self.c.sin, self.c.rotary_pairs = floats(cos), floats(sin), cnp.PyArray_DIM(cos, 1)
            self.positions = cnp.PyArray_DIM(cos, 0)


cdef class RoutedState:
    """What a layer with a Router remembers: the AttentionState of the tokens that went through, and their positions
    (batch, room), held (batch,) of each row; chosen (batch,): how many of a pass, which a forward pass writes. All
    int64 and contiguous."""
    cdef fc_routed_state c
    cdef readonly AttentionState mixer
    cdef tuple kept
    cdef ptrdiff_t batch

    def __init__(self, AttentionState mixer not None, cnp.ndarray positions not None, cnp.ndarray held not None,
                 cnp.ndarray chosen not None):
        self.mixer, self.kept, self.batch = mixer, (positions, held, chosen), held.size
        if mixer.attend is not None:
            raise TypeError("RoutedState: mixer has a function that attends, expected pages behind a Router")
        for a, shape in zip(self.kept, ((self.batch, positions.size // max(self.batch, 1)), (self.batch,),
                                        (self.batch,))):
            if a.dtype != np.int64 or a.shape != shape or not a.flags.c_contiguous:
                raise ValueError(f"RoutedState: an array has shape {a.shape} and dtype {a.dtype}, expected int64 "
                                 f"{shape}, contiguous")
        self.c.mixer = &mixer.c
        self.c.positions = <int64_t *>cnp.PyArray_DATA(positions)
        self.c.room = cnp.PyArray_DIM(positions, 1)
        self.c.held, self.c.chosen = <const int64_t *>cnp.PyArray_DATA(held), <int64_t *>cnp.PyArray_DATA(chosen)

    @property
    def positions(self):
        """How many it can rotate."""
        return self.mixer.positions

    def rotate_by(self, table):
        """Another RopeTable, for more positions."""
        self.mixer.rotate_by(table)


cdef class StateTable:
    """Each layer's state as src_c takes it, made once: AttentionState, RoutedState, RecurrentSlots, any object for
    a CalledPart, or None; and the scratch memory of forward passes over them."""
    cdef void **states
    cdef readonly list held
    cdef fc_workspace *workspace

    def __cinit__(self, list states not None):
        cdef ptrdiff_t i
        self.held = list(states)  # its own: src_c has their addresses
        self.workspace = fc_workspace_new()
        self.states = <void **>PyMem_Malloc((len(states) + 1) * sizeof(void *))
        if self.states == NULL or self.workspace == NULL:
            raise MemoryError("StateTable: no memory")
        for i, state in enumerate(states):
            self.states[i] = <void *>state
            if isinstance(state, AttentionState):
                self.states[i] = &(<AttentionState>state).c
            elif isinstance(state, RoutedState):
                self.states[i] = &(<RoutedState>state).c
            elif isinstance(state, RecurrentSlots):
                self.states[i] = &(<RecurrentSlots>state).c

    def __dealloc__(self):
        fc_workspace_free(self.workspace)
        PyMem_Free(self.states)


cdef class LayeredModel:
    """Embedding, layers, last norm and projection. layers: (mixer, mlp, parallel, residual_scale), parts or None, and
    behind them, where a layer has one, a Router, the mixer beside, and attention and mlp ahead, or None; embedding
    (vocab, hidden), or packed as (hidden, vocab), so that it may be the head; head (hidden, vocab).
    ranks: that hold the rest of the vocabulary; first_token: of this one's."""
    cdef fc_model c
    cdef fc_layer *layers
    cdef readonly list held
    cdef readonly list parts
    cdef list mixers  # (part or None, whether behind a router) for each state
    cdef readonly object embedding
    cdef readonly PackedWeight head
    cdef readonly Norm norm
    cdef readonly Ranks ranks

    def __cinit__(self, embedding not None, list layers not None, Norm norm not None,
                  PackedWeight head not None, *, double embedding_scale=1.0, Ranks ranks=None,
                  ptrdiff_t first_token=0):
        cdef ptrdiff_t i
        self.held = layers
        self.parts = [part for layer in layers for part in (*layer[:2], *layer[4:]) if part is not None]
        self.mixers = []
        self.embedding, self.norm, self.head = embedding, norm, head
        self.c.hidden, self.c.vocab = norm.n, head.n
        if head.k != norm.n:
            raise ValueError(f"LayeredModel: head has shape {head.shape}, expected ({norm.n}, vocab)")
        self.look_up(embedding)
        self.c.embedding_scale, self.c.norm = <float>embedding_scale, norm.c
        self.ranks, self.c.first_token, self.c.ranks = ranks, first_token, NULL if ranks is None else &ranks.c
        self.c.head = matrix_of(head)
        self.layers = <fc_layer *>PyMem_Malloc((len(layers) + 1) * sizeof(fc_layer))
        if self.layers == NULL:
            raise MemoryError("LayeredModel: no memory")
        memset(self.layers, 0, len(layers) * sizeof(fc_layer))
        self.c.layers, self.c.n_layers = self.layers, len(layers)
        for i, (mixer, mlp, parallel, scale, *more) in enumerate(layers):
            layer_part(&self.layers[i].mixer, mixer, norm.n)
            layer_part(&self.layers[i].mlp, mlp, norm.n)
            self.layers[i].parallel, self.layers[i].residual_scale = bool(parallel), scale
            router, beside = more[0] if more else None, more[1] if len(more) > 1 else None
            layer_router(&self.layers[i], router, norm.n)
            layer_beside(&self.layers[i], beside, norm.n)
            self.mixers += [(one, router is not None) for one in ([mixer] if beside is None else [mixer, beside])]
            if len(more) > 2:
                layer_ahead(&self.layers[i], more[2], more[3], norm.n)
                self.mixers.append((more[2], False))

    def __dealloc__(self):
        PyMem_Free(self.layers)

    @property
    def first_token(self):
        """Of those whose rows are here."""
        return self.c.first_token

    @property
    def nbytes(self):
        """Bytes of all weights, of those that parts share once."""
        cdef dict held = {id(self.norm): self.norm, id(self.head): self.head, id(self.embedding): self.embedding}
        for part in self.parts:
            its = (<Part>part).held if isinstance(part, Part) else (<Router>part).held
            held.update({id(one): one for one in its})
        return sum([getattr(one, "nbytes", 0) for one in held.values()])  # a function has none

    cdef int look_up(self, object embedding) except -1:
        cdef cnp.ndarray rows
        cdef tuple shape = embedding.shape[::-1] if isinstance(embedding, PackedWeight) else shape_of(embedding)
        if shape != (self.c.vocab, self.c.hidden):
            raise ValueError(f"LayeredModel: embedding has {shape[0]} rows of {shape[1:]}, expected {self.c.vocab} of "
                             f"{self.c.hidden}")
        if isinstance(embedding, PackedWeight):
            one_matrix("LayeredModel", "embedding", embedding)
            self.c.table = matrix_of(embedding)
            return 0
        rows = embedding
        contiguous_last("LayeredModel", "embedding", rows)
        self.c.embedding_type = <fc_dtype>float_type("LayeredModel", "embedding", rows)
        self.c.embedding, self.c.ld_embedding = cnp.PyArray_DATA(rows), cnp.PyArray_STRIDE(rows, 0)
        return 0

    def forward(self, cnp.ndarray ids not None, StateTable states not None, cnp.ndarray start not None, *,
                bint logits=True, bint last_only=False, bint hidden=False, positions=None):
        """ids (batch, seq) int64 inside the vocabulary, after the start (batch,) int64 tokens that each row's states
        hold, or at positions (batch, seq) where each layer of attention has an AttentionState that attends -> (logits (batch, seq, vocab), with last_only (batch, 1, vocab), hidden (batch, seq, hidden) after the
        last norm), None for what is not asked for. The caller has seen to it that the states have room, and says to
        them that the tokens are there."""
        cdef fc_forward_args a
        cdef fc_status status
        cdef cnp.npy_intp dims[3]
        cdef cnp.ndarray y = None
        cdef cnp.ndarray h = None
        cdef cnp.ndarray at
        cdef ptrdiff_t longest = 0
        cdef ptrdiff_t b
        cdef ptrdiff_t i
        ids, start = private_ints(ids), private_ints(start)
        memset(&a, 0, sizeof(a))
        if len(states.held) != len(self.mixers):
            raise ValueError(f"forward: {len(states.held)} states, expected {len(self.mixers)}")
        a.size, a.model, a.states, a.workspace = sizeof(a), &self.c, states.states, states.workspace
        a.batch, a.seq, a.last_only = cnp.PyArray_DIM(ids, 0), cnp.PyArray_DIM(ids, 1), last_only
        for b in range(a.batch):
            longest = max(longest, a.seq + (<const int64_t *>cnp.PyArray_DATA(start))[b])
        a.waits = self.ranks is not None
        if positions is not None:
            at = private_ints(positions)
            longest = placed(at, a.batch, a.seq)
            a.positions = <const int64_t *>cnp.PyArray_DATA(at)
        for i, (part, is_routed) in enumerate(self.mixers):
            check_state(part, is_routed, i, states.held[i], a.batch, a.seq, longest)
            a.waits |= waits(states.held[i], positions is not None)
        a.ids, a.start = <const int64_t *>cnp.PyArray_DATA(ids), <const int64_t *>cnp.PyArray_DATA(start)
        if logits:
            dims[0], dims[1], dims[2] = a.batch, (1 if a.seq else 0) if last_only else a.seq, self.c.vocab
            y = new_array(3, dims, FC_F32)
            a.logits = <float *>cnp.PyArray_DATA(y)
        if hidden:
            dims[0], dims[1], dims[2] = a.batch, a.seq, self.c.hidden
            h = new_array(3, dims, FC_F32)
            a.hidden = <float *>cnp.PyArray_DATA(h)
        with nogil:
            status = fc_forward(&a)
        check("forward", status)
        return y, h


cdef ptrdiff_t placed(cnp.ndarray at, ptrdiff_t batch, ptrdiff_t seq) except -1:
    """One beyond the last position."""
    if shape_of(at) != (batch, seq) or (at.size and at.min() < 0):
        raise ValueError(f"forward: positions has shape {shape_of(at)}, expected ({batch}, {seq}) of them, none below 0")
    return at.max() + 1 if at.size else 0


cdef bint waits(object state, bint apart) except -1:
    """Whether the pass may wait long for a state; TypeError for tokens that lie apart where none attends to them."""
    if isinstance(state, RecurrentSlots):
        return (<RecurrentSlots>state).relay is not None
    if isinstance(state, RoutedState):
        state = (<RoutedState>state).mixer
    attends = isinstance(state, AttentionState) and (<AttentionState>state).attend is not None
    if apart and not attends and isinstance(state, AttentionState):
        raise TypeError("forward: positions are given, expected AttentionStates that attend to keys at any")
    return apart and attends


cdef int check_state(Part part, bint is_routed, ptrdiff_t i, object state, ptrdiff_t batch, ptrdiff_t seq,
                     ptrdiff_t longest) except -1:
    """Whether the pass may take `state` for what mixer i remembers: src_c follows the pointers in it."""
    cdef fc_part_kind kind = FC_NO_PART if part is None else part.c.kind
    cdef const fc_attention_weights *w
    cdef AttentionState s
    if is_routed != isinstance(state, RoutedState):
        raise TypeError(f"forward: state {i} is a {type(state).__name__}; expected a RoutedState for a layer with a "
                        "Router, and for no other")
    if is_routed:
        check_routed(i, state, batch, seq)
        state = (<RoutedState>state).mixer
    if (kind == FC_ATTENTION) != isinstance(state, AttentionState) or (
            isinstance(part, RecurrentPart) != isinstance(state, RecurrentSlots)):
        raise TypeError(f"forward: state {i} is a {type(state).__name__}; expected an AttentionState for an "
                        "AttentionPart, RecurrentSlots for a recurrent one, and neither for anything else")
    if isinstance(part, RecurrentPart):
        return (<RecurrentSlots>state).check(i, batch, (<RecurrentPart>part).floats)
    if kind != FC_ATTENTION:
        return 0
    s, w = state, <const fc_attention_weights *>part.c.weights
    if s.pages.c.kv_heads != w.kv_heads or s.pages.c.head_dim != w.head_dim or s.pages.c.v_dim != w.head_dim:
        raise ValueError(f"forward: state {i} has {s.pages.c.kv_heads} heads of {s.pages.c.head_dim} and "
                         f"{s.pages.c.v_dim} channels, expected {w.kv_heads} of {w.head_dim} and {w.head_dim}")
    if longest > s.positions:
        raise IndexError(f"forward: position {longest - 1} is outside the table of {s.positions}")
    return 0


cdef int check_routed(ptrdiff_t i, RoutedState state, ptrdiff_t batch, ptrdiff_t seq) except -1:
    """It is of so many rows, with room for so many more tokens each."""
    cdef ptrdiff_t b
    if state.batch != batch:
        raise ValueError(f"forward: state {i} has {state.batch} rows, expected {batch}")
    for b in range(batch):
        if not 0 <= state.c.held[b] <= state.c.room - seq:
            raise ValueError(f"forward: state {i} has room for {state.c.room} tokens, expected {state.c.held[b] + seq}")
    return 0


cdef int layer_router(fc_layer *layer, object router, ptrdiff_t hidden) except -1:
    if router is None:
        return 0
    if not isinstance(router, Router) or (<Router>router).hidden != hidden or layer.mixer.kind != FC_ATTENTION:
        raise ValueError(f"LayeredModel: a layer has {router!r}, expected a Router of {hidden} channels, around an "
                         "AttentionPart")
    layer.router = &(<Router>router).c
    return 0


cdef int layer_beside(fc_layer *layer, Part part, ptrdiff_t hidden) except -1:
    if part is None:
        return 0
    if part.hidden != hidden or layer.router != NULL or layer.mixer.kind == FC_NO_PART or (
            isinstance(part, AttentionPart) and (<AttentionPart>part).w.width != hidden):
        raise ValueError(f"LayeredModel: a layer has {part!r} beside its mixer, expected one of {hidden} channels, "
                         "beside another, and no Router")
    layer.beside = &part.c
    return 0


cdef int layer_ahead(fc_layer *layer, AttentionPart attention, MLPPart mlp, ptrdiff_t hidden) except -1:
    if attention is None or mlp is None:
        raise TypeError("LayeredModel: a layer has None ahead of its mixer, expected an AttentionPart and an MLPPart")
    if (attention.hidden != hidden or attention.w.width != 2 * hidden or mlp.hidden != hidden or layer.parallel
            or layer.residual_scale != 1 or layer.router != NULL or layer.beside != NULL
            or layer.mixer.kind == FC_NO_PART):
        raise ValueError(f"LayeredModel: a layer has attention of {attention.w.width} channels ahead of its mixer, "
                         f"expected {2 * hidden}, a mixer, scale 1, and nothing beside or parallel")
    layer.ahead[0], layer.ahead[1] = &attention.c, &mlp.c
    return 0


cdef int layer_part(fc_part *to, Part part, ptrdiff_t hidden) except -1:
    if part is None:
        return 0
    if part.hidden != hidden:
        raise ValueError(f"LayeredModel: a part has {part.hidden} channels, expected {hidden}")
    if isinstance(part, AttentionPart) and (<AttentionPart>part).w.width != hidden:
        raise ValueError(f"LayeredModel: attention is of width {(<AttentionPart>part).w.width}, expected {hidden}")
    to[0] = part.c
    return 0

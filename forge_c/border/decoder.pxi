# A model's forward pass in one call, for forge_c.models: the model, of parts.pxi's parts, and where its state lies.
from cpython.exc cimport PyErr_SetObject
from cpython.mem cimport PyMem_Free, PyMem_Malloc


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
        hold, or at positions (batch, seq) where each layer of attention has an AttentionState that attends
        -> (logits (batch, seq, vocab), with last_only (batch, 1, vocab), hidden (batch, seq, hidden) after the last
        norm), None for what is not asked for. The caller has seen to it that the states have room, and says to
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
        raise ValueError(f"forward: positions has shape {shape_of(at)}, expected ({batch}, {seq}) of them, none below "
                         "0")
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

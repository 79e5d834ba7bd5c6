# Mirror of src_c/forge.h, and nothing else. `from forge_c cimport _c` reaches the kernels from other Cython code.
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t, uint8_t

cdef extern from "forge.h" nogil:
    ctypedef enum fc_dtype:
        FC_F32
        FC_F16
        FC_BF16
        FC_DTYPES
    ctypedef enum fc_status:
        FC_OK
        FC_NO_MEMORY
        FC_INTERRUPTED
        FC_BAD_SIZE
    enum:
        FC_VERSION
    int fc_version()
    enum:
        FC_MAX_AXES
        FC_MAX_ARRAYS
        FC_KV_CHUNK
    ctypedef struct fc_rows:
        size_t size
        int ndim
        ptrdiff_t shape[32]
        ptrdiff_t stride[4][32]
        const int64_t *index[4]

    const char *fc_isa()
    int fc_num_isas()
    const char *fc_isa_name(int i)
    int fc_use_isa(const char *name)
    const char *fc_openmp()
    const char *fc_build()
    int fc_bound_cpus(int *cpus, int n)
    int fc_get_num_threads()
    void fc_set_num_threads(int n)
    ctypedef enum fc_cache:
        FC_CACHE_L2
        FC_CACHE_LAST
        FC_CACHES
    ptrdiff_t fc_cache_bytes(fc_cache which)
    void fc_set_cache_bytes(fc_cache which, ptrdiff_t bytes)
    void fc_set_poll(int (*poll)() noexcept nogil)

    ctypedef struct fc_workspace:
        pass
    fc_workspace *fc_workspace_new()
    void fc_workspace_free(fc_workspace *workspace)
    size_t fc_workspace_bytes(const fc_workspace *workspace)

    fc_status fc_rms_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                          const fc_rows *rows, ptrdiff_t n, float eps, float offset)
    fc_status fc_layer_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual,
                            const float *weight, const float *bias, const fc_rows *rows, ptrdiff_t n, float eps)
    fc_status fc_softmax(fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n)

    ctypedef enum fc_activation:
        FC_RELU
        FC_SILU
        FC_GELU
        FC_GELU_TANH
        FC_ACTIVATIONS
    fc_status fc_activate(fc_activation f, fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n)
    fc_status fc_glu(fc_activation f, fc_dtype type, void *out, const void *gate, const void *up,
                     const fc_rows *rows, ptrdiff_t n)
    fc_status fc_convert(fc_dtype type, float *out, const void *x, ptrdiff_t n)

    ctypedef struct fc_rope_args:
        size_t size
        fc_dtype type
        void *out
        const void *x
        const float *cos
        const float *sin
        const int64_t *positions
        ptrdiff_t positions_stride
        int64_t start_pos
        ptrdiff_t batch, seq, heads, head_dim, rotary_pairs
        ptrdiff_t x_stride[3]
        ptrdiff_t out_stride[3]
        int interleaved
    fc_status fc_rope(const fc_rope_args *args)

    fc_status fc_embedding(fc_dtype table_type, fc_dtype out_type, void *out, const void *table, const int64_t *ids,
                           ptrdiff_t count, ptrdiff_t n, ptrdiff_t ldtable, float scale)

    fc_status fc_router_logits(fc_dtype type, float *logits, const void *x, const float *weight, const fc_rows *rows,
                               ptrdiff_t n)
    fc_status fc_largest_logits(int64_t *indices, float *gate, const float *logits, ptrdiff_t batch, ptrdiff_t seq,
                                ptrdiff_t count)
    fc_status fc_gate_update(fc_dtype type, void *out, const void *x, const void *y, const float *gate,
                             const fc_rows *rows, ptrdiff_t n)

    ctypedef enum fc_layout:
        FC_PACKED_F32
        FC_PACKED_BF16
        FC_PACKED_I8
        FC_PACKED_I4_SYMMETRIC
        FC_PACKED_I4_AFFINE
        FC_PACKED_Q4_1
        FC_PACKED_Q5_0
        FC_PACKED_Q5_1
        FC_PACKED_Q8_0
        FC_PACKED_Q2_K
        FC_PACKED_Q3_K
        FC_PACKED_Q4_K
        FC_PACKED_Q5_K
        FC_PACKED_Q6_K
        FC_PACKED_IQ4_NL
        FC_PACKED_IQ4_XS
        FC_PACKED_MXFP4
        FC_ROWS
        FC_COLS
        FC_LAYOUTS
    fc_status fc_embedding_packed(fc_layout layout, ptrdiff_t group, fc_dtype out_type, void *out, const void *table,
                                  const int64_t *ids, ptrdiff_t count, ptrdiff_t k, float scale)
    ctypedef enum fc_rounds:
        FC_ROUND_I8
        FC_ROUND_I12
    ctypedef struct fc_linear_args:
        size_t size
        fc_dtype type
        void *out
        const void *x
        const void *residual
        const fc_rows *rows
        ptrdiff_t m, k, n
        fc_layout layout
        fc_dtype weight_type
        const void *weight
        ptrdiff_t ldw
        ptrdiff_t group
        fc_rounds rounding
        const float *norm
        float norm_eps, norm_offset
        const float *bias
        int gated
        fc_activation activation
        const float *out_scale
        fc_workspace *workspace
    fc_status fc_linear(const fc_linear_args *args)
    fc_status fc_pack_columns(fc_dtype type, void *out, ptrdiff_t panel_stride, const void *w, ptrdiff_t ldw,
                              ptrdiff_t k, ptrdiff_t n)
    ctypedef struct fc_search_args:
        size_t size
        float *out
        const float *w
        ptrdiff_t ldw
        const float *importance
        ptrdiff_t n, k, group
        int groups, minima, zero, top
    fc_status fc_search_scales(const fc_search_args *args)

    ctypedef enum fc_kv_type:
        FC_KV_F32
        FC_KV_BF16
        FC_KV_I8
    ctypedef struct fc_kv_cache:
        size_t size
        fc_kv_type type
        ptrdiff_t kv_heads, head_dim, v_dim
        ptrdiff_t pages_a_row
        void **pages
        int ring
    ptrdiff_t fc_kv_page_bytes(const fc_kv_cache *cache)
    ctypedef struct fc_append_args:
        size_t size
        const fc_kv_cache *cache
        fc_dtype type
        const void *k
        const void *v
        ptrdiff_t k_stride[3]
        ptrdiff_t v_stride[3]
        ptrdiff_t batch, seq
        const int64_t *start
        const int64_t *count
        const float *cos
        const float *sin
        ptrdiff_t rotary_pairs
        int interleaved
        fc_workspace *workspace
    fc_status fc_append(const fc_append_args *args)
    fc_status fc_kv_read(const fc_kv_cache *cache, ptrdiff_t b, ptrdiff_t start, ptrdiff_t seq, float *k, float *v)

    ctypedef enum fc_precision:
        FC_PRECISION_AUTO
        FC_PRECISION_F32
        FC_PRECISION_BF16
        FC_PRECISION_I8

    ctypedef struct fc_attention_args:
        size_t size
        fc_dtype q_type, kv_type
        void *out
        float *lse
        const void *q
        const void *k
        const void *v
        const fc_kv_cache *cache
        ptrdiff_t batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim
        ptrdiff_t q_stride[3]
        ptrdiff_t k_stride[3]
        ptrdiff_t v_stride[3]
        ptrdiff_t out_stride[3]
        const int64_t *kv_lens
        const int64_t *q_positions
        const int64_t *kv_positions
        ptrdiff_t q_positions_stride, kv_positions_stride
        int causal
        ptrdiff_t window
        float scale, softcap
        const void *mask
        int mask_is_bool
        fc_dtype mask_type
        ptrdiff_t mask_stride[4]
        const float *sinks
        fc_workspace *workspace
        fc_precision precision
        float *carried
        ptrdiff_t carried_stride
        int finish
    fc_status fc_attention(const fc_attention_args *args)
    fc_status fc_fold_attention(float *carried, const float *parts, ptrdiff_t chunks, ptrdiff_t rows, ptrdiff_t e)
    fc_status fc_merge_attention(fc_dtype type, void *out, float *lse, const void *a, const float *lse_a,
                                 const void *b, const float *lse_b, ptrdiff_t rows, ptrdiff_t n)

    ctypedef struct fc_ssd_scan_args:
        size_t size
        fc_dtype type, dt_type
        void *out
        float *new_state
        const void *x
        const void *dt
        const void *b
        const void *c
        const void *z
        const float *a
        const float *d
        const float *dt_bias
        const float *state
        ptrdiff_t batch, seq, heads, groups, p, n
        ptrdiff_t out_stride[3]
        ptrdiff_t x_stride[3]
        ptrdiff_t dt_stride[3]
        ptrdiff_t b_stride[3]
        ptrdiff_t c_stride[3]
        ptrdiff_t z_stride[3]
        ptrdiff_t state_stride[3]
        ptrdiff_t new_state_stride[3]
        float dt_min, dt_max
        int dt_softplus
        int state_by_n
        fc_workspace *workspace
    fc_status fc_ssd_scan(const fc_ssd_scan_args *args)
    ctypedef struct fc_gated_delta_args:
        size_t size
        fc_dtype type, g_type, beta_type
        void *out
        float *new_state
        const void *q
        const void *k
        const void *v
        const void *g
        const void *beta
        const float *state
        ptrdiff_t batch, seq, q_heads, k_heads, heads, n, p
        ptrdiff_t out_stride[3]
        ptrdiff_t q_stride[3]
        ptrdiff_t k_stride[3]
        ptrdiff_t v_stride[3]
        ptrdiff_t g_stride[3]
        ptrdiff_t beta_stride[3]
        ptrdiff_t state_stride[3]
        ptrdiff_t new_state_stride[3]
        float scale
        int each_n
        fc_workspace *workspace
    fc_status fc_gated_delta(const fc_gated_delta_args *args)
    ctypedef struct fc_s4d_modes_args:
        size_t size
        float *modes
        const float *a
        const float *b
        const float *c
        const float *dt
        ptrdiff_t channels, n
        int bilinear
        fc_workspace *workspace
    ptrdiff_t fc_s4d_modes_floats(ptrdiff_t channels, ptrdiff_t n)
    fc_status fc_s4d_modes(const fc_s4d_modes_args *args)
    fc_status fc_s4d_kernel(float *out, const fc_s4d_modes_args *args, ptrdiff_t length)
    ctypedef struct fc_s4d_scan_args:
        size_t size
        fc_dtype type
        void *out
        float *new_state
        const void *u
        const float *modes
        const float *d
        const float *state
        ptrdiff_t batch, seq, channels, n
        ptrdiff_t out_stride[2]
        ptrdiff_t u_stride[2]
        ptrdiff_t state_stride[2]
        ptrdiff_t new_state_stride[2]
        fc_workspace *workspace
    fc_status fc_s4d_scan(const fc_s4d_scan_args *args)
    ctypedef struct fc_conv1d_args:
        size_t size
        fc_dtype type
        void *out
        const void *x
        float *new_state
        const float *state
        fc_layout layout
        fc_dtype weight_type
        const void *weight
        ptrdiff_t ldw
        const float *bias
        int silu
        ptrdiff_t batch, seq, channels, width
        ptrdiff_t out_stride[2]
        ptrdiff_t x_stride[2]
        ptrdiff_t new_state_stride[2]
        ptrdiff_t state_stride[2]
        fc_workspace *workspace
    fc_status fc_conv1d(const fc_conv1d_args *args)
    ctypedef struct fc_scan_args:
        size_t size
        fc_dtype type
        void *out
        const void *u
        const void *delta
        const void *z
        float *new_state
        const float *state
        const float *a
        const void *b
        const void *c
        const float *d
        const float *delta_bias
        int delta_softplus
        ptrdiff_t batch, seq, channels, n
        ptrdiff_t lda
        ptrdiff_t out_stride[2]
        ptrdiff_t u_stride[2]
        ptrdiff_t delta_stride[2]
        ptrdiff_t z_stride[2]
        ptrdiff_t b_stride[2]
        ptrdiff_t c_stride[2]
        ptrdiff_t new_state_stride[2]
        ptrdiff_t state_stride[2]
        fc_workspace *workspace
    fc_status fc_selective_scan(const fc_scan_args *args)
    ctypedef struct fc_rg_lru_args:
        size_t size
        fc_dtype type
        void *out
        const void *x
        const void *input_gate
        const void *recurrence_gate
        float *new_state
        const float *state
        const float *param
        const uint8_t *reset
        ptrdiff_t batch, seq, channels
        ptrdiff_t out_stride[2]
        ptrdiff_t x_stride[2]
        ptrdiff_t input_gate_stride[2]
        ptrdiff_t recurrence_gate_stride[2]
        ptrdiff_t reset_stride[2]
        ptrdiff_t new_state_stride, state_stride
        fc_workspace *workspace
    fc_status fc_rg_lru(const fc_rg_lru_args *args)

    ctypedef enum fc_norm_kind:
        FC_NO_NORM
        FC_RMS_NORM
        FC_LAYER_NORM
    ctypedef struct fc_norm:
        fc_norm_kind kind
        const float *weight
        const float *bias
        float eps, offset
    ctypedef struct fc_matrix:
        fc_layout layout
        const void *data
        ptrdiff_t group
        fc_rounds rounding
        const float *bias
    ctypedef enum fc_part_kind:
        FC_NO_PART
        FC_ATTENTION
        FC_GATED_MLP
        FC_MLP
        FC_CALLED
        FC_MAMBA
        FC_MAMBA2
        FC_SHORT_CONV
        FC_RG_LRU
        FC_PART_KINDS
    ctypedef fc_status fc_exchange(void *self, float *y, const float *mine, ptrdiff_t rows, ptrdiff_t n,
                                   ptrdiff_t mine_stride) noexcept nogil
    ctypedef struct fc_ranks:
        fc_exchange *call
        void *self
        ptrdiff_t first, count, n
    ctypedef struct fc_part:
        fc_part_kind kind
        const void *weights
        fc_norm norm, post_norm
        const fc_ranks *inner
        const fc_ranks *ranks
    ctypedef struct fc_router:
        const float *weight
        float threshold
        ptrdiff_t inner
        fc_matrix up
        const float *down
        float down_bias
    ctypedef struct fc_routed_state:
        void *mixer
        int64_t *positions
        ptrdiff_t room
        const int64_t *held
        int64_t *chosen
    ctypedef struct fc_layer:
        fc_part mixer, mlp
        int parallel
        float residual_scale
        const fc_router *router
        const fc_part *beside
        const fc_part *ahead[2]
    ctypedef struct fc_attention_weights:
        ptrdiff_t heads, kv_heads, head_dim
        fc_norm q_norm, k_norm
        ptrdiff_t width
        fc_matrix qkv[3]
        ptrdiff_t qkv_columns[3]
        fc_matrix out
        const float *balance
        float scale, softcap
        ptrdiff_t window
        fc_precision precision
    ctypedef fc_status fc_attend(void *self, float *out, const float *qkv, ptrdiff_t batch, ptrdiff_t seq,
                                 ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t head_dim) noexcept nogil
    ctypedef struct fc_attention_state:
        const fc_kv_cache *kv
        const float *cos
        const float *sin
        ptrdiff_t rotary_pairs
        fc_attend *attend
        void *self
    ctypedef struct fc_mlp_weights:
        ptrdiff_t inner
        fc_matrix up, gate, down
        fc_activation activation
        int squared
    ctypedef fc_status fc_call(void *self, void *state, float *out, const float *x, ptrdiff_t batch, ptrdiff_t seq,
                               ptrdiff_t hidden, const int64_t *start) noexcept nogil
    ctypedef struct fc_called:
        fc_call *call
        void *self
    ctypedef fc_status fc_relay(void *self, int written) noexcept nogil
    ctypedef struct fc_recurrent_state:
        float *memory
        ptrdiff_t slots, floats
        const int64_t *from_ "from"
        const int64_t *to
        fc_relay *relay
        void *self
    ctypedef struct fc_conv_weights:
        ptrdiff_t width
        const float *panels
        const float *bias
    ctypedef struct fc_mamba_weights:
        ptrdiff_t inner, n, rank
        fc_matrix in_ "in"
        fc_matrix x, dt, out
        fc_conv_weights conv
        const float *a
        const float *d
        const float *dt_bias
        fc_norm dt_norm, b_norm, c_norm
    ctypedef struct fc_mamba2_weights:
        ptrdiff_t heads, head_dim, groups, n
        fc_matrix in_ "in"
        fc_matrix out
        fc_conv_weights conv
        const float *a
        const float *d
        const float *dt_bias
        float dt_min, dt_max
        fc_norm norm
        int norm_before_gate
    ctypedef struct fc_short_conv_weights:
        ptrdiff_t channels
        fc_matrix in_ "in"
        fc_matrix out
        fc_conv_weights conv
    ctypedef struct fc_rg_lru_weights:
        ptrdiff_t heads, block
        fc_matrix in_ "in"
        fc_matrix out
        const fc_matrix *gates
        fc_conv_weights conv
        const float *param
        fc_activation activation
    ctypedef struct fc_model:
        ptrdiff_t hidden, vocab
        fc_dtype embedding_type
        const void *embedding
        ptrdiff_t ld_embedding
        fc_matrix table
        float embedding_scale
        const fc_layer *layers
        ptrdiff_t n_layers
        fc_norm norm
        fc_matrix head
        const fc_ranks *ranks
        ptrdiff_t first_token
    ctypedef struct fc_forward_args:
        size_t size
        const fc_model *model
        void **states
        const int64_t *ids
        float *x
        float *hidden
        float *logits
        int last_only
        ptrdiff_t batch, seq
        const int64_t *start
        fc_workspace *workspace
        const int64_t *positions
        int waits
    fc_status fc_forward(const fc_forward_args *args)

    ctypedef enum fc_peak:
        FC_PEAK_F32
        FC_PEAK_BF16
        FC_PEAK_I8
        FC_PEAK_I4
    double fc_peak_ops(fc_peak what, ptrdiff_t iterations)
    fc_status fc_read_bytes(const void *data, ptrdiff_t bytes, float *sum)
    fc_status fc_copy_bytes(void *out, const void *data, ptrdiff_t bytes)

/* forge_c: the C API. One fc_* prototype per op; shapes stand beside the pointers.
 *
 * Letters:  B batch   S query length   T key length   H query heads   G key/value heads
 *           D head_dim   E v_dim   M rows   K in_features   N out_features   R = H / G
 * docs/glossary.md has the words.
 *
 * The caller owns and checks every array: nothing here validates, allocates outputs or keeps state,
 * apart from the thread count and the ISA. Floats and weights may lie on any byte; structs, int64_t and pointers are
 * aligned.
 * ld* and strides count bytes.
 * An fc_dtype argument is an index into a row of kernels, never a branch.
 * Results are the same bits for any thread count, and for a row alone or in a batch. */
#ifndef FC_FORGE_H
#define FC_FORGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef enum { FC_F32, FC_F16, FC_BF16, FC_DTYPES } fc_dtype;
typedef enum { FC_OK, FC_NO_MEMORY, FC_INTERRUPTED, FC_BAD_SIZE } fc_status;

/* Of this header, and of the library that runs: 10000 major + 100 minor + patch. Structs that a caller fills in begin
 * with their size, sizeof of the type as the caller knows it: FC_BAD_SIZE, and nothing done, where the library knows
 * another one, because its members would be misread. */
enum { FC_VERSION = 100 };
int fc_version(void);

/* The shared outer axes of up to FC_MAX_ARRAYS arrays whose last axis is contiguous. ndim = 0 is one row. An array with
 * an index (ndim 1) has at i not its row i but its row index[i]: inputs are gathered, outputs scattered. An op writes
 * no row twice, unless it says so. */
enum { FC_MAX_AXES = 32, FC_MAX_ARRAYS = 4 };
typedef struct {
    size_t size; /* sizeof(fc_rows) */
    int ndim;
    ptrdiff_t shape[FC_MAX_AXES];
    ptrdiff_t stride[FC_MAX_ARRAYS][FC_MAX_AXES];
    const int64_t *index[FC_MAX_ARRAYS]; /* (shape[0]), or NULL */
} fc_rows;

/* ---- runtime ---- */
const char *fc_isa(void);
int fc_num_isas(void);
const char *fc_isa_name(int i); /* best first; NULL where this CPU cannot run it */
int fc_use_isa(const char *name); /* 0, or -1: not a name that this CPU can run */
const char *fc_openmp(void);      /* "libgomp", "libomp", "none" */
const char *fc_build(void);       /* the compiler and its flags */
/* The CPUs that OpenMP binds threads to (OMP_PROC_BIND, OMP_PLACES), at most n of them into cpus; how many there are, 0
 * where it binds none. The calling thread is then bound itself: its affinity says less. */
int fc_bound_cpus(int *cpus, int n);
int fc_get_num_threads(void);
void fc_set_num_threads(int n);
/* Bytes of the caches that one core sees, as the system tells: they choose blocks, and which results are written past
 * the caches, never a bit of a result. Setting 0 restores what the system tells. */
typedef enum { FC_CACHE_L2, FC_CACHE_LAST, FC_CACHES } fc_cache;
ptrdiff_t fc_cache_bytes(fc_cache which);
void fc_set_cache_bytes(fc_cache which, ptrdiff_t bytes);
void fc_set_poll(int (*poll)(void)); /* called on the calling thread now and then; nonzero stops the op */

/* Scratch memory that ops with a `workspace` take and give back: kept from call to call, nothing is allocated once a
 * shape has been seen. NULL: they allocate. One call at a time may use it. */
typedef struct fc_workspace fc_workspace;
fc_workspace *fc_workspace_new(void); /* NULL: no memory */
void fc_workspace_free(fc_workspace *workspace);
size_t fc_workspace_bytes(const fc_workspace *workspace);

/* ---- rows: y[n] from x[n]; the rows' arrays in the order of the arguments ---- */

/* h = x + residual (h, residual may be NULL: h = x);  out = h / sqrt(mean(h^2) + eps) * (offset + weight[n]) */
fc_status fc_rms_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                      const fc_rows *rows, ptrdiff_t n, float eps, float offset);
/* out = (h - mean(h)) / sqrt(var(h) + eps) * weight[n] + bias[n];  weight, bias may be NULL */
fc_status fc_layer_norm(fc_dtype type, void *out, void *h, const void *x, const void *residual, const float *weight,
                        const float *bias, const fc_rows *rows, ptrdiff_t n, float eps);
fc_status fc_softmax(fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n);

typedef enum { FC_RELU, FC_SILU, FC_GELU, FC_GELU_TANH, FC_ACTIVATIONS } fc_activation;
fc_status fc_activate(fc_activation f, fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n);
/* out = f(gate) * up. (Where a layer calls its two matrices W_up and W_gate, f acts on W_up.) */
fc_status fc_glu(fc_activation f, fc_dtype type, void *out, const void *gate, const void *up, const fc_rows *rows,
                 ptrdiff_t n);
fc_status fc_convert(fc_dtype type, float *out, const void *x, ptrdiff_t n);

/* ---- rope: pair (a, b) at position p rotates by the angle of (p, pair) ----
 * x, out (B, S, H, D), strides of axes 0..2; position (B or 1, S), already checked against the table;
 * cos, sin (max_seq_len, rotary_pairs): the first 2 rotary_pairs channels rotate, the rest are copied. */
typedef struct {
    size_t size; /* sizeof(fc_rope_args) */
    fc_dtype type;
    void *out;
    const void *x;
    const float *cos, *sin;
    const int64_t *positions; /* NULL: start_pos + s */
    ptrdiff_t positions_stride; /* elements from batch to batch; 0: shared */
    int64_t start_pos;
    ptrdiff_t batch, seq, heads, head_dim, rotary_pairs;
    ptrdiff_t x_stride[3], out_stride[3];
    int interleaved;
} fc_rope_args;
fc_status fc_rope(const fc_rope_args *args);

/* out (count, n) = table[ids] * scale, table row i at table + i*ldtable; ids already checked */
fc_status fc_embedding(fc_dtype table_type, fc_dtype out_type, void *out, const void *table, const int64_t *ids,
                       ptrdiff_t count, ptrdiff_t n, ptrdiff_t ldtable, float scale);

/* ---- mixture of depths: only some tokens go through a block ---- */

/* logits (M), contiguous = x . weight (n); rows: of logits (unused) and x */
fc_status fc_router_logits(fc_dtype type, float *logits, const void *x, const float *weight, const fc_rows *rows,
                           ptrdiff_t n);
/* Of each row of logits (B, S) the `count` <= S largest: their indices (B, count), ascending, and gate (B, count), the
 * logits themselves. Of equal ones that of the lower index; NaN is less than any number. */
fc_status fc_largest_logits(int64_t *indices, float *gate, const float *logits, ptrdiff_t batch, ptrdiff_t seq,
                            ptrdiff_t count);
/* out = (1 - gate (M)) x + gate y: tokens x and what a block made of them, y. rows: of out, x, y. */
fc_status fc_gate_update(fc_dtype type, void *out, const void *x, const void *y, const float *gate, const fc_rows *rows,
                         ptrdiff_t n);

/* ---- linear: out (M, N) = out_scale (M) * (x (M, K) @ W (K, N) + bias (N)) + residual (M, N) ----
 * With an index of out the rows are stored in their order, so that residual = out with the same index adds to it,
 * however often a row is named: out[index[i]] += out_scale[i] * (x[i] W + bias). */

/* How W lies in memory. FC_PACKED_*: formats.h defines the bytes. FC_ROWS: W[k][n], n contiguous, ld from k to k+1.
 * FC_COLS: k contiguous, ld from n to n+1 (a transposed view). */
typedef enum {
    FC_PACKED_F32, FC_PACKED_BF16, FC_PACKED_I8, FC_PACKED_I4_SYMMETRIC, FC_PACKED_I4_AFFINE, FC_PACKED_Q4_1,
    FC_PACKED_Q5_0, FC_PACKED_Q5_1, FC_PACKED_Q8_0, FC_PACKED_Q2_K, FC_PACKED_Q3_K, FC_PACKED_Q4_K, FC_PACKED_Q5_K,
    FC_PACKED_Q6_K, FC_PACKED_IQ4_NL, FC_PACKED_IQ4_XS, FC_PACKED_MXFP4, FC_ROWS, FC_COLS, FC_LAYOUTS
} fc_layout;

/* fc_embedding from a packed matrix (K, N), group as in fc_linear_args:  out (count, K) = W[:, ids]^T * scale */
fc_status fc_embedding_packed(fc_layout layout, ptrdiff_t group, fc_dtype out_type, void *out, const void *table,
                              const int64_t *ids, ptrdiff_t count, ptrdiff_t k, float scale);

/* How x is rounded for integer weights, a scale for each 32 k or, if that is less, group of W. FC_ROUND_I8: to
 * -127..127. FC_ROUND_I12: to -2047..2047; against weights of 8 bits a scale serves a whole group, up to 4096 k. */
typedef enum { FC_ROUND_I8, FC_ROUND_I12 } fc_rounds;
typedef struct {
    size_t size; /* sizeof(fc_linear_args) */
    fc_dtype type; /* of x, residual and out */
    void *out;
    const void *x, *residual; /* residual may be NULL */
    const fc_rows *rows;      /* of out, x, residual: M rows */
    ptrdiff_t m, k, n;
    fc_layout layout;
    fc_dtype weight_type; /* of FC_ROWS and FC_COLS */
    const void *weight;
    ptrdiff_t ldw;
    ptrdiff_t group; /* of FC_PACKED_I8 and FC_PACKED_I4_AFFINE: k that share a scale */
    fc_rounds rounding;
    const float *norm; /* (K) or NULL; else x stands for fc_rms_norm of it, with this weight, eps and offset */
    float norm_eps, norm_offset;
    const float *bias; /* (N) or NULL; gated: (2, N) */
    int gated;         /* W holds 2N columns, panel by panel [gate16][up16]; out = f(gate) * up */
    fc_activation activation;
    const float *out_scale; /* (M) or NULL: 1; not if gated */
    fc_workspace *workspace;
} fc_linear_args;
fc_status fc_linear(const fc_linear_args *args);

/* Panels of 16 columns from columns (n, k) that lie k by k, ldw apart: FC_F32 as FC_PACKED_F32, FC_BF16 as
 * FC_PACKED_BF16, panel p at out + p * panel_stride. Columns beyond n become zeros. */
fc_status fc_pack_columns(fc_dtype type, void *out, ptrdiff_t panel_stride, const void *w, ptrdiff_t ldw, ptrdiff_t k,
                          ptrdiff_t n);

/* Scales and minima for columns (n, k) that become integers u = 0..top, ldw bytes apart, in blocks of `groups` groups
 * of `group` k; see kernels/search.h. out (n, k / (group groups), lines) float32. One group to a block: a scale and a
 * minimum, 2 lines. Several: float16 factors d and m, then the integer scale and minimum of each, 2 + 2 groups lines:
 *     W = scale u + minimum      W = (d scale) u - (m minimum)
 * and without minima  W = scale (u - zero),  W = (d scale) (u - zero). */
typedef struct {
    size_t size; /* sizeof(fc_search_args) */
    float *out;
    const float *w;
    ptrdiff_t ldw;
    const float *importance; /* (k): of the square of the error of each k */
    ptrdiff_t n, k;          /* k: whole blocks */
    ptrdiff_t group;
    int groups; /* at most 16 */
    int minima, zero, top;
} fc_search_args;
fc_status fc_search_scales(const fc_search_args *args);

/* ---- key/value cache: pages of FC_KV_CHUNK slots, each row its own list of them ----
 * The token at position p lies in page p / FC_KV_CHUNK, slot p % FC_KV_CHUNK; in a ring, in page
 * p / FC_KV_CHUNK % pages_a_row. A page holds for each head in turn, 16 slots or channels to a line, as attention
 * multiplies them:
 *     K (256 / 16, D / u, 16, u)    V (E / 16, 256 / u, 16, u)    and with FC_KV_I8 scales of K, V (2, 256)
 * u = 1 for FC_KV_F32, else 2; D is rounded up to a multiple of u, E to one of 16, with zeros. FC_KV_I8: a number is
 * int8 times its token's float32 scale, max / 127. */
enum { FC_KV_CHUNK = 256 }; /* keys are cut at absolute positions 0, 256, 512, ...; see ops/attention */
typedef enum { FC_KV_F32, FC_KV_BF16, FC_KV_I8 } fc_kv_type;
typedef struct {
    size_t size; /* sizeof(fc_kv_cache) */
    fc_kv_type type;
    ptrdiff_t kv_heads, head_dim, v_dim;
    ptrdiff_t pages_a_row;
    void **pages;          /* (B, pages_a_row) */
    int ring;
} fc_kv_cache;
ptrdiff_t fc_kv_page_bytes(const fc_kv_cache *cache); /* PTRDIFF_MAX: more than that */

/* Tokens into their slots, rounded to the cache's type; keys through RoPE on their way if there is a table. */
typedef struct {
    size_t size; /* sizeof(fc_append_args) */
    const fc_kv_cache *cache;
    fc_dtype type;
    const void *k, *v; /* (B, S, G, D), (B, S, G, E) */
    ptrdiff_t k_stride[3], v_stride[3]; /* batch, token, head */
    ptrdiff_t batch, seq;
    const int64_t *start; /* (B) position of the first token */
    const int64_t *count; /* (B) tokens to take, or NULL: all */
    const float *cos, *sin; /* (max_seq_len, rotary_pairs) or NULL, read at the token's position */
    ptrdiff_t rotary_pairs;
    int interleaved;
    fc_workspace *workspace;
} fc_append_args;
fc_status fc_append(const fc_append_args *args);

/* The tokens at positions [start, start + seq) of row b as float32: k (seq, G, D), v (seq, G, E), contiguous. */
fc_status fc_kv_read(const fc_kv_cache *cache, ptrdiff_t b, ptrdiff_t start, ptrdiff_t seq, float *k, float *v);

/* ---- attention: out (B, S, H, E) = softmax(mask(cap(scale q k^T))) v ---- */

/* What q k^T and weights v are multiplied in; softmax and sums are float32. FC_PRECISION_I8: see
 * ops/attention/bytes.h */
typedef enum { FC_PRECISION_AUTO, FC_PRECISION_F32, FC_PRECISION_BF16, FC_PRECISION_I8 } fc_precision;

typedef struct {
    size_t size; /* sizeof(fc_attention_args) */
    fc_dtype q_type, kv_type; /* out has q_type */
    void *out;
    float *lse; /* (B, S, H) contiguous, or NULL */
    const void *q, *k, *v;    /* k (B, T, G, D), v (B, T, G, E), */
    const fc_kv_cache *cache; /* or, if not NULL, what this holds, and no k, v */
    ptrdiff_t batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim;
    ptrdiff_t q_stride[3], k_stride[3], v_stride[3], out_stride[3]; /* batch, position, head */
    const int64_t *kv_lens; /* (B) or NULL: kv_len */
    /* (B or 1, S), (B or 1, T), ascending; NULL: the last of kv_lens; 0, 1, .. */
    const int64_t *q_positions, *kv_positions;
    ptrdiff_t q_positions_stride, kv_positions_stride; /* elements from batch to batch; 0: shared */
    int causal;       /* a query sees keys at positions up to its own */
    ptrdiff_t window; /* and beyond its own less this; 0: none */
    float scale, softcap; /* softcap 0: none */
    const void *mask;     /* NULL, bool bytes, or floats of mask_type added to the scores */
    int mask_is_bool;
    fc_dtype mask_type;
    ptrdiff_t mask_stride[4]; /* batch, head, query, key; 0 broadcasts; key: 0 or contiguous */
    const float *sinks;       /* (H) or NULL */
    fc_workspace *workspace;
    fc_precision precision; /* 0: by kv_type, or as the cache holds them */
    /* (B, S, H, E + 2) or NULL: o, max and sum of each row over the keys before these, a multiple of FC_KV_CHUNK of
     * them; to begin with, max is -inf and sum 0. Keys come in pieces, in their order: all but the last call only add
     * to it, and one with `finish`, of the last piece or of none, only writes out and lse: the bits of all keys at once. */
    float *carried;
    ptrdiff_t carried_stride; /* batch */
    int finish;
} fc_attention_args;
fc_status fc_attention(const fc_attention_args *args);

/* carried (rows, E + 2), as fc_attention_args has it, <- folded with parts (chunks, rows, E + 2), in their order: each what
 * fc_attention carries from an empty beginning over one chunk of FC_KV_CHUNK keys. With the chunks in the keys' order that
 * is what it carries over all of them, to the bit. */
fc_status fc_fold_attention(float *carried, const float *parts, ptrdiff_t chunks, ptrdiff_t rows, ptrdiff_t e);

/* Exact union of two attentions over disjoint keys: rows of E values and one lse each; empty parts have lse -inf. */
fc_status fc_merge_attention(fc_dtype type, void *out, float *lse, const void *a, const float *lse_a, const void *b,
                             const float *lse_b, ptrdiff_t rows, ptrdiff_t n);

/* ---- state spaces and linear attention: tokens in time order, from `state` (NULL: zeros) to new_state ----
 * Both may be the same; the last axis of every array is contiguous but for dt, g and beta, the strides are those of the
 * axes before it. A sequence in pieces, each from the state that the last one left, gives the bits of the whole. */

/* Mamba-2: dt = clip(softplus(dt + dt_bias));  h = e^(dt A) h + dt x B^T;  out = (h C + D x) silu(z) */
typedef struct {
    size_t size; /* sizeof(fc_ssd_scan_args) */
    fc_dtype type, dt_type;    /* of x, B, C, z and out; of dt */
    void *out;                 /* (B, S, H, P) */
    float *new_state;          /* (B, H, P, N) */
    const void *x, *dt, *b, *c; /* (B, S, H, P), (B, S, H), (B, S, groups, N) twice */
    const void *z;             /* (B, S, H, P) or NULL */
    const float *a, *d, *dt_bias; /* (H) each; d, dt_bias may be NULL */
    const float *state;        /* (B, H, P, N) */
    ptrdiff_t batch, seq, heads, groups, p, n;
    ptrdiff_t out_stride[3], x_stride[3], dt_stride[3], b_stride[3], c_stride[3], z_stride[3]; /* batch, token, head */
    ptrdiff_t state_stride[3], new_state_stride[3]; /* batch, head, row */
    float dt_min, dt_max;
    int dt_softplus;
    int state_by_n; /* the states are (B, H, N, P), as the scan itself has them: it need not turn them round */
    fc_workspace *workspace;
} fc_ssd_scan_args;
fc_status fc_ssd_scan(const fc_ssd_scan_args *args);

/* S = e^g S;  S = S + k u^T, u = v or, by the delta rule, beta (v - S^T k);  out = scale S^T q.  H heads of v, each
 * with its S, and k_heads, q_heads of k and q: neighbours share one where there are fewer. Of q there may be more: then
 * neighbours share an S, and out has q's heads. */
typedef struct {
    size_t size; /* sizeof(fc_gated_delta_args) */
    fc_dtype type, g_type, beta_type; /* of q, k, v and out; of g; of beta */
    void *out;                  /* (B, S, max(H, q_heads), P) */
    float *new_state;           /* (B, H, N, P) */
    const void *q, *k, *v;      /* (B, S, q_heads, N), (B, S, k_heads, N), (B, S, H, P) */
    const void *g;              /* (B, S, H), each_n: (B, S, H, N); NULL: 0 */
    const void *beta;           /* (B, S, H); NULL: not the delta rule */
    const float *state;         /* (B, H, N, P) */
    ptrdiff_t batch, seq, q_heads, k_heads, heads, n, p;
    ptrdiff_t out_stride[3], q_stride[3], k_stride[3], v_stride[3]; /* batch, token, head */
    ptrdiff_t g_stride[3], beta_stride[3], state_stride[3], new_state_stride[3]; /* of the states batch, head, row */
    float scale;
    int each_n;
    fc_workspace *workspace;
} fc_gated_delta_args;
fc_status fc_gated_delta(const fc_gated_delta_args *args);

/* S4D: x = dA x + dB u,  out = 2 Re(C x) + D u,  x (N) complex, of each channel. fc_s4d_modes makes what tokens are
 * multiplied by, fc_s4d_modes_floats(channels, n) floats, from A, B, C (channels, N) complex64 and dt (channels). */
typedef struct {
    size_t size; /* sizeof(fc_s4d_modes_args) */
    float *modes; /* not of fc_s4d_kernel */
    const float *a, *b, *c, *dt;
    ptrdiff_t channels, n;
    int bilinear; /* else zero-order hold */
    fc_workspace *workspace;
} fc_s4d_modes_args;
ptrdiff_t fc_s4d_modes_floats(ptrdiff_t channels, ptrdiff_t n); /* PTRDIFF_MAX: more than that */
fc_status fc_s4d_modes(const fc_s4d_modes_args *args);
/* out (channels, length): the response to one u of 1, without D */
fc_status fc_s4d_kernel(float *out, const fc_s4d_modes_args *args, ptrdiff_t length);
typedef struct {
    size_t size; /* sizeof(fc_s4d_scan_args) */
    fc_dtype type;      /* of u and out */
    void *out;          /* (B, S, channels) */
    float *new_state;   /* (B, channels, N) complex64 */
    const void *u;      /* (B, S, channels) */
    const float *modes, *d; /* d (channels) or NULL */
    const float *state; /* (B, channels, N) complex64 */
    ptrdiff_t batch, seq, channels, n;
    ptrdiff_t out_stride[2], u_stride[2], state_stride[2], new_state_stride[2];
    fc_workspace *workspace;
} fc_s4d_scan_args;
fc_status fc_s4d_scan(const fc_s4d_scan_args *args);
/* ---- state-space models: tokens change a state, which is float32 and returned; any cut of a sequence gives the bits
 * of the whole. (batch, seq, channels) arrays with strides of axes 0 and 1 in bytes. ---- */

/* out[t] = f(bias + sum over k < width of weight[k] x[t - width + 1 + k]) for each channel, f: nothing, or silu. What
 * lies before x is the state, the last width - 1 inputs. */
typedef struct {
    size_t size; /* sizeof(fc_conv1d_args) */
    fc_dtype type; /* of x and out */
    void *out;
    const void *x; /* both (batch, seq, channels); out is not x */
    float *new_state;
    const float *state; /* both (batch, width - 1, channels); NULL: zeros; may be new_state */
    fc_layout layout;   /* FC_COLS: weight (channels, width), ldw apart; FC_PACKED_F32: fc_pack_columns' panels of it */
    fc_dtype weight_type; /* of FC_COLS */
    const void *weight;
    ptrdiff_t ldw;
    const float *bias; /* (channels) or NULL */
    int silu;
    ptrdiff_t batch, seq, channels, width; /* width >= 1 */
    ptrdiff_t out_stride[2], x_stride[2], new_state_stride[2], state_stride[2];
    fc_workspace *workspace;
} fc_conv1d_args;
fc_status fc_conv1d(const fc_conv1d_args *args);

/* Mamba's scan: delta = delta + delta_bias, or softplus of it;  h[n] = e^(delta a[n]) h[n] + delta u b[n];
 * out = (d u + sum over n of h[n] c[n]) silu(z). */
typedef struct {
    size_t size; /* sizeof(fc_scan_args) */
    fc_dtype type; /* of out, u, delta, b, c, z */
    void *out;
    const void *u, *delta, *z; /* (batch, seq, channels), as out, which may be one of them; z NULL: no gate */
    float *new_state;
    const float *state; /* h: both (batch, channels, n); NULL: zeros; may be new_state */
    const float *a;     /* (channels, n), lda apart */
    const void *b, *c;  /* (batch, seq, n) */
    const float *d, *delta_bias; /* (channels) or NULL */
    int delta_softplus;
    ptrdiff_t batch, seq, channels, n;
    ptrdiff_t lda;
    ptrdiff_t out_stride[2], u_stride[2], delta_stride[2], z_stride[2], b_stride[2], c_stride[2];
    ptrdiff_t new_state_stride[2], state_stride[2]; /* batch, channel */
    fc_workspace *workspace;
} fc_scan_args;
fc_status fc_selective_scan(const fc_scan_args *args);

/* RG-LRU:  a = e^(-8 softplus(param) sigmoid(recurrence_gate));  h = a h + sqrt(1 - a^2) sigmoid(input_gate) x;
 * where reset is not 0 a sequence begins, h = sigmoid(input_gate) x;  out = h. */
typedef struct {
    size_t size; /* sizeof(fc_rg_lru_args) */
    fc_dtype type; /* of out, x and the gates */
    void *out;
    const void *x, *input_gate, *recurrence_gate; /* (batch, seq, channels), as out, which may be one of them */
    float *new_state;
    const float *state;   /* h: both (batch, channels); NULL: zeros; may be new_state */
    const float *param;   /* (channels) */
    const uint8_t *reset; /* (batch, seq) or NULL */
    ptrdiff_t batch, seq, channels;
    ptrdiff_t out_stride[2], x_stride[2], input_gate_stride[2], recurrence_gate_stride[2], reset_stride[2];
    ptrdiff_t new_state_stride, state_stride; /* from row to row */
    fc_workspace *workspace;
} fc_rg_lru_args;
fc_status fc_rg_lru(const fc_rg_lru_args *args);

/* ---- a model's forward pass: layers of parts, each of a kind ----
 * A layer is a mixer, which sees the tokens before, and an mlp, which does not:
 *     h = x + s mixer(x),  h + s mlp(h)        or, parallel,  x + s (mixer(x) + mlp(x))
 * where part(x) stands for post_norm(part(norm(x))), and mixer(x) for the sum of two where there is one beside it.
 * Activations are float32. */
typedef enum { FC_NO_NORM, FC_RMS_NORM, FC_LAYER_NORM } fc_norm_kind;
typedef struct {
    fc_norm_kind kind;
    const float *weight, *bias; /* (n); bias may be NULL, and so may a layer norm's weight */
    float eps, offset;          /* offset: of fc_rms_norm */
} fc_norm;

typedef struct {
    fc_layout layout; /* one of FC_PACKED_* */
    const void *data;
    ptrdiff_t group;
    fc_rounds rounding;
    const float *bias; /* as in fc_linear_args, or NULL */
} fc_matrix;

typedef enum {
    FC_NO_PART, FC_ATTENTION, FC_GATED_MLP, FC_MLP, FC_CALLED, FC_MAMBA, FC_MAMBA2, FC_SHORT_CONV, FC_RG_LRU,
    FC_PART_KINDS
} fc_part_kind;
/* Processes that hold shares of what is one matrix in the formula. y (M, n) becomes what all of them give, the same bits
 * in each: with count 0 the sum of their y, else this one's columns, `mine` (M, count), mine_stride floats apart, from
 * `first` on, beside the others'; mine may be these columns of y. On the calling thread. */
typedef fc_status fc_exchange(void *self, float *y, const float *mine, ptrdiff_t rows, ptrdiff_t n,
                              ptrdiff_t mine_stride);
typedef struct {
    fc_exchange *call;
    void *self;
    ptrdiff_t first, count, n;
} fc_ranks;
typedef struct {
    fc_part_kind kind;
    const void *weights; /* of the kind: fc_attention_weights, fc_mlp_weights, fc_called, fc_mamba_weights, .. */
    fc_norm norm, post_norm;
    /* Of a part whose heads or channels are spread over ranks, else NULL twice: the last matrix has some columns, and
     * takes in the channels of all; or it has the rows for this rank's channels, results are terms of a sum, of which one
     * has the bias, and `inner` is NULL. */
    const fc_ranks *inner; /* (M, channels that the last matrix takes in) */
    const fc_ranks *ranks; /* (M, hidden): results */
} fc_part;

/* Mixture of depths: a token's logit is r = x . weight. Those with r > threshold go through the layer,
 *     x' = (1 - r) x + r layer(x),
 * seeing only each other; the others stay as they are. With a predictor it is those for which that is above 0:
 *     silu(x up + bias) . down + down_bias
 * The layer's mixer is FC_ATTENTION. */
typedef struct {
    const float *weight; /* (hidden) */
    float threshold;
    ptrdiff_t inner;   /* of the predictor; 0: there is none */
    fc_matrix up;      /* (hidden, inner) */
    const float *down; /* (inner) */
    float down_bias;
} fc_router;
/* What such a layer remembers: the tokens that went through. */
typedef struct {
    void *mixer;         /* the mixer's own state, of as many tokens */
    int64_t *positions;  /* (B, room): where those lie; the pass adds the new ones */
    ptrdiff_t room;
    const int64_t *held; /* (B): how many went through before the pass, */
    int64_t *chosen;     /* (B), and, written by it, in it */
} fc_routed_state;

typedef struct {
    fc_part mixer, mlp;
    int parallel;
    float residual_scale;
    const fc_router *router; /* or NULL: all tokens go through */
    const fc_part *beside;   /* a second mixer, or NULL; not behind a router */
    /* Attention and an mlp whose result is added to what the mixer is given, x += mixer(x + mlp(attention(x | e))), or
     * NULL twice: e are the embeddings, and attention is of `width` 2 hidden. Not in parallel layers, nor with a scale,
     * a router or a mixer beside. */
    const fc_part *ahead[2];
} fc_layer;

/* FC_ATTENTION: A = H * D query channels, C = G * D key channels; q_norm, k_norm act on each head, before RoPE. Queries,
 * keys and values come from one matrix, or from two or three in formats of their own. */
typedef struct {
    ptrdiff_t heads, kv_heads, head_dim;
    fc_norm q_norm, k_norm;
    ptrdiff_t width;  /* channels of what goes in; 0: hidden */
    fc_matrix qkv[3]; /* side by side (width, A + 2 C) */
    ptrdiff_t qkv_columns[3]; /* of each; 0: there is none */
    fc_matrix out; /* (A, hidden) */
    const float *balance; /* (A + C), or NULL: what q and k are multiplied by, before RoPE, for pages of int8 */
    float scale, softcap;
    ptrdiff_t window; /* as in fc_attention_args, */
    fc_precision precision; /* too */
} fc_attention_weights;
/* out (B, S, heads, head_dim) = attention of the queries in qkv (B, S, heads + 2 kv_heads, head_dim), queries and keys
 * rotated, by a function of the caller's, which keeps keys and values; on the calling thread */
typedef fc_status fc_attend(void *self, float *out, const float *qkv, ptrdiff_t batch, ptrdiff_t seq, ptrdiff_t heads,
                            ptrdiff_t kv_heads, ptrdiff_t head_dim);
typedef struct {
    const fc_kv_cache *kv;
    const float *cos, *sin; /* (positions, rotary_pairs), or NULL: no RoPE */
    ptrdiff_t rotary_pairs;
    fc_attend *attend; /* in the place of kv, of which only the type counts then; or NULL. Not behind a router */
    void *self;        /* its first argument */
} fc_attention_state;

/* FC_GATED_MLP: down (f(x gate) * (x up));  FC_MLP: down f(x up), or down f(x up)^2 */
typedef struct {
    ptrdiff_t inner;
    fc_matrix up; /* gated: the pair (hidden, 2 inner), as fc_linear takes it, else (hidden, inner) */
    fc_matrix gate; /* gated, with data: the pair is this and `up` (hidden, inner), in formats of their own */
    fc_matrix down; /* (inner, hidden) */
    fc_activation activation;
    int squared; /* FC_MLP */
} fc_mlp_weights;

/* FC_CALLED: out (B, S, hidden) from x, which is normalised, by a function of the caller's; on the calling thread */
typedef fc_status fc_call(void *self, void *state, float *out, const float *x, ptrdiff_t batch, ptrdiff_t seq,
                          ptrdiff_t hidden, const int64_t *start);
typedef struct {
    fc_call *call;
    void *self;
} fc_called;

/* States that are as large after a million tokens as after one. A pass reads each row's slot `from` and writes its slot
 * `to`, another one: a state that was stays as it is. A slot: the convolution's last inputs (width - 1, channels), then
 * the scan's state. */
typedef fc_status fc_relay(void *self, int written);
typedef struct {
    float *memory; /* (B, slots, floats) */
    ptrdiff_t slots, floats;
    const int64_t *from, *to; /* (B); from < 0: zeros */
    fc_relay *relay; /* called before `from` is read, and once more, `written`, when `to` is whole; or NULL */
    void *self;      /* its first argument */
} fc_recurrent_state;
typedef struct {
    ptrdiff_t width;
    const float *panels; /* (width, channels) in fc_pack_columns' panels */
    const float *bias;   /* (channels) or NULL */
} fc_conv_weights;

/* FC_MAMBA: x, z = in(..);  u = silu(conv(x));  dt, B, C = x(u), each through its norm if it has one;
 * out(fc_selective_scan(u, dt(dt), a, B, C, d, z)) */
typedef struct {
    ptrdiff_t inner, n, rank;
    fc_matrix in;  /* (hidden, 2 inner) */
    fc_matrix x;   /* (inner, rank + 2 n) */
    fc_matrix dt;  /* (rank, inner) */
    fc_matrix out; /* (inner, hidden) */
    fc_conv_weights conv;             /* of inner channels */
    const float *a, *d, *dt_bias;     /* (inner, n), (inner) twice */
    fc_norm dt_norm, b_norm, c_norm;  /* of rank, n and n channels */
} fc_mamba_weights;

/* FC_MAMBA2, inner = heads head_dim:  z, xBC, dt = in(..);  x, B, C = silu(conv(xBC));  y = fc_ssd_scan(x, dt, ..);
 * out(norm(y silu(z))) or, norm_before_gate, out(norm(y) silu(z)); norm: of the channels of each group */
typedef struct {
    ptrdiff_t heads, head_dim, groups, n;
    fc_matrix in;  /* (hidden, 2 inner + 2 groups n + heads) */
    fc_matrix out; /* (inner, hidden) */
    fc_conv_weights conv;         /* of inner + 2 groups n channels */
    const float *a, *d, *dt_bias; /* (heads) each */
    float dt_min, dt_max;
    fc_norm norm; /* weight (inner); or none */
    int norm_before_gate;
} fc_mamba2_weights;

/* FC_SHORT_CONV: b, c, x = in(..);  out(c conv(b x)), conv without an activation */
typedef struct {
    ptrdiff_t channels;
    fc_matrix in;  /* (hidden, 3 channels) */
    fc_matrix out; /* (channels, hidden) */
    fc_conv_weights conv;
} fc_short_conv_weights;

/* FC_RG_LRU, width = heads block:  y, x = in(..);  u = conv(x), conv without an activation;  i, r: two products of each
 * head's channels of u with its own;  out(f(y) fc_rg_lru(u, i, r, param)), which begins at a row's first token */
typedef struct {
    ptrdiff_t heads, block;
    fc_matrix in;  /* (hidden, 2 width) */
    fc_matrix out; /* (width, hidden) */
    const fc_matrix *gates; /* (2, heads), each (block, block): those of i, then those of r */
    fc_conv_weights conv;   /* of width channels */
    const float *param;     /* (width) */
    fc_activation activation;
} fc_rg_lru_weights;

typedef struct {
    ptrdiff_t hidden, vocab;
    fc_dtype embedding_type;
    const void *embedding; /* (vocab, hidden), rows ld_embedding apart; or NULL: */
    ptrdiff_t ld_embedding;
    fc_matrix table; /* its rows are the columns of this one (hidden, vocab), which may be the head */
    float embedding_scale;
    const fc_layer *layers;
    ptrdiff_t n_layers;
    fc_norm norm;
    fc_matrix head; /* (hidden, vocab) */
    const fc_ranks *ranks; /* that hold the embedding's rows of other tokens; NULL: none do, */
    ptrdiff_t first_token; /* else these rows, and the head's columns, are of `vocab` tokens from this one on */
} fc_model;

/* Row b's tokens come after the start[b] that its states hold. One parallel region in all. FC_INTERRUPTED leaves the
 * states' new tokens and the results undefined. */
typedef struct {
    size_t size; /* sizeof(fc_forward_args) of the caller */
    const fc_model *model;
    void **states;        /* one a mixer, of its kind: fc_attention_state, fc_recurrent_state, what fc_called takes, or
                           * NULL; of a layer with a router fc_routed_state. That of a mixer beside or of attention ahead
                           * follows. */
    const int64_t *ids;   /* (B, S), already checked; NULL: x holds what the embedding would give */
    float *x;             /* (B, S, hidden): what the last layer gives, before the norm; or NULL, if there are ids */
    float *hidden;        /* (B, S, hidden) after the norm, may be x; or NULL */
    float *logits;        /* (B, S, vocab), with last_only (B, 1, vocab); or NULL */
    int last_only;
    ptrdiff_t batch, seq;
    const int64_t *start; /* (B) */
    fc_workspace *workspace;
    const int64_t *positions; /* (B, S), where tokens lie for layers of attention that all have `attend`; NULL: one after
                               * the other from start on */
    int waits; /* some state's function may wait long: a parallel region for each op, whose threads sleep meanwhile */
} fc_forward_args;
fc_status fc_forward(const fc_forward_args *args);

/* ---- roofline: work of a known size for the clock, on fc_get_num_threads() threads ---- */
typedef enum { FC_PEAK_F32, FC_PEAK_BF16, FC_PEAK_I8, FC_PEAK_I4 } fc_peak;
double fc_peak_ops(fc_peak what, ptrdiff_t iterations); /* operations done (multiply and add count 2); 0: no unit */
fc_status fc_read_bytes(const void *data, ptrdiff_t bytes, float *sum);
fc_status fc_copy_bytes(void *out, const void *data, ptrdiff_t bytes);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif

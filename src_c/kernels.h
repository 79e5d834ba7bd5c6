/* Every leaf once: its name and signature. all.h makes the leaves and one table per ISA from this list;
 * dispatch.c chooses a table; drivers read fc_k once and call k->name(...).
 *
 * A typed leaf exists for each fc_dtype: kernels/<op>.h writes `name_any(type, ...)` once, inlined with a constant. */
#ifndef FC_KERNELS_H
#define FC_KERNELS_H

#include "forge.h"
#include "formats.h"

static inline ptrdiff_t fc_size_of(fc_dtype type) { return type == FC_F32 ? 4 : 2; }

/* k of a row of x that share a scale, or as many as share one of W, if those are fewer */
enum { FC_CHUNK = 32 };

/* A chunk of a row of x as integers: x[k] ~ scale q[k]. It follows its q, and is followed by the next chunk's, which begin
 * at a multiple of the table's x_align. */
struct fc_chunk {
    float scale;
    int32_t start; /* -zero times the sum of q: what the sum over u q begins with */
    float sum;     /* of scale q over the group of W that begins with this chunk */
};

/* Bytes of a chunk whose integers take so many */
static inline ptrdiff_t fc_chunk_bytes(ptrdiff_t integers, ptrdiff_t x_align) {
    return (integers + (ptrdiff_t)sizeof(struct fc_chunk) + x_align - 1) / x_align * x_align;
}

/* What `quantize` makes of x. */
struct fc_rounding {
    ptrdiff_t chunk, group; /* k of a chunk, and of a group of W: whole chunks */
    int zero;               /* of W */
    int wide;               /* int16, each four in the order 0 2 1 3 (see gemm.h), else int8 */
    int planes;             /* int8: 2 for -2047..2047, high and low part of a chunk one after the other */
    float qmax;             /* 127 or 2047 */
};

/* Integers for W, whose scales `search` looks for. */
struct fc_search {
    ptrdiff_t group; /* k that share a scale */
    int groups;      /* of a block; if several, their scales are integers, and so are their minima */
    int minima;      /* whether there are minima, */
    int zero;        /* and if not, the u that stands for 0 */
    int top;         /* the largest u */
};

/* C[m][FC_PANEL * panels] (+)= X[m][k] W, what the gemm leaves take. Strides in bytes; formats in formats.h. */
struct fc_gemm {
    float *c; /* whole panels, ldc from row to row */
    ptrdiff_t ldc;
    const void *x; /* of the a_type that the format multiplies; integer formats: what `quantize` makes */
    ptrdiff_t ldx;
    const void *w; /* panel p at p * panel_stride */
    ptrdiff_t panel_stride;
    const void *next_w; /* panels that will be multiplied after these, or NULL */
    ptrdiff_t m, panels;
    ptrdiff_t lines;        /* float formats: all of them; integer formats: those of a chunk */
    ptrdiff_t group_chunks; /* integer formats: chunks of a group of W, */
    ptrdiff_t blocks;       /* blocks of a panel, */
    int planes, wide;       /* of x, whose integers are int16, */
    int minima, zero;       /* and, of lines of bytes, whether a line of minima follows that of scales, and the u of 0 */
    int accumulate;         /* add to C instead of writing it */
    int in_cache;           /* W comes from there: no matter in which order */
};

/* A row of scores, and what stands between them and their weights; NULL: nothing. */
struct fc_attention_row {
    float *s; /* (n) in: q k; out: weights */
    const float *k_scale, *v_scale, *bias; /* (n) */
    float scale, softcap;
    int16_t *q; /* (n), with v_scale: weights v_scale ~ *w_scale q; q may begin where s does */
    float *w_scale;
    uint16_t *bf16; /* (n): weights as bfloat16, instead of s; may begin where s does, or before; else NULL */
};

enum { FC_STRIP_ROWS = 32 };

/* Rows of queries against a chunk's first keys, of which each row sees as many as it says. */
struct fc_attention_strips {
    const uint16_t *q; /* (rows), ldq bytes from row to row, and with room for whole strips, as all that follows */
    const char *k, *v; /* panels of a page, k_panel and v_panel bytes apart */
    float *scores;     /* room: two strips of 272 */
    float *part;       /* (rows, panels), ldp bytes from row to row */
    float *max, *sum;  /* (rows) */
    const ptrdiff_t *sees; /* (rows) keys; those up to the next multiple of 32 lie in the page */
    ptrdiff_t ldq, k_panel, v_panel, ldp;
    ptrdiff_t rows, k_lines, panels; /* lines of K in whole tiles, and an even number of panels of V */
    float scale;
};

/* C[m][FC_PANEL * panels] = sum over blocks of scale (start + X W), X unsigned and W signed bytes; strides in bytes. */
struct fc_byte_product {
    float *c; /* int32 without scale */
    ptrdiff_t ldc;
    const uint8_t *x; /* (m, blocks * lines * 4) */
    ptrdiff_t ldx;
    const int8_t *w; /* (panels, blocks * lines, FC_PANEL, 4), panels panel_stride apart */
    ptrdiff_t panel_stride, m, panels, blocks, lines;
    const int32_t *start; /* (FC_PANEL * panels), or NULL: zeros */
    const float *scale;   /* (m, blocks), rows ld_scale floats apart, or NULL: C is integers of one block */
    ptrdiff_t ld_scale;
};

enum { FC_BYTE_ROWS = 24 }; /* at a time: their scores stay in L1 until they are weights */

/* A row's scores of a chunk, of which [lo, hi) are seen, on their way to weights in bytes:
 *     cap tanh((scale s k_scale + shift) / cap) + bias     without softcap and bias scale and shift have a factor log2(e) */
struct fc_byte_row {
    float *s;                       /* (256) in: q k as integers, int32 */
    const float *k_scale, *v_scale; /* (256) */
    const float *shift;             /* (256 / FC_PANEL), of a panel of keys */
    const float *bias;              /* (256), or NULL */
    float scale, softcap;
    ptrdiff_t lo, hi;
    uint8_t *w;     /* (256) out: w_scale w ~ weights v_scale, w_scale of 64 keys at a time */
    float *w_scale; /* (4) */
};

/* Rows of queries in bytes against a chunk, FC_STRIP_ROWS at a time: weights, maxima and sums as byte_weights makes them,
 * and part, weights V. */
struct fc_byte_strips {
    const struct fc_byte_row *rows; /* (count), no bias, w_scale (count, 4); s and w 2 * FC_STRIP_ROWS apart may be one */
    ptrdiff_t count;
    const uint8_t *q;    /* (count), ldq bytes from row to row, and with room for whole strips, as s and w of rows */
    const char *k, *v;   /* panels of 256 keys, k_panel and v_panel bytes apart */
    const int32_t *start; /* (256) what sums of a key begin with */
    float *part, *max, *sum; /* (count, panels), ldp bytes from row to row, (count), (count) */
    ptrdiff_t ldq, ld_s, ld_w, k_panel, v_panel, ldp; /* bytes */
    ptrdiff_t k_lines, panels; /* lines of K in whole tiles, panels of V */
};

/* A block of tokens of one head, whose state is S (n, p); see kernels/ssd.h, kernels/delta.h and kernels/s4d.h. */
struct fc_head_scan {
    const char *from;                     /* S before, NULL: zeros; may be `to`, S after */
    char *to;
    ptrdiff_t from_n, from_p, to_n, to_p; /* bytes from n to n + 1, from p to p + 1: one of two is 4 */
    float *y;                             /* (queries, tokens, width) */
    const float *u;                       /* (tokens, width): u, or v of the delta rule */
    /* k, q of each query, the decays of each n, and k times these for the delta rule: floats from one kind to the next,
     * from token to token, and from 16 of the n to the next, which are 16 for the delta rule. S4D: the modes of 16
     * channels, `line` floats to those of the next 16 */
    const float *keys;
    ptrdiff_t kind, token, line;
    const float *decay; /* (tokens), or NULL: those of each n */
    const float *beta;  /* (tokens), of the delta rule, else NULL */
    float *tile;        /* (n, 2 vectors), of the delta rule */
    ptrdiff_t n, p, width, tokens, queries;
};

/* A mode of S4D: its floats for 16 channels each; terms of its convolution that are made at once */
enum { FC_MODE_FLOATS = 8, FC_POWERS = 8 };

struct fc_ssd_steps {
    float a, bias, lo, hi;
    int softplus;
};

struct fc_head_output {
    void *out;
    const float *y; /* (tokens, width) */
    const void *x, *z;
    ptrdiff_t ldo, width, ldx, ldz;
    float d;         /* of the head, */
    const float *ds; /* or (p) of each column; NULL: none */
};

/* Panels of channels of a selective scan over a run of tokens; see kernels/scan.h. */
struct fc_scan {
    float *h;                  /* (panels, n, FC_PANEL) */
    const float *a;            /* (panels, n, FC_PANEL) */
    const float *step, *input; /* (panels, tokens, FC_PANEL), panels `stride` apart: delta log2(e), delta u */
    float *y;                  /* like them */
    const float *b, *c;        /* (tokens, n) */
    ptrdiff_t tokens, n, channels, stride;
};

/* Channels of an RG-LRU over a run of tokens; see kernels/rg_lru.h. */
struct fc_rg_lru {
    float *x;           /* (tokens, channels), as i and r, rows `row` floats apart, whole vectors; becomes h */
    const float *i, *r; /* the gates' logits */
    const float *rate;  /* (channels) */
    const float *from;  /* (channels): h before, NULL: zeros; may be `to`, h after */
    float *to;
    const uint8_t *begins; /* (tokens), begins_stride apart: whether a sequence begins; or NULL */
    ptrdiff_t begins_stride, tokens, channels, row;
    const char *next[3]; /* what will be read a run later, rows next_stride bytes apart, of values of `size` bytes */
    ptrdiff_t next_stride[3], size;
};

/* A result on its way past the caches: the last `waiting` bytes before `end`, fewer than bytes[] has, are still
 * here; see kernels/stream.h. */
struct fc_stream {
    char *end;
    ptrdiff_t waiting;
    char bytes[32];
};

/* A row of a softmax that waits: e[n], and what each is multiplied by for out (n); of 16 bits, out's values at e. */
struct fc_softmax_row {
    char *out;
    const float *e;
    float share;
};

/* Vectors that two rows of a result past the caches share; see kernels/conv1d.h. */
struct fc_seams {
    char lines[4][3 * 64]; /* the end of one row and the beginning of the next, around the vector in the middle */
    char last[64];         /* the end of the last row */
    char *at, *end;        /* where the first vector goes, `row` bytes before the next; the last row's end, or NULL */
    ptrdiff_t row, tail;   /* tail: bytes of a row in the vector that it begins */
    int from;              /* the first vector that waits */
};

/* next: the row that will be read next, or NULL. stream: if not NULL, out goes past the caches, row after row */
#define FC_TYPED_KERNELS(X)                                                                                            \
    X(rms_norm, (void *out, void *h, const void *x, const void *residual, const float *weight, ptrdiff_t n, float eps, \
                 float offset, const void *next, struct fc_stream *stream), out, h, x, residual, weight, n, eps,       \
                 offset,                                                                                               \
      next, stream)                                                                                                    \
    X(layer_norm, (void *out, void *h, const void *x, const void *residual, const float *weight, const float *bias,    \
                   ptrdiff_t n, float eps, const void *next, struct fc_stream *stream), out, h, x, residual, weight,   \
      bias, n, eps, next, stream)                                                                                      \
    X(softmax, (void *out, const void *x, float *e, ptrdiff_t n), out, x, e, n)                                        \
    X(softmax_streamed, (struct fc_stream *stream, struct fc_softmax_row *row, void *out, const void *x, float *e,     \
                         ptrdiff_t n, const void *next), stream, row, out, x, e, n, next)                              \
    X(relu, (void *out, const void *x, ptrdiff_t n, struct fc_stream *stream), out, x, n, stream)                      \
    X(silu, (void *out, const void *x, ptrdiff_t n, struct fc_stream *stream), out, x, n, stream)                      \
    X(gelu, (void *out, const void *x, ptrdiff_t n, struct fc_stream *stream), out, x, n, stream)                      \
    X(gelu_tanh, (void *out, const void *x, ptrdiff_t n, struct fc_stream *stream), out, x, n, stream)                 \
    X(reglu, (void *out, const void *gate, const void *up, ptrdiff_t n, struct fc_stream *stream), out, gate,          \
      up, n, stream)                                                                                                   \
    X(swiglu, (void *out, const void *gate, const void *up, ptrdiff_t n, struct fc_stream *stream), out, gate,         \
      up, n, stream)                                                                                                   \
    X(geglu, (void *out, const void *gate, const void *up, ptrdiff_t n, struct fc_stream *stream), out, gate,          \
      up, n, stream)                                                                                                   \
    X(geglu_tanh, (void *out, const void *gate, const void *up, ptrdiff_t n, struct fc_stream *stream), out, gate,     \
      up, n, stream)                                                                                                   \
    X(rope_split_halves, (void *out, const void *x, const float *cos, const float *sin, ptrdiff_t pairs,               \
      ptrdiff_t dim),                                                                                                  \
      out, x, cos, sin, pairs, dim)                                                                                    \
    X(rope_interleaved, (void *out, const void *x, const float *cos, const float *sin, ptrdiff_t pairs,                \
      ptrdiff_t dim),                                                                                                  \
      out, x, cos, sin, pairs, dim)                                                                                    \
    X(to_f32, (float *out, const void *x, ptrdiff_t n, float scale), out, x, n, scale)                                 \
    X(from_f32, (void *out, const float *x, ptrdiff_t n, float scale), out, x, n, scale)                               \
    X(to_bf16, (uint16_t *out, const void *x, ptrdiff_t n), out, x, n)                                                 \
    X(round_bf16, (float *out, const void *x, ptrdiff_t n), out, x, n)                                                 \
    X(quantize, (void *q, const void *x, ptrdiff_t n, ptrdiff_t padded, const struct fc_rounding *r), q, x, n, padded, \
      r)                                                                                                               \
    X(panel_rows, (float *panel, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n), panel, w, ldw, k, n)         \
    X(panel_cols, (float *panel, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n), panel, w, ldw, k, n)         \
    X(gemv_rows, (float *c, const float *x, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n), c, x, w, ldw, k,  \
      n)                                                                                                               \
    X(linear_store, (void *out, const float *acc, const float *bias, float out_scale, const void *residual,            \
                     ptrdiff_t n), out, acc, bias, out_scale, residual, n)                                             \
    X(gated_store_relu, (void *out, const float *acc, const float *bias, const float *bias_up, ptrdiff_t n), out, acc, \
      bias, bias_up, n)                                                                                                \
    X(gated_store_silu, (void *out, const float *acc, const float *bias, const float *bias_up, ptrdiff_t n), out, acc, \
      bias, bias_up, n)                                                                                                \
    X(gated_store_gelu, (void *out, const float *acc, const float *bias, const float *bias_up, ptrdiff_t n), out, acc, \
      bias, bias_up, n)                                                                                                \
    X(gated_store_gelu_tanh, (void *out, const float *acc, const float *bias, const float *bias_up, ptrdiff_t n), out, \
      acc, bias, bias_up, n)                                                                                           \
    X(head_rows, (float *out, ptrdiff_t token, ptrdiff_t line, const void *x, ptrdiff_t ldx, ptrdiff_t tokens,         \
                  ptrdiff_t n, const float *scale, float factor), out, token, line, x, ldx, tokens, n, scale, factor)  \
    X(scalars_f32, (float *out, const void *x, ptrdiff_t stride, ptrdiff_t n), out, x, stride, n)                      \
    X(head_output, (const struct fc_head_output *o, ptrdiff_t tokens, ptrdiff_t p), o, tokens, p)                      \
    X(conv1d, (void *out, ptrdiff_t ldo, const void *x, ptrdiff_t ldx, const float *weight, const float *bias,         \
               ptrdiff_t n, ptrdiff_t tokens, ptrdiff_t width, int silu), out, ldo, x, ldx, weight, bias, n, tokens,   \
      width, silu)                                                                                                     \
    X(silu_of_sums, (void *out, const float *x, ptrdiff_t n), out, x, n)                                               \
    X(conv1d_streamed, (struct fc_seams *seams, void *out, const void *x, ptrdiff_t ldx, const float *weight,          \
                        ptrdiff_t ldw, const float *bias, ptrdiff_t n, ptrdiff_t width, int silu), seams, out, x,      \
      ldx, weight, ldw, bias, n, width, silu)                                                                          \
    X(scan_begin, (float *step, float *input, float *y, ptrdiff_t stride, const void *u, const void *delta,            \
                   const float *bias, const float *d, ptrdiff_t n, int softplus, const void *next_u,                   \
                   const void *next_delta), step, input, y, stride, u, delta, bias, d, n, softplus, next_u,            \
      next_delta)                                                                                                      \
    X(scan_end, (void *out, const float *y, ptrdiff_t stride, const void *z, ptrdiff_t n, const void *next_z), out,    \
      y, stride, z, n, next_z)                                                                                         \
    X(merge, (void *out, const void *a, const void *b, float weight_a, float weight_b, ptrdiff_t n), out, a, b,        \
      weight_a, weight_b, n)                                                                                           \
    X(router_logit, (float *logit, const void *x, const float *weight, ptrdiff_t n), logit, x, weight, n)              \
    X(gate_update, (void *out, const void *x, const void *y, float gate, ptrdiff_t n), out, x, y, gate, n)

#define FC_KERNELS(X)                                                                                                  \
    X(gemm_f32, (const struct fc_gemm *g))                                                                             \
    X(gemm_bf16, (const struct fc_gemm *g))                                                                            \
    X(gemm_s8, (const struct fc_gemm *g))                                                                              \
    X(paged_f32, (const struct fc_gemm *g))                                                                            \
    X(paged_bf16, (const struct fc_gemm *g))                                                                           \
    X(paged_s8, (const struct fc_gemm *g))                                                                             \
    X(gemm_u8, (const struct fc_gemm *g))                                                                              \
    X(gemm_u4, (const struct fc_gemm *g))                                                                              \
    X(gemm_u6, (const struct fc_gemm *g))                                                                              \
    X(gemm_i4_symmetric, (const struct fc_gemm *g))                                                                    \
    X(gemm_i4_affine, (const struct fc_gemm *g))                                                                       \
    X(stream_row, (struct fc_stream *stream, void *out, const void *from, ptrdiff_t bytes, const void *next))          \
    X(stream_end, (struct fc_stream *stream))                                                                          \
    X(seams_end, (struct fc_seams *seams))                                                                             \
    X(add_scaled, (float *out, const float *x, const float *y, float scale, ptrdiff_t n))                              \
    X(bias_from_bool, (float *bias, const uint8_t *mask, ptrdiff_t n))                                                 \
    X(attention_row, (const struct fc_attention_row *row, ptrdiff_t n, float *max, float *sum))                        \
    X(gemm_bytes, (const struct fc_byte_product *g))                                                                   \
    X(byte_weights, (const struct fc_byte_row *rows, ptrdiff_t count, float *max, float *sum))                         \
    X(to_bytes, (int8_t *q, float *scale, int32_t *sum, const float *x, ptrdiff_t n, float qmax))                      \
    X(hadamard, (float *x, ptrdiff_t n))                                                                               \
    X(to_s16, (int16_t *q, float *scale, const float *x, ptrdiff_t n, float qmax))                                     \
    X(pv_partial_lines, (const struct fc_gemm *g, fc_kv_type type, ptrdiff_t lo, ptrdiff_t hi))                        \
    X(all_finite, (int *yes, const float *x, ptrdiff_t n))                                                             \
    X(attention_fold, (float *o, float *max, float *sum, const float *o_part, float max_part, float sum_part,          \
                       ptrdiff_t n))                                                                                   \
    X(search, (float *out, const float *w, const float *h, const struct fc_search *s))                                 \
    X(head_outer, (const struct fc_head_scan *s))                                                                      \
    X(head_delta, (const struct fc_head_scan *s))                                                                      \
    X(ssd_steps, (float *dt, float *decay, ptrdiff_t tokens, const struct fc_ssd_steps *s))                            \
    X(key_decays, (const struct fc_head_scan *s, float *keys))                                                         \
    X(head_modes, (const struct fc_head_scan *s))                                                                      \
    X(mode_powers, (float *out, double *powers, const double *step, ptrdiff_t modes, ptrdiff_t length))                \
    X(exp_f32, (float *x, ptrdiff_t n))                                                                                \
    X(scan, (const struct fc_scan *s))                                                                                 \
    X(rg_lru, (const struct fc_rg_lru *s))                                                                             \
    X(rg_lru_rates, (float *rate, const float *param, ptrdiff_t n))                                                    \
    X(panel_to_columns, (float *out, ptrdiff_t ld, const float *panel, ptrdiff_t k, ptrdiff_t columns))                \
    X(peak_f32, (float *sink, ptrdiff_t iterations))                                                                   \
    X(peak_bf16, (float *sink, ptrdiff_t iterations))                                                                  \
    X(peak_i8, (float *sink, ptrdiff_t iterations))                                                                    \
    X(peak_i4, (float *sink, ptrdiff_t iterations))                                                                    \
    X(copy_stream, (float *out, const float *data, ptrdiff_t n))                                                       \
    X(read_sum, (float *sum, const float *data, ptrdiff_t n))

/* Formats that expand, each with its leaves expand_<name>(out, block, blocks), see kernels/expand.h, and
 * few_<name>(g), which multiplies few rows by packed blocks, see kernels/blocks.h. */
#define FC_EXPANSIONS(X)                                                                                               \
    X(q5_0, FC_PACKED_Q5_0)                                                                                            \
    X(q5_1, FC_PACKED_Q5_1)                                                                                            \
    X(q8_0, FC_PACKED_Q8_0)                                                                                            \
    X(q2_k, FC_PACKED_Q2_K)                                                                                            \
    X(q3_k, FC_PACKED_Q3_K)                                                                                            \
    X(q4_k, FC_PACKED_Q4_K)                                                                                            \
    X(q5_k, FC_PACKED_Q5_K)                                                                                            \
    X(q6_k, FC_PACKED_Q6_K)                                                                                            \
    X(iq4_nl, FC_PACKED_IQ4_NL)                                                                                        \
    X(iq4_xs, FC_PACKED_IQ4_XS)                                                                                        \
    X(mxfp4, FC_PACKED_MXFP4)

/* How drivers cut a product of one a_type: data that belongs to the registers and caches of an ISA's machines. No bit
 * of a result depends on it. */
struct fc_blocks {
    ptrdiff_t tile_rows;               /* rows that a line of W serves in registers */
    ptrdiff_t pass_rows;               /* rows that pass over W at once, in one tile or a narrower one */
    ptrdiff_t panel_bytes;             /* of each panel of W that more rows of x pass over at a time */
    ptrdiff_t rows;                    /* of x at a time, or fewer, */
    ptrdiff_t l2_quarters;             /* so that they and their sums fill so much of L2 */
    ptrdiff_t rows_in_place;           /* up to here float32 x is multiplied where it lies */
    ptrdiff_t many_rows;               /* beyond these a tile has many panels: what is read of x serves them all */
    ptrdiff_t few_panels, many_panels; /* of a tile */
};

/* And one whose W does not lie as it is multiplied, whatever the a_type. */
struct fc_unpacked {
    ptrdiff_t k;               /* rows of W, not packed, that become panels at once */
    ptrdiff_t expanded_k;      /* rows of packed W that expand at once */
    ptrdiff_t unexpanded_rows; /* of x, up to which it does not expand */
    ptrdiff_t stream_rows;     /* up to here rows of W that come as they lie are streamed past x, */
    ptrdiff_t stream_columns, stream_k; /* so many columns and rows of W at a time */
};

struct fc_kernels {
    const char *isa;
    /* operations per iteration of the peak_* leaves; 0: the ISA has no such unit */
    double ops_f32, ops_bf16, ops_i8, ops_i4;
    /* the a_type of the ISA's products: float32 or bfloat16 against bfloat16 weights; bytes a value against
     * integer ones */
    fc_dtype bf16_x;
    ptrdiff_t bf16_k; /* k of bfloat16 products that are summed before they join an output's chain */
    int i8_x, i4_x;
    ptrdiff_t x_align; /* of a chunk of integers */
    int byte_query; /* the largest byte of a query, see kernels/attention_bytes.h */
    struct fc_blocks blocks[FC_A_TYPES];
    struct fc_unpacked unpacked;
#define FC_TYPED_MEMBER(name, params, ...) void(*name[FC_DTYPES]) params;
#define FC_MEMBER(name, params) void(*name) params;
    FC_TYPED_KERNELS(FC_TYPED_MEMBER)
    FC_KERNELS(FC_MEMBER)
    void (*expand[FC_LAYOUTS])(char *out, const char *block, ptrdiff_t blocks); /* NULL: as it is */
    void (*few[FC_LAYOUTS])(const struct fc_gemm *g);
    void (*attention_strips)(const struct fc_attention_strips *t); /* NULL: the ISA has no tiles */
    void (*byte_strips)(const struct fc_byte_strips *t);           /* likewise */
    ptrdiff_t staged_heads; /* of a large result of rope that are made before the first of them goes past the caches */
#undef FC_TYPED_MEMBER
#undef FC_MEMBER
};

/* The table in use; set by dispatch.c, at any time: an op reads it once, at its start. */
extern const struct fc_kernels *_Atomic fc_k;

#endif

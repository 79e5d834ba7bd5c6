/* One call of attention: what its files share. attention.c chooses the work's items, chunk.c computes one chunk of keys
 * against one block of queries, bytes.c does in bytes, pages.c brings keys and values into the pages of either,
 * carried.c begins and ends rows. */
#ifndef FC_OPS_ATTENTION_H
#define FC_OPS_ATTENTION_H

#include "../../state/kv_pages.h"
#include "../visible.h"

/* FLOATS: float32. BF16: where the ISA multiplies pairs of bfloat16. INT16, against int8: each query, and each row of a
 * chunk's weights, has a scale; the sums of products are exact. */
enum a_type { FLOATS, BF16, INT16 };

/* How weights V is summed, so that a row alone has the bits of many. IN_ORDER: a chain over keys, or pairs of them, which
 * begins and ends with the row's own keys. ON_GRID: over groups of keys at absolute positions, in which others weigh 0;
 * integer sums have no order, but the same zeros. */
enum key_sums { IN_ORDER, ON_GRID };

struct attention {
    const struct fc_kernels *k;
    const fc_attention_args *args;
    int threads; /* of all its regions at most: the scratch is for as many */
    void (*gemm)(const struct fc_gemm *);
    enum a_type a_type;          /* of queries and weights */
    ptrdiff_t x_size;        /* their bytes */
    float qmax;              /* INT16: of a query's channel, so that the sums of its products fit */
    ptrdiff_t k_step;         /* keys, or channels of a key, in a line */
    enum key_sums sums;
    ptrdiff_t grid;           /* keys of such a group */
    ptrdiff_t tile_rows;      /* rows that a line serves in registers */
    ptrdiff_t group;         /* R: query heads per key/value head */
    ptrdiff_t block, blocks; /* queries a block, blocks a sequence */
    ptrdiff_t rows, d_padded, e_padded; /* rows of a block = block * R; D in whole lines; E in whole panels */
    /* The pages: a cache's where they lie, or what plain arrays, or a cache's pages of another type, become: those of
     * pairs (b, g) from first_pair and of chunks from first_page on, or a thread's one. bytes: see bytes.c. */
    int in_place, bytes, smooth;
    ptrdiff_t first_page;
    fc_kv_cache kv;
    ptrdiff_t first_pair, pairs;
    int own_page;
    fc_scratch scratch;
    /* one item a chunk: */
    ptrdiff_t first_chunk, chunks, run; /* of the segment at hand; chunks an item */
    float *parts;                  /* (B, G, chunks) partials: o (rows, e_padded), max (rows), sum (rows) */
    float *folded;                 /* (B, G) likewise */
    struct fc_range *see;          /* (B, S) */
    float *queries;                /* (B, G) times q (rows, d_padded) and q_scale (rows), or NULL: each chunk loads them */
};

/* A thread's scratch. */
struct scratch {
    char *q;       /* (rows, d_padded), scaled unless bfloat16; int16 ones lie as far apart as float32 */
    float *q_scale, *w_scale; /* (rows), INT16 */
    float *scores; /* (rows, LD_SCORES) */
    float *part, *part_max, *part_sum; /* (rows, e_padded), (rows), (rows) */
    float *o, *max, *sum;              /* the same, folded so far */
    ptrdiff_t *sees; /* (rows), of strips */
    float *bias;   /* (256) */
    float *bytes;  /* of bytes.c */
    void *store;   /* of fc_kv_store, and tokens of a cache as float32 */
    void *page;    /* own_page */
};

/* One block of queries of one sequence and group, and what each of them sees. */
struct where {
    ptrdiff_t b, g, q0, queries, kv_len;
    const struct fc_range *see; /* (queries) */
};

/* A chunk of n keys from key0 on; of a block's rows (query, head) from `row` on, [lo, hi) are the keys that any of them
 * sees, [from, to) those that all of them see: intervals only move on from query to query. */
struct chunk {
    ptrdiff_t key0, n;
};
struct shared {
    ptrdiff_t lo, from, to, hi;
};

static inline struct fc_range see_in(const struct attention *ctx, const struct where *w, ptrdiff_t row,
                                     struct chunk c) {
    return fc_visible_in(w->see[row / ctx->group], c.key0, c.n);
}

static inline struct shared seen_by(const struct attention *ctx, const struct where *w, ptrdiff_t row, ptrdiff_t rows,
                                    struct chunk c) {
    const struct fc_range first = see_in(ctx, w, row, c), last = see_in(ctx, w, row + rows - 1, c);
    return (struct shared){.lo = first.lo, .from = last.lo, .to = first.hi, .hi = last.hi};
}

/* Keys (n, D) and values (n, E) of one head on their way into a page */
struct tokens {
    fc_dtype type;
    const char *k, *v;
    ptrdiff_t k_stride, v_stride; /* bytes */
};

/* ---- carried.c ---- */

/* o (e_padded), max, sum of a row: as nothing, or as it carries them. A fresh o is not written: the first fold does. */
void fc_attention_begin_row(const struct attention *ctx, const struct where *w, ptrdiff_t row, float *o, float *max,
                            float *sum);
/* Its result, for which o is overwritten, or what it carries on */
void fc_attention_end_row(const struct attention *ctx, const struct where *w, ptrdiff_t row, float *o, float max,
                          float sum);

/* ---- pages.c ---- */

ptrdiff_t fc_attention_page_bytes(const struct attention *ctx);
size_t fc_attention_store_bytes(const struct attention *ctx);

/* Pages for `pairs` heads' keys and values. Nonzero: no memory. */
int fc_attention_new_pages(struct attention *ctx, fc_scratch *pages, ptrdiff_t pairs);

/* The chunks that some query sees of the pairs at hand into their pages, on threads */
fc_status fc_attention_pack_pages(struct attention *ctx);

/* One chunk of keys and values into `page`; scratch: of fc_attention_store_bytes */
void fc_attention_store_chunk(const struct attention *ctx, ptrdiff_t pair, ptrdiff_t chunk, void *page, void *scratch);

/* ---- chunk.c ---- */

/* Rows of a block that scratch has room for: strips read, and write, whole ones. */
ptrdiff_t fc_attention_rows_in_strips(const struct attention *ctx);
size_t fc_attention_scratch_bytes(const struct attention *ctx);
struct scratch fc_attention_scratch_of(const struct attention *ctx, int rank);

/* Rows (query, head) of a block into r->q */
void fc_attention_load_queries(const struct attention *ctx, const struct where *w, const struct scratch *r);

/* What the mask adds to the scores of the keys that a row sees, into `bias`, which is returned */
const float *fc_attention_load_bias(const struct attention *ctx, const struct where *w, ptrdiff_t row, struct chunk c,
                                    float *bias);

/* part, part_max, part_sum of a chunk; returns 0 if the block sees none of it. */
int fc_attention_chunk(const struct attention *ctx, const struct where *w, const struct scratch *r, ptrdiff_t chunk);

/* ---- bytes.c ---- */

ptrdiff_t fc_byte_page_bytes(const struct attention *ctx);
size_t fc_byte_store_bytes(const struct attention *ctx);
ptrdiff_t fc_byte_scratch_floats(const struct attention *ctx);

/* A page <- n tokens; scratch: of fc_byte_store_bytes */
void fc_byte_store(const struct attention *ctx, void *page, ptrdiff_t n, const struct tokens *from, void *scratch);
void fc_byte_load_queries(const struct attention *ctx, const struct where *w, const struct scratch *r);

/* part, part_max, part_sum of a chunk, whose page this is */
void fc_byte_chunk(const struct attention *ctx, const struct where *w, const struct scratch *r, void *page,
                   struct chunk c);

#endif

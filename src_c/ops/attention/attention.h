/* One call of attention: what its three files share. attention.c chooses the work's items, chunk.c computes one chunk
 * of keys against one block of queries, pages.c brings plain arrays into pages. */
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
    /* The pages: a cache's, or, for plain arrays, those of pairs (b, g) from first_pair on, or a thread's one. */
    fc_kv_cache kv;
    ptrdiff_t first_pair, pairs;
    int own_page;
    fc_scratch scratch;
    /* one item a chunk: */
    ptrdiff_t first_chunk, chunks, run; /* of the segment at hand; chunks an item */
    float *parts;                  /* (B, G, chunks) partials: o (rows, e_padded), max (rows), sum (rows) */
    float *folded;                 /* (B, G) likewise */
    struct fc_range *see;          /* (B, S) */
};

/* A thread's scratch. */
struct scratch {
    char *q;       /* (rows, d_padded), scaled unless bfloat16; int16 ones lie as far apart as float32 */
    float *q_scale, *w_scale; /* (rows), INT16 */
    float *scores; /* (rows, LD_SCORES) */
    float *part, *part_max, *part_sum; /* (rows, e_padded), (rows), (rows) */
    float *o, *max, *sum;              /* the same, folded so far */
    float *bias;   /* (256) */
    void *store;   /* of fc_kv_store */
    void *page;    /* own_page */
};

/* One block of queries of one sequence and group, and what each of them sees. */
struct where {
    ptrdiff_t b, g, q0, queries, kv_len;
    const struct fc_range *see; /* (queries) */
};

/* ---- pages.c ---- */

/* Pages for `pairs` heads' keys and values, for free(); NULL without memory. */
void **fc_attention_new_pages(struct attention *ctx, ptrdiff_t pairs);

/* The chunks that some query sees of the pairs at hand into their pages, on threads */
fc_status fc_attention_pack_pages(struct attention *ctx);

/* One chunk of plain keys and values into `page`; scratch: of fc_kv_store */
void fc_attention_store_chunk(const struct attention *ctx, ptrdiff_t pair, ptrdiff_t chunk, void *page, void *scratch);

/* ---- chunk.c ---- */

size_t fc_attention_scratch_bytes(const struct attention *ctx);
struct scratch fc_attention_scratch_of(const struct attention *ctx, int rank);

/* Rows (query, head) of a block into r->q */
void fc_attention_load_queries(const struct attention *ctx, const struct where *w, const struct scratch *r);

/* part, part_max, part_sum of a chunk; returns 0 if the block sees none of it. */
int fc_attention_chunk(const struct attention *ctx, const struct where *w, const struct scratch *r, ptrdiff_t chunk);

#endif

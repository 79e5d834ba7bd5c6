/* Heads whose state S (n, p) goes through tokens in time order: what ssd_scan, gated_delta and s4d_scan share.
 *
 * An item is one head of one row, or some of its columns p where heads are few. Items go through the tokens block by
 * block: inputs become float32, k and q once where heads share them, a leaf takes S through them, results are stored.
 * A block, an item and a span of tokens are only how far one goes at a time: the arithmetic of a token knows none. */
#ifndef FC_HEADS_H
#define FC_HEADS_H

#include "rows.h"

struct heads;

/* Where an item stands: row b, head h, its columns p from p0 on, tokens from `start` on; the block's scratch. */
struct head_block {
    const struct heads *heads;
    ptrdiff_t b, h, p0, start;
    float *steps; /* (FC_HEAD_STEPS, FC_HEAD_TOKENS) */
    float *keys, *u;
    struct fc_head_scan scan; /* whose inputs are float32 once `fill_keys` and `fill` have run */
};

/* Tokens of a block: what they bring stays in the first cache. Rows of scratch with a number for each of them. */
enum { FC_HEAD_TOKENS = 128, FC_HEAD_STEPS = 3 };

struct heads {
    const struct fc_kernels *k;
    const void *args; /* of the op */
    ptrdiff_t batch, heads, seq, n, p;
    ptrdiff_t queries, kinds;           /* y a token; kinds of floats in scan.keys */
    const void *state;                  /* S before, NULL: zeros */
    void *new_state;
    const ptrdiff_t *state_stride, *new_state_stride; /* bytes: batch, head, row */
    int by_p;                           /* a row of the states is a p, else an n */
    int delta;                          /* the delta rule */
    int each_n;                         /* each n has a decay of its own */
    int modes;                          /* S4D: n are the real and imaginary parts of modes */
    ptrdiff_t most_columns;             /* of an item; 0: as there are */
    ptrdiff_t share;                    /* neighbouring heads whose keys are the same */
    void (*fill_keys)(struct head_block *at); /* of the first of them */
    void (*fill)(struct head_block *at);
    void (*put)(const struct head_block *at);
    /* what fc_heads_run decides */
    ptrdiff_t parts, columns; /* of a head, and of a part of it */
    struct fc_span span;
    fc_scratch scratch;
};

fc_status fc_heads_run(struct heads *heads, fc_workspace *workspace);

#endif

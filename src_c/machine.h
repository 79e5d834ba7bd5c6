/* Facts about the machine, each once: its caches, and what work costs. They choose blocks, how many threads work, and
 * whether results go past the caches; never a bit of a result. */
#ifndef FC_MACHINE_H
#define FC_MACHINE_H

#include "forge.h"

/* Nanoseconds on one thread, of a server's core with AVX2, rounded: an op is worth threads, and a look for Ctrl-C, by
 * them. Elementwise work is for one float32; what a row or a token costs besides stands below it. */
static const struct {
    double flop, weight_byte; /* of a product: an addition or a multiplication; a byte of packed W from memory */
    double plain_byte;        /* a byte of W as it lies, streamed past few rows */
    double convert, convert_normed, row;
    double rms_norm, layer_norm, norm_residual, softmax, rope, rope_token, add_scaled;
    double activation[FC_ACTIVATIONS];
    double merge, merge_row, lookup, lookup_packed, lookup_row; /* of attentions' results; of a table's rows */
    double pack, pack_panel;                        /* a row of a panel; a panel */
    double search;                                  /* of scales: a row of a panel */
    double append, read;                            /* a channel of a token, into pages and out of them */
    double score_flop, page_byte, query_block;      /* of attention: a product's operation, a byte of pages, a block */
    double page_value, fold;                        /* a plain value into a page; a value of a partial folded */
    double router_logit, choose, gate_update;       /* of routed depth: a value; a token; a value */
    double conv1d;                                  /* a channel of a token */
    double scan, scan_channel, scan_load;           /* a state of a channel of a token; a channel of one; a state */
    double rg_lru;                                  /* a channel of a token */
} fc_ns = {
    .flop = 0.01,
    .weight_byte = 0.04,
    .plain_byte = 0.05,
    .convert = 0.2,
    .convert_normed = 0.4,
    .row = 20,
    .rms_norm = 0.15,
    .layer_norm = 0.2,
    .norm_residual = 0.3,
    .softmax = 0.5,
    .rope = 0.2,
    .rope_token = 10,
    .add_scaled = 0.2,
    .activation = {[FC_RELU] = 0.15, [FC_SILU] = 0.4, [FC_GELU] = 0.9, [FC_GELU_TANH] = 0.5},
    .merge = 0.3,
    .merge_row = 40,
    .lookup = 0.3,
    .lookup_packed = 2,
    .lookup_row = 50,
    .pack = 4,
    .pack_panel = 50,
    .search = 1000,
    .append = 0.5,
    .read = 1.5,
    .score_flop = 1.0 / 80,
    .page_byte = 1.0 / 20,
    .query_block = 200,
    .page_value = 0.4,
    .fold = 0.1,
    .router_logit = 0.1,
    .choose = 6,
    .gate_update = 0.2,
    .conv1d = 0.3,
    .scan = 0.3,
    .scan_channel = 2,
    .scan_load = 0.5,
    .rg_lru = 1.5,
};

/* Inputs of more bytes come from beyond the second cache: then the next row is prefetched. */
ptrdiff_t fc_beyond_l2(void);

/* A result of so many bytes or more is kept by no cache until it is read: then it is written past them, and its lines
 * need not be read first. Half of the last cache, the other half being full of what it was made from; 16 MB at most: a
 * larger cache is shared. */
ptrdiff_t fc_stream_from(void);

#endif

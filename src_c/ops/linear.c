/* out = x W + bias + residual, and the gated pair f(x W1 + b1) * (x W2 + b2), over tiles of 64 columns.
 *
 * A tile's columns of W stay in L2 while blocks of rows pass under them; float32 accumulators live in a thread's
 * scratch [rows][64] between blocks of k, so every output is one chain over k whatever M, the threads or the
 * blocks are. W that is not packed becomes panels on the fly; with few rows its plain rows are streamed instead.
 * With bfloat16 weights x is rounded to bfloat16, on every ISA and for every M. */
#include <stdint.h>

#include "rows.h"

enum {
    TILE_PANELS = 4,     /* 64 columns */
    TILE_BYTES = 256,    /* a row of accumulators */
    ROWS_A_BLOCK = 384,  /* accumulators of a block: 96 KiB of L2 */
    PACKED_BYTES = 1 << 19, /* of W under a block of rows: half of a 1 MiB L2 */
    LOOSE_K = 512,       /* k packed on the fly at once: 128 KiB */
    STREAM_ROWS = 4,     /* up to here plain rows of W are streamed, */
    STREAM_COLUMNS = 1024, /* this many columns */
    STREAM_K = 64        /* and this many k at a time: 256 KiB */
};

struct linear {
    const fc_linear_args *a;
    const char *x; /* (M, K) float32, or bfloat16 with K rounded up to even; ldx bytes */
    ptrdiff_t ldx, x_size, k;
    ptrdiff_t panels, tiles, block_rows, blocks, kc;
    size_t loose_bytes;
    fc_scratch scratch; /* a thread: loose panels, then accumulators */
    void (*gated)(void *, const float *, const float *, const float *, ptrdiff_t);
};

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static ptrdiff_t size_of(fc_dtype type) { return type == FC_F32 ? 4 : 2; }

/* ---- x as the kernel eats it ---- */

struct convert_x {
    const fc_linear_args *a;
    char *to;
    ptrdiff_t ld, k;
};

static void convert_rows(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct convert_x *c = ctx;
    fc_cursor at;
    (void)rank;
    fc_cursor_at(&at, c->a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&at)) {
        const char *row = (const char *)c->a->x + at.at[1];
        if (c->a->layout == FC_PACKED_BF16) {
            uint16_t *to = (uint16_t *)(void *)(c->to + i * c->ld);
            fc_k->to_bf16[c->a->type](to, row, c->a->k);
            if (c->k > c->a->k) to[c->a->k] = 0;
        } else {
            fc_k->to_f32[c->a->type]((float *)(void *)(c->to + i * c->ld), row, c->a->k, 1.0f);
        }
    }
}

/* Uses x where it lies if it has the right type, whole pairs and one stride; else copies it into `copy`. */
static fc_status prepare_x(struct linear *l, fc_scratch *copy) {
    const fc_linear_args *a = l->a;
    const fc_dtype eaten = a->layout == FC_PACKED_BF16 ? FC_BF16 : FC_F32;
    copy->block = NULL;
    l->x_size = size_of(eaten);
    l->k = eaten == FC_BF16 ? (a->k + 1) / 2 * 2 : a->k;
    if (a->type == eaten && l->k == a->k && a->rows->ndim <= 1) {
        l->x = a->x;
        l->ldx = a->rows->ndim ? a->rows->stride[1][0] : 0;
        return FC_OK;
    }
    if (fc_scratch_alloc(copy, 1, (size_t)(a->m * l->k * l->x_size))) return FC_NO_MEMORY;
    l->x = copy->base;
    l->ldx = l->k * l->x_size;
    struct convert_x c = {a, copy->base, l->ldx, l->k};
    double ns = (double)a->k * 0.2 + 20;
    return fc_static(fc_threads_for(a->m, ns), a->m, ns, convert_rows, &c);
}

/* ---- one tile: up to 64 columns under a block of rows ---- */

/* Panels [first, first + count) of k rows k0..k0+kc from W as it lies. */
static void pack_loose(const struct linear *l, float *to, ptrdiff_t first, ptrdiff_t count, ptrdiff_t k0, ptrdiff_t kc) {
    const fc_linear_args *a = l->a;
    const ptrdiff_t size = size_of(a->weight_type);
    for (ptrdiff_t p = 0; p < count; p++, to += kc * 16) {
        ptrdiff_t column = (first + p) * 16, n = smaller(16, a->n - column);
        const char *w = a->weight;
        if (a->layout == FC_ROWS) fc_k->panel_rows[a->weight_type](to, w + k0 * a->ldw + column * size, a->ldw, kc, n);
        else fc_k->panel_cols[a->weight_type](to, w + column * a->ldw + k0 * size, a->ldw, kc, n);
    }
}

static void multiply(const struct linear *l, float *acc, float *loose, ptrdiff_t panel, ptrdiff_t panels, ptrdiff_t row,
                     ptrdiff_t rows) {
    const fc_linear_args *a = l->a;
    for (ptrdiff_t k0 = 0; k0 < l->k || k0 == 0; k0 += l->kc) {
        ptrdiff_t kc = smaller(l->kc, l->k - k0);
        const char *x = l->x + row * l->ldx + k0 * l->x_size;
        if (a->layout == FC_PACKED_BF16) {
            const uint16_t *w = (const uint16_t *)a->weight + panel * l->k * 16 + k0 * 16;
            fc_k->gemm_bf16(acc, TILE_BYTES, (const void *)x, l->ldx, w, l->k * 16, 32, rows, panels, kc, k0 > 0);
        } else if (a->layout == FC_PACKED_F32) {
            const float *w = (const float *)a->weight + panel * l->k * 16 + k0 * 16;
            fc_k->gemm_f32(acc, TILE_BYTES, (const void *)x, l->ldx, w, l->k * 16, 16, rows, panels, kc, k0 > 0);
        } else {
            pack_loose(l, loose, panel, panels, k0, kc);
            fc_k->gemm_f32(acc, TILE_BYTES, (const void *)x, l->ldx, loose, kc * 16, 16, rows, panels, kc, k0 > 0);
        }
    }
}

static void store(const struct linear *l, const float *acc, ptrdiff_t column, ptrdiff_t columns, ptrdiff_t row,
                  ptrdiff_t rows) {
    const fc_linear_args *a = l->a;
    const ptrdiff_t skip = column * size_of(a->type);
    const float *bias = a->bias ? a->bias + column : NULL;
    fc_cursor at;
    fc_cursor_at(&at, a->rows, row);
    for (ptrdiff_t i = 0; i < rows; i++, fc_cursor_next(&at), acc += TILE_BYTES / 4) {
        char *out = (char *)a->out + at.at[0] + skip;
        if (a->gated) l->gated(out, acc, bias, bias ? bias + a->n : NULL, columns);
        else fc_k->linear_store[a->type](out, acc, bias, a->residual ? (const char *)a->residual + at.at[2] + skip : NULL,
                                         columns);
    }
}

static void tile_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *l = ctx;
    float *loose = fc_scratch_of(&l->scratch, rank), *acc = (float *)(void *)((char *)loose + l->loose_bytes);
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t panel = i / l->blocks * TILE_PANELS, panels = smaller(TILE_PANELS, l->panels - panel);
        ptrdiff_t row = i % l->blocks * l->block_rows, rows = smaller(l->block_rows, l->a->m - row);
        ptrdiff_t column = panel * (l->a->gated ? 8 : 16), columns = panels * (l->a->gated ? 8 : 16);
        multiply(l, acc, loose, panel, panels, row, rows);
        store(l, acc, column, smaller(columns, l->a->n - column), row, rows);
    }
}

static double item_ns(const struct linear *l) {
    double flops = 2.0 * (double)l->block_rows * (double)l->k * 64, bytes = (double)l->k * 64 * (double)l->x_size;
    return flops / 100 > bytes / 25 ? flops / 100 : bytes / 25;
}

static fc_status by_tiles(struct linear *l) {
    const fc_linear_args *a = l->a;
    const int packed = a->layout == FC_PACKED_F32 || a->layout == FC_PACKED_BF16;
    l->panels = a->gated ? (a->n + 15) / 16 * 2 : (a->n + 15) / 16;
    l->tiles = (l->panels + TILE_PANELS - 1) / TILE_PANELS;
    l->kc = packed ? PACKED_BYTES / 64 / l->x_size : LOOSE_K;
    l->loose_bytes = packed ? 0 : (size_t)LOOSE_K * 64 * 4;
    l->block_rows = smaller(a->m, ROWS_A_BLOCK);
    l->blocks = 1;
    int threads = fc_threads_for(l->tiles * a->m, item_ns(l) / (double)l->block_rows);
    while (l->block_rows > 48 && l->tiles * ((a->m + l->block_rows - 1) / l->block_rows) < 4 * threads)
        l->block_rows = (l->block_rows / 2 + 5) / 6 * 6;
    l->blocks = (a->m + l->block_rows - 1) / l->block_rows;
    ptrdiff_t items = l->tiles * l->blocks;
    if (threads > items) threads = (int)items;
    if (fc_scratch_alloc(&l->scratch, threads, l->loose_bytes + (size_t)(l->block_rows * TILE_BYTES))) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, item_ns(l), tile_body, l);
    fc_scratch_free(&l->scratch);
    return status;
}

/* ---- few rows against plain rows of W ---- */

static void stream_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *l = ctx;
    const fc_linear_args *a = l->a;
    const ptrdiff_t size = size_of(a->type), w_size = size_of(a->weight_type), width = l->block_rows;
    float *acc = fc_scratch_of(&l->scratch, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t column = i * width, n = smaller(width, a->n - column);
        for (ptrdiff_t j = 0; j < a->m * width; j++) acc[j] = 0.0f;
        for (ptrdiff_t k0 = 0; k0 < a->k; k0 += STREAM_K)
            for (ptrdiff_t row = 0; row < a->m; row++)
                fc_k->gemv_rows[a->weight_type](acc + row * width, (const float *)(const void *)(l->x + row * l->ldx) + k0,
                                                (const char *)a->weight + k0 * a->ldw + column * w_size, a->ldw,
                                                smaller(STREAM_K, a->k - k0), n);
        fc_cursor at;
        fc_cursor_at(&at, a->rows, 0);
        for (ptrdiff_t row = 0; row < a->m; row++, fc_cursor_next(&at))
            fc_k->linear_store[a->type]((char *)a->out + at.at[0] + column * size, acc + row * width,
                                        a->bias ? a->bias + column : NULL,
                                        a->residual ? (const char *)a->residual + at.at[2] + column * size : NULL, n);
    }
}

static fc_status by_streams(struct linear *l) {
    const fc_linear_args *a = l->a;
    const double ns = (double)(a->k * size_of(a->weight_type) * 64) / 20;
    int threads = fc_threads_for((a->n + 63) / 64, ns);
    l->block_rows = smaller(STREAM_COLUMNS, ((a->n + threads - 1) / threads + 63) / 64 * 64);
    ptrdiff_t items = (a->n + l->block_rows - 1) / l->block_rows;
    if (fc_scratch_alloc(&l->scratch, threads, (size_t)(a->m * l->block_rows * 4))) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns * (double)(l->block_rows / 64), stream_body, l);
    fc_scratch_free(&l->scratch);
    return status;
}

fc_status fc_linear(const fc_linear_args *args) {
    struct linear l = {.a = args};
    fc_scratch copy;
    void (*const gated[FC_ACTIVATIONS])(void *, const float *, const float *, const float *, ptrdiff_t) = {
        [FC_RELU] = fc_k->gated_store_relu[args->type],
        [FC_SILU] = fc_k->gated_store_silu[args->type],
        [FC_GELU] = fc_k->gated_store_gelu[args->type],
        [FC_GELU_TANH] = fc_k->gated_store_gelu_tanh[args->type],
    };
    if (args->m == 0 || args->n == 0) return FC_OK;
    l.gated = gated[args->activation];
    fc_status status = prepare_x(&l, &copy);
    if (status == FC_OK) status = args->layout == FC_ROWS && args->m <= STREAM_ROWS ? by_streams(&l) : by_tiles(&l);
    fc_scratch_free(&copy);
    return status;
}

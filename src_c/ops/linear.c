/* out = out_scale (x W + bias) + residual, and the gated pair f(x W_gate + b_gate) * (x W_up + b_up), over tiles of columns.
 *
 * A block of rows of x stays in L2 while the tile's panels of W pass over it; float32 accumulators live in a thread's
 * scratch [rows][columns] between blocks of k, so every output is one chain over k (or over groups of k) whatever M, the
 * threads or the blocks are. W that is not packed becomes panels on the fly; with few rows its plain rows are streamed
 * instead. Each format multiplies one type of x, the same for every M: float32; bfloat16; int8, one scale a row. */
#include <stdint.h>
#include <string.h>

#include "rows.h"

enum {
    FINER = 64,                 /* parts of a tile that count when threads are chosen: tiles can still be cut */
    STREAM_UNIT = 4 * FC_PANEL, /* columns of streamed W, whole lines of it */
};

/* ---- what a layout asks for ---- */

enum a_type { A_F32, A_BF16, A_ROUNDED, A_QUANTIZED }; /* A_ROUNDED: float32 with bfloat16 values */

struct product {
    const struct fc_format *format;
    void (*gemm)(const struct fc_gemm *);
    enum a_type a_type;
    ptrdiff_t x_size;               /* bytes of a value of x */
    ptrdiff_t block_k, block_bytes; /* W comes in whole blocks of so many k */
    ptrdiff_t group_k, group_lines; /* integer formats: a group, and its lines without the scales */
};

static struct product product_of(const struct fc_kernels *kernels, const fc_linear_args *a) {
    void (*const gemm[FC_LAYOUTS])(const struct fc_gemm *) = {
        [FC_PACKED_F32] = kernels->gemm_f32,
        [FC_PACKED_BF16] = kernels->gemm_bf16,
        [FC_PACKED_I8] = kernels->gemm_i8,
        [FC_PACKED_I4_SYMMETRIC] = kernels->gemm_i4_symmetric,
        [FC_PACKED_I4_AFFINE] = kernels->gemm_i4_affine,
        [FC_ROWS] = kernels->gemm_f32,
        [FC_COLS] = kernels->gemm_f32,
    };
    const struct fc_format *format = &fc_formats[a->layout];
    struct product f = {.format = format, .gemm = gemm[a->layout], .a_type = A_F32, .x_size = 4};
    f.block_k = fc_block_rows(format, a->group);
    f.block_bytes = fc_block_bytes(format, a->group);
    f.group_k = fc_group_rows(format, a->group);
    f.group_lines = f.group_k / format->k_step;
    if (format->a_type == FC_A_BF16) {
        f.a_type = kernels->bf16_x == FC_BF16 ? A_BF16 : A_ROUNDED;
        f.x_size = fc_size_of(kernels->bf16_x);
    } else if (format->a_type == FC_A_I8) {
        f.a_type = A_QUANTIZED;
        f.x_size = format->bits == 8 ? kernels->i8_x : kernels->i4_x;
    }
    return f;
}

struct linear {
    const fc_linear_args *a;
    const struct fc_kernels *kernels;
    const struct fc_blocks *sizes;
    struct product product;
    const char *x; /* (k / kc, M, kc) of a_type: x_block bytes a block, ldx a row */
    ptrdiff_t ldx, x_block, k; /* k: K in whole blocks of W */
    const char *sums; /* A_QUANTIZED: (M, groups) of 4 bytes */
    const float *scales; /* A_QUANTIZED: (M); else NULL */
    ptrdiff_t groups;
    ptrdiff_t panel_columns; /* of the result, a panel of W: half of FC_PANEL if gated */
    ptrdiff_t panels, tile_panels, tiles, block_rows, blocks, item_blocks, kc;
    size_t unpacked_bytes;
    fc_scratch normed; /* a thread: one row of x after its norm */
    fc_scratch scratch; /* a thread: unpacked panels, then accumulators */
    void (*gated)(void *, const float *, float, const float *, const float *, ptrdiff_t);
};

/* ---- x as the kernel eats it ---- */

/* Row i, k0 .. k0 + kc - 1 of it, to where the kernel looks for it; zeros from K on. */
static void convert_piece(const struct linear *l, const char *row, ptrdiff_t i, ptrdiff_t k0, float inverse) {
    const fc_linear_args *a = l->a;
    const ptrdiff_t padded = fc_smaller(l->kc, l->k - k0), n = fc_smaller(padded, a->k - k0);
    const char *from = row + k0 * fc_size_of(a->type);
    void *to = (void *)(l->x + k0 / l->kc * l->x_block + i * l->ldx);
    switch (l->product.a_type) {
    case A_F32: l->kernels->to_f32[a->type](to, from, n, 1.0f); break;
    case A_BF16: l->kernels->to_bf16[a->type](to, from, n); break;
    case A_ROUNDED: l->kernels->round_bf16[a->type](to, from, n); break;
    case A_QUANTIZED:
        l->kernels->quantize[a->type](to, (char *)l->sums + (i * l->groups + k0 / l->product.group_k) * 4, from, inverse, n,
                                      padded, l->product.group_k, l->product.x_size == 2, l->product.format->zero);
        return;
    }
    if (n < padded) memset((char *)to + n * l->product.x_size, 0, (size_t)((padded - n) * l->product.x_size));
}

static void convert_rows(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *l = ctx;
    const fc_linear_args *a = l->a;
    fc_cursor at;
    float inverse = 0.0f;
    fc_cursor_at(&at, a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&at)) {
        const char *row = (const char *)a->x + at.at[1];
        if (a->norm) {
            char *normed = fc_scratch_of(&l->normed, rank);
            l->kernels->rms_norm[a->type](normed, NULL, row, NULL, a->norm, a->k, a->norm_eps, a->norm_offset, NULL,
                                          NULL);
            row = normed;
        }
        if (l->product.a_type == A_QUANTIZED)
            l->kernels->quantize_scale[a->type]((float *)l->scales + i, &inverse, row, a->k, 127.0f);
        for (ptrdiff_t k0 = 0; k0 < l->k; k0 += l->kc) convert_piece(l, row, i, k0, inverse);
    }
}

/* Whether x as it came has the right type. */
static int lies_ready(const struct linear *l) {
    const fc_linear_args *a = l->a;
    const int same = (l->product.a_type == A_F32 && a->type == FC_F32) || (l->product.a_type == A_BF16 && a->type == FC_BF16);
    return same && !a->norm && l->k == a->k && a->rows->ndim <= 1 && !a->rows->index[1];
}

/* k of a block: those of unpacked W that become panels; for one tile of rows, all; else as many as a panel's share of
 * the caches holds. */
static ptrdiff_t k_at_once(const struct linear *l) {
    const ptrdiff_t block = l->product.block_bytes;
    if (!l->product.format->packed) return l->sizes->unpacked_k;
    if (l->a->m <= l->sizes->tile_rows) return l->k ? l->k : 1;
    return (l->sizes->panel_bytes + block - 1) / block * l->product.block_k;
}

/* Few rows of float32 or bfloat16, not to be normalised, may already have the right type; else x is copied into `copy`,
 * block of k after block of k: rows far apart, and the more so by a power of two, would leave most of L2 unused. */
static fc_status prepare_x(struct linear *l, fc_scratch *copy) {
    const fc_linear_args *a = l->a;
    l->k = fc_round_up(a->k, l->product.block_k);
    l->kc = k_at_once(l);
    if (a->m <= l->sizes->rows_in_place && lies_ready(l)) {
        l->x = a->x;
        l->ldx = a->rows->ndim ? a->rows->stride[1][0] : 0;
        l->x_block = l->kc * l->product.x_size;
        return FC_OK;
    }
    l->ldx = fc_smaller(l->kc, l->k) * l->product.x_size;
    l->x_block = a->m * l->ldx;
    l->groups = l->product.a_type == A_QUANTIZED ? l->k / l->product.group_k : 0;
    size_t values = (size_t)(l->x_block * ((l->k + l->kc - 1) / l->kc)), sums = (size_t)(a->m * l->groups) * 4;
    const size_t scales = l->product.a_type == A_QUANTIZED ? (size_t)a->m * 4 : 0;
    if (fc_scratch_alloc(a->workspace, copy, 1, values + sums + scales)) return FC_NO_MEMORY;
    l->x = copy->base;
    l->sums = copy->base + values;
    l->scales = scales ? (float *)(void *)(copy->base + values + sums) : NULL;
    const double ns = (double)a->k * (a->norm ? fc_ns.convert_normed : fc_ns.convert) + fc_ns.row;
    const int threads = fc_threads_for(a->m, ns);
    if (a->norm && fc_scratch_alloc(a->workspace, &l->normed, threads, (size_t)(a->k * fc_size_of(a->type))))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, a->m, ns, convert_rows, l);
    fc_scratch_free(&l->normed);
    return status;
}

/* ---- one tile: its columns and a block of rows ---- */

/* Panels [first, first + count) of k rows k0..k0+kc from W as it lies. */
static void pack_unpacked(const struct linear *l, float *to, ptrdiff_t first, ptrdiff_t count, ptrdiff_t k0,
                       ptrdiff_t kc) {
    const fc_linear_args *a = l->a;
    const ptrdiff_t size = fc_size_of(a->weight_type);
    for (ptrdiff_t p = 0; p < count; p++, to += kc * FC_PANEL) {
        ptrdiff_t column = (first + p) * FC_PANEL, n = fc_smaller(FC_PANEL, a->n - column);
        const char *w = a->weight;
        if (a->layout == FC_ROWS)
            l->kernels->panel_rows[a->weight_type](to, w + k0 * a->ldw + column * size, a->ldw, kc, n);
        else l->kernels->panel_cols[a->weight_type](to, w + column * a->ldw + k0 * size, a->ldw, kc, n);
    }
}

static void multiply(const struct linear *l, float *acc, float *unpacked, ptrdiff_t panel, ptrdiff_t panels, ptrdiff_t row,
                     ptrdiff_t rows) {
    const struct product *f = &l->product;
    const ptrdiff_t panel_bytes = l->k / f->block_k * f->block_bytes;
    struct fc_gemm g = {.c = acc, .ldc = l->tile_panels * FC_PANEL * 4, .ldx = l->ldx, .ldsums = l->groups,
                        .panel_stride = panel_bytes, .m = rows, .panels = panels};
    for (ptrdiff_t k0 = 0; k0 < l->k || k0 == 0; k0 += l->kc) {
        ptrdiff_t kc = fc_smaller(l->kc, l->k - k0);
        g.x = l->x + k0 / l->kc * l->x_block + row * l->ldx;
        g.w = (const char *)l->a->weight + panel * panel_bytes + k0 / f->block_k * f->block_bytes;
        g.blocks = kc / f->block_k;
        g.lines = f->a_type == A_QUANTIZED ? f->group_lines : g.blocks;
        if (l->groups) g.sums = l->sums + (row * l->groups + k0 / f->group_k) * 4;
        if (l->unpacked_bytes) {
            pack_unpacked(l, unpacked, panel, panels, k0, kc);
            g.w = unpacked;
            g.panel_stride = kc * FC_PANEL * 4;
        }
        f->gemm(&g);
        g.accumulate = 1;
    }
}

/* Rows of accumulators, ld floats apart, to columns of out. */
static void store(const struct linear *l, const float *acc, ptrdiff_t ld, ptrdiff_t column, ptrdiff_t columns,
                  ptrdiff_t row, ptrdiff_t rows) {
    const fc_linear_args *a = l->a;
    const ptrdiff_t skip = column * fc_size_of(a->type);
    const float *bias = a->bias ? a->bias + column : NULL;
    fc_cursor at;
    fc_cursor_at(&at, a->rows, row);
    for (ptrdiff_t i = row; i < row + rows; i++, fc_cursor_next(&at), acc += ld) {
        char *out = (char *)a->out + at.at[0] + skip;
        const char *residual = a->residual ? (const char *)a->residual + at.at[2] + skip : NULL;
        const float scale = l->scales ? l->scales[i] : 1.0f, out_scale = a->out_scale ? a->out_scale[i] : 1.0f;
        if (a->gated) l->gated(out, acc, scale, bias, bias ? bias + a->n : NULL, columns);
        else l->kernels->linear_store[a->type](out, acc, scale, bias, out_scale, residual, columns);
    }
}

static void multiply_tiles(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *l = ctx;
    float *unpacked = fc_scratch_of(&l->scratch, rank), *acc = (float *)(void *)((char *)unpacked + l->unpacked_bytes);
    for (ptrdiff_t i = begin * l->item_blocks; i < end * l->item_blocks; i++) {
        ptrdiff_t panel = i / l->blocks * l->tile_panels, panels = fc_smaller(l->tile_panels, l->panels - panel);
        ptrdiff_t row = i % l->blocks * l->block_rows, rows = fc_smaller(l->block_rows, l->a->m - row);
        ptrdiff_t column = panel * l->panel_columns, columns = fc_smaller(panels * l->panel_columns, l->a->n - column);
        multiply(l, acc, unpacked, panel, panels, row, rows);
        store(l, acc, l->tile_panels * FC_PANEL, column, columns, row, rows);
    }
}

static double item_ns(const struct linear *l) {
    const double columns = (double)(l->tile_panels * FC_PANEL);
    const double flops = 2.0 * (double)(l->block_rows * l->item_blocks) * (double)l->k * columns;
    const double bytes = (double)(l->k / l->product.block_k * l->product.block_bytes * l->tile_panels);
    const double compute = flops * fc_ns.flop, memory = bytes * fc_ns.weight_byte;
    return compute > memory ? compute : memory;
}

/* Rows of x whose values and accumulators fill half of L2: panels of W pass over them. */
static ptrdiff_t rows_in_l2(const struct linear *l) {
    const ptrdiff_t x = fc_smaller(l->kc, l->k) * l->product.x_size, sums = l->sizes->many_panels * FC_PANEL * 4;
    const ptrdiff_t fit = fc_cache_bytes(FC_CACHE_L2) / 2 / (x + sums), tile = l->sizes->tile_rows;
    return fit >= l->sizes->rows ? l->sizes->rows : fit > tile ? fit / tile * tile : tile;
}

/* Tiles and blocks of rows, smaller ones where the threads would not have four items each. An item is a block of a tile,
 * or, where a row of out may be named twice, all of them in their order. */
static void cut(struct linear *l, int threads) {
    const ptrdiff_t m = l->a->m, wanted = 4 * (ptrdiff_t)threads;
    const int in_order = l->a->rows->index[0] != NULL;
    l->tile_panels = m > l->sizes->many_rows ? l->sizes->many_panels : l->sizes->few_panels;
    l->block_rows = fc_smaller(m, rows_in_l2(l));
    for (;;) {
        l->tiles = (l->panels + l->tile_panels - 1) / l->tile_panels;
        l->blocks = (m + l->block_rows - 1) / l->block_rows;
        l->item_blocks = in_order ? l->blocks : 1;
        if (l->tiles * l->blocks / l->item_blocks >= wanted) return;
        if (l->tile_panels > l->sizes->few_panels) l->tile_panels /= 2;
        else if (l->block_rows > l->sizes->many_rows && !in_order)
            l->block_rows = fc_round_up(l->block_rows / 2, l->sizes->tile_rows);
        else return;
    }
}

static fc_status by_tiles(struct linear *l) {
    const fc_linear_args *a = l->a;
    const int sides = a->gated ? 2 : 1;
    l->panel_columns = FC_PANEL / sides;
    l->panels = fc_round_up(a->n, FC_PANEL) / FC_PANEL * sides;
    l->unpacked_bytes = l->product.format->packed ? 0 : (size_t)(l->sizes->unpacked_k * l->sizes->many_panels * FC_PANEL * 4);
    cut(l, 1);
    int threads = fc_threads_for(l->tiles * l->blocks / l->item_blocks * FINER, item_ns(l) / FINER);
    cut(l, threads);
    const ptrdiff_t items = l->tiles * l->blocks / l->item_blocks;
    if (threads > items) threads = (int)items;
    const size_t sums = (size_t)(l->block_rows * l->tile_panels * FC_PANEL * 4);
    if (fc_scratch_alloc(a->workspace, &l->scratch, threads, l->unpacked_bytes + sums)) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, item_ns(l), multiply_tiles, l);
    fc_scratch_free(&l->scratch);
    return status;
}

/* ---- few rows against plain rows of W ---- */

/* Few rows: copied or not, stream_k values from a multiple of it on lie side by side. */
static const float *stream_x(const struct linear *l, ptrdiff_t row, ptrdiff_t k0) {
    return (const float *)(const void *)(l->x + k0 / l->kc * l->x_block + row * l->ldx) + k0 % l->kc;
}

static void multiply_streams(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *l = ctx;
    const fc_linear_args *a = l->a;
    const ptrdiff_t w_size = fc_size_of(a->weight_type), width = l->block_rows;
    float *acc = fc_scratch_of(&l->scratch, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t column = i * width, n = fc_smaller(width, a->n - column);
        for (ptrdiff_t j = 0; j < a->m * width; j++) acc[j] = 0.0f;
        for (ptrdiff_t k0 = 0; k0 < a->k; k0 += l->sizes->stream_k)
            for (ptrdiff_t row = 0; row < a->m; row++)
                l->kernels->gemv_rows[a->weight_type](acc + row * width, stream_x(l, row, k0),
                                                (const char *)a->weight + k0 * a->ldw + column * w_size, a->ldw,
                                                fc_smaller(l->sizes->stream_k, a->k - k0), n);
        store(l, acc, width, column, n, 0, a->m);
    }
}

static fc_status by_streams(struct linear *l) {
    const fc_linear_args *a = l->a;
    const double ns = (double)(a->k * fc_size_of(a->weight_type) * STREAM_UNIT) * fc_ns.plain_byte;
    int threads = fc_threads_for((a->n + STREAM_UNIT - 1) / STREAM_UNIT, ns);
    l->block_rows = fc_smaller(l->sizes->stream_columns, fc_round_up((a->n + threads - 1) / threads, STREAM_UNIT));
    ptrdiff_t items = (a->n + l->block_rows - 1) / l->block_rows;
    if (fc_scratch_alloc(a->workspace, &l->scratch, threads, (size_t)(a->m * l->block_rows * 4))) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns * (double)(l->block_rows / STREAM_UNIT), multiply_streams, l);
    fc_scratch_free(&l->scratch);
    return status;
}

fc_status fc_linear(const fc_linear_args *args) {
    if (!FC_IS_OURS(args) || !FC_IS_OURS(args->rows)) return FC_BAD_SIZE;
    const struct fc_kernels *kernels = fc_k;
    struct linear l = {.a = args, .kernels = kernels, .sizes = &kernels->blocks};
    fc_scratch copy = {0};
    void (*const gated[FC_ACTIVATIONS])(void *, const float *, float, const float *, const float *, ptrdiff_t) = {
        [FC_RELU] = kernels->gated_store_relu[args->type],
        [FC_SILU] = kernels->gated_store_silu[args->type],
        [FC_GELU] = kernels->gated_store_gelu[args->type],
        [FC_GELU_TANH] = kernels->gated_store_gelu_tanh[args->type],
    };
    if (args->m == 0 || args->n == 0) return FC_OK;
    l.gated = gated[args->activation];
    l.product = product_of(kernels, args);
    fc_status status = prepare_x(&l, &copy);
    const int streamed = args->layout == FC_ROWS && args->m <= l.sizes->stream_rows;
    if (status == FC_OK) status = streamed ? by_streams(&l) : by_tiles(&l);
    fc_scratch_free(&copy);
    return status;
}

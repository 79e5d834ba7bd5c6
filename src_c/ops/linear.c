/* out = out_scale (x W + bias) + residual, and the gated pair f(x W_gate + b_gate) * (x W_up + b_up), over tiles of
 * columns.
 *
 * A block of rows of x stays in L2 while the tile's panels of W pass over it; float32 accumulators live in a thread's
 * scratch [rows][columns] between blocks of k, so every output is one chain over k (or over groups of k) whatever M,
 * the threads or the blocks are. W that is not packed becomes panels on the fly; with few rows its plain rows are
 * streamed instead; formats that expand do so on the fly for more than a few. Each format multiplies one type of x, the
 * same for every M: float32; bfloat16; integers in chunks of k, as the caller wants them rounded. */
#include <stdint.h>
#include <string.h>

#include "cut.h"
#include "rows.h"

enum {
    FINER = 64,                 /* parts of a tile that count when threads are chosen: tiles can still be cut */
    STREAM_UNIT = 4 * FC_PANEL, /* columns of streamed W, whole lines of it */
};

/* ---- what a layout asks for ---- */

enum a_type { A_F32, A_BF16, A_ROUNDED, A_QUANTIZED }; /* A_ROUNDED: float32 with bfloat16 values */

/* k of an exact sum: 255 * 2047 * 2^12 < 2^31 */
enum { LONGEST_CHUNK = 1 << 12 };

struct product {
    const struct fc_format *format;
    void (*gemm)(const struct fc_gemm *);
    void (*expand)(char *out, const char *block, ptrdiff_t blocks); /* of a format that expands */
    enum a_type a_type;
    int int_bytes;                  /* A_QUANTIZED: of an integer of x */
    ptrdiff_t x_k, x_bytes;         /* so many values of x and what belongs to them lie in so many bytes */
    ptrdiff_t block_k, block_bytes; /* W comes in whole blocks of so many k */
    struct fc_rounding rounding;    /* A_QUANTIZED */
    ptrdiff_t chunk_lines;
};

/* Lines of small u are multiplied by bytes of x, where the ISA has such products; 12 bits would be two planes of them,
 * and cost more than int16. */
static void choose_lines(struct product *f, const struct fc_kernels *kernels, const fc_linear_args *args) {
    const int small = args->rounding == FC_ROUND_I8 && f->format->expands != FC_TO_U8;
    f->gemm = !small ? kernels->gemm_u8 : f->format->expands == FC_TO_U4 ? kernels->gemm_u4 : kernels->gemm_u6;
    f->int_bytes = small ? kernels->i4_x : kernels->i8_x;
    if (args->m > kernels->unpacked.unexpanded_rows) return;
    f->gemm = kernels->few[args->layout];
    f->expand = NULL;
}

/* k that share a scale of x and of W, and an integer sum: with 12 bits against 8, as many as may. */
static ptrdiff_t chunk_of(const struct fc_format *format, ptrdiff_t group, fc_rounds rounding) {
    if (rounding == FC_ROUND_I8 || format->bits < 8 || format->expands) return fc_smaller(group, FC_CHUNK);
    if (group <= LONGEST_CHUNK) return group;
    ptrdiff_t chunk = LONGEST_CHUNK;
    while (group % chunk) chunk /= 2;
    return chunk;
}

static struct fc_rounding rounding_of(const struct fc_format *format, const fc_linear_args *args, int x_bytes) {
    const int fine = args->rounding == FC_ROUND_I12;
    struct fc_rounding r = {.group = fc_group_k(format, args->group), .zero = format->zero, .wide = x_bytes == 2,
                            .qmax = fine ? 2047.0f : 127.0f};
    r.chunk = chunk_of(format, r.group, args->rounding);
    r.planes = fine && !r.wide ? 2 : 1;
    return r;
}

static struct product product_of(const struct fc_kernels *kernels, const fc_linear_args *args) {
    void (*const gemm[FC_LAYOUTS])(const struct fc_gemm *) = {
        [FC_PACKED_F32] = kernels->gemm_f32,
        [FC_PACKED_BF16] = kernels->gemm_bf16,
        [FC_PACKED_I8] = kernels->gemm_u8,
        [FC_PACKED_I4_SYMMETRIC] = kernels->gemm_i4_symmetric,
        [FC_PACKED_I4_AFFINE] = kernels->gemm_i4_affine,
        [FC_PACKED_Q4_1] = kernels->gemm_i4_affine,
        [FC_ROWS] = kernels->gemm_f32,
        [FC_COLS] = kernels->gemm_f32,
    };
    const struct fc_format *format = &fc_formats[args->layout];
    struct product f = {.format = format, .gemm = gemm[args->layout], .expand = kernels->expand[args->layout],
                        .a_type = A_F32, .x_k = 1, .x_bytes = 4};
    f.int_bytes = format->bits == 8 ? kernels->i8_x : kernels->i4_x;
    if (format->expands) choose_lines(&f, kernels, args);
    f.block_k = fc_block_k(format, args->group);
    f.block_bytes = fc_block_bytes(format, args->group);
    if (format->a_type == FC_A_BF16) {
        f.a_type = kernels->bf16_x == FC_BF16 ? A_BF16 : A_ROUNDED;
        f.x_bytes = fc_size_of(kernels->bf16_x);
    } else if (format->a_type == FC_A_I8) {
        f.a_type = A_QUANTIZED;
        f.rounding = rounding_of(format, args, f.int_bytes);
        f.x_k = f.rounding.chunk;
        f.x_bytes = fc_chunk_bytes(f.x_k * f.int_bytes * f.rounding.planes, kernels->x_align);
        f.chunk_lines = f.rounding.chunk / (format->expands ? 4 : format->k_step);
    }
    return f;
}

struct linear {
    const fc_linear_args *args;
    const struct fc_kernels *kernels;
    const struct fc_blocks *sizes; /* of what the product's format multiplies */
    const struct fc_unpacked *unpacked;
    struct product product;
    const char *x; /* (k / kc, M, kc) of a_type: x_block bytes a block, ldx a row */
    ptrdiff_t ldx, x_block, k; /* k: K in whole blocks of W */
    ptrdiff_t panel_columns; /* of the result, a panel of W: half of FC_PANEL if gated */
    ptrdiff_t ldc; /* of the accumulators, bytes */
    ptrdiff_t panels, tile_panels, tiles, block_rows, blocks, item_blocks, kc;
    size_t unpacked_bytes; /* a thread's scratch of panels as they are multiplied, of a block of k */
    fc_scratch normed; /* a thread: one row of x after its norm */
    fc_scratch scratch; /* a thread: unpacked panels, then accumulators */
    void (*gated)(void *, const float *, const float *, const float *, ptrdiff_t);
};

/* ---- x as the kernel eats it ---- */

/* Row i, k0 .. k0 + kc - 1 of it, to where the kernel looks for it; zeros from K on. */
static void convert_piece(const struct linear *ctx, const char *row, ptrdiff_t i, ptrdiff_t k0) {
    const fc_linear_args *args = ctx->args;
    const ptrdiff_t padded = fc_smaller(ctx->kc, ctx->k - k0), n = fc_smaller(padded, args->k - k0);
    const char *from = row + k0 * fc_size_of(args->type);
    void *to = (void *)(ctx->x + k0 / ctx->kc * ctx->x_block + i * ctx->ldx);
    switch (ctx->product.a_type) {
    case A_F32: ctx->kernels->to_f32[args->type](to, from, n, 1.0f); break;
    case A_BF16: ctx->kernels->to_bf16[args->type](to, from, n); break;
    case A_ROUNDED: ctx->kernels->round_bf16[args->type](to, from, n); break;
    case A_QUANTIZED:
        ctx->kernels->quantize[args->type](to, from, n, padded, &ctx->product.rounding);
        return;
    }
    if (n < padded) memset((char *)to + n * ctx->product.x_bytes, 0, (size_t)((padded - n) * ctx->product.x_bytes));
}

static void convert_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *ctx = context;
    const fc_linear_args *args = ctx->args;
    fc_cursor at;
    fc_cursor_at(&at, args->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&at)) {
        const char *row = (const char *)args->x + at.at[1];
        if (args->norm) {
            char *normed = fc_scratch_of(&ctx->normed, rank);
            ctx->kernels->rms_norm[args->type](normed, NULL, row, NULL, args->norm, args->k, args->norm_eps,
                                               args->norm_offset, NULL, NULL);
            row = normed;
        }
        for (ptrdiff_t k0 = 0; k0 < ctx->k; k0 += ctx->kc) convert_piece(ctx, row, i, k0);
    }
}

/* Whether x as it came has the right type. */
static int lies_ready(const struct linear *ctx) {
    const fc_linear_args *args = ctx->args;
    const int same = (ctx->product.a_type == A_F32 && args->type == FC_F32) ||
                     (ctx->product.a_type == A_BF16 && args->type == FC_BF16);
    return same && !args->norm && ctx->k == args->k && args->rows->ndim <= 1 && !args->rows->index[1];
}

/* k of a block: those of unpacked W that become panels; for one tile of rows, all; else as many as a panel's share of
 * the caches holds. */
static ptrdiff_t k_at_once(const struct linear *ctx) {
    const ptrdiff_t block = ctx->product.block_bytes;
    if (!ctx->product.format->packed) return ctx->unpacked->k;
    if (ctx->product.expand) return fc_round_up(ctx->unpacked->expanded_k, ctx->product.block_k);
    if (ctx->args->m <= ctx->sizes->pass_rows) return ctx->k ? ctx->k : 1;
    return (ctx->sizes->panel_bytes + block - 1) / block * ctx->product.block_k;
}

/* Rows an odd number of lines apart: those of one tile, and of one block, then lie in different sets of the caches. */
static ptrdiff_t odd_lines(ptrdiff_t bytes) { return fc_round_up(bytes - FC_LINE, 2 * FC_LINE) + FC_LINE; }

/* Plain W may be one of many that are multiplied once, as while a model is packed: nothing is kept for it. */
static int alloc_scratch(const struct linear *ctx, fc_scratch *s, int threads, size_t bytes) {
    fc_workspace *workspace = ctx->args->workspace;
    return ctx->product.format->packed ? fc_scratch_alloc_huge(workspace, s, threads, bytes)
                                       : fc_scratch_alloc(workspace, s, threads, bytes);
}

/* Rows of integers, or of their sums, that a leaf may go through for `rows` of them */
static ptrdiff_t rows_of_tiles(const struct linear *ctx, ptrdiff_t rows) {
    const int whole = ctx->product.a_type == A_QUANTIZED && ctx->args->m > ctx->sizes->pass_rows;
    return whole ? fc_round_up(rows, ctx->sizes->tile_rows) : rows;
}

/* Zeros behind the rows of each block of k, of `bytes` in all */
static void pad_x(const struct linear *ctx, char *x, ptrdiff_t bytes) {
    const ptrdiff_t used = ctx->args->m * ctx->ldx;
    for (char *end = x + bytes; x < end; x += ctx->x_block) memset(x + used, 0, (size_t)(ctx->x_block - used));
}

/* Few rows of float32 or bfloat16, not to be normalised, may already have the right type; else x is copied into `copy`,
 * block of k after block of k: rows far apart, and the more so by a power of two, would leave most of L2 unused. */
static fc_status prepare_x(struct linear *ctx, fc_scratch *copy) {
    const fc_linear_args *args = ctx->args;
    ctx->k = fc_round_up(args->k, ctx->product.block_k);
    ctx->kc = k_at_once(ctx);
    if (args->m <= ctx->sizes->rows_in_place && lies_ready(ctx)) {
        ctx->x = args->x;
        ctx->ldx = args->rows->ndim ? args->rows->stride[1][0] : 0;
        ctx->x_block = ctx->kc * ctx->product.x_bytes;
        return FC_OK;
    }
    ctx->ldx = odd_lines(fc_smaller(ctx->kc, ctx->k) / ctx->product.x_k * ctx->product.x_bytes);
    ctx->x_block = fc_times(rows_of_tiles(ctx, args->m), ctx->ldx);
    const ptrdiff_t values = fc_times(ctx->x_block, (ctx->k + ctx->kc - 1) / ctx->kc);
    if (alloc_scratch(ctx, copy, 1, (size_t)values)) return FC_NO_MEMORY;
    ctx->x = copy->base;
    pad_x(ctx, copy->base, values);
    const double ns = (double)args->k * (args->norm ? fc_ns.convert_normed : fc_ns.convert) + fc_ns.row;
    const int threads = fc_threads_for(args->m, ns);
    if (args->norm &&
        fc_scratch_alloc(args->workspace, &ctx->normed, threads, (size_t)fc_times(args->k, fc_size_of(args->type))))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, args->m, ns, convert_rows, ctx);
    fc_scratch_free(&ctx->normed);
    return status;
}

/* ---- one tile: its columns and a block of rows ---- */

/* Panels [first, first + count) of k rows k0..k0+kc from W as it lies. */
static void pack_unpacked(const struct linear *ctx, float *to, ptrdiff_t first, ptrdiff_t count, ptrdiff_t k0,
                          ptrdiff_t kc) {
    const fc_linear_args *args = ctx->args;
    const ptrdiff_t size = fc_size_of(args->weight_type);
    for (ptrdiff_t p = 0; p < count; p++, to += kc * FC_PANEL) {
        ptrdiff_t column = (first + p) * FC_PANEL, n = fc_smaller(FC_PANEL, args->n - column);
        const char *w = args->weight;
        if (args->layout == FC_ROWS)
            ctx->kernels->panel_rows[args->weight_type](to, w + k0 * args->ldw + column * size, args->ldw, kc, n);
        else ctx->kernels->panel_cols[args->weight_type](to, w + column * args->ldw + k0 * size, args->ldw, kc, n);
    }
}

/* Of a panel, kc rows of it */
static ptrdiff_t expanded_bytes(const struct product *f, ptrdiff_t kc) {
    return kc / f->rounding.group * fc_expanded_bytes(f->format);
}

/* The same panels of a format that expands. */
static void expand_panels(const struct linear *ctx, char *to, const char *w, ptrdiff_t panel_bytes, ptrdiff_t count,
                          ptrdiff_t kc) {
    const struct product *f = &ctx->product;
    const ptrdiff_t stride = expanded_bytes(f, kc);
    for (ptrdiff_t p = 0; p < count; p++) f->expand(to + p * stride, w + p * panel_bytes, kc / f->block_k);
}

/* Row k of a panel of packed W */
static const char *packed_w(const struct linear *ctx, ptrdiff_t panel, ptrdiff_t k) {
    const struct product *f = &ctx->product;
    return (const char *)ctx->args->weight + (panel * ctx->k + k) / f->block_k * f->block_bytes;
}

static void multiply(const struct linear *ctx, float *acc, float *unpacked, ptrdiff_t panel, ptrdiff_t panels,
                     ptrdiff_t row, ptrdiff_t rows) {
    const struct product *f = &ctx->product;
    const struct fc_rounding *r = &f->rounding;
    const ptrdiff_t panel_bytes = ctx->k / f->block_k * f->block_bytes;
    struct fc_gemm g = {.c = acc, .ldc = ctx->ldc, .ldx = ctx->ldx,
                        .panel_stride = panel_bytes, .m = rows, .panels = panels, .planes = r->planes, .wide = r->wide,
                        .minima = f->format->minimum_bytes > 0, .zero = f->format->zero,
                        .group_chunks = r->chunk ? r->group / r->chunk : 0};
    for (ptrdiff_t k0 = 0; k0 < ctx->k || k0 == 0; k0 += ctx->kc) {
        ptrdiff_t kc = fc_smaller(ctx->kc, ctx->k - k0);
        g.x = ctx->x + k0 / ctx->kc * ctx->x_block + row * ctx->ldx;
        g.w = packed_w(ctx, panel, k0);
        g.blocks = kc / f->block_k;
        g.lines = f->a_type == A_QUANTIZED ? f->chunk_lines : g.blocks;
        if (f->expand) {
            expand_panels(ctx, (char *)unpacked, g.w, panel_bytes, panels, kc);
            g.w = unpacked;
            g.panel_stride = expanded_bytes(f, kc);
            g.blocks = kc / r->group;
        } else if (ctx->unpacked_bytes) {
            pack_unpacked(ctx, unpacked, panel, panels, k0, kc);
            g.w = unpacked;
            g.panel_stride = kc * FC_PANEL * 4;
        } else {
            /* the next k, then the same panels under the next rows, then those beside them; never what is not there,
             * where each prefetch would search the page tables in vain */
            const ptrdiff_t next = row + rows < ctx->args->m ? panel : (panel + panels) % ctx->panels;
            g.next_w = k0 + kc < ctx->k ? packed_w(ctx, panel, k0 + kc) : packed_w(ctx, next, 0);
        }
        f->gemm(&g);
        g.accumulate = 1;
    }
}

/* Rows of accumulators, ld floats apart, to columns of out. */
static void store(const struct linear *ctx, const float *acc, ptrdiff_t ld, ptrdiff_t column, ptrdiff_t columns,
                  ptrdiff_t row, ptrdiff_t rows) {
    const fc_linear_args *args = ctx->args;
    const ptrdiff_t skip = column * fc_size_of(args->type);
    const float *bias = args->bias ? args->bias + column : NULL;
    fc_cursor at;
    fc_cursor_at(&at, args->rows, row);
    for (ptrdiff_t i = row; i < row + rows; i++, fc_cursor_next(&at), acc += ld) {
        char *out = (char *)args->out + at.at[0] + skip;
        const char *residual = args->residual ? (const char *)args->residual + at.at[2] + skip : NULL;
        const float out_scale = args->out_scale ? args->out_scale[i] : 1.0f;
        if (args->gated) ctx->gated(out, acc, bias, bias ? bias + args->n : NULL, columns);
        else ctx->kernels->linear_store[args->type](out, acc, bias, out_scale, residual, columns);
    }
}

static void multiply_tiles(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *ctx = context;
    float *unpacked = fc_scratch_of(&ctx->scratch, rank),
          *acc = (float *)(void *)((char *)unpacked + ctx->unpacked_bytes);
    for (ptrdiff_t i = begin * ctx->item_blocks; i < end * ctx->item_blocks; i++) {
        ptrdiff_t panel = i / ctx->blocks * ctx->tile_panels,
                  panels = fc_smaller(ctx->tile_panels, ctx->panels - panel);
        ptrdiff_t row = i % ctx->blocks * ctx->block_rows, rows = fc_smaller(ctx->block_rows, ctx->args->m - row);
        ptrdiff_t column = panel * ctx->panel_columns,
                  columns = fc_smaller(panels * ctx->panel_columns, ctx->args->n - column);
        multiply(ctx, acc, unpacked, panel, panels, row, rows);
        store(ctx, acc, ctx->ldc / 4, column, columns, row, rows);
    }
}

static double item_ns(const struct linear *ctx) {
    const double columns = (double)(ctx->tile_panels * FC_PANEL);
    const double flops = 2.0 * (double)(ctx->block_rows * ctx->item_blocks) * (double)ctx->k * columns;
    const double bytes = (double)(ctx->k / ctx->product.block_k * ctx->product.block_bytes * ctx->tile_panels);
    const double compute = flops * fc_ns.flop, memory = bytes * fc_ns.weight_byte;
    return compute > memory ? compute : memory;
}

/* Rows of x whose values and accumulators fill their part of L2: panels of W pass over them. */
static ptrdiff_t rows_in_l2(const struct linear *ctx) {
    const ptrdiff_t x = fc_smaller(ctx->kc, ctx->k) / ctx->product.x_k * ctx->product.x_bytes,
                    sums = ctx->sizes->many_panels * FC_PANEL * 4;
    const ptrdiff_t bytes = fc_cache_bytes(FC_CACHE_L2) / 4 * ctx->sizes->l2_quarters;
    const ptrdiff_t fit = bytes / (x + sums), tile = ctx->sizes->tile_rows;
    return fit >= ctx->sizes->rows ? ctx->sizes->rows : fit > tile ? fit / tile * tile : tile;
}

static void cut(struct linear *ctx, int threads) {
    const struct fc_cut c = fc_cut_product(ctx->sizes, ctx->args->m, ctx->panels, rows_in_l2(ctx),
                                           ctx->args->rows->index[0] != NULL, threads);
    ctx->tile_panels = c.tile_panels;
    ctx->tiles = c.tiles;
    ctx->block_rows = c.block_rows;
    ctx->blocks = c.blocks;
    ctx->item_blocks = c.item_blocks;
}

static fc_status by_tiles(struct linear *ctx) {
    const fc_linear_args *args = ctx->args;
    const int sides = args->gated ? 2 : 1;
    ctx->panel_columns = FC_PANEL / sides;
    ctx->panels = fc_round_up(args->n, FC_PANEL) / FC_PANEL * sides;
    if (ctx->product.expand)
        ctx->unpacked_bytes = (size_t)(expanded_bytes(&ctx->product, ctx->kc) * ctx->sizes->many_panels);
    else if (!ctx->product.format->packed)
        ctx->unpacked_bytes = (size_t)(ctx->unpacked->k * ctx->sizes->many_panels * FC_PANEL * 4);
    cut(ctx, 1);
    int threads = fc_threads_for(ctx->tiles * ctx->blocks / ctx->item_blocks * FINER, item_ns(ctx) / FINER);
    cut(ctx, threads);
    const ptrdiff_t items = ctx->tiles * ctx->blocks / ctx->item_blocks;
    if (threads > items) threads = (int)items;
    ctx->ldc = odd_lines(ctx->tile_panels * FC_PANEL * 4);
    const size_t sums = (size_t)(rows_of_tiles(ctx, ctx->block_rows) * ctx->ldc);
    if (alloc_scratch(ctx, &ctx->scratch, threads, ctx->unpacked_bytes + sums)) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, item_ns(ctx), multiply_tiles, ctx);
    fc_scratch_free(&ctx->scratch);
    return status;
}

/* ---- few rows against plain rows of W ---- */

/* Few rows: copied or not, stream_k values from a multiple of it on lie side by side. */
static const float *stream_x(const struct linear *ctx, ptrdiff_t row, ptrdiff_t k0) {
    return (const float *)(const void *)(ctx->x + k0 / ctx->kc * ctx->x_block + row * ctx->ldx) + k0 % ctx->kc;
}

static void multiply_streams(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct linear *ctx = context;
    const fc_linear_args *args = ctx->args;
    const ptrdiff_t w_size = fc_size_of(args->weight_type), width = ctx->block_rows;
    float *acc = fc_scratch_of(&ctx->scratch, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t column = i * width, n = fc_smaller(width, args->n - column);
        for (ptrdiff_t j = 0; j < args->m * width; j++) acc[j] = 0.0f;
        for (ptrdiff_t k0 = 0; k0 < args->k; k0 += ctx->unpacked->stream_k)
            for (ptrdiff_t row = 0; row < args->m; row++)
                ctx->kernels->gemv_rows[args->weight_type](
                    acc + row * width, stream_x(ctx, row, k0),
                    (const char *)args->weight + k0 * args->ldw + column * w_size, args->ldw,
                    fc_smaller(ctx->unpacked->stream_k, args->k - k0), n);
        store(ctx, acc, width, column, n, 0, args->m);
    }
}

static fc_status by_streams(struct linear *ctx) {
    const fc_linear_args *args = ctx->args;
    const double ns = (double)(args->k * fc_size_of(args->weight_type) * STREAM_UNIT) * fc_ns.plain_byte;
    int threads = fc_threads_for((args->n + STREAM_UNIT - 1) / STREAM_UNIT, ns);
    ctx->block_rows =
        fc_smaller(ctx->unpacked->stream_columns, fc_round_up((args->n + threads - 1) / threads, STREAM_UNIT));
    ptrdiff_t items = (args->n + ctx->block_rows - 1) / ctx->block_rows;
    if (fc_scratch_alloc(args->workspace, &ctx->scratch, threads, (size_t)(args->m * ctx->block_rows * 4)))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns * (double)(ctx->block_rows / STREAM_UNIT), multiply_streams, ctx);
    fc_scratch_free(&ctx->scratch);
    return status;
}

fc_status fc_linear(const fc_linear_args *args) {
    if (!FC_IS_OURS(args) || !FC_IS_OURS(args->rows)) return FC_BAD_SIZE;
    const struct fc_kernels *kernels = fc_k;
    struct linear ctx = {.args = args, .kernels = kernels, .unpacked = &kernels->unpacked};
    fc_scratch copy = {0};
    void (*const gated[FC_ACTIVATIONS])(void *, const float *, const float *, const float *, ptrdiff_t) = {
        [FC_RELU] = kernels->gated_store_relu[args->type],
        [FC_SILU] = kernels->gated_store_silu[args->type],
        [FC_GELU] = kernels->gated_store_gelu[args->type],
        [FC_GELU_TANH] = kernels->gated_store_gelu_tanh[args->type],
    };
    if (args->m == 0 || args->n == 0) return FC_OK;
    ctx.gated = gated[args->activation];
    ctx.product = product_of(kernels, args);
    ctx.sizes = &kernels->blocks[ctx.product.format->a_type];
    fc_status status = prepare_x(&ctx, &copy);
    const int streamed = args->layout == FC_ROWS && args->m <= ctx.unpacked->stream_rows;
    if (status == FC_OK) status = streamed ? by_streams(&ctx) : by_tiles(&ctx);
    fc_scratch_free(&copy);
    return status;
}

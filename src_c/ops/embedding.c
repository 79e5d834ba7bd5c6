/* Rows of a table by id, scaled, in another dtype where asked: of an array, or columns of a packed matrix. */
#include "rows.h"

struct embedding {
    const struct fc_kernels *k;
    fc_dtype table_type, out_type;
    char *out;
    const char *table;
    const int64_t *ids;
    ptrdiff_t n, ldtable;
    float scale;
};

static void look_up_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct embedding *ctx = context;
    const ptrdiff_t out_size = fc_size_of(ctx->out_type);
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++)
        fc_convert_row(ctx->k, ctx->out_type, ctx->out + i * ctx->n * out_size, ctx->table_type,
                       ctx->table + ctx->ids[i] * ctx->ldtable, ctx->n, ctx->scale);
}

fc_status fc_embedding(fc_dtype table_type, fc_dtype out_type, void *out, const void *table, const int64_t *ids,
                       ptrdiff_t count, ptrdiff_t n, ptrdiff_t ldtable, float scale) {
    struct embedding ctx = {fc_k, table_type, out_type, out, table, ids, n, ldtable, scale};
    double ns = (double)n * fc_ns.lookup + fc_ns.lookup_row;
    return fc_static(fc_threads_for(count, ns), count, ns, look_up_rows, &ctx);
}

/* ---- columns of panels ---- */

enum {
    PIECE = 256,                    /* values at a time, at most */
    MOST_EXPANDED = 16 * 6 * FC_LINE /* bytes of a block after expansion */
};

struct columns {
    struct embedding to; /* table: the panels; n: K */
    const struct fc_format *format;
    struct fc_format lines; /* what is read: the format, or what it expands to */
    ptrdiff_t group;
    void (*expand)(char *out, const char *block, ptrdiff_t blocks); /* or NULL */
};

static float number_at(const struct columns *ctx, const char *at, int bytes) {
    float value;
    if (bytes == 4) memcpy(&value, at, 4);
    else ctx->to.k->to_f32[FC_F16](&value, at, 1, 1.0f);
    return value;
}

/* to[n] = scale (u - zero) + minimum, rows k .. k + n - 1 of a block, all of one group */
static void read_integers(const struct columns *ctx, float *to, const char *block, ptrdiff_t k, ptrdiff_t n,
                          ptrdiff_t column) {
    const struct fc_format *f = &ctx->lines;
    const ptrdiff_t at = k / fc_group_k(f, ctx->group) * FC_PANEL + column;
    const char *scales = block + fc_block_k(f, ctx->group) / f->k_step * FC_LINE,
               *minima = scales + f->block_groups * FC_PANEL * f->scale_bytes;
    const float scale = number_at(ctx, scales + at * f->scale_bytes, f->scale_bytes);
    const float minimum = f->minimum_bytes ? number_at(ctx, minima + at * f->minimum_bytes, f->minimum_bytes) : -0.0f;
    for (ptrdiff_t i = 0; i < n; i++, k++) {
        const unsigned byte = (unsigned char)block[k / f->k_step * FC_LINE + column * 4 + k % 4],
                       u = byte >> k % f->k_step / 4 * f->bits & ((1u << f->bits) - 1);
        to[i] = scale * (float)((int)u - f->zero) + minimum; /* -0 changes no number */
    }
}

static void read_floats(const struct columns *ctx, float *to, const char *panel, ptrdiff_t k, ptrdiff_t n,
                        ptrdiff_t column) {
    const ptrdiff_t step = ctx->lines.k_step, size = 4 / step;
    const fc_dtype type = step == 1 ? FC_F32 : FC_BF16;
    for (ptrdiff_t i = 0; i < n; i++, k++)
        ctx->to.k->to_f32[type](to + i, panel + k / step * FC_LINE + (column * step + k % step) * size, 1, 1.0f);
}

/* Rows of column `column` of a panel, k .. of one group, as they are after scaling */
static void look_up_column(const struct columns *ctx, char *out, const char *panel, ptrdiff_t column) {
    const struct fc_format *f = ctx->format;
    const ptrdiff_t block_k = f->group ? fc_block_k(f, ctx->group) : ctx->to.n, group = fc_group_k(f, ctx->group);
    const ptrdiff_t unit = f->group ? fc_smaller(PIECE, group) : PIECE, size = fc_size_of(ctx->to.out_type);
    char expanded[MOST_EXPANDED];
    float values[PIECE];
    for (ptrdiff_t k0 = 0; k0 < ctx->to.n; k0 += block_k, panel += fc_block_bytes(f, ctx->group)) {
        const ptrdiff_t end = fc_smaller(block_k, ctx->to.n - k0);
        if (ctx->expand) ctx->expand(expanded, panel, 1);
        for (ptrdiff_t k = 0, n; k < end; k += n) {
            n = fc_smaller(fc_smaller(unit, end - k), f->group ? group - k % group : PIECE);
            if (!f->group) read_floats(ctx, values, panel, k, n, column);
            else if (!ctx->expand) read_integers(ctx, values, panel, k, n, column);
            else read_integers(ctx, values, expanded + k / group * fc_expanded_bytes(f), k % group, n, column);
            fc_convert_row(ctx->to.k, ctx->to.out_type, out + (k0 + k) * size, FC_F32, values, n, ctx->to.scale);
        }
    }
}

static void look_up_columns(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct columns *ctx = context;
    const ptrdiff_t row = ctx->to.n * fc_size_of(ctx->to.out_type);
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++)
        look_up_column(ctx, ctx->to.out + i * row, ctx->to.table + ctx->to.ids[i] / FC_PANEL * ctx->to.ldtable,
                       ctx->to.ids[i] % FC_PANEL);
}

fc_status fc_embedding_packed(fc_layout layout, ptrdiff_t group, fc_dtype out_type, void *out, const void *table,
                              const int64_t *ids, ptrdiff_t count, ptrdiff_t k, float scale) {
    const struct fc_format *f = &fc_formats[layout];
    const struct fc_kernels *kernels = fc_k;
    const ptrdiff_t panel = fc_round_up(k, fc_block_k(f, group)) / fc_block_k(f, group) * fc_block_bytes(f, group);
    struct columns ctx = {.to = {kernels, FC_F32, out_type, out, table, ids, k, panel, scale}, .format = f, .lines = *f,
                          .group = group, .expand = kernels->expand[layout]};
    if (f->expands) {
        ctx.lines.bits = 8, ctx.lines.k_step = 4, ctx.lines.block_groups = 1, ctx.lines.expands = FC_AS_IT_IS;
        ctx.lines.scale_bytes = 4, ctx.lines.minimum_bytes = f->minimum_bytes ? 4 : 0;
    }
    const double ns = (double)k * fc_ns.lookup_packed + fc_ns.lookup_row;
    return fc_static(fc_threads_for(count, ns), count, ns, look_up_columns, &ctx);
}

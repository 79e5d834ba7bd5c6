/* One chunk of at most FC_KV_CHUNK keys against one block of queries: their partial (max, sum, o), started fresh.
 * Scores q k^T become weights row by row, and weights V the partial; no thread, no fold and no choice is made here. */
#include <math.h>
#include <string.h>

#include "../rows.h"
#include "attention.h"

enum {
    PREFETCH_QUERIES = 4,
    SCORE_TILES = 4, /* register tiles of rows whose keys are multiplied together, where rows end at different ones */
    LD_SCORES = FC_KV_CHUNK + 16,
};

/* ---- a thread's scratch ---- */

static ptrdiff_t byte_floats(const struct attention *ctx) {
    return ctx->bytes ? fc_round_up(fc_byte_scratch_floats(ctx), 16) : 0;
}
ptrdiff_t fc_attention_rows_in_strips(const struct attention *ctx) { return fc_round_up(ctx->rows, FC_STRIP_ROWS); }
static ptrdiff_t scratch_floats(const struct attention *ctx) {
    const ptrdiff_t row = fc_plus(fc_plus(ctx->d_padded, LD_SCORES + 8), fc_times(2, ctx->e_padded));
    return fc_plus(fc_plus(fc_times(fc_attention_rows_in_strips(ctx), row), FC_KV_CHUNK + 128), byte_floats(ctx));
}
static ptrdiff_t store_bytes(const struct attention *ctx) {
    return ctx->in_place ? 0 : fc_round_up((ptrdiff_t)fc_attention_store_bytes(ctx), 64);
}
size_t fc_attention_scratch_bytes(const struct attention *ctx) {
    const ptrdiff_t page = ctx->own_page ? fc_attention_page_bytes(ctx) : 0;
    return (size_t)fc_plus(fc_plus(fc_times(scratch_floats(ctx), 4), store_bytes(ctx)), page);
}

struct scratch fc_attention_scratch_of(const struct attention *ctx, int rank) {
    struct scratch r;
    char *base = fc_scratch_of(&ctx->scratch, rank);
    r.store = base;
    r.page = base + store_bytes(ctx);
    const ptrdiff_t rows = fc_attention_rows_in_strips(ctx);
    float *p = (float *)(void *)((char *)r.page + (ctx->own_page ? fc_attention_page_bytes(ctx) : 0));
    r.scores = p, p += rows * LD_SCORES;
    r.part = p, p += rows * ctx->e_padded;
    r.o = p, p += rows * ctx->e_padded;
    r.q = (char *)p, p += rows * ctx->d_padded;
    r.bias = p, p += FC_KV_CHUNK;
    r.part_max = p, p += rows;
    r.part_sum = p, p += rows;
    r.q_scale = p, p += rows;
    r.w_scale = p, p += rows;
    r.sees = (ptrdiff_t *)(void *)p, p += rows * 2;
    r.max = p, p += rows;
    r.sum = p, p += rows;
    r.bytes = r.scores + fc_round_up(p - r.scores, 16);
    return r;
}

/* Rows (query, head) of a block. A token's heads lie together and tokens far apart: the next ones are prefetched. */
void fc_attention_load_queries(const struct attention *ctx, const struct where *w, const struct scratch *to) {
    const fc_attention_args *args = ctx->args;
    if (ctx->bytes) {
        fc_byte_load_queries(ctx, w, to);
        return;
    }
    const ptrdiff_t size = ctx->a_type == BF16 ? 2 : 4, pad = (ctx->d_padded - args->head_dim) * size;
    const ptrdiff_t bytes = ctx->group * args->head_dim * fc_size_of(args->q_type);
    char *q = to->q;
    float *scale = to->q_scale;
    const char *block = (const char *)args->q + w->b * args->q_stride[0] + w->q0 * args->q_stride[1] +
                        w->g * ctx->group * args->q_stride[2];
    for (ptrdiff_t i = 0; i < w->queries; i++) {
        const char *from = block + i * args->q_stride[1];
        for (ptrdiff_t at = 0; i + PREFETCH_QUERIES < w->queries && at < bytes; at += 64)
            __builtin_prefetch(from + PREFETCH_QUERIES * args->q_stride[1] + at);
        for (ptrdiff_t r = 0; r < ctx->group; r++, from += args->q_stride[2], q += ctx->d_padded * size, scale++) {
            if (ctx->a_type == BF16) ctx->k->to_bf16[args->q_type]((uint16_t *)(void *)q, from, args->head_dim);
            else ctx->k->to_f32[args->q_type]((float *)(void *)q, from, args->head_dim, args->scale);
            memset(q + args->head_dim * size, 0, (size_t)pad);
            if (ctx->a_type == INT16)
                ctx->k->to_s16((int16_t *)(void *)q, scale, (const float *)(void *)q, ctx->d_padded, ctx->qmax);
        }
    }
}

/* ---- one chunk ---- */

/* Not in place */
static void *page_of(const struct attention *ctx, const struct where *w, const struct scratch *r, ptrdiff_t chunk) {
    const ptrdiff_t pair = w->b * ctx->args->kv_heads + w->g - ctx->first_pair;
    return ctx->own_page ? r->page : ctx->kv.pages[pair * ctx->kv.pages_a_row + chunk - ctx->first_page];
}

static fc_kv_head head_of(const struct attention *ctx, const struct where *w, const struct scratch *r,
                          ptrdiff_t chunk) {
    if (ctx->in_place) return fc_kv_head_of(&ctx->kv, w->b, w->g, chunk);
    return fc_kv_head_at(&ctx->kv, page_of(ctx, w, r, chunk), 0);
}

const float *fc_attention_load_bias(const struct attention *ctx, const struct where *w, ptrdiff_t row, struct chunk c,
                                    float *bias) {
    const fc_attention_args *args = ctx->args;
    const struct fc_range see = see_in(ctx, w, row, c);
    const ptrdiff_t q = w->q0 + row / ctx->group, head = w->g * ctx->group + row % ctx->group;
    const ptrdiff_t key = c.key0 + see.lo, n = see.hi - see.lo;
    const char *mask = (const char *)args->mask + w->b * args->mask_stride[0] + head * args->mask_stride[1] +
                       q * args->mask_stride[2] + key * args->mask_stride[3];
    ptrdiff_t stored = args->mask_stride[3] ? n : 1;
    if (args->mask_is_bool) ctx->k->bias_from_bool(bias, (const uint8_t *)mask, stored);
    else ctx->k->to_f32[args->mask_type](bias, mask, stored, 1.0f);
    for (ptrdiff_t i = stored; i < n; i++) bias[i] = bias[0];
    return bias;
}

/* scores (rows [row, row + rows), keys [lo, hi) and those of their panels) = q k^T */
static void score(const struct attention *ctx, const struct scratch *r, const fc_kv_head *h, ptrdiff_t row,
                  ptrdiff_t rows, ptrdiff_t lo, ptrdiff_t hi) {
    const ptrdiff_t first = lo / 16, last = (hi + 15) / 16, ldq = ctx->d_padded * (ctx->a_type == BF16 ? 2 : 4);
    if (hi <= lo) return;
    ctx->gemm(&(struct fc_gemm){
        .c = r->scores + row * LD_SCORES + first * 16, .ldc = LD_SCORES * 4, .x = r->q + row * ldq, .ldx = ldq,
        .w = h->k + first * h->k_panel, .panel_stride = h->k_panel, .m = rows,
        .panels = last - first, .lines = h->k_lines});
}

/* scores [from, to) of a row -> weights, in the type that values are multiplied by */
static void weights(const struct attention *ctx, const struct scratch *r, const fc_kv_head *h, ptrdiff_t row,
                    ptrdiff_t from, ptrdiff_t to, const float *bias) {
    float *s = r->scores + row * LD_SCORES;
    const struct fc_attention_row one = {
        .s = s + from, .k_scale = h->k_scale ? h->k_scale + from : NULL,
        .v_scale = h->v_scale ? h->v_scale + from : NULL, .bias = bias,
        .scale = ctx->a_type == FLOATS ? 1.0f : ctx->a_type == BF16 ? ctx->args->scale : r->q_scale[row],
        .softcap = ctx->args->softcap, .q = (int16_t *)(void *)s + from, .w_scale = &r->w_scale[row],
        .bf16 = ctx->a_type == BF16 ? (uint16_t *)(void *)s + from : NULL};
    ctx->k->attention_row(&one, to - from, &r->part_max[row], &r->part_sum[row]);
}

static void weights_of_block(const struct attention *ctx, const struct where *w, const struct scratch *r,
                             const fc_kv_head *h, struct chunk c) {
    const fc_attention_args *args = ctx->args;
    const float *bias = NULL;
    for (ptrdiff_t row = 0; row < w->queries * ctx->group; row++) {
        const struct fc_range see = see_in(ctx, w, row, c);
        if (args->mask && (row % ctx->group == 0 || args->mask_stride[1]))
            bias = fc_attention_load_bias(ctx, w, row, c, r->bias);
        weights(ctx, r, h, row, see.lo, see.hi, bias);
    }
}

/* part (rows [row, row + rows)) (+)= weights[:, lo:hi) V[lo:hi), whole lines */
static void weigh_lines(const struct attention *ctx, const struct scratch *r, const fc_kv_head *h, ptrdiff_t row,
                        ptrdiff_t rows, ptrdiff_t lo, ptrdiff_t hi, int accumulate) {
    if (hi <= lo && accumulate) return;
    ctx->gemm(&(struct fc_gemm){
        .c = r->part + row * ctx->e_padded, .ldc = ctx->e_padded * 4,
        .x = (const char *)(r->scores + row * LD_SCORES) + lo * ctx->x_size, .ldx = LD_SCORES * 4,
        .w = h->v + lo / ctx->k_step * h->line, .panel_stride = h->v_panel, .m = rows,
        .panels = ctx->e_padded / 16, .lines = (hi - lo) / ctx->k_step, .accumulate = accumulate,
        .in_cache = rows < ctx->rows});
}

/* part (row) += weights[lo:hi) V[lo:hi) */
static void weigh_partial_lines(const struct attention *ctx, const struct scratch *r, const fc_kv_head *h,
                                ptrdiff_t row, ptrdiff_t lo, ptrdiff_t hi) {
    if (hi > lo)
        ctx->k->pv_partial_lines(
            &(struct fc_gemm){.c = r->part + row * ctx->e_padded, .x = r->scores + row * LD_SCORES, .w = h->v,
                              .panel_stride = h->v_panel, .panels = ctx->e_padded / 16}, ctx->kv.type, lo, hi);
}

/* part = weights V, times w_scale if weights are integers, for rows: zeros stand for keys that some of them do not
 * see. */
static void weigh_on_grid(const struct attention *ctx, const struct where *w, const struct scratch *r,
                          const fc_kv_head *h, ptrdiff_t row, ptrdiff_t rows, struct chunk c) {
    const struct shared see = seen_by(ctx, w, row, rows, c);
    const ptrdiff_t begin = see.lo / ctx->grid * ctx->grid, end = fc_round_up(see.hi, ctx->k_step);
    for (ptrdiff_t i = row; i < row + rows; i++) {
        uint16_t *weight = (uint16_t *)(void *)(r->scores + i * LD_SCORES); /* or int16 */
        const struct fc_range own = see_in(ctx, w, i, c);
        memset(weight + begin, 0, (size_t)(own.lo - begin) * sizeof *weight);
        memset(weight + own.hi, 0, (size_t)(end - own.hi) * sizeof *weight);
    }
    weigh_lines(ctx, r, h, row, rows, begin, end, 0);
    for (ptrdiff_t i = row; ctx->a_type == INT16 && i < row + rows; i++) {
        float *part = r->part + i * ctx->e_padded;
        ctx->k->from_f32[FC_F32](part, part, ctx->e_padded, r->w_scale[i]);
    }
}

/* part = weights V for rows: the keys that all of them see in whole lines and at once, the ends of each on its own:
 * rows take their keys in order, so the bits are those of a row alone. */
static void weigh_rows(const struct attention *ctx, const struct where *w, const struct scratch *r, const fc_kv_head *h,
                       ptrdiff_t row, ptrdiff_t rows, struct chunk c) {
    const struct shared see = seen_by(ctx, w, row, rows, c);
    const ptrdiff_t begin = fc_round_up(see.from, ctx->k_step), last = see.to / ctx->k_step * ctx->k_step;
    const ptrdiff_t end = last > begin ? last : begin;
    const int heads = see.lo < begin; /* some row begins before the common keys: the first does */
    if (heads) memset(r->part + row * ctx->e_padded, 0, (size_t)(rows * ctx->e_padded) * 4);
    for (ptrdiff_t i = row; heads && i < row + rows; i++) {
        const struct fc_range own = see_in(ctx, w, i, c);
        weigh_partial_lines(ctx, r, h, i, own.lo, fc_smaller(own.hi, begin));
    }
    weigh_lines(ctx, r, h, row, rows, begin, end, heads);
    for (ptrdiff_t i = row; i < row + rows; i++) {
        const struct fc_range own = see_in(ctx, w, i, c);
        weigh_partial_lines(ctx, r, h, i, own.lo > end ? own.lo : end, own.hi);
    }
}

/* Whether a row's key counts for nothing: outside what it sees, or hidden by the mask, of which bias[0] is its first */
static int is_hidden(struct fc_range see, const float *bias, ptrdiff_t key) {
    return key < see.lo || key >= see.hi || (bias && bias[key - see.lo] == -INFINITY);
}

/* part (row) = weights V, of which the values of hidden keys are copied as zeros, panel by panel */
static void weigh_copies(const struct attention *ctx, const struct scratch *r, const fc_kv_head *h, ptrdiff_t row,
                         struct fc_range see, const float *bias) {
    uint16_t panel[FC_KV_CHUNK * 16] __attribute__((aligned(64))); /* lines of 16 channels by pairs of keys */
    const ptrdiff_t begin = see.lo / ctx->grid * ctx->grid, end = fc_round_up(see.hi, ctx->k_step);
    for (ptrdiff_t p = 0; p < ctx->e_padded / 16; p++) {
        memcpy(panel, h->v + p * h->v_panel + begin / 2 * h->line, (size_t)((end - begin) / 2 * h->line));
        for (ptrdiff_t key = begin; key < end; key++)
            for (ptrdiff_t e = 0; e < 16 && is_hidden(see, bias, key); e++)
                panel[(key - begin) / 2 * 32 + e * 2 + key % 2] = 0;
        ctx->gemm(&(struct fc_gemm){
            .c = r->part + row * ctx->e_padded + p * 16, .ldc = ctx->e_padded * 4,
            .x = (const char *)(r->scores + row * LD_SCORES) + begin * ctx->x_size, .ldx = LD_SCORES * 4, .w = panel,
            .panel_stride = h->v_panel, .m = 1, .panels = 1, .lines = (end - begin) / ctx->k_step});
    }
}

/* part (row) = weights V over the runs of keys that it sees: their chain is the same */
static void weigh_runs(const struct attention *ctx, const struct scratch *r, const fc_kv_head *h, ptrdiff_t row,
                       struct fc_range see, const float *bias) {
    memset(r->part + row * ctx->e_padded, 0, (size_t)ctx->e_padded * 4);
    for (ptrdiff_t lo = see.lo, hi; lo < see.hi; lo = hi + 1) {
        for (hi = lo; hi < see.hi && !is_hidden(see, bias, hi);) hi++;
        weigh_partial_lines(ctx, r, h, row, lo, hi);
    }
}

/* Whether rows that see these keys of a chunk may be strips: nothing stands between q k and weights, and the last group
 * of keys is whole. */
static int in_strips(const struct attention *ctx, ptrdiff_t rows, struct shared see, struct chunk c) {
    const fc_attention_args *args = ctx->args;
    if (!ctx->k->attention_strips || ctx->a_type != BF16 || rows < FC_STRIP_ROWS) return 0;
    if (ctx->parts && rows % FC_STRIP_ROWS) return 0; /* those have no room for what a strip is filled with */
    if (args->mask || args->softcap > 0.0f || !(args->scale > 0.0f)) return 0;
    if (ctx->d_padded % ctx->grid || ctx->e_padded % (2 * FC_PANEL)) return 0;
    return see.from == 0 && fc_round_up(see.hi, ctx->grid) <= c.n;
}

static void attend_strips(const struct attention *ctx, const struct where *w, const struct scratch *r,
                          const fc_kv_head *h, struct chunk c) {
    const ptrdiff_t rows = w->queries * ctx->group;
    for (ptrdiff_t i = 0; i < fc_round_up(rows, FC_STRIP_ROWS); i++)
        r->sees[i] = i < rows ? see_in(ctx, w, i, c).hi : 0;
    ctx->k->attention_strips(&(struct fc_attention_strips){
        .q = (const uint16_t *)(const void *)r->q, .k = h->k, .v = h->v, .scores = r->scores, .part = r->part,
        .max = r->part_max, .sum = r->part_sum, .sees = r->sees, .ldq = ctx->d_padded * 2, .k_panel = h->k_panel,
        .v_panel = h->v_panel, .ldp = ctx->e_padded * 4, .rows = rows, .k_lines = h->k_lines,
        .panels = ctx->e_padded / FC_PANEL, .scale = ctx->args->scale});
}

/* Rows at a time that end at the same keys, or few enough that what only some see is little */
static void attend_rows(const struct attention *ctx, const struct where *w, const struct scratch *r,
                        const fc_kv_head *h, struct chunk c, int same) {
    const ptrdiff_t rows = w->queries * ctx->group;
    for (ptrdiff_t row = 0, count = same ? rows : SCORE_TILES * ctx->tile_rows; row < rows; row += count) {
        const ptrdiff_t these = fc_smaller(count, rows - row);
        const struct shared see = seen_by(ctx, w, row, these, c);
        score(ctx, r, h, row, these, see.lo, see.hi);
    }
    weights_of_block(ctx, w, r, h, c);
    for (ptrdiff_t row = 0, count = same ? rows : ctx->tile_rows; row < rows; row += count)
        (ctx->sums == ON_GRID ? weigh_on_grid : weigh_rows)(ctx, w, r, h, row, fc_smaller(count, rows - row), c);
}

/* One row alone: the weights of a strip are gone when the next one is at work. */
static void attend_row(const struct attention *ctx, const struct where *w, const struct scratch *r,
                       const fc_kv_head *h, ptrdiff_t row, struct chunk c) {
    const struct fc_range see = see_in(ctx, w, row, c);
    score(ctx, r, h, row, 1, see.lo, see.hi);
    weights(ctx, r, h, row, see.lo, see.hi, NULL);
    weigh_on_grid(ctx, w, r, h, row, 1, c);
}

/* A hidden key weighs 0, and 0 times an infinity or a NaN in its value is NaN: a row where that may be is made again
 * without it, and nothing else changes. */
static void weigh_unhidden(const struct attention *ctx, const struct where *w, const struct scratch *r,
                           const fc_kv_head *h, ptrdiff_t row, struct chunk c, int strips) {
    int finite;
    ctx->k->all_finite(&finite, r->part + row * ctx->e_padded, ctx->e_padded);
    if (finite || r->part_sum[row] == 0.0f) return;
    if (strips) attend_row(ctx, w, r, h, row, c);
    const float *bias = ctx->args->mask ? fc_attention_load_bias(ctx, w, row, c, r->bias) : NULL;
    (ctx->sums == ON_GRID ? weigh_copies : weigh_runs)(ctx, r, h, row, see_in(ctx, w, row, c), bias);
}

/* part, part_max, part_sum of a chunk; returns 0 if the block sees none of it. */
int fc_attention_chunk(const struct attention *ctx, const struct where *w, const struct scratch *r, ptrdiff_t chunk) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t key0 = chunk * FC_KV_CHUNK, rows = w->queries * ctx->group;
    const struct chunk c = {key0, fc_smaller(w->kv_len - key0, FC_KV_CHUNK)};
    const struct shared all = seen_by(ctx, w, 0, rows, c);
    if (all.hi <= all.lo) return 0;
    if (ctx->own_page) fc_attention_store_chunk(ctx, w->b * args->kv_heads + w->g, chunk, r->page, r->store);
    if (ctx->bytes) {
        fc_byte_chunk(ctx, w, r, page_of(ctx, w, r, chunk), c);
        return 1;
    }
    const fc_kv_head h = head_of(ctx, w, r, chunk);
    const int same = all.lo == all.from && all.to == all.hi;
    const int strips = in_strips(ctx, rows, all, c);
    if (strips) attend_strips(ctx, w, r, &h, c);
    else attend_rows(ctx, w, r, &h, c, same);
    const ptrdiff_t group = strips ? ctx->grid : ctx->k_step; /* of keys of which some may be hidden */
    const int zeros = args->mask || (ctx->sums == ON_GRID && (!same || all.lo % ctx->grid || all.hi % group));
    for (ptrdiff_t row = 0; zeros && ctx->a_type != INT16 && row < rows; row++)
        weigh_unhidden(ctx, w, r, &h, row, c, strips);
    return 1;
}

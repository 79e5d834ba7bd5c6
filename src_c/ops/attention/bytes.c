/* Attention whose products are bytes, FC_PRECISION_I8: one chunk of keys against one block of queries, and its page.
 *
 *     s = scale q k = scale (H q) (H k - m) + scale (H q) m       o = H sum of w (H v)
 *
 * with H Hadamard's matrix over D, or E, (kernels/attention_bytes.h) and m the mean of the keys H k of this chunk that
 * lie in earlier panels of 16: a row that sees a key sees those too, so its result depends on nothing else, and a key's
 * bytes never change when others follow. Where a window or a mask may hide them there is no m. H q, H k - m and H v are
 * bytes with a scale for each token and head, w times v's scale are bytes with a scale for each 64 keys; the second
 * term of s is float32, a constant for each row and panel. Sums of products of bytes are exact.
 *
 * A page of one head: K (256 / 16, D / 4, 16, 4)   V (E / 16, 256 / 4, 16, 4)   scales of K, V (2, 256)
 * what sums of a key begin with (256), as bytes of queries are unsigned   m (D, 256 / 16); D rounded up to 4, E to 16. */
#include <math.h>
#include <string.h>

#include "../rows.h"
#include "attention.h"

enum {
    BLOCK_KEYS = 64, /* of a scale of weights */
    BLOCKS = FC_KV_CHUNK / BLOCK_KEYS,
    PANELS = FC_KV_CHUNK / FC_PANEL,
    PREFETCH = 4, /* queries ahead: a token's heads lie together, and tokens far apart */
    PREFETCH_TOKENS = 8, /* keys or values of one head ahead, which lie as far apart */
    LD_SCORES = FC_KV_CHUNK + 16,
    LD_WEIGHTS = FC_KV_CHUNK + 64,
    STRIP_ROWS = 4 * FC_STRIP_ROWS /* in a call */
};

typedef struct {
    char *k, *v;
    float *k_scale, *v_scale, *means;
    int32_t *k_start;
    ptrdiff_t k_panel, v_panel; /* bytes */
} byte_head;

/* ---- pages ---- */

ptrdiff_t fc_byte_page_bytes(const struct attention *ctx) {
    const ptrdiff_t values = fc_times(FC_KV_CHUNK, fc_plus(ctx->d_padded, ctx->e_padded));
    return fc_plus(fc_plus(values, fc_times(ctx->d_padded, PANELS * 4)), 3 * FC_KV_CHUNK * 4);
}

static byte_head head_at(const struct attention *ctx, void *page) {
    byte_head h = {.k = page, .k_panel = ctx->d_padded * FC_PANEL, .v_panel = FC_KV_CHUNK * FC_PANEL};
    h.v = h.k + FC_KV_CHUNK * ctx->d_padded;
    h.k_scale = (float *)(void *)(h.v + FC_KV_CHUNK * ctx->e_padded);
    h.v_scale = h.k_scale + FC_KV_CHUNK;
    h.k_start = (int32_t *)(void *)(h.v_scale + FC_KV_CHUNK);
    h.means = (float *)(void *)(h.k_start + FC_KV_CHUNK);
    return h;
}

static ptrdiff_t widest(const struct attention *ctx) {
    return fc_round_up(ctx->args->head_dim > ctx->args->v_dim ? ctx->args->head_dim : ctx->args->v_dim, 64);
}

/* Four rows of float32: a token, its difference to the mean, the mean, the sum; and 16 of bytes with what follows them */
size_t fc_byte_store_bytes(const struct attention *ctx) {
    return (size_t)fc_plus(fc_times(widest(ctx), 4 * 4 + FC_PANEL), FC_PANEL * 64);
}

struct store {
    const struct attention *ctx;
    const struct tokens *from;
    byte_head h;
    float *row, *rest, *mean, *sum; /* (widest) */
    char *bytes;                    /* (16, widest + 64) */
    ptrdiff_t ld, n; /* n tokens */
};

/* Token `at` + PREFETCH_TOKENS of n, `bytes` of each, is on its way. */
static void prefetch_token(const char *first, ptrdiff_t stride, ptrdiff_t at, ptrdiff_t n, ptrdiff_t bytes) {
    const char *next = first + (at + PREFETCH_TOKENS) * stride;
    for (ptrdiff_t i = 0; at + PREFETCH_TOKENS < n && i < bytes; i += 64) __builtin_prefetch(next + i);
}

/* row (n) <- H x */
static void rotated(const struct attention *ctx, float *row, fc_dtype type, const void *x, ptrdiff_t n, float scale) {
    ctx->k->to_f32[type](row, x, n, scale);
    memset(row + n, 0, (size_t)(fc_round_up(n, 64) - n) * 4);
    if (n) ctx->k->hadamard(row, n);
}

/* A panel of `rows` <= 16 keys from token `at` on */
static void store_keys(const struct store *s, ptrdiff_t at, ptrdiff_t rows) {
    const struct attention *ctx = s->ctx;
    const ptrdiff_t d = ctx->args->head_dim, panel = at / FC_PANEL;
    for (ptrdiff_t i = 0; i < rows; i++) {
        const float *row = s->row;
        prefetch_token(s->from->k, s->from->k_stride, at + i, s->n, d * fc_size_of(s->from->type));
        rotated(ctx, s->row, s->from->type, s->from->k + (at + i) * s->from->k_stride, d, 1.0f);
        if (ctx->smooth) {
            ctx->k->add_scaled(s->sum, s->sum, s->row, 1.0f / FC_KV_CHUNK, d);
            ctx->k->add_scaled(s->rest, s->row, s->mean, -1.0f, d);
            row = s->rest;
        }
        ctx->k->to_bytes((int8_t *)s->bytes + i * s->ld, s->h.k_scale + at + i, s->h.k_start + at + i, row, d, 127.0f);
        s->h.k_start[at + i] *= -(ctx->k->byte_query + 1);
    }
    ctx->k->panel_cols[FC_F32]((float *)(void *)(s->h.k + panel * s->h.k_panel), s->bytes, s->ld, ctx->d_padded / 4,
                               rows);
    if (!ctx->smooth || rows < FC_PANEL || panel + 1 == PANELS) return;
    const float each = (float)FC_KV_CHUNK / (float)(at + FC_PANEL);
    for (ptrdiff_t i = 0; i < d; i++) {
        s->mean[i] = s->sum[i] * each;
        s->h.means[i * PANELS + panel + 1] = s->mean[i];
    }
}

/* The line of four tokens from `at` on, of which `rows` exist */
static void store_values(const struct store *s, ptrdiff_t at, ptrdiff_t rows) {
    const struct attention *ctx = s->ctx;
    const ptrdiff_t e = ctx->args->v_dim;
    int32_t sum;
    for (ptrdiff_t i = 0; i < 4; i++) {
        char *bytes = s->bytes + i * s->ld;
        s->h.v_scale[at + i] = 0.0f;
        if (i < rows) {
            prefetch_token(s->from->v, s->from->v_stride, at + i, s->n, e * fc_size_of(s->from->type));
            rotated(ctx, s->row, s->from->type, s->from->v + (at + i) * s->from->v_stride, e, 1.0f);
            ctx->k->to_bytes((int8_t *)bytes, s->h.v_scale + at + i, &sum, s->row, e, 127.0f);
        } else {
            memset(bytes, 0, (size_t)ctx->e_padded);
        }
    }
    for (ptrdiff_t j = 0; j < ctx->e_padded; j++) {
        char *to = s->h.v + j / FC_PANEL * s->h.v_panel + at * FC_PANEL + j % FC_PANEL * 4;
        for (ptrdiff_t i = 0; i < 4; i++) to[i] = s->bytes[i * s->ld + j];
    }
}

void fc_byte_store(const struct attention *ctx, void *page, ptrdiff_t n, const struct tokens *from, void *scratch) {
    const ptrdiff_t wide = widest(ctx);
    struct store s = {.ctx = ctx, .from = from, .h = head_at(ctx, page), .row = scratch, .ld = wide + 64, .n = n};
    s.rest = s.row + wide, s.mean = s.rest + wide, s.sum = s.mean + wide;
    s.bytes = (char *)(s.sum + wide);
    memset(s.mean, 0, (size_t)(2 * wide) * 4);
    memset(s.rest, 0, (size_t)wide * 4);
    if (ctx->smooth) memset(s.h.means, 0, (size_t)(ctx->d_padded * PANELS) * 4);
    for (ptrdiff_t at = 0; at < n; at += FC_PANEL) store_keys(&s, at, fc_smaller(n - at, FC_PANEL));
    for (ptrdiff_t at = 0; at < fc_round_up(n, BLOCK_KEYS); at += 4)
        store_values(&s, at, fc_smaller(n > at ? n - at : 0, 4));
}

/* ---- queries ---- */

static ptrdiff_t ld_query(const struct attention *ctx) { return fc_round_up(ctx->d_padded, 64) + 64; }

/* Of a block's rows: bytes of queries, of weights, their scales, shifts of panels; and one query */
ptrdiff_t fc_byte_scratch_floats(const struct attention *ctx) {
    const ptrdiff_t row = fc_plus(ld_query(ctx) / 4, LD_WEIGHTS / 4 + BLOCKS + PANELS);
    return fc_plus(fc_times(fc_attention_rows_in_strips(ctx), row), widest(ctx) + 16);
}

struct byte_scratch {
    float *w_scale, *shifts, *query; /* (rows, 4), (rows, 16), (widest) */
    uint8_t *q, *w;                  /* (rows, ld_query), (rows, LD_WEIGHTS) */
};

static struct byte_scratch scratch_of(const struct attention *ctx, const struct scratch *r) {
    struct byte_scratch b = {.w_scale = r->bytes};
    b.shifts = b.w_scale + fc_attention_rows_in_strips(ctx) * BLOCKS;
    b.query = b.shifts + fc_attention_rows_in_strips(ctx) * PANELS;
    b.q = (uint8_t *)(b.query + widest(ctx));
    b.w = b.q + fc_attention_rows_in_strips(ctx) * ld_query(ctx);
    return b;
}

/* q (d_padded) <- bytes of a rotated query, `zero` more than 0; its scale */
static void query_bytes(const struct attention *ctx, uint8_t *q, float *scale, const float *query) {
    const uint8_t zero = (uint8_t)(ctx->k->byte_query + 1);
    int32_t sum;
    ctx->k->to_bytes((int8_t *)q, scale, &sum, query, ctx->args->head_dim, (float)ctx->k->byte_query);
    for (ptrdiff_t i = 0; i < ctx->d_padded; i++) q[i] = (uint8_t)(q[i] + zero);
}

/* scale H q of rows (query, head), in r->q, and the same as bytes */
void fc_byte_load_queries(const struct attention *ctx, const struct where *w, const struct scratch *r) {
    const fc_attention_args *args = ctx->args;
    const struct byte_scratch b = scratch_of(ctx, r);
    const int whole = args->head_dim % 64 == 0; /* rows of r->q are as long as `rotated` writes */
    const float scale = args->scale * (args->mask || args->softcap > 0.0f ? 1.0f : 1.44269504f); /* see fc_byte_row */
    const ptrdiff_t bytes = args->head_dim * fc_size_of(args->q_type), ahead = PREFETCH * args->q_stride[1];
    const char *block = (const char *)args->q + w->b * args->q_stride[0] + w->q0 * args->q_stride[1] +
                        w->g * ctx->group * args->q_stride[2];
    for (ptrdiff_t i = 0; i < w->queries; i++) {
        const char *from = block + i * args->q_stride[1];
        for (ptrdiff_t row = i * ctx->group; row < (i + 1) * ctx->group; row++, from += args->q_stride[2]) {
            float *q = (float *)(void *)r->q + row * ctx->d_padded, *place = whole ? q : b.query;
            for (ptrdiff_t at = 0; i + PREFETCH < w->queries && at < bytes; at += 64)
                __builtin_prefetch(from + ahead + at);
            rotated(ctx, place, args->q_type, from, args->head_dim, scale);
            if (!whole) memcpy(q, place, (size_t)ctx->d_padded * 4);
            query_bytes(ctx, b.q + row * ld_query(ctx), r->q_scale + row, place);
        }
    }
}

/* ---- one chunk ---- */

/* scores (rows [row, row + rows), keys [lo, hi) and those of their panels) = q k as integers */
static void score(const struct attention *ctx, const struct scratch *r, const struct byte_scratch *b,
                  const byte_head *h, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t lo, ptrdiff_t hi) {
    const ptrdiff_t first = lo / FC_PANEL, last = (hi + FC_PANEL - 1) / FC_PANEL, ldq = ld_query(ctx);
    ctx->k->gemm_bytes(&(struct fc_byte_product){
        .c = r->scores + row * LD_SCORES + first * FC_PANEL, .ldc = LD_SCORES * 4, .x = b->q + row * ldq, .ldx = ldq,
        .w = (const int8_t *)h->k + first * h->k_panel, .panel_stride = h->k_panel, .m = rows,
        .panels = last - first, .blocks = 1, .lines = ctx->d_padded / 4, .start = h->k_start + first * FC_PANEL});
}

/* Row i, whose bias is loaded if need be, as the leaf takes it */
static struct fc_byte_row row_of(const struct attention *ctx, const struct where *w, const struct scratch *r,
                                 const struct byte_scratch *b, const byte_head *h, ptrdiff_t i, struct chunk c) {
    static const float none[PANELS];
    const struct fc_range see = see_in(ctx, w, i, c);
    if (ctx->args->mask) fc_attention_load_bias(ctx, w, i, c, r->bias + see.lo);
    return (struct fc_byte_row){
        .s = r->scores + i * LD_SCORES, .k_scale = h->k_scale, .v_scale = h->v_scale,
        .shift = ctx->smooth ? b->shifts + i * PANELS : none, .bias = ctx->args->mask ? r->bias : NULL,
        .scale = r->q_scale[i], .softcap = ctx->args->softcap, .lo = see.lo, .hi = see.hi,
        .w = b->w + i * LD_WEIGHTS, .w_scale = b->w_scale + i * BLOCKS};
}

static void weights_of_rows(const struct attention *ctx, const struct where *w, const struct scratch *r,
                            const struct byte_scratch *b, const byte_head *h, ptrdiff_t row, ptrdiff_t rows,
                            struct chunk c) {
    const ptrdiff_t together = ctx->args->mask ? 1 : rows; /* there is one bias */
    struct fc_byte_row some[FC_BYTE_ROWS];
    for (ptrdiff_t i = row; i < row + rows; i += together) {
        for (ptrdiff_t j = 0; j < together; j++) some[j] = row_of(ctx, w, r, b, h, i + j, c);
        ctx->k->byte_weights(some, together, r->part_max + i, r->part_sum + i);
    }
}

/* part (rows [row, row + rows)) = weights V, in whole blocks of keys */
static void weigh(const struct attention *ctx, const struct scratch *r, const struct byte_scratch *b,
                  const byte_head *h, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t lo, ptrdiff_t hi) {
    const ptrdiff_t first = lo / BLOCK_KEYS, last = (hi + BLOCK_KEYS - 1) / BLOCK_KEYS;
    ctx->k->gemm_bytes(&(struct fc_byte_product){
        .c = r->part + row * ctx->e_padded, .ldc = ctx->e_padded * 4,
        .x = b->w + row * LD_WEIGHTS + first * BLOCK_KEYS, .ldx = LD_WEIGHTS,
        .w = (const int8_t *)h->v + first * BLOCK_KEYS * FC_PANEL, .panel_stride = h->v_panel, .m = rows,
        .panels = ctx->e_padded / FC_PANEL, .blocks = last - first, .lines = BLOCK_KEYS / 4,
        .scale = b->w_scale + row * BLOCKS + first, .ld_scale = BLOCKS});
}

/* Whether rows may be strips: the ISA has them, and nothing is added to scores. Under half a strip few are filled. */
static int in_strips(const struct attention *ctx, ptrdiff_t rows) {
    return ctx->k->byte_strips && !ctx->args->mask && rows >= FC_STRIP_ROWS / 2 && ctx->d_padded % 64 == 0;
}

/* Rows [row, row + rows) in strips. Each strip has its scores and weights where the one before the last had them. */
static void attend_strips(const struct attention *ctx, const struct where *w, const struct scratch *r,
                          const struct byte_scratch *b, const byte_head *h, ptrdiff_t row, ptrdiff_t rows,
                          struct chunk c) {
    struct fc_byte_row all[STRIP_ROWS];
    for (ptrdiff_t i = 0; i < rows; i++) {
        all[i] = row_of(ctx, w, r, b, h, row + i, c);
        all[i].s = r->scores + i % (2 * FC_STRIP_ROWS) * LD_SCORES;
        all[i].w = b->w + i % (2 * FC_STRIP_ROWS) * LD_WEIGHTS;
    }
    ctx->k->byte_strips(&(struct fc_byte_strips){
        .rows = all, .count = rows, .q = b->q + row * ld_query(ctx), .k = h->k, .v = h->v, .start = h->k_start,
        .part = r->part + row * ctx->e_padded, .max = r->part_max + row, .sum = r->part_sum + row,
        .ldq = ld_query(ctx), .ld_s = LD_SCORES * 4, .ld_w = LD_WEIGHTS, .k_panel = h->k_panel, .v_panel = h->v_panel,
        .ldp = ctx->e_padded * 4, .k_lines = ctx->d_padded / 4, .panels = ctx->e_padded / FC_PANEL});
}

static void attend_rows(const struct attention *ctx, const struct where *w, const struct scratch *r,
                        const struct byte_scratch *b, const byte_head *h, ptrdiff_t row, ptrdiff_t rows,
                        struct chunk c) {
    const struct shared see = seen_by(ctx, w, row, rows, c);
    if (see.hi <= see.lo) {
        for (ptrdiff_t i = row; i < row + rows; i++) r->part_max[i] = -INFINITY, r->part_sum[i] = 0.0f;
        return;
    }
    score(ctx, r, b, h, row, rows, see.lo, see.hi);
    weights_of_rows(ctx, w, r, b, h, row, rows, c);
    weigh(ctx, r, b, h, row, rows, see.lo, see.hi);
}

void fc_byte_chunk(const struct attention *ctx, const struct where *w, const struct scratch *r, void *page,
                   struct chunk c) {
    const ptrdiff_t all = w->queries * ctx->group, ldq = ctx->d_padded * 4;
    const struct byte_scratch b = scratch_of(ctx, r);
    const byte_head h = head_at(ctx, page);
    if (ctx->smooth)
        ctx->k->gemm_f32(&(struct fc_gemm){.c = b.shifts, .ldc = PANELS * 4, .x = r->q, .ldx = ldq, .w = h.means,
                                           .panel_stride = ldq * PANELS, .m = all, .panels = 1,
                                           .lines = ctx->args->head_dim});
    const int strips = in_strips(ctx, all);
    const ptrdiff_t at_once = strips ? STRIP_ROWS : FC_BYTE_ROWS;
    for (ptrdiff_t row = 0; row < all; row += at_once)
        (strips ? attend_strips : attend_rows)(ctx, w, r, &b, &h, row, fc_smaller(at_once, all - row), c);
}

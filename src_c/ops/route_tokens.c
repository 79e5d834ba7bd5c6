/* Mixture of depths: the router's logits, the tokens with the largest ones, and what a block made of them back among
 * the others. What a block is, nothing here knows. */
#include "rows.h"

/* ---- logits ---- */

struct logits {
    const struct fc_kernels *k;
    fc_dtype type;
    float *logits;
    const char *x;
    const float *weight;
    const fc_rows *rows;
    ptrdiff_t n;
};

static void logit_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct logits *ctx = context;
    fc_cursor c;
    (void)rank;
    fc_cursor_at(&c, ctx->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c))
        ctx->k->router_logit[ctx->type](ctx->logits + i, ctx->x + c.at[1], ctx->weight, ctx->n);
}

fc_status fc_router_logits(fc_dtype type, float *logits, const void *x, const float *weight, const fc_rows *rows,
                           ptrdiff_t n) {
    if (!FC_IS_OURS(rows)) return FC_BAD_SIZE;
    struct logits ctx = {fc_k, type, logits, x, weight, rows, n};
    const ptrdiff_t count = fc_rows_count(rows);
    const double ns = (double)n * fc_ns.router_logit + fc_ns.row;
    return fc_static(fc_threads_for(count, ns), count, ns, logit_rows, &ctx);
}

/* ---- the largest ---- */

struct largest {
    int64_t *indices;    /* (B, count) */
    float *gate;         /* (B, count) */
    const float *logits; /* (B, S) */
    ptrdiff_t seq, count;
};

enum { DIGIT = 8, DIGITS = 1 << DIGIT };

/* Unsigned numbers in the order of the floats: NaN below -inf, both zeros equal. */
static uint32_t order_of(float r) {
    uint32_t u;
    if (r != r) return 0;
    r += 0.0f;
    memcpy(&u, &r, 4);
    return u >> 31 ? ~u : u | 0x80000000u;
}

/* The count-th largest of r (n), digit by digit from the highest; *equal: how many of its equals are among those. */
static uint32_t nth_largest(const float *r, ptrdiff_t n, ptrdiff_t count, ptrdiff_t *equal) {
    uint32_t found = 0, known = 0;
    for (int shift = 32 - DIGIT; shift >= 0; shift -= DIGIT) {
        ptrdiff_t tokens[DIGITS] = {0};
        uint32_t digit = DIGITS - 1;
        for (ptrdiff_t i = 0; i < n; i++) {
            const uint32_t u = order_of(fc_get_float(r, i));
            if ((u & known) == found) tokens[u >> shift & (DIGITS - 1)]++;
        }
        while (tokens[digit] < count) count -= tokens[digit--];
        found |= digit << shift;
        known |= (uint32_t)(DIGITS - 1) << shift;
    }
    *equal = count;
    return found;
}

static void choose_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct largest *ctx = context;
    (void)rank;
    for (ptrdiff_t b = begin; b < end; b++) {
        const float *r = ctx->logits + b * ctx->seq;
        ptrdiff_t equal, to = b * ctx->count;
        const uint32_t least = nth_largest(r, ctx->seq, ctx->count, &equal);
        for (ptrdiff_t i = 0; i < ctx->seq; i++) {
            const uint32_t u = order_of(fc_get_float(r, i));
            if (u < least || (u == least && equal-- <= 0)) continue;
            ctx->indices[to] = i;
            fc_put_float(ctx->gate, to++, fc_get_float(r, i));
        }
    }
}

fc_status fc_largest_logits(int64_t *indices, float *gate, const float *logits, ptrdiff_t batch, ptrdiff_t seq,
                            ptrdiff_t count) {
    struct largest ctx = {indices, gate, logits, seq, count};
    const double ns = (double)seq * fc_ns.choose + fc_ns.row;
    if (count == 0) return FC_OK;
    return fc_static(fc_threads_for(batch, ns), batch, ns, choose_rows, &ctx);
}

/* ---- back among the others ---- */

struct update {
    const struct fc_kernels *k;
    fc_dtype type;
    char *out;
    const char *x, *y;
    const float *gate;
    const fc_rows *rows;
    ptrdiff_t n;
};

static void update_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct update *ctx = context;
    fc_cursor c;
    (void)rank;
    fc_cursor_at(&c, ctx->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c))
        ctx->k->gate_update[ctx->type](ctx->out + c.at[0], ctx->x + c.at[1], ctx->y + c.at[2],
                                       fc_get_float(ctx->gate, i), ctx->n);
}

fc_status fc_gate_update(fc_dtype type, void *out, const void *x, const void *y, const float *gate, const fc_rows *rows,
                         ptrdiff_t n) {
    if (!FC_IS_OURS(rows)) return FC_BAD_SIZE;
    struct update ctx = {fc_k, type, out, x, y, gate, rows, n};
    const ptrdiff_t count = fc_rows_count(rows);
    const double ns = (double)n * fc_ns.gate_update + fc_ns.row;
    return fc_static(fc_threads_for(count, ns), count, ns, update_rows, &ctx);
}

/* Attention with online softmax over chunks of FC_KV_CHUNK keys at absolute positions 0, 256, 512, ...
 *
 * A row's result is its chunks' partials (max, sum, o), each started fresh and folded in chunk order. A prompt
 * fed whole, in pieces or token by token, alone or in a batch, on any threads, runs that same arithmetic, hence the
 * same bits. Work is a block of queries of one key/value head (all R query heads of the group share its keys), or,
 * where blocks are too few, single chunks whose partials are folded afterwards.
 *
 * Keys outside a row's [lo, hi) (causal, window, kv_lens) are not multiplied at all: a NaN there changes nothing.
 * Keys hidden by `mask` weigh zero. No (S, T) matrix exists: scores are (block, 256). */
#include <math.h>
#include <string.h>

#include "rows.h"

enum { BLOCK_ROWS = 128, STRIP = 6, FEW_ROWS = 4, LD_SCORES = FC_KV_CHUNK + 16 };

struct attention {
    const fc_attention_args *a;
    ptrdiff_t group;           /* R: query heads per key/value head */
    ptrdiff_t block, blocks;   /* queries a block, blocks a sequence */
    ptrdiff_t rows, e_padded;  /* rows of a block = block * R; E in whole panels */
    ptrdiff_t chunks;          /* of the longest sequence */
    int direct_v;              /* V's rows can be multiplied where they lie */
    fc_scratch scratch;
    float *parts;              /* split: (B, G, chunks) partials, each o (rows, e_padded), max (rows), sum (rows) */
};

/* A thread's scratch, in floats. */
struct room {
    float *q;       /* (rows, D), scaled */
    float *keys;    /* panels [256/16][D][16] */
    float *scores;  /* (rows, LD_SCORES) */
    float *values;  /* (256, e_padded), unless direct_v */
    float *part, *part_max, *part_sum; /* (rows, e_padded), (rows), (rows) */
    float *o, *max, *sum;              /* the same, folded so far */
    float *bias;    /* (256) */
};

static ptrdiff_t room_floats(const struct attention *t) {
    const ptrdiff_t d = t->a->head_dim;
    return t->rows * (d + LD_SCORES + 2 * t->e_padded + 4) + FC_KV_CHUNK * (d + 1 + (t->direct_v ? 0 : t->e_padded)) + 128;
}

static struct room room_of(const struct attention *t, int rank) {
    const ptrdiff_t d = t->a->head_dim;
    struct room r;
    float *p = fc_scratch_of(&t->scratch, rank);
    r.keys = p, p += FC_KV_CHUNK * d;
    r.scores = p, p += t->rows * LD_SCORES;
    r.values = p, p += t->direct_v ? 0 : FC_KV_CHUNK * t->e_padded;
    r.part = p, p += t->rows * t->e_padded;
    r.o = p, p += t->rows * t->e_padded;
    r.q = p, p += t->rows * d;
    r.bias = p, p += FC_KV_CHUNK;
    r.part_max = p, p += t->rows;
    r.part_sum = p, p += t->rows;
    r.max = p, p += t->rows;
    r.sum = p;
    return r;
}

/* One block of queries of one sequence and group. */
struct where {
    ptrdiff_t b, g, q0, queries, kv_len;
};

static struct where where_of(const struct attention *t, ptrdiff_t b, ptrdiff_t g, ptrdiff_t block) {
    const fc_attention_args *a = t->a;
    ptrdiff_t q0 = block * t->block, left = a->q_len - q0;
    return (struct where){b, g, q0, left < t->block ? left : t->block, a->kv_lens ? a->kv_lens[b] : a->kv_len};
}

/* Keys [lo, hi) that query q sees. */
static void visible(const fc_attention_args *a, ptrdiff_t kv_len, ptrdiff_t q, ptrdiff_t *lo, ptrdiff_t *hi) {
    ptrdiff_t position = q + kv_len - a->q_len;
    *hi = a->causal && position + 1 < kv_len ? position + 1 : kv_len;
    *lo = a->window && position - a->window + 1 > 0 ? position - a->window + 1 : 0;
    if (*hi < 0) *hi = 0;
    if (*lo > *hi) *lo = *hi;
}

/* The same inside the chunk of n keys that starts at key0. */
static void visible_in(const fc_attention_args *a, const struct where *w, ptrdiff_t q, ptrdiff_t key0, ptrdiff_t n,
                       ptrdiff_t *lo, ptrdiff_t *hi) {
    visible(a, w->kv_len, q, lo, hi);
    *lo = *lo < key0 ? 0 : *lo - key0 < n ? *lo - key0 : n;
    *hi = *hi < key0 ? 0 : *hi - key0 < n ? *hi - key0 : n;
}

static void load_queries(const struct attention *t, const struct where *w, float *q) {
    const fc_attention_args *a = t->a;
    for (ptrdiff_t i = 0; i < w->queries; i++)
        for (ptrdiff_t r = 0; r < t->group; r++, q += a->head_dim)
            fc_k->to_f32[a->q_type](q, (const char *)a->q + w->b * a->q_stride[0] + (w->q0 + i) * a->q_stride[1] +
                                           (w->g * t->group + r) * a->q_stride[2], a->head_dim, a->scale);
}

/* ---- one chunk ---- */

static const float *load_bias(const struct attention *t, const struct where *w, ptrdiff_t q, ptrdiff_t head, ptrdiff_t key,
                              ptrdiff_t n, float *bias) {
    const fc_attention_args *a = t->a;
    const char *mask = (const char *)a->mask + w->b * a->mask_stride[0] + head * a->mask_stride[1] +
                       q * a->mask_stride[2] + key * a->mask_stride[3];
    ptrdiff_t stored = a->mask_stride[3] ? n : 1;
    if (a->mask_is_bool) fc_k->bias_from_bool(bias, (const uint8_t *)mask, stored);
    else fc_k->to_f32[a->mask_type](bias, mask, stored, 1.0f);
    for (ptrdiff_t i = stored; i < n; i++) bias[i] = bias[0];
    return bias;
}

static const char *at(const void *kv, const ptrdiff_t *stride, const struct where *w, ptrdiff_t slot) {
    return (const char *)kv + w->b * stride[0] + slot * stride[1] + w->g * stride[2];
}

/* scores (rows, 16 [first, last)) = q (rows, d) times panels of keys */
static void score_panels(const struct room *r, ptrdiff_t rows, ptrdiff_t d, ptrdiff_t first, ptrdiff_t last) {
    fc_k->gemm_f32(&(struct fc_gemm){
        .c = r->scores + first * 16, .ldc = LD_SCORES * 4, .x = r->q, .ldx = d * 4, .w = r->keys + first * 16 * d,
        .panel_stride = d * 64, .line_stride = 64, .m = rows, .panels = last - first, .lines = d});
}

/* scores (rows, [lo, hi)) = q k^T, panel by panel of 16 keys */
static void score(const struct attention *t, const struct where *w, const struct room *r, ptrdiff_t slot, ptrdiff_t lo,
                  ptrdiff_t hi) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t d = a->head_dim, rows = w->queries * t->group, ld = a->k_stride[1], first = lo / 16, last = (hi + 15) / 16;
    const char *k = at(a->k, a->k_stride, w, slot);
    const int few = rows <= FEW_ROWS && d % 16 == 0;
    for (ptrdiff_t p = first; p < last; p++) {
        const ptrdiff_t begin = p * 16, keys = hi - begin < 16 ? hi - begin : 16;
        float *panel = r->keys + begin * d;
        if (few && keys == 16) {
            fc_k->attention_panel[a->kv_type](r->scores + begin, LD_SCORES, r->q, rows, d, k + begin * ld, ld, hi - begin >= 32);
            continue;
        }
        fc_k->panel_cols[a->kv_type](panel, k + begin * ld, ld, d, keys);
        if (few) score_panels(r, rows, d, p, p + 1);
    }
    if (!few) score_panels(r, rows, d, first, last);
}

/* part (rows [row, row + rows)) += scores[:, lo:hi) V[lo:hi) */
static void weigh(const struct attention *t, const struct room *r, const float *v, ptrdiff_t ldv, ptrdiff_t row,
                  ptrdiff_t rows, ptrdiff_t lo, ptrdiff_t hi, int accumulate) {
    float *part = r->part + row * t->e_padded;
    const float *p = r->scores + row * LD_SCORES + lo;
    if (hi <= lo && accumulate) return;
    if (rows <= FEW_ROWS && hi > lo)
        fc_k->attention_weigh[FC_F32](part, t->e_padded, p, LD_SCORES, (const char *)(v + lo * ldv), ldv * 4, rows,
                                      t->e_padded, hi - lo, accumulate);
    else
        fc_k->gemm_f32(&(struct fc_gemm){
            .c = part, .ldc = t->e_padded * 4, .x = p, .ldx = LD_SCORES * 4, .w = v + lo * ldv, .panel_stride = 64,
            .line_stride = ldv * 4, .m = rows, .panels = t->e_padded / 16, .lines = hi - lo, .accumulate = accumulate});
}

/* Rows whose keys differ: in strips, what all rows of a strip see at once, the ends of each row on its own.
 * Every row still takes its keys in order, so the bits are those of the whole. */
static void weigh_strips(const struct attention *t, const struct where *w, const struct room *r, const float *v,
                         ptrdiff_t ldv, ptrdiff_t key0, ptrdiff_t n) {
    const ptrdiff_t rows = w->queries * t->group;
    for (ptrdiff_t row = 0; row < rows; row += STRIP) {
        ptrdiff_t count = rows - row < STRIP ? rows - row : STRIP, lo[STRIP], hi[STRIP], from = 0, to = n;
        for (ptrdiff_t i = 0; i < count; i++) {
            visible_in(t->a, w, w->q0 + (row + i) / t->group, key0, n, &lo[i], &hi[i]);
            from = lo[i] > from ? lo[i] : from;
            to = hi[i] < to ? hi[i] : to;
        }
        if (to < from) to = from;
        for (ptrdiff_t i = 0; i < count; i++)
            weigh(t, r, v, ldv, row + i, 1, lo[i], hi[i] < from ? hi[i] : from, 0);
        weigh(t, r, v, ldv, row, count, from, to, 1);
        for (ptrdiff_t i = 0; i < count; i++) weigh(t, r, v, ldv, row + i, 1, to, hi[i], 1);
    }
}

static const float *load_values(const struct attention *t, const struct where *w, const struct room *r, ptrdiff_t slot,
                                ptrdiff_t lo, ptrdiff_t hi, ptrdiff_t *ldv) {
    const fc_attention_args *a = t->a;
    const char *v = at(a->v, a->v_stride, w, slot);
    if (t->direct_v) {
        *ldv = a->v_stride[1] / 4;
        return (const float *)(const void *)v;
    }
    *ldv = t->e_padded;
    for (ptrdiff_t i = lo; i < hi; i++) {
        float *to = r->values + i * t->e_padded;
        fc_k->to_f32[a->kv_type](to, v + i * a->v_stride[1], a->v_dim, 1.0f);
        for (ptrdiff_t j = a->v_dim; j < t->e_padded; j++) to[j] = 0.0f;
    }
    return r->values;
}

/* part, part_max, part_sum of chunk c; returns 0 if the block sees none of it. */
static int attend_chunk(const struct attention *t, const struct where *w, const struct room *r, ptrdiff_t c) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t key0 = c * FC_KV_CHUNK, rows = w->queries * t->group;
    const ptrdiff_t n = w->kv_len - key0 < FC_KV_CHUNK ? w->kv_len - key0 : FC_KV_CHUNK;
    ptrdiff_t lo, hi, first_hi, last_lo, slot = a->ring ? key0 % a->ring : key0, ldv;
    visible_in(a, w, w->q0, key0, n, &lo, &first_hi);
    visible_in(a, w, w->q0 + w->queries - 1, key0, n, &last_lo, &hi);
    if (hi <= lo) return 0;
    score(t, w, r, slot, lo, hi);
    const float *bias = NULL;
    for (ptrdiff_t row = 0; row < rows; row++) {
        ptrdiff_t q = w->q0 + row / t->group, head = w->g * t->group + row % t->group, from, to;
        visible_in(a, w, q, key0, n, &from, &to);
        if (a->mask && (row % t->group == 0 || a->mask_stride[1]))
            bias = load_bias(t, w, q, head, key0 + from, to - from, r->bias);
        fc_k->attention_row(r->scores + row * LD_SCORES + from, bias, to - from, a->softcap, &r->part_max[row],
                            &r->part_sum[row]);
    }
    if (rows <= FEW_ROWS && a->v_dim % 16 == 0 && first_hi == hi && last_lo == lo) {
        /* A decode step reads each value once: it is decoded on its way into the product, not into scratch. */
        fc_k->attention_weigh[a->kv_type](r->part, t->e_padded, r->scores + lo, LD_SCORES,
                                          at(a->v, a->v_stride, w, slot) + lo * a->v_stride[1], a->v_stride[1], rows,
                                          t->e_padded, hi - lo, 0);
        return 1;
    }
    const float *v = load_values(t, w, r, slot, lo, hi, &ldv);
    if (first_hi == hi && last_lo == lo) weigh(t, r, v, ldv, 0, rows, lo, hi, 0);
    else weigh_strips(t, w, r, v, ldv, key0, n);
    return 1;
}

/* ---- the end of a row ---- */

static void finish(const struct attention *t, const struct where *w, float *o, const float *max, const float *sum) {
    const fc_attention_args *a = t->a;
    for (ptrdiff_t row = 0; row < w->queries * t->group; row++, o += t->e_padded) {
        ptrdiff_t q = w->q0 + row / t->group, head = w->g * t->group + row % t->group;
        float top = max[row], total = sum[row], keep = 1.0f;
        if (total == 0.0f) {
            top = -INFINITY, keep = 0.0f;
            for (ptrdiff_t j = 0; j < a->v_dim; j++) o[j] = 0.0f;
        }
        if (a->sinks && a->sinks[head] != -INFINITY) {
            float sink = a->sinks[head], higher = sink > top ? sink : top;
            keep = total == 0.0f ? 0.0f : expf(top - higher);
            total = total * keep + expf(sink - higher);
            top = higher;
        }
        if (a->lse) a->lse[(w->b * a->q_len + q) * a->heads + head] = total == 0.0f ? -INFINITY : top + logf(total);
        fc_k->from_f32[a->q_type]((char *)a->out + w->b * a->out_stride[0] + q * a->out_stride[1] + head * a->out_stride[2],
                                  o, a->v_dim, total == 0.0f ? 0.0f : keep / total);
    }
}

static void fold(const struct attention *t, ptrdiff_t rows, const struct room *r, const float *part, const float *part_max,
                 const float *part_sum) {
    for (ptrdiff_t row = 0; row < rows; row++)
        fc_k->attention_fold(r->o + row * t->e_padded, &r->max[row], &r->sum[row], part + row * t->e_padded, part_max[row],
                             part_sum[row], t->e_padded);
}

static void clear(const struct room *r, ptrdiff_t rows) {
    for (ptrdiff_t i = 0; i < rows; i++) r->max[i] = -INFINITY, r->sum[i] = 0.0f;
}

/* ---- an item is a block of queries; later blocks see more keys, so they go first ---- */

static void block_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    const fc_attention_args *a = t->a;
    const struct room r = room_of(t, rank);
    const ptrdiff_t pairs = a->batch * a->kv_heads;
    for (ptrdiff_t i = begin; i < end; i++) {
        const struct where w = where_of(t, i % pairs / a->kv_heads, i % a->kv_heads, t->blocks - 1 - i / pairs);
        ptrdiff_t lo, hi, other;
        visible(a, w.kv_len, w.q0, &lo, &other);
        visible(a, w.kv_len, w.q0 + w.queries - 1, &other, &hi);
        load_queries(t, &w, r.q);
        clear(&r, t->rows);
        for (ptrdiff_t c = lo / FC_KV_CHUNK; c * FC_KV_CHUNK < hi; c++)
            if (attend_chunk(t, &w, &r, c)) fold(t, w.queries * t->group, &r, r.part, r.part_max, r.part_sum);
        finish(t, &w, r.o, r.max, r.sum);
    }
}

/* ---- an item is one chunk of keys; partials are folded in a second pass ---- */

static ptrdiff_t part_floats(const struct attention *t) { return t->rows * (t->e_padded + 2); }

static void chunk_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    struct room r = room_of(t, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        /* All heads of a chunk before the next chunk: in (batch, seq, heads, dim) they share their pages. */
        const ptrdiff_t pairs = t->a->batch * t->a->kv_heads, pair = i % pairs, chunk = i / pairs;
        const struct where w = where_of(t, pair / t->a->kv_heads, pair % t->a->kv_heads, 0);
        r.part = t->parts + (pair * t->chunks + chunk) * part_floats(t);
        r.part_max = r.part + t->rows * t->e_padded;
        r.part_sum = r.part_max + t->rows;
        load_queries(t, &w, r.q);
        if (!attend_chunk(t, &w, &r, chunk))
            for (ptrdiff_t row = 0; row < t->rows; row++) r.part_max[row] = -INFINITY, r.part_sum[row] = 0.0f;
    }
}

static void fold_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    const struct room r = room_of(t, rank);
    for (ptrdiff_t pair = begin; pair < end; pair++) {
        const struct where w = where_of(t, pair / t->a->kv_heads, pair % t->a->kv_heads, 0);
        clear(&r, t->rows);
        for (ptrdiff_t c = 0; c < t->chunks; c++) {
            const float *part = t->parts + (pair * t->chunks + c) * part_floats(t);
            fold(t, t->rows, &r, part, part + t->rows * t->e_padded, part + t->rows * t->e_padded + t->rows);
        }
        finish(t, &w, r.o, r.max, r.sum);
    }
}

/* Nanoseconds for one block against `keys` keys: multiply-adds, or the keys' and values' bytes. */
static double item_ns(const struct attention *t, ptrdiff_t keys) {
    double values = (double)keys * (double)(t->a->head_dim + t->a->v_dim);
    double flops = 2.0 * (double)t->rows * values, bytes = values * 4;
    return (flops / 60 > bytes / 12 ? flops / 60 : bytes / 12) + 200;
}

static fc_status by_blocks(struct attention *t) {
    const ptrdiff_t items = t->blocks * t->a->batch * t->a->kv_heads;
    const double ns = item_ns(t, t->a->window && t->a->window < t->a->kv_len ? t->a->window : t->a->kv_len);
    int threads = fc_threads_for(items, ns);
    if (fc_scratch_alloc(&t->scratch, threads, (size_t)room_floats(t) * 4)) return FC_NO_MEMORY;
    fc_status status = fc_dynamic(threads, items, ns, block_body, t);
    fc_scratch_free(&t->scratch);
    return status;
}

static fc_status by_chunks(struct attention *t, int threads) {
    const ptrdiff_t pairs = t->a->batch * t->a->kv_heads, items = pairs * t->chunks;
    fc_scratch parts;
    if (fc_scratch_alloc(&parts, 1, (size_t)(items * part_floats(t)) * 4)) return FC_NO_MEMORY;
    if (fc_scratch_alloc(&t->scratch, threads, (size_t)room_floats(t) * 4)) {
        fc_scratch_free(&parts);
        return FC_NO_MEMORY;
    }
    t->parts = (float *)(void *)parts.base;
    fc_status status = fc_dynamic(threads, items, item_ns(t, FC_KV_CHUNK), chunk_body, t);
    if (status == FC_OK) fold_body(t, 0, pairs, 0);
    fc_scratch_free(&t->scratch);
    fc_scratch_free(&parts);
    return status;
}

fc_status fc_attention(const fc_attention_args *a) {
    struct attention t = {.a = a, .group = a->heads / a->kv_heads, .chunks = (a->kv_len + FC_KV_CHUNK - 1) / FC_KV_CHUNK};
    if (a->kv_lens) {
        t.chunks = 0;
        for (ptrdiff_t b = 0; b < a->batch; b++) {
            ptrdiff_t chunks = (a->kv_lens[b] + FC_KV_CHUNK - 1) / FC_KV_CHUNK;
            if (chunks > t.chunks) t.chunks = chunks;
        }
    }
    t.block = BLOCK_ROWS / t.group > 0 ? BLOCK_ROWS / t.group : 1;
    if (t.block > a->q_len) t.block = a->q_len;
    t.blocks = (a->q_len + t.block - 1) / t.block;
    t.rows = t.block * t.group;
    t.e_padded = (a->v_dim + 15) / 16 * 16;
    t.direct_v = a->kv_type == FC_F32 && a->v_dim % 16 == 0 && a->v_stride[1] % 4 == 0;
    const ptrdiff_t pairs = a->batch * a->kv_heads;
    if (t.blocks == 1 && t.chunks > 1 && !a->window)
        return by_chunks(&t, fc_threads_for(pairs * t.chunks, item_ns(&t, FC_KV_CHUNK)));
    return by_blocks(&t);
}

/* ---- merging ---- */

struct merge {
    fc_dtype type;
    char *out;
    float *lse;
    const char *a, *b;
    const float *lse_a, *lse_b;
    ptrdiff_t n, size;
};

static void merge_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct merge *m = ctx;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        /* A NaN on either side must win. */
        float la = m->lse_a[i], lb = m->lse_b[i], top = la > lb || la != la ? la : lb, wa = 0.0f, wb = 0.0f;
        if (top != -INFINITY) wa = expf(la - top), wb = expf(lb - top);
        float total = wa + wb;
        fc_k->merge[m->type](m->out + i * m->n * m->size, m->a + i * m->n * m->size, m->b + i * m->n * m->size,
                             total == 0.0f ? 0.0f : wa / total, total == 0.0f ? 0.0f : wb / total, m->n);
        m->lse[i] = total == 0.0f ? -INFINITY : top + logf(total);
    }
}

fc_status fc_merge_attention(fc_dtype type, void *out, float *lse, const void *a, const float *lse_a, const void *b,
                             const float *lse_b, ptrdiff_t rows, ptrdiff_t n) {
    struct merge m = {type, out, lse, a, b, lse_a, lse_b, n, type == FC_F32 ? 4 : 2};
    double ns = (double)n * 0.3 + 40;
    return fc_static(fc_threads_for(rows, ns), rows, ns, merge_body, &m);
}

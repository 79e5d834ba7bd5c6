/* Attention with online softmax over chunks of FC_KV_CHUNK keys at absolute positions 0, 256, 512, ...
 *
 * A row's result is its chunks' partials (max, sum, o), each started fresh and folded in chunk order. A prompt
 * fed whole, in pieces or token by token, alone or in a batch, on any threads, runs that same arithmetic, hence the
 * same bits. Keys and values are multiplied in the panels of a cache's page (kv.h); those of plain arrays are brought
 * into such pages first. Work is a block of queries of one key/value head (all R query heads of the group share its
 * keys), or, where blocks are too few, single chunks whose partials are folded afterwards.
 *
 * Keys outside a row's [lo, hi) (visible.h) are not multiplied at all: a NaN there changes nothing.
 * A key that `mask` hides (False, or -inf) counts for nothing either, whatever it and its value hold. No (S, T) matrix exists: scores are (block, 256). */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kv.h"
#include "rows.h"
#include "visible.h"

enum {
    BLOCK_ROWS = 96,
    QUERIES_AHEAD = 4,
    STRIP = 6,      /* rows whose values are multiplied together */
    SCORE_ROWS = 24, /* rows whose keys are, where rows end at different ones */
    LD_SCORES = FC_KV_CHUNK + 16,
    PACKED_BYTES = 64 << 20, /* of plain keys and values brought into pages at once, if one head has less */
    PARTS_BYTES = 1 << 20,   /* of partials at once: they stay in L2 and L3 */
    RUN = 4                  /* chunks of neighbouring heads that a thread takes: what it fetches ahead is the next */
};

/* FLOATS: float32. BF16: where the ISA multiplies pairs of bfloat16. INT16, against int8: each query, and each row of a
 * chunk's weights, has a scale; the sums of products are exact. */
enum form { FLOATS, BF16, INT16 };

struct attention {
    const struct fc_kernels *k;
    const fc_attention_args *a;
    int threads; /* of all its regions at most: the scratch is for as many */
    void (*gemm)(const struct fc_gemm *);
    enum form form;          /* of queries and weights */
    ptrdiff_t x_size;        /* their bytes */
    float most;              /* INT16: of a query's channel, so that the sums of its products fit */
    ptrdiff_t unit;          /* keys, or channels of a key, in a line */
    ptrdiff_t group;         /* R: query heads per key/value head */
    ptrdiff_t block, blocks; /* queries a block, blocks a sequence */
    ptrdiff_t rows, d_padded, e_padded; /* rows of a block = block * R; D in whole lines; E in whole panels */
    /* The pages: a cache's, or, for plain arrays, those of pairs (b, g) from first_pair on, or a thread's one. */
    fc_kv_cache kv;
    ptrdiff_t first_pair, pairs;
    int own_page;
    fc_scratch scratch;
    /* one item a chunk: */
    ptrdiff_t first_chunk, chunks, run; /* of the segment at hand; chunks an item */
    float *parts;                  /* (B, G, chunks) partials: o (rows, e_padded), max (rows), sum (rows) */
    float *folded;                 /* (B, G) likewise */
    struct fc_range *see;          /* (B, S) */
};

/* A thread's scratch. */
struct room {
    char *q;       /* (rows, d_padded), scaled unless bfloat16; int16 ones lie as far apart as float32 */
    float *q_scale, *w_scale; /* (rows), INT16 */
    float *scores; /* (rows, LD_SCORES) */
    float *part, *part_max, *part_sum; /* (rows, e_padded), (rows), (rows) */
    float *o, *max, *sum;              /* the same, folded so far */
    float *bias;   /* (256) */
    void *store;   /* of fc_kv_store */
    void *page;    /* own_page */
};

static ptrdiff_t chunks_of(ptrdiff_t keys) { return (keys + FC_KV_CHUNK - 1) / FC_KV_CHUNK; }

static ptrdiff_t room_floats(const struct attention *t) {
    const ptrdiff_t row = fc_plus(fc_plus(t->d_padded, LD_SCORES + 6), fc_times(2, t->e_padded));
    return fc_plus(fc_times(t->rows, row), FC_KV_CHUNK + 128);
}
static ptrdiff_t store_bytes(const struct attention *t) {
    return t->a->cache ? 0 : fc_round_up((ptrdiff_t)fc_kv_store_bytes(&t->kv), 64);
}
static size_t room_bytes(const struct attention *t) {
    const ptrdiff_t page = t->own_page ? fc_kv_page_bytes(&t->kv) : 0;
    return (size_t)fc_plus(fc_plus(fc_times(room_floats(t), 4), store_bytes(t)), page);
}

static struct room room_of(const struct attention *t, int rank) {
    struct room r;
    char *base = fc_scratch_of(&t->scratch, rank);
    r.store = base;
    r.page = base + store_bytes(t);
    float *p = (float *)(void *)((char *)r.page + (t->own_page ? fc_kv_page_bytes(&t->kv) : 0));
    r.scores = p, p += t->rows * LD_SCORES;
    r.part = p, p += t->rows * t->e_padded;
    r.o = p, p += t->rows * t->e_padded;
    r.q = (char *)p, p += t->rows * t->d_padded;
    r.bias = p, p += FC_KV_CHUNK;
    r.part_max = p, p += t->rows;
    r.part_sum = p, p += t->rows;
    r.q_scale = p, p += t->rows;
    r.w_scale = p, p += t->rows;
    r.max = p, p += t->rows;
    r.sum = p;
    return r;
}

/* One block of queries of one sequence and group, and what each of them sees. */
struct where {
    ptrdiff_t b, g, q0, queries, kv_len;
    const struct fc_range *see; /* (queries) */
};

static struct where where_of(const struct attention *t, ptrdiff_t pair, ptrdiff_t block) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t b = pair / a->kv_heads, q0 = block * t->block;
    return (struct where){b, pair % a->kv_heads, q0, fc_smaller(t->block, a->q_len - q0), fc_keys_of(a, b), NULL};
}

/* A chunk of n keys from key0 on; of a block's rows (query, head) from `row` on, [lo, hi) are the keys that any of them
 * sees, [from, to) those that all of them see: intervals only move on from query to query. */
struct chunk {
    ptrdiff_t key0, n;
};
struct shared {
    ptrdiff_t lo, from, to, hi;
};

static inline struct fc_range see_in(const struct attention *t, const struct where *w, ptrdiff_t row, struct chunk c) {
    return fc_visible_in(w->see[row / t->group], c.key0, c.n);
}

static struct shared seen_by(const struct attention *t, const struct where *w, ptrdiff_t row, ptrdiff_t rows,
                             struct chunk c) {
    const struct fc_range first = see_in(t, w, row, c), last = see_in(t, w, row + rows - 1, c);
    return (struct shared){.lo = first.lo, .from = last.lo, .to = first.hi, .hi = last.hi};
}

/* Rows (query, head) of a block. A token's heads lie together and tokens far apart: the next ones are asked for. */
static void load_queries(const struct attention *t, const struct where *w, const struct room *to) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t size = t->form == BF16 ? 2 : 4, pad = (t->d_padded - a->head_dim) * size;
    const ptrdiff_t bytes = t->group * a->head_dim * fc_size_of(a->q_type);
    char *q = to->q;
    float *scale = to->q_scale;
    const char *block =
        (const char *)a->q + w->b * a->q_stride[0] + w->q0 * a->q_stride[1] + w->g * t->group * a->q_stride[2];
    for (ptrdiff_t i = 0; i < w->queries; i++) {
        const char *from = block + i * a->q_stride[1];
        for (ptrdiff_t at = 0; i + QUERIES_AHEAD < w->queries && at < bytes; at += 64)
            __builtin_prefetch(from + QUERIES_AHEAD * a->q_stride[1] + at);
        for (ptrdiff_t r = 0; r < t->group; r++, from += a->q_stride[2], q += t->d_padded * size, scale++) {
            if (t->form == BF16) t->k->to_bf16[a->q_type]((uint16_t *)(void *)q, from, a->head_dim);
            else t->k->to_f32[a->q_type]((float *)(void *)q, from, a->head_dim, a->scale);
            memset(q + a->head_dim * size, 0, (size_t)pad);
            if (t->form == INT16) t->k->to_s16((int16_t *)(void *)q, scale, (const float *)(void *)q, t->d_padded, t->most);
        }
    }
}

/* ---- plain arrays into pages ---- */

static void store_chunk(const struct attention *t, ptrdiff_t pair, ptrdiff_t chunk, void *page, void *scratch) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t b = pair / a->kv_heads, g = pair % a->kv_heads, key0 = chunk * FC_KV_CHUNK;
    const ptrdiff_t n = fc_smaller(FC_KV_CHUNK, fc_keys_of(a, b) - key0);
    const fc_kv_head head = fc_kv_head_at(&t->kv, page, 0);
    const fc_append_args as = {.cache = &t->kv, .type = a->kv_type, .k_stride = {0, a->k_stride[1], 0},
                               .v_stride = {0, a->v_stride[1], 0}};
    fc_kv_store(t->k, &as, &head, 0, n, (const char *)a->k + b * a->k_stride[0] + key0 * a->k_stride[1] + g * a->k_stride[2],
                (const char *)a->v + b * a->v_stride[0] + key0 * a->v_stride[1] + g * a->v_stride[2], 0, scratch);
}

static void pack_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    const struct room r = room_of(t, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t pair = t->first_pair + i / t->kv.pages_a_row, chunk = i % t->kv.pages_a_row;
        const struct fc_range see = fc_visible_to(t->a, pair / t->a->kv_heads, 0, t->a->q_len - 1);
        if (chunk * FC_KV_CHUNK < see.hi && (chunk + 1) * FC_KV_CHUNK > see.lo)
            store_chunk(t, pair, chunk, t->kv.pages[i], r.store);
    }
}

static fc_kv_head head_of(const struct attention *t, const struct where *w, const struct room *r, ptrdiff_t chunk) {
    if (t->a->cache) return fc_kv_head_of(&t->kv, w->b, w->g, chunk);
    if (t->own_page) return fc_kv_head_at(&t->kv, r->page, 0);
    return fc_kv_head_of(&t->kv, w->b * t->a->kv_heads + w->g - t->first_pair, 0, chunk);
}

/* ---- one chunk ---- */

/* What the mask adds to the scores of the keys that a row sees; `bias` holds it. */
static const float *load_bias(const struct attention *t, const struct where *w, ptrdiff_t row, struct chunk c, float *bias) {
    const fc_attention_args *a = t->a;
    const struct fc_range see = see_in(t, w, row, c);
    const ptrdiff_t q = w->q0 + row / t->group, head = w->g * t->group + row % t->group;
    const ptrdiff_t key = c.key0 + see.lo, n = see.hi - see.lo;
    const char *mask = (const char *)a->mask + w->b * a->mask_stride[0] + head * a->mask_stride[1] +
                       q * a->mask_stride[2] + key * a->mask_stride[3];
    ptrdiff_t stored = a->mask_stride[3] ? n : 1;
    if (a->mask_is_bool) t->k->bias_from_bool(bias, (const uint8_t *)mask, stored);
    else t->k->to_f32[a->mask_type](bias, mask, stored, 1.0f);
    for (ptrdiff_t i = stored; i < n; i++) bias[i] = bias[0];
    return bias;
}

/* scores (rows [row, row + rows), keys [lo, hi) and those of their panels) = q k^T */
static void score(const struct attention *t, const struct room *r, const fc_kv_head *h, ptrdiff_t row, ptrdiff_t rows,
                  ptrdiff_t lo, ptrdiff_t hi) {
    const ptrdiff_t first = lo / 16, last = (hi + 15) / 16, ldq = t->d_padded * (t->form == BF16 ? 2 : 4);
    if (hi <= lo) return;
    t->gemm(&(struct fc_gemm){
        .c = r->scores + row * LD_SCORES + first * 16, .ldc = LD_SCORES * 4, .x = r->q + row * ldq, .ldx = ldq,
        .w = h->k + first * h->k_panel, .panel_stride = h->k_panel, .m = rows,
        .panels = last - first, .lines = h->k_lines});
}

/* scores [from, to) of a row -> weights, in the form that values are multiplied by */
static void weights(const struct attention *t, const struct room *r, const fc_kv_head *h, ptrdiff_t row, ptrdiff_t from,
                    ptrdiff_t to, const float *bias) {
    float *s = r->scores + row * LD_SCORES;
    const struct fc_attention_row one = {
        .s = s + from, .k_scale = h->k_scale ? h->k_scale + from : NULL, .v_scale = h->v_scale ? h->v_scale + from : NULL,
        .bias = bias,
        .scale = t->form == FLOATS ? 1.0f : t->form == BF16 ? t->a->scale : r->q_scale[row],
        .softcap = t->a->softcap,
        .q = (int16_t *)(void *)s + from,
        .w_scale = &r->w_scale[row]};
    t->k->attention_row(&one, to - from, &r->part_max[row], &r->part_sum[row]);
    if (t->form == BF16) t->k->to_bf16[FC_F32]((uint16_t *)(void *)s + from, s + from, to - from);
}

static void weights_of_block(const struct attention *t, const struct where *w, const struct room *r, const fc_kv_head *h,
                             struct chunk c) {
    const fc_attention_args *a = t->a;
    const float *bias = NULL;
    for (ptrdiff_t row = 0; row < w->queries * t->group; row++) {
        const struct fc_range see = see_in(t, w, row, c);
        if (a->mask && (row % t->group == 0 || a->mask_stride[1])) bias = load_bias(t, w, row, c, r->bias);
        weights(t, r, h, row, see.lo, see.hi, bias);
    }
}

/* part (rows [row, row + rows)) (+)= weights[:, lo:hi) V[lo:hi), whole lines */
static void weigh_lines(const struct attention *t, const struct room *r, const fc_kv_head *h, ptrdiff_t row, ptrdiff_t rows,
                        ptrdiff_t lo, ptrdiff_t hi, int accumulate) {
    if (hi <= lo && accumulate) return;
    t->gemm(&(struct fc_gemm){
        .c = r->part + row * t->e_padded, .ldc = t->e_padded * 4,
        .x = (const char *)(r->scores + row * LD_SCORES) + lo * t->x_size, .ldx = LD_SCORES * 4,
        .w = h->v + lo / t->unit * h->line, .panel_stride = h->v_panel, .m = rows,
        .panels = t->e_padded / 16, .lines = (hi - lo) / t->unit, .accumulate = accumulate});
}

/* part (row) += weights[lo:hi) V[lo:hi) */
static void weigh_ends(const struct attention *t, const struct room *r, const fc_kv_head *h, ptrdiff_t row, ptrdiff_t lo,
                       ptrdiff_t hi) {
    if (hi > lo)
        t->k->attention_ends(&(struct fc_gemm){.c = r->part + row * t->e_padded, .x = r->scores + row * LD_SCORES, .w = h->v,
                                               .panel_stride = h->v_panel, .panels = t->e_padded / 16}, t->kv.type, lo, hi);
}

/* part = w_scale weights V for rows: zeros stand for keys that some of them do not see. Integer sums have no order. */
static void weigh_integers(const struct attention *t, const struct where *w, const struct room *r, const fc_kv_head *h,
                           ptrdiff_t row, ptrdiff_t rows, struct chunk c) {
    const struct shared see = seen_by(t, w, row, rows, c);
    const ptrdiff_t begin = see.lo / t->unit * t->unit, end = fc_round_up(see.hi, t->unit);
    for (ptrdiff_t i = row; i < row + rows; i++) {
        int16_t *weight = (int16_t *)(void *)(r->scores + i * LD_SCORES);
        const struct fc_range own = see_in(t, w, i, c);
        memset(weight + begin, 0, (size_t)(own.lo - begin) * sizeof *weight);
        memset(weight + own.hi, 0, (size_t)(end - own.hi) * sizeof *weight);
    }
    weigh_lines(t, r, h, row, rows, begin, end, 0);
    for (ptrdiff_t i = row; i < row + rows; i++) {
        float *part = r->part + i * t->e_padded;
        t->k->from_f32[FC_F32](part, part, t->e_padded, r->w_scale[i]);
    }
}

/* part = weights V for rows: the keys that all of them see in whole lines and at once, the ends of each on its own: rows
 * take their keys in order, so the bits are those of a row alone. */
static void weigh_rows(const struct attention *t, const struct where *w, const struct room *r, const fc_kv_head *h,
                       ptrdiff_t row, ptrdiff_t rows, struct chunk c) {
    const struct shared see = seen_by(t, w, row, rows, c);
    const ptrdiff_t begin = fc_round_up(see.from, t->unit), last = see.to / t->unit * t->unit;
    const ptrdiff_t end = last > begin ? last : begin;
    const int heads = see.lo < begin; /* some row begins before the common keys: the first does */
    if (heads) memset(r->part + row * t->e_padded, 0, (size_t)(rows * t->e_padded) * 4);
    for (ptrdiff_t i = row; heads && i < row + rows; i++) {
        const struct fc_range own = see_in(t, w, i, c);
        weigh_ends(t, r, h, i, own.lo, fc_smaller(own.hi, begin));
    }
    weigh_lines(t, r, h, row, rows, begin, end, heads);
    for (ptrdiff_t i = row; i < row + rows; i++) {
        const struct fc_range own = see_in(t, w, i, c);
        weigh_ends(t, r, h, i, own.lo > end ? own.lo : end, own.hi);
    }
}

/* A hidden key weighs 0, and 0 times an infinity or a NaN in its value is NaN: a row where that may be is made again, from
 * the runs of keys that it sees. Their chain is the same, so nothing else changes. */
static void weigh_unhidden(const struct attention *t, const struct where *w, const struct room *r, const fc_kv_head *h,
                           ptrdiff_t row, struct chunk c) {
    float *part = r->part + row * t->e_padded;
    int finite;
    t->k->all_finite(&finite, part, t->e_padded);
    if (finite || r->part_sum[row] == 0.0f) return;
    const struct fc_range see = see_in(t, w, row, c);
    const float *bias = load_bias(t, w, row, c, r->bias) - see.lo;
    memset(part, 0, (size_t)t->e_padded * 4);
    for (ptrdiff_t lo = see.lo, hi; lo < see.hi; lo = hi + 1) {
        for (hi = lo; hi < see.hi && bias[hi] != -INFINITY;) hi++;
        weigh_ends(t, r, h, row, lo, hi);
    }
}

/* part, part_max, part_sum of a chunk; returns 0 if the block sees none of it. */
static int attend_chunk(const struct attention *t, const struct where *w, const struct room *r, ptrdiff_t chunk) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t key0 = chunk * FC_KV_CHUNK, rows = w->queries * t->group;
    const struct chunk c = {key0, fc_smaller(w->kv_len - key0, FC_KV_CHUNK)};
    const struct shared all = seen_by(t, w, 0, rows, c);
    if (all.hi <= all.lo) return 0;
    if (t->own_page) store_chunk(t, w->b * a->kv_heads + w->g, chunk, r->page, r->store);
    const fc_kv_head h = head_of(t, w, r, chunk);
    const int same = all.lo == all.from && all.to == all.hi;
    for (ptrdiff_t row = 0, count = same ? rows : SCORE_ROWS; row < rows; row += count) {
        const ptrdiff_t these = fc_smaller(count, rows - row);
        const struct shared see = seen_by(t, w, row, these, c);
        score(t, r, &h, row, these, see.lo, see.hi);
    }
    weights_of_block(t, w, r, &h, c);
    for (ptrdiff_t row = 0, count = same ? rows : STRIP; row < rows; row += count)
        (t->form == INT16 ? weigh_integers : weigh_rows)(t, w, r, &h, row, fc_smaller(count, rows - row), c);
    for (ptrdiff_t row = 0; a->mask && t->form != INT16 && row < rows; row++) weigh_unhidden(t, w, r, &h, row, c);
    return 1;
}

/* ---- the end of a row ---- */

static void finish_row(const struct attention *t, const struct where *w, ptrdiff_t row, float *o, float top, float total) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t q = w->q0 + row / t->group, head = w->g * t->group + row % t->group;
    float keep = 1.0f;
    if (total == 0.0f) {
        top = -INFINITY, keep = 0.0f;
        for (ptrdiff_t j = 0; j < a->v_dim; j++) o[j] = 0.0f;
    }
    const float sink = a->sinks ? fc_get_float(a->sinks, head) : -INFINITY;
    if (sink != -INFINITY) {
        const float higher = sink > top ? sink : top;
        keep = total == 0.0f ? 0.0f : expf(top - higher);
        total = total * keep + expf(sink - higher);
        top = higher;
    }
    if (a->lse)
        fc_put_float(a->lse, (w->b * a->q_len + q) * a->heads + head, total == 0.0f ? -INFINITY : top + logf(total));
    t->k->from_f32[a->q_type]((char *)a->out + w->b * a->out_stride[0] + q * a->out_stride[1] + head * a->out_stride[2], o,
                              a->v_dim, total == 0.0f ? 0.0f : keep / total);
}

/* ---- an item is a block of queries; later blocks see more keys, so they go first ---- */

static void block_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    const struct room r = room_of(t, rank);
    const ptrdiff_t pairs = t->a->cache ? t->a->batch * t->a->kv_heads : t->pairs;
    struct fc_range see[BLOCK_ROWS];
    for (ptrdiff_t i = begin; i < end; i++) {
        struct where w = where_of(t, t->first_pair + i % pairs, t->blocks - 1 - i / pairs);
        const ptrdiff_t rows = w.queries * t->group;
        for (ptrdiff_t q = 0; q < w.queries; q++) see[q] = fc_visible(t->a, w.b, w.q0 + q);
        const ptrdiff_t lo = see[0].lo, hi = see[w.queries - 1].hi;
        w.see = see;
        load_queries(t, &w, &r);
        for (ptrdiff_t row = 0; row < rows; row++) r.max[row] = -INFINITY, r.sum[row] = 0.0f;
        for (ptrdiff_t c = lo / FC_KV_CHUNK; c * FC_KV_CHUNK < hi; c++) {
            if (!attend_chunk(t, &w, &r, c)) continue;
            for (ptrdiff_t row = 0; row < rows; row++)
                t->k->attention_fold(r.o + row * t->e_padded, &r.max[row], &r.sum[row], r.part + row * t->e_padded,
                                     r.part_max[row], r.part_sum[row], t->e_padded);
        }
        for (ptrdiff_t row = 0; row < rows; row++) finish_row(t, &w, row, r.o + row * t->e_padded, r.max[row], r.sum[row]);
    }
}

/* Nanoseconds for one block against `keys` keys: multiply-adds, or the keys' and values' bytes. */
static double item_ns(const struct attention *t, ptrdiff_t keys) {
    double values = (double)keys * (double)(t->a->head_dim + t->a->v_dim);
    double flops = 2.0 * (double)t->rows * values, bytes = values * 4;
    return (flops / 80 > bytes / 20 ? flops / 80 : bytes / 20) + 200;
}

static fc_status attend_blocks(struct attention *t, ptrdiff_t pairs) {
    const ptrdiff_t items = t->blocks * pairs, kv_len = t->a->kv_len;
    const double ns = item_ns(t, t->a->window && t->a->window < kv_len ? t->a->window : kv_len);
    return fc_dynamic(fc_threads_within(t->threads, items, ns), items, ns, block_body, t);
}

/* Pages for `pairs` heads' keys and values; NULL without memory. */
static void **new_pages(struct attention *t, ptrdiff_t pairs) {
    const size_t count = (size_t)fc_times(pairs, t->kv.pages_a_row), bytes = (size_t)fc_kv_page_bytes(&t->kv);
    if (count > SIZE_MAX / 2 / (bytes + sizeof(void *))) return NULL;
    char *block = malloc(count * (bytes + sizeof(void *)) + 64);
    if (!block) return NULL;
    void **table = (void **)(void *)block;
    char *first = (char *)(((uintptr_t)(table + count) + 63) / 64 * 64);
    for (size_t i = 0; i < count; i++) table[i] = first + i * bytes;
    t->kv.pages = table;
    return table;
}

/* Heads' keys and values into pages, as many heads as PACKED_BYTES allow, then their blocks. */
static fc_status pack_and_attend(struct attention *t) {
    const ptrdiff_t all = t->a->batch * t->a->kv_heads, each = fc_times(t->kv.pages_a_row, fc_kv_page_bytes(&t->kv));
    const ptrdiff_t some = each > 0 && PACKED_BYTES / each < all ? (PACKED_BYTES / each > 0 ? PACKED_BYTES / each : 1) : all;
    void **pages = new_pages(t, some);
    fc_status status = pages ? FC_OK : FC_NO_MEMORY;
    for (t->first_pair = 0; status == FC_OK && t->first_pair < all; t->first_pair += some) {
        t->pairs = fc_smaller(some, all - t->first_pair);
        const ptrdiff_t items = t->pairs * t->kv.pages_a_row;
        const double ns = (double)(fc_smaller(FC_KV_CHUNK, t->a->kv_len) * (t->a->head_dim + t->a->v_dim)) * 0.4;
        status = fc_static(fc_threads_within(t->threads, items, ns), items, ns, pack_body, t);
        if (status == FC_OK) status = attend_blocks(t, t->pairs);
    }
    free(pages);
    return status;
}

static fc_status by_blocks(struct attention *t) {
    if (fc_scratch_alloc(t->a->workspace, &t->scratch, t->threads, room_bytes(t))) return FC_NO_MEMORY;
    fc_status status = t->a->cache ? attend_blocks(t, t->a->batch * t->a->kv_heads) : pack_and_attend(t);
    fc_scratch_free(&t->scratch);
    return status;
}

/* ---- an item is a run of chunks of keys; partials are folded after each segment of chunks ---- */

static ptrdiff_t part_floats(const struct attention *t) { return fc_times(t->rows, fc_plus(t->e_padded, 2)); }

static void chunk_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    struct room r = room_of(t, rank);
    const ptrdiff_t pairs = t->a->batch * t->a->kv_heads;
    for (ptrdiff_t i = begin * t->run; i < fc_smaller(end * t->run, pairs * t->chunks); i++) {
        /* All heads of a chunk before the next chunk: in (batch, seq, heads, dim) they share their pages. */
        const ptrdiff_t pair = i % pairs, chunk = i / pairs;
        struct where w = where_of(t, pair, 0);
        w.see = t->see + w.b * t->a->q_len;
        r.part = t->parts + (pair * t->chunks + chunk) * part_floats(t);
        r.part_max = r.part + t->rows * t->e_padded;
        r.part_sum = r.part_max + t->rows;
        load_queries(t, &w, &r);
        if (!attend_chunk(t, &w, &r, t->first_chunk + chunk))
            for (ptrdiff_t row = 0; row < t->rows; row++) r.part_max[row] = -INFINITY, r.part_sum[row] = 0.0f;
    }
}

/* An item is a row of a pair: its partials of the segment, in order. */
static void fold_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t pair = i / t->rows, row = i % t->rows, maxima = t->rows * t->e_padded;
        float *to = t->folded + pair * part_floats(t);
        for (ptrdiff_t c = 0; c < t->chunks; c++) {
            const float *part = t->parts + (pair * t->chunks + c) * part_floats(t);
            t->k->attention_fold(to + row * t->e_padded, to + maxima + row, to + maxima + t->rows + row,
                                 part + row * t->e_padded, part[maxima + row], part[maxima + t->rows + row], t->e_padded);
        }
    }
}

static fc_status attend_chunks(struct attention *t, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t segment) {
    const ptrdiff_t pairs = t->a->batch * t->a->kv_heads;
    fc_status status = FC_OK;
    for (t->first_chunk = begin; t->first_chunk < end && status == FC_OK; t->first_chunk += segment) {
        t->chunks = fc_smaller(segment, end - t->first_chunk);
        const double ns = item_ns(t, FC_KV_CHUNK), fold_ns = (double)(t->chunks * t->e_padded) * 0.1;
        const int threads = fc_threads_within(t->threads, pairs * t->chunks, ns);
        t->run = fc_smaller(RUN, (pairs * t->chunks + 8 * threads - 1) / (8 * threads));
        const ptrdiff_t items = (pairs * t->chunks + t->run - 1) / t->run;
        status = fc_dynamic(threads, items, ns * (double)t->run, chunk_body, t);
        if (status == FC_OK)
            status = fc_static(fc_threads_within(t->threads, pairs * t->rows, fold_ns), pairs * t->rows, fold_ns, fold_body, t);
    }
    return status;
}

static fc_status by_chunks(struct attention *t, ptrdiff_t begin, ptrdiff_t end) {
    const ptrdiff_t pairs = t->a->batch * t->a->kv_heads, bytes = fc_times(fc_times(pairs, part_floats(t)), 4);
    const ptrdiff_t segment = fc_smaller(end - begin, PARTS_BYTES / bytes > 8 ? PARTS_BYTES / bytes : 8);
    const ptrdiff_t queries = t->a->batch * t->a->q_len, see_bytes = fc_times(queries, sizeof(struct fc_range));
    fc_scratch parts;
    t->own_page = !t->a->cache;
    const size_t parts_bytes = (size_t)fc_plus(see_bytes, fc_times(bytes, segment + 1));
    if (fc_scratch_alloc(t->a->workspace, &parts, 1, parts_bytes)) return FC_NO_MEMORY;
    if (fc_scratch_alloc(t->a->workspace, &t->scratch, t->threads, room_bytes(t))) {
        fc_scratch_free(&parts);
        return FC_NO_MEMORY;
    }
    t->see = (struct fc_range *)(void *)parts.base;
    for (ptrdiff_t i = 0; i < queries; i++) t->see[i] = fc_visible(t->a, i / t->a->q_len, i % t->a->q_len);
    t->folded = (float *)(void *)(t->see + queries);
    t->parts = t->folded + pairs * part_floats(t);
    for (ptrdiff_t i = 0; i < pairs * part_floats(t); i++) /* maxima -inf, sums 0 */
        t->folded[i] = i % part_floats(t) < t->rows * (t->e_padded + 1) ? -INFINITY : 0.0f;
    fc_status status = attend_chunks(t, begin, end, segment);
    for (ptrdiff_t pair = 0; pair < pairs && status == FC_OK; pair++) {
        const struct where w = where_of(t, pair, 0);
        float *o = t->folded + pair * part_floats(t), *max = o + t->rows * t->e_padded, *sum = max + t->rows;
        for (ptrdiff_t row = 0; row < t->rows; row++) finish_row(t, &w, row, o + row * t->e_padded, max[row], sum[row]);
    }
    fc_scratch_free(&t->scratch);
    fc_scratch_free(&parts);
    return status;
}

/* ---- which ---- */

/* How keys and values lie, and what multiplies them. Plain float16 becomes float32. */
static void choose_pages(struct attention *t) {
    const fc_attention_args *a = t->a;
    if (a->cache) {
        t->kv = *a->cache;
    } else {
        const ptrdiff_t pages = chunks_of(a->kv_len);
        t->kv = (fc_kv_cache){.type = a->kv_type == FC_BF16 ? FC_KV_BF16 : FC_KV_F32, .kv_heads = 1,
                              .head_dim = a->head_dim, .v_dim = a->v_dim, .pages_a_row = pages};
    }
    t->gemm = t->kv.type == FC_KV_F32 ? t->k->gemm_f32 : t->kv.type == FC_KV_BF16 ? t->k->gemm_bf16 : t->k->gemm_s8;
    t->form = t->kv.type == FC_KV_I8 ? INT16 : t->kv.type == FC_KV_BF16 && t->k->bf16_x == FC_BF16 ? BF16 : FLOATS;
    t->x_size = t->form == FLOATS ? 4 : 2;
    t->unit = t->kv.type == FC_KV_F32 ? 1 : 2;
}

fc_status fc_attention(const fc_attention_args *a) {
    if (!FC_IS_OURS(a) || (a->cache && !FC_IS_OURS(a->cache))) return FC_BAD_SIZE;
    struct attention t = {.k = fc_k, .a = a, .threads = fc_get_num_threads(), .group = a->heads / a->kv_heads};
    choose_pages(&t);
    t.block = BLOCK_ROWS / t.group > 0 ? BLOCK_ROWS / t.group : 1;
    if (t.block > a->q_len) t.block = a->q_len;
    t.blocks = (a->q_len + t.block - 1) / t.block;
    t.rows = t.block * t.group;
    t.d_padded = fc_round_up(a->head_dim, t.unit);
    t.e_padded = fc_round_up(a->v_dim, 16);
    t.most = (float)fc_smaller(INT16_MAX, INT32_MAX / 128 / (t.d_padded > 0 ? t.d_padded : 1));
    ptrdiff_t begin = PTRDIFF_MAX, end = 0;
    for (ptrdiff_t b = 0; b < a->batch; b++) {
        const struct fc_range see = fc_visible_to(a, b, 0, a->q_len - 1);
        if (see.hi <= see.lo) continue;
        if (see.lo / FC_KV_CHUNK < begin) begin = see.lo / FC_KV_CHUNK;
        if (chunks_of(see.hi) > end) end = chunks_of(see.hi);
    }
    if (t.blocks == 1 && end - begin > 1) return by_chunks(&t, begin, end);
    return by_blocks(&t);
}

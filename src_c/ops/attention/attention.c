/* Attention with online softmax over chunks of FC_KV_CHUNK keys at absolute positions 0, 256, 512, ...
 *
 * A row's result is its chunks' partials (max, sum, o), each started fresh and folded in chunk order. A prompt
 * fed whole, in pieces or token by token, alone or in a batch, on any threads, runs that same arithmetic, hence the
 * same bits. Keys and values are multiplied in the panels of a cache's page (state/kv_pages.h); those of plain arrays are brought
 * into such pages first. Work is a block of queries of one key/value head (all R query heads of the group share its
 * keys), or, where blocks are too few, single chunks whose partials are folded afterwards.
 *
 * Keys outside a row's [lo, hi) (visible.h) are not multiplied at all: a NaN there changes nothing.
 * A key that `mask` hides (False, or -inf) counts for nothing either, whatever it and its value hold. No (S, T) matrix exists: scores are (block, 256). */
#include <math.h>
#include <stdlib.h>

#include "../rows.h"
#include "attention.h"

enum {
    BLOCK_ROWS = 96,
    PACKED_BYTES = 64 << 20, /* of plain keys and values brought into pages at once, if one head has less */
    PARTS_BYTES = 1 << 20,   /* of partials at once: they stay in L2 and L3 */
    RUN = 4                  /* chunks of neighbouring heads that a thread takes: what it fetches ahead is the next */
};

static ptrdiff_t chunks_of(ptrdiff_t keys) { return (keys + FC_KV_CHUNK - 1) / FC_KV_CHUNK; }

static struct where where_of(const struct attention *t, ptrdiff_t pair, ptrdiff_t block) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t b = pair / a->kv_heads, q0 = block * t->block;
    return (struct where){b, pair % a->kv_heads, q0, fc_smaller(t->block, a->q_len - q0), fc_keys_of(a, b), NULL};
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

static void attend_query_blocks(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    const struct scratch r = fc_attention_scratch_of(t, rank);
    const ptrdiff_t pairs = t->a->cache ? t->a->batch * t->a->kv_heads : t->pairs;
    struct fc_range see[BLOCK_ROWS];
    for (ptrdiff_t i = begin; i < end; i++) {
        struct where w = where_of(t, t->first_pair + i % pairs, t->blocks - 1 - i / pairs);
        const ptrdiff_t rows = w.queries * t->group;
        for (ptrdiff_t q = 0; q < w.queries; q++) see[q] = fc_visible(t->a, w.b, w.q0 + q);
        const ptrdiff_t lo = see[0].lo, hi = see[w.queries - 1].hi;
        w.see = see;
        fc_attention_load_queries(t, &w, &r);
        for (ptrdiff_t row = 0; row < rows; row++) r.max[row] = -INFINITY, r.sum[row] = 0.0f;
        for (ptrdiff_t c = lo / FC_KV_CHUNK; c * FC_KV_CHUNK < hi; c++) {
            if (!fc_attention_chunk(t, &w, &r, c)) continue;
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
    return fc_dynamic(fc_threads_within(t->threads, items, ns), items, ns, attend_query_blocks, t);
}

/* Heads' keys and values into pages, as many heads as PACKED_BYTES allow, then their blocks. */
static fc_status pack_and_attend(struct attention *t) {
    const ptrdiff_t all = t->a->batch * t->a->kv_heads, each = fc_times(t->kv.pages_a_row, fc_kv_page_bytes(&t->kv));
    const ptrdiff_t some = each > 0 && PACKED_BYTES / each < all ? (PACKED_BYTES / each > 0 ? PACKED_BYTES / each : 1) : all;
    void **pages = fc_attention_new_pages(t, some);
    fc_status status = pages ? FC_OK : FC_NO_MEMORY;
    for (t->first_pair = 0; status == FC_OK && t->first_pair < all; t->first_pair += some) {
        t->pairs = fc_smaller(some, all - t->first_pair);
        status = fc_attention_pack_pages(t);
        if (status == FC_OK) status = attend_blocks(t, t->pairs);
    }
    free(pages);
    return status;
}

static fc_status by_blocks(struct attention *t) {
    if (fc_scratch_alloc(t->a->workspace, &t->scratch, t->threads, fc_attention_scratch_bytes(t))) return FC_NO_MEMORY;
    fc_status status = t->a->cache ? attend_blocks(t, t->a->batch * t->a->kv_heads) : pack_and_attend(t);
    fc_scratch_free(&t->scratch);
    return status;
}

/* ---- an item is a run of chunks of keys; partials are folded after each segment of chunks ---- */

static ptrdiff_t part_floats(const struct attention *t) { return fc_times(t->rows, fc_plus(t->e_padded, 2)); }

static void attend_key_chunks(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    struct scratch r = fc_attention_scratch_of(t, rank);
    const ptrdiff_t pairs = t->a->batch * t->a->kv_heads;
    for (ptrdiff_t i = begin * t->run; i < fc_smaller(end * t->run, pairs * t->chunks); i++) {
        /* All heads of a chunk before the next chunk: in (batch, seq, heads, dim) they share their pages. */
        const ptrdiff_t pair = i % pairs, chunk = i / pairs;
        struct where w = where_of(t, pair, 0);
        w.see = t->see + w.b * t->a->q_len;
        r.part = t->parts + (pair * t->chunks + chunk) * part_floats(t);
        r.part_max = r.part + t->rows * t->e_padded;
        r.part_sum = r.part_max + t->rows;
        fc_attention_load_queries(t, &w, &r);
        if (!fc_attention_chunk(t, &w, &r, t->first_chunk + chunk))
            for (ptrdiff_t row = 0; row < t->rows; row++) r.part_max[row] = -INFINITY, r.part_sum[row] = 0.0f;
    }
}

/* An item is a row of a pair: its partials of the segment, in order. */
static void fold_rows(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
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
        status = fc_dynamic(threads, items, ns * (double)t->run, attend_key_chunks, t);
        if (status == FC_OK)
            status = fc_static(fc_threads_within(t->threads, pairs * t->rows, fold_ns), pairs * t->rows, fold_ns, fold_rows, t);
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
    if (fc_scratch_alloc(t->a->workspace, &t->scratch, t->threads, fc_attention_scratch_bytes(t))) {
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
    t->a_type = t->kv.type == FC_KV_I8 ? INT16 : t->kv.type == FC_KV_BF16 && t->k->bf16_x == FC_BF16 ? BF16 : FLOATS;
    t->x_size = t->a_type == FLOATS ? 4 : 2;
    t->k_step = t->kv.type == FC_KV_F32 ? 1 : 2;
}

fc_status fc_attention(const fc_attention_args *a) {
    if (!FC_IS_OURS(a) || (a->cache && !FC_IS_OURS(a->cache))) return FC_BAD_SIZE;
    struct attention t = {.k = fc_k, .a = a, .threads = fc_get_num_threads(), .group = a->heads / a->kv_heads};
    choose_pages(&t);
    t.block = BLOCK_ROWS / t.group > 0 ? BLOCK_ROWS / t.group : 1;
    if (t.block > a->q_len) t.block = a->q_len;
    t.blocks = (a->q_len + t.block - 1) / t.block;
    t.rows = t.block * t.group;
    t.d_padded = fc_round_up(a->head_dim, t.k_step);
    t.e_padded = fc_round_up(a->v_dim, 16);
    t.qmax = (float)fc_smaller(INT16_MAX, INT32_MAX / 128 / (t.d_padded > 0 ? t.d_padded : 1));
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

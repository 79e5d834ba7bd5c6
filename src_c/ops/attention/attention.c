/* Attention with online softmax over chunks of FC_KV_CHUNK keys at absolute positions 0, 256, 512, ...
 *
 * A row's result is its chunks' partials (max, sum, o), each started fresh and folded in chunk order. A prompt
 * fed whole, in pieces or token by token, alone or in a batch, on any threads, runs that same arithmetic, hence the
 * same bits. Keys and values are multiplied in the panels of a cache's page (state/kv_pages.h); those of plain arrays,
 * and those that are to be multiplied in another precision, are brought into such pages first. Work is a block of
 * queries of one key/value head (all R query heads of the group share its keys), or, where blocks are too few, single
 * chunks whose partials are folded afterwards.
 *
 * Keys outside a row's [lo, hi) (visible.h) are not multiplied at all: a NaN there changes nothing.
 * A key that `mask` hides (False, or -inf) counts for nothing either, whatever it and its value hold. No (S, T) matrix
 * exists: scores are (block, 256). */
#include <math.h>

#include "../rows.h"
#include "attention.h"

enum {
    BLOCK_ROWS = 96,
    STRIPS_ROWS = 256, /* of strips: keys and values beyond L2 are read once for all of them */
    LONG_PROMPT = 4,   /* such blocks at least, so that threads have their share */
    PACKED_BYTES = 64 << 20, /* of plain keys and values brought into pages at once, if one head has less */
    PARTS_BYTES = 1 << 20,   /* of partials at once: they stay in L2 and L3 */
    RUN = 4,                 /* chunks of neighbouring heads that a thread takes: what it fetches ahead is the next */
    FEW_ROWS = 32            /* up to here memory is what products with a cache's page wait for, or close */
};

static ptrdiff_t chunks_of(ptrdiff_t keys) { return (keys + FC_KV_CHUNK - 1) / FC_KV_CHUNK; }

static struct where where_of(const struct attention *ctx, ptrdiff_t pair, ptrdiff_t block) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t b = pair / args->kv_heads, q0 = block * ctx->block;
    const ptrdiff_t queries = fc_smaller(ctx->block, args->q_len - q0);
    return (struct where){b, pair % args->kv_heads, q0, queries, fc_keys_of(args, b), NULL};
}

/* ---- an item is a block of queries; later blocks see more keys, so they go first; blocks of a head follow each other,
 * as its keys and values are in L2 then ---- */

static void attend_query_blocks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *ctx = context;
    const struct scratch r = fc_attention_scratch_of(ctx, rank);
    struct fc_range see[STRIPS_ROWS];
    for (ptrdiff_t i = begin; i < end; i++) {
        struct where w = where_of(ctx, ctx->first_pair + i / ctx->blocks, ctx->blocks - 1 - i % ctx->blocks);
        const ptrdiff_t rows = w.queries * ctx->group;
        const struct fc_range all = fc_visible_to(ctx->args, w.b, w.q0, w.q0 + w.queries - 1);
        const ptrdiff_t lo = all.lo, hi = all.hi;
        if (hi <= lo && ctx->args->carried && !ctx->args->finish) continue;
        for (ptrdiff_t q = 0; q < w.queries; q++) see[q] = fc_visible(ctx->args, w.b, w.q0 + q);
        w.see = see;
        if (hi > lo) fc_attention_load_queries(ctx, &w, &r);
        for (ptrdiff_t row = 0; row < rows; row++)
            fc_attention_begin_row(ctx, &w, row, r.o + row * ctx->e_padded, &r.max[row], &r.sum[row]);
        for (ptrdiff_t c = lo / FC_KV_CHUNK; c * FC_KV_CHUNK < hi; c++) {
            if (!fc_attention_chunk(ctx, &w, &r, c)) continue;
            for (ptrdiff_t row = 0; row < rows; row++)
                ctx->k->attention_fold(r.o + row * ctx->e_padded, &r.max[row], &r.sum[row],
                                       r.part + row * ctx->e_padded, r.part_max[row], r.part_sum[row], ctx->e_padded);
        }
        for (ptrdiff_t row = 0; row < rows; row++)
            fc_attention_end_row(ctx, &w, row, r.o + row * ctx->e_padded, r.max[row], r.sum[row]);
    }
}

/* Nanoseconds for one block against `keys` keys: multiply-adds, or the keys' and values' bytes. */
static double item_ns(const struct attention *ctx, ptrdiff_t keys) {
    double values = (double)keys * (double)(ctx->args->head_dim + ctx->args->v_dim);
    double flops = 2.0 * (double)ctx->rows * values, bytes = values * 4;
    return fmax(flops * fc_ns.score_flop, bytes * fc_ns.page_byte) + fc_ns.query_block;
}

static fc_status attend_blocks(struct attention *ctx, ptrdiff_t pairs) {
    const ptrdiff_t items = ctx->blocks * pairs, kv_len = ctx->args->kv_len;
    const double ns = item_ns(ctx, ctx->args->window && ctx->args->window < kv_len ? ctx->args->window : kv_len);
    return fc_dynamic(fc_threads_within(ctx->threads, items, ns), items, ns, attend_query_blocks, ctx);
}

/* Heads' keys and values into pages, as many heads as PACKED_BYTES allow, then their blocks. */
static fc_status pack_and_attend(struct attention *ctx) {
    const ptrdiff_t all = ctx->args->batch * ctx->args->kv_heads,
                    each = fc_times(ctx->kv.pages_a_row, fc_attention_page_bytes(ctx));
    const ptrdiff_t some =
        each > 0 && PACKED_BYTES / each < all ? (PACKED_BYTES / each > 0 ? PACKED_BYTES / each : 1) : all;
    fc_scratch pages = {0};
    fc_status status = fc_attention_new_pages(ctx, &pages, some) ? FC_NO_MEMORY : FC_OK;
    for (ctx->first_pair = 0; status == FC_OK && ctx->first_pair < all; ctx->first_pair += some) {
        ctx->pairs = fc_smaller(some, all - ctx->first_pair);
        status = fc_attention_pack_pages(ctx);
        if (status == FC_OK) status = attend_blocks(ctx, ctx->pairs);
    }
    fc_scratch_free(&pages);
    return status;
}

static fc_status by_blocks(struct attention *ctx) {
    if (fc_scratch_alloc_huge(ctx->args->workspace, &ctx->scratch, ctx->threads, fc_attention_scratch_bytes(ctx)))
        return FC_NO_MEMORY;
    fc_status status =
        ctx->in_place ? attend_blocks(ctx, ctx->args->batch * ctx->args->kv_heads) : pack_and_attend(ctx);
    fc_scratch_free(&ctx->scratch);
    return status;
}

/* ---- an item is a run of chunks of keys; partials are folded after each segment of chunks ---- */

static ptrdiff_t part_floats(const struct attention *ctx) { return fc_times(ctx->rows, fc_plus(ctx->e_padded, 2)); }

/* Queries as they are multiplied, made once for all chunks. Not bytes, which keep more than that of a block. */
static ptrdiff_t query_floats(const struct attention *ctx) {
    return ctx->bytes ? 0 : fc_round_up(fc_times(ctx->rows, fc_plus(ctx->d_padded, 1)), 16);
}

static void point_at_queries(const struct attention *ctx, ptrdiff_t pair, struct scratch *r) {
    r->q = (char *)(ctx->queries + pair * query_floats(ctx));
    r->q_scale = ctx->queries + pair * query_floats(ctx) + ctx->rows * ctx->d_padded;
}

/* An item is a pair. */
static void load_all_queries(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *ctx = context;
    (void)rank;
    for (ptrdiff_t pair = begin; pair < end; pair++) {
        const struct where w = where_of(ctx, pair, 0);
        struct scratch r = {0};
        point_at_queries(ctx, pair, &r);
        fc_attention_load_queries(ctx, &w, &r);
    }
}

static void attend_key_chunks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *ctx = context;
    struct scratch r = fc_attention_scratch_of(ctx, rank);
    const ptrdiff_t pairs = ctx->args->batch * ctx->args->kv_heads;
    for (ptrdiff_t i = begin * ctx->run; i < fc_smaller(end * ctx->run, pairs * ctx->chunks); i++) {
        /* All heads of a chunk before the next chunk: in (batch, seq, heads, dim) they share their pages. */
        const ptrdiff_t pair = i % pairs, chunk = i / pairs;
        struct where w = where_of(ctx, pair, 0);
        w.see = ctx->see + w.b * ctx->args->q_len;
        r.part = ctx->parts + (pair * ctx->chunks + chunk) * part_floats(ctx);
        r.part_max = r.part + ctx->rows * ctx->e_padded;
        r.part_sum = r.part_max + ctx->rows;
        if (ctx->queries) point_at_queries(ctx, pair, &r);
        else fc_attention_load_queries(ctx, &w, &r);
        if (!fc_attention_chunk(ctx, &w, &r, ctx->first_chunk + chunk))
            for (ptrdiff_t row = 0; row < ctx->rows; row++) r.part_max[row] = -INFINITY, r.part_sum[row] = 0.0f;
    }
}

/* An item is a row of a pair: its partials of the segment, in order. */
static void fold_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *ctx = context;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t pair = i / ctx->rows, row = i % ctx->rows, maxima = ctx->rows * ctx->e_padded;
        float *to = ctx->folded + pair * part_floats(ctx);
        for (ptrdiff_t c = 0; c < ctx->chunks; c++) {
            const float *part = ctx->parts + (pair * ctx->chunks + c) * part_floats(ctx);
            ctx->k->attention_fold(to + row * ctx->e_padded, to + maxima + row, to + maxima + ctx->rows + row,
                                   part + row * ctx->e_padded, part[maxima + row], part[maxima + ctx->rows + row],
                                   ctx->e_padded);
        }
    }
}

static fc_status attend_chunks(struct attention *ctx, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t segment) {
    const ptrdiff_t pairs = ctx->args->batch * ctx->args->kv_heads;
    fc_status status = FC_OK;
    for (ctx->first_chunk = begin; ctx->first_chunk < end && status == FC_OK; ctx->first_chunk += segment) {
        ctx->chunks = fc_smaller(segment, end - ctx->first_chunk);
        const double ns = item_ns(ctx, FC_KV_CHUNK), fold_ns = (double)(ctx->chunks * ctx->e_padded) * fc_ns.fold;
        const int threads = fc_threads_within(ctx->threads, pairs * ctx->chunks, ns);
        ctx->run = fc_smaller(RUN, (pairs * ctx->chunks + 8 * threads - 1) / (8 * threads));
        const ptrdiff_t items = (pairs * ctx->chunks + ctx->run - 1) / ctx->run;
        status = fc_dynamic(threads, items, ns * (double)ctx->run, attend_key_chunks, ctx);
        if (status == FC_OK)
            status = fc_static(fc_threads_within(ctx->threads, pairs * ctx->rows, fold_ns), pairs * ctx->rows, fold_ns,
                               fold_rows, ctx);
    }
    return status;
}

/* Row i of a pair's in ctx->folded */
struct folded {
    float *o, *max, *sum;
};
static struct folded folded_row(const struct attention *ctx, ptrdiff_t pair, ptrdiff_t row) {
    float *o = ctx->folded + pair * part_floats(ctx), *max = o + ctx->rows * ctx->e_padded;
    return (struct folded){o + row * ctx->e_padded, max + row, max + ctx->rows + row};
}

static void begin_rows(const struct attention *ctx) {
    for (ptrdiff_t i = 0; i < ctx->args->batch * ctx->args->kv_heads * ctx->rows; i++) {
        const struct where w = where_of(ctx, i / ctx->rows, 0);
        const struct folded f = folded_row(ctx, i / ctx->rows, i % ctx->rows);
        fc_attention_begin_row(ctx, &w, i % ctx->rows, f.o, f.max, f.sum);
    }
}

static void end_rows(const struct attention *ctx) {
    for (ptrdiff_t i = 0; i < ctx->args->batch * ctx->args->kv_heads * ctx->rows; i++) {
        const struct where w = where_of(ctx, i / ctx->rows, 0);
        const struct folded f = folded_row(ctx, i / ctx->rows, i % ctx->rows);
        fc_attention_end_row(ctx, &w, i % ctx->rows, f.o, *f.max, *f.sum);
    }
}

static fc_status load_queries(struct attention *ctx, ptrdiff_t pairs) {
    const double ns = (double)query_floats(ctx) * fc_ns.convert;
    return fc_static(fc_threads_within(ctx->threads, pairs, ns), pairs, ns, load_all_queries, ctx);
}

static fc_status by_chunks(struct attention *ctx, ptrdiff_t begin, ptrdiff_t end) {
    const ptrdiff_t pairs = ctx->args->batch * ctx->args->kv_heads,
                    bytes = fc_times(fc_times(pairs, part_floats(ctx)), 4);
    const ptrdiff_t segment = fc_smaller(end - begin, PARTS_BYTES / bytes > 8 ? PARTS_BYTES / bytes : 8);
    const ptrdiff_t queries = ctx->args->batch * ctx->args->q_len,
                    see_bytes = fc_times(queries, sizeof(struct fc_range));
    const ptrdiff_t query_bytes = fc_times(fc_times(pairs, query_floats(ctx)), 4);
    fc_scratch parts;
    ctx->own_page = !ctx->in_place;
    const size_t parts_bytes = (size_t)fc_plus(fc_plus(see_bytes, query_bytes), fc_times(bytes, segment + 1));
    if (fc_scratch_alloc(ctx->args->workspace, &parts, 1, parts_bytes)) return FC_NO_MEMORY;
    if (fc_scratch_alloc(ctx->args->workspace, &ctx->scratch, ctx->threads, fc_attention_scratch_bytes(ctx))) {
        fc_scratch_free(&parts);
        return FC_NO_MEMORY;
    }
    ctx->queries = ctx->bytes ? NULL : (float *)(void *)parts.base;
    ctx->see = (struct fc_range *)(void *)((char *)parts.base + query_bytes);
    for (ptrdiff_t i = 0; i < queries; i++)
        ctx->see[i] = fc_visible(ctx->args, i / ctx->args->q_len, i % ctx->args->q_len);
    ctx->folded = (float *)(void *)(ctx->see + queries);
    ctx->parts = ctx->folded + pairs * part_floats(ctx);
    begin_rows(ctx);
    fc_status status = ctx->bytes ? FC_OK : load_queries(ctx, pairs);
    if (status == FC_OK) status = attend_chunks(ctx, begin, end, segment);
    if (status == FC_OK) end_rows(ctx);
    fc_scratch_free(&ctx->scratch);
    fc_scratch_free(&parts);
    return status;
}

/* ---- which ---- */

static ptrdiff_t block_rows(const struct attention *ctx) {
    const int strips = ctx->bytes ? ctx->k->byte_strips != NULL : ctx->k->attention_strips && ctx->a_type == BF16;
    return strips && ctx->args->q_len >= LONG_PROMPT * STRIPS_ROWS / ctx->group ? STRIPS_ROWS : BLOCK_ROWS;
}

static void choose_blocks(struct attention *ctx) {
    ctx->block = block_rows(ctx) / ctx->group > 0 ? block_rows(ctx) / ctx->group : 1;
    if (ctx->block > ctx->args->q_len) ctx->block = ctx->args->q_len;
    ctx->blocks = (ctx->args->q_len + ctx->block - 1) / ctx->block;
    ctx->rows = ctx->block * ctx->group;
}

/* The pages of a precision. Without one: those of a cache as they are; plain float16 becomes float32. */
static fc_kv_type page_type(const fc_attention_args *args) {
    switch (args->precision) {
    case FC_PRECISION_F32: return FC_KV_F32;
    case FC_PRECISION_BF16: return FC_KV_BF16;
    case FC_PRECISION_I8: return FC_KV_I8; /* not their layout: see bytes.c */
    default: break;
    }
    return args->cache ? args->cache->type : args->kv_type == FC_BF16 ? FC_KV_BF16 : FC_KV_F32;
}

/* Whether keys and values come from memory under few rows. Chains of one or two rows are no work: gemm's shorter way
 * ahead is better for mere reading. (Tiles, and bytes, it takes several panels at a time.) */
static int is_read_in_order(const struct attention *ctx) {
    return ctx->in_place && ctx->rows <= FEW_ROWS && (ctx->sums == ON_GRID || ctx->rows > 2);
}

/* How keys and values lie, of chunks [begin, end), and what multiplies them. */
static void choose_pages(struct attention *ctx, ptrdiff_t begin, ptrdiff_t end) {
    const fc_attention_args *args = ctx->args;
    const fc_kv_type type = page_type(args);
    ctx->bytes = args->precision == FC_PRECISION_I8;
    ctx->smooth = ctx->bytes && !args->mask && !args->window;
    ctx->in_place = args->cache && args->cache->type == type && !ctx->bytes;
    ctx->first_page = begin < end ? begin : 0;
    if (ctx->in_place) ctx->kv = *args->cache;
    else ctx->kv = (fc_kv_cache){.type = type, .kv_heads = 1, .head_dim = args->head_dim, .v_dim = args->v_dim,
                                 .pages_a_row = begin < end ? end - begin : 0};
    ctx->a_type = ctx->bytes                                              ? FLOATS
                  : type == FC_KV_I8                                      ? INT16
                  : type == FC_KV_BF16 && ctx->k->bf16_x == FC_BF16 ? BF16
                                                                          : FLOATS;
    const fc_a_type multiplies[] = {[FC_KV_F32] = FC_A_F32, [FC_KV_BF16] = FC_A_BF16, [FC_KV_I8] = FC_A_I16};
    ctx->tile_rows = ctx->k->blocks[multiplies[type]].tile_rows;
    ctx->x_size = ctx->a_type == FLOATS ? 4 : 2;
    ctx->k_step = ctx->bytes ? 4 : type == FC_KV_F32 ? 1 : 2;
    ctx->grid = ctx->a_type == BF16 ? ctx->k->bf16_k : ctx->k_step;
    ctx->sums = ctx->a_type == INT16 || ctx->grid > ctx->k_step ? ON_GRID : IN_ORDER;
    void (*const products[][2])(const struct fc_gemm *) = {[FC_KV_F32] = {ctx->k->gemm_f32, ctx->k->paged_f32},
                                                           [FC_KV_BF16] = {ctx->k->gemm_bf16, ctx->k->paged_bf16},
                                                           [FC_KV_I8] = {ctx->k->gemm_s8, ctx->k->paged_s8}};
    ctx->gemm = products[type][is_read_in_order(ctx)];
}

fc_status fc_attention(const fc_attention_args *args) {
    if (!FC_IS_OURS(args) || (args->cache && !FC_IS_OURS(args->cache))) return FC_BAD_SIZE;
    struct attention ctx = {
        .k = fc_k, .args = args, .threads = fc_get_num_threads(), .group = args->heads / args->kv_heads};
    ptrdiff_t begin = PTRDIFF_MAX, end = 0;
    for (ptrdiff_t b = 0; b < args->batch; b++) {
        const struct fc_range see = fc_visible_to(args, b, 0, args->q_len - 1);
        if (see.hi <= see.lo) continue;
        if (see.lo / FC_KV_CHUNK < begin) begin = see.lo / FC_KV_CHUNK;
        if (chunks_of(see.hi) > end) end = chunks_of(see.hi);
    }
    if (begin >= end && args->carried && !args->finish) return FC_OK;
    choose_pages(&ctx, begin, end);
    choose_blocks(&ctx);
    ctx.d_padded = fc_round_up(args->head_dim, ctx.k_step);
    ctx.e_padded = fc_round_up(args->v_dim, 16);
    ctx.qmax = (float)fc_smaller(INT16_MAX, INT32_MAX / 128 / (ctx.d_padded > 0 ? ctx.d_padded : 1));
    if (ctx.blocks == 1 && end - begin > 1) return by_chunks(&ctx, begin, end);
    return by_blocks(&ctx);
}

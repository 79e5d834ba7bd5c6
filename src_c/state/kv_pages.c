/* Tokens into the pages of a key/value cache, and out of them again. forge.h has the layout. */
#include <string.h>

#include "../formats.h"
#include "../ops/rows.h"
#include "kv_pages.h"

static ptrdiff_t k_step_of(fc_kv_type type) { return type == FC_KV_F32 ? 1 : 2; }
static ptrdiff_t value_bytes(fc_kv_type type) { return type == FC_KV_F32 ? 4 : type == FC_KV_BF16 ? 2 : 1; }

/* ---- where things lie ---- */

static ptrdiff_t keys_bytes(const fc_kv_cache *c) {
    return fc_times(FC_KV_CHUNK * value_bytes(c->type), fc_round_up(c->head_dim, k_step_of(c->type)));
}
static ptrdiff_t values_bytes(const fc_kv_cache *c) {
    return fc_times(FC_KV_CHUNK * value_bytes(c->type), fc_round_up(c->v_dim, FC_PANEL));
}

static ptrdiff_t head_bytes(const fc_kv_cache *c) {
    const ptrdiff_t scales = c->type == FC_KV_I8 ? 2 * FC_KV_CHUNK * 4 : 0;
    return fc_round_up(fc_plus(fc_plus(keys_bytes(c), values_bytes(c)), scales), 64);
}

ptrdiff_t fc_kv_page_bytes(const fc_kv_cache *c) { return fc_times(c->kv_heads, head_bytes(c)); }

fc_kv_head fc_kv_head_at(const fc_kv_cache *c, void *page, ptrdiff_t g) {
    const ptrdiff_t k_step = k_step_of(c->type);
    fc_kv_head h = {.k = (char *)page + g * head_bytes(c)};
    h.v = h.k + keys_bytes(c);
    h.k_lines = fc_round_up(c->head_dim, k_step) / k_step;
    h.line = FC_PANEL * k_step * value_bytes(c->type);
    h.k_panel = h.k_lines * h.line;
    h.v_panel = FC_KV_CHUNK / k_step * h.line;
    if (c->type == FC_KV_I8) {
        h.k_scale = (float *)(void *)(h.v + values_bytes(c));
        h.v_scale = h.k_scale + FC_KV_CHUNK;
    }
    return h;
}

/* ---- in ---- */

static ptrdiff_t widest(const fc_kv_cache *c) {
    return fc_round_up(c->head_dim > c->v_dim ? c->head_dim : c->v_dim, 64);
}

/* 16 rows of float32, and one to convert or rotate in */
size_t fc_kv_store_bytes(const fc_kv_cache *c) { return (size_t)fc_times((FC_PANEL + 1) * 4, widest(c)); }

/* One channel of a key, or one key of a channel, is `size` bytes; its line-mates are `step` apart. */
static void scatter(char *to, ptrdiff_t step, const char *from, ptrdiff_t size, ptrdiff_t n) {
    if (size == 4) for (ptrdiff_t i = 0; i < n; i++) memcpy(to + i * step, from + i * 4, 4);
    else if (size == 2) for (ptrdiff_t i = 0; i < n; i++) memcpy(to + i * step, from + i * 2, 2);
    else for (ptrdiff_t i = 0; i < n; i++) to[i * step] = from[i];
}

/* row (n) of one token as the cache's type, in `to`; its scale, or 1 */
static float encode(const struct fc_kernels *kernels, fc_kv_type type, void *to, fc_dtype from_type, const void *from,
                    ptrdiff_t n) {
    const ptrdiff_t padded = fc_round_up(n, 64);
    const struct fc_rounding r = {.chunk = padded, .group = padded, .planes = 1, .qmax = 127.0f};
    struct fc_chunk whole;
    if (type != FC_KV_I8) {
        fc_convert_row(kernels, type == FC_KV_F32 ? FC_F32 : FC_BF16, to, from_type, from, n, 1.0f);
        return 1.0f;
    }
    kernels->quantize[from_type](to, from, n, padded, &r);
    memcpy(&whole, (const char *)to + padded, sizeof whole);
    return whole.scale;
}

/* The key (D) of one token: where it lies, or rotated in `stage`, rounded to the dtype of k as fc_rope does */
static const void *rotated(const struct fc_kernels *kernels, const fc_append_args *args, const void *key,
                           int64_t position, void *stage) {
    if (!args->cos) return key;
    (args->interleaved ? kernels->rope_interleaved : kernels->rope_split_halves)[args->type](
        stage, key, args->cos + position * args->rotary_pairs, args->sin + position * args->rotary_pairs,
        args->rotary_pairs, args->cache->head_dim);
    return stage;
}

/* A whole panel: as words of 4 bytes, a channel or a pair of them, it is a transposition. */
static void store_panel_of_keys(const struct fc_kernels *kernels, const fc_append_args *args, const fc_kv_head *h,
                                ptrdiff_t slot, const char *k, int64_t position, char *rows, void *stage) {
    const fc_kv_cache *c = args->cache;
    const ptrdiff_t d = c->head_dim, ld = widest(c) * 4;
    char *panel = h->k + slot / FC_PANEL * h->k_panel;
    if (c->type == FC_KV_F32 && !args->cos) {
        kernels->panel_cols[args->type]((float *)(void *)panel, k, args->k_stride[1], d, FC_PANEL);
        return;
    }
    for (ptrdiff_t i = 0; i < FC_PANEL; i++) {
        encode(kernels, c->type, rows + i * ld, args->type,
               rotated(kernels, args, k + i * args->k_stride[1], position + i, stage), d);
        if (c->type == FC_KV_BF16 && d % 2) memset(rows + i * ld + d * 2, 0, 2);
    }
    kernels->panel_cols[FC_F32]((float *)(void *)panel, rows, ld, h->k_lines, FC_PANEL);
}

static void store_keys(const struct fc_kernels *kernels, const fc_append_args *args, const fc_kv_head *h,
                       ptrdiff_t slot, ptrdiff_t n, const char *k, int64_t position, char *rows, void *stage) {
    const fc_kv_cache *c = args->cache;
    const ptrdiff_t size = value_bytes(c->type), k_step = k_step_of(c->type), d = c->head_dim;
    for (ptrdiff_t i = 0; i < n;) {
        const ptrdiff_t at = slot + i;
        if (c->type != FC_KV_I8 && at % FC_PANEL == 0 && n - i >= FC_PANEL) {
            store_panel_of_keys(kernels, args, h, at, k + i * args->k_stride[1], position + i, rows, stage);
            i += FC_PANEL;
            continue;
        }
        const void *key = rotated(kernels, args, k + i * args->k_stride[1], position + i, stage);
        const float scale = encode(kernels, c->type, rows, args->type, key, d);
        char *to = h->k + at / FC_PANEL * h->k_panel + at % FC_PANEL * k_step * size;
        scatter(to, h->line, rows, k_step * size, d / k_step);
        if (d % k_step) {
            memcpy(to + d / k_step * h->line, rows + (d - 1) * size, (size_t)size);
            memset(to + d / k_step * h->line + size, 0, (size_t)size);
        }
        if (h->k_scale) h->k_scale[at] = scale;
        i++;
    }
}

/* 16 channels of the two tokens of a line, `size` bytes each */
static void put_pair(char *line, const char *first, const char *second, ptrdiff_t size) {
    char pairs[FC_PANEL * 4];
    scatter(pairs, 2 * size, first, size, FC_PANEL);
    scatter(pairs + size, 2 * size, second, size, FC_PANEL);
    memcpy(line, pairs, (size_t)(FC_PANEL * 2 * size));
}

/* Values of one token, or of the two of a line */
static void store_values(const struct fc_kernels *kernels, const fc_append_args *args, const fc_kv_head *h,
                         ptrdiff_t slot, ptrdiff_t n, const char *v, char *rows) {
    const fc_kv_cache *c = args->cache;
    const ptrdiff_t size = value_bytes(c->type), k_step = k_step_of(c->type);
    const ptrdiff_t e = c->v_dim, padded = fc_round_up(e, FC_PANEL), ld = widest(c) * 4;
    for (ptrdiff_t i = 0, two; i < n; i += two) {
        const ptrdiff_t at = slot + i;
        two = k_step == 2 && at % 2 == 0 && i + 1 < n ? 2 : 1;
        for (ptrdiff_t j = 0; j < two; j++) {
            const float scale = encode(kernels, c->type, rows + j * ld, args->type, v + (i + j) * args->v_stride[1], e);
            memset(rows + j * ld + e * size, 0, (size_t)((padded - e) * size));
            if (h->v_scale) h->v_scale[at + j] = scale;
        }
        for (ptrdiff_t p = 0; p < padded / FC_PANEL; p++) {
            char *line = h->v + p * h->v_panel, *row = rows + p * FC_PANEL * size;
            if (two == 2) put_pair(line + at / 2 * h->line, row, row + ld, size);
            else if (k_step == 2) scatter(line + at / 2 * h->line + at % 2 * size, 2 * size, row, size, FC_PANEL);
            else memcpy(line + at * h->line, row, (size_t)(FC_PANEL * size));
        }
    }
}

void fc_kv_store(const struct fc_kernels *kernels, const fc_append_args *args, const fc_kv_head *head, ptrdiff_t slot,
                 ptrdiff_t n, const char *k, const char *v, int64_t position, void *scratch) {
    char *rows = scratch;
    store_keys(kernels, args, head, slot, n, k, position, rows, rows + FC_PANEL * widest(args->cache) * 4);
    store_values(kernels, args, head, slot, n, v, rows);
}

struct append {
    const struct fc_kernels *kernels;
    const fc_append_args *args;
    fc_scratch scratch;
};

/* An item is a run of up to FC_KV_CHUNK tokens of one row and head. */
static ptrdiff_t runs_of(ptrdiff_t seq) { return (seq + FC_KV_CHUNK - 1) / FC_KV_CHUNK + 1; }

static void append_runs(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct append *ctx = context;
    const fc_append_args *args = ctx->args;
    const fc_kv_cache *c = args->cache;
    const ptrdiff_t runs = runs_of(args->seq);
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t b = i / (c->kv_heads * runs), g = i / runs % c->kv_heads;
        const int64_t first = args->start[b], stop = first + (args->count ? args->count[b] : args->seq);
        const ptrdiff_t chunk = (ptrdiff_t)(first / FC_KV_CHUNK) + i % runs;
        int64_t from = chunk * FC_KV_CHUNK, to = from + FC_KV_CHUNK;
        if (from < first) from = first;
        if (to > stop) to = stop;
        if (from >= to) continue;
        const fc_kv_head head = fc_kv_head_of(c, b, g, chunk);
        fc_kv_store(
            ctx->kernels, args, &head, (ptrdiff_t)(from - chunk * FC_KV_CHUNK), (ptrdiff_t)(to - from),
            (const char *)args->k + b * args->k_stride[0] + (from - first) * args->k_stride[1] + g * args->k_stride[2],
            (const char *)args->v + b * args->v_stride[0] + (from - first) * args->v_stride[1] + g * args->v_stride[2],
            from, fc_scratch_of(&ctx->scratch, rank));
    }
}

fc_status fc_append(const fc_append_args *args) {
    if (!FC_IS_OURS(args) || !FC_IS_OURS(args->cache)) return FC_BAD_SIZE;
    const fc_kv_cache *c = args->cache;
    struct append ctx = {.kernels = fc_k, .args = args};
    const ptrdiff_t runs = runs_of(args->seq), items = args->batch * c->kv_heads * runs;
    const double tokens = (double)args->seq / (double)runs;
    const double ns = tokens * (double)(c->head_dim + c->v_dim) * fc_ns.append + fc_ns.row;
    const int threads = fc_threads_for(items, ns);
    if (fc_scratch_alloc(args->workspace, &ctx.scratch, threads, fc_kv_store_bytes(c))) return FC_NO_MEMORY;
    fc_status status = fc_static(threads, items, ns, append_runs, &ctx);
    fc_scratch_free(&ctx.scratch);
    return status;
}

/* ---- out ---- */

static inline float decoded(fc_kv_type type, const char *p, float scale) {
    if (type == FC_KV_I8) return (float)*(const signed char *)p * scale;
    uint32_t bits = 0;
    if (type == FC_KV_BF16) memcpy((char *)&bits + 2, p, 2);
    else memcpy(&bits, p, 4);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The token of a slot: k (D), v (E) */
static inline __attribute__((always_inline)) void read_token(const fc_kv_type type, const fc_kv_cache *c, const fc_kv_head *h, ptrdiff_t slot,
                                 float *k, float *v) {
    const ptrdiff_t size = type == FC_KV_F32 ? 4 : type == FC_KV_BF16 ? 2 : 1, k_step = type == FC_KV_F32 ? 1 : 2;
    const float k_scale = type == FC_KV_I8 ? h->k_scale[slot] : 1.0f, v_scale = type == FC_KV_I8 ? h->v_scale[slot] : 1;
    const char *key = h->k + slot / FC_PANEL * h->k_panel + slot % FC_PANEL * k_step * size;
    const char *value = h->v + slot / k_step * h->line + slot % k_step * size;
    for (ptrdiff_t d = 0; d < c->head_dim; d++)
        k[d] = decoded(type, key + d / k_step * h->line + d % k_step * size, k_scale);
    for (ptrdiff_t e = 0; e < c->v_dim; e++)
        v[e] = decoded(type, value + e / FC_PANEL * h->v_panel + e % FC_PANEL * k_step * size, v_scale);
}

static void read_slot(const fc_kv_cache *c, const fc_kv_head *h, ptrdiff_t slot, float *k, float *v) {
    if (c->type == FC_KV_F32) read_token(FC_KV_F32, c, h, slot, k, v);
    else if (c->type == FC_KV_BF16) read_token(FC_KV_BF16, c, h, slot, k, v);
    else read_token(FC_KV_I8, c, h, slot, k, v);
}

void fc_kv_read_head(const fc_kv_cache *cache, const fc_kv_head *head, ptrdiff_t n, float *k, float *v) {
    for (ptrdiff_t i = 0; i < n; i++) read_slot(cache, head, i, k + i * cache->head_dim, v + i * cache->v_dim);
}

struct read {
    const fc_kv_cache *c;
    ptrdiff_t b, start;
    float *k, *v;
};

static void read_tokens(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct read *ctx = context;
    const fc_kv_cache *c = ctx->c;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t position = ctx->start + i;
        for (ptrdiff_t g = 0; g < c->kv_heads; g++) {
            const fc_kv_head h = fc_kv_head_of(c, ctx->b, g, position / FC_KV_CHUNK);
            read_slot(c, &h, position % FC_KV_CHUNK, ctx->k + (i * c->kv_heads + g) * c->head_dim,
                      ctx->v + (i * c->kv_heads + g) * c->v_dim);
        }
    }
}

fc_status fc_kv_read(const fc_kv_cache *cache, ptrdiff_t b, ptrdiff_t start, ptrdiff_t seq, float *k, float *v) {
    if (!FC_IS_OURS(cache)) return FC_BAD_SIZE;
    struct read ctx = {cache, b, start, k, v};
    const double ns = (double)(cache->kv_heads * (cache->head_dim + cache->v_dim)) * fc_ns.read + fc_ns.row;
    return fc_static(fc_threads_for(seq, ns), seq, ns, read_tokens, &ctx);
}

/* Keys and values of plain arrays into pages, where attention reads them; a cache's lie there already. */
#include <stdint.h>
#include <stdlib.h>

#include "../rows.h"
#include "attention.h"

/* Pages for `pairs` heads' keys and values; NULL without memory. */
void **fc_attention_new_pages(struct attention *ctx, ptrdiff_t pairs) {
    const size_t count = (size_t)fc_times(pairs, ctx->kv.pages_a_row), bytes = (size_t)fc_kv_page_bytes(&ctx->kv);
    if (count > SIZE_MAX / 2 / (bytes + sizeof(void *))) return NULL;
    char *block = malloc(count * (bytes + sizeof(void *)) + 64);
    if (!block) return NULL;
    void **table = (void **)(void *)block;
    char *first = (char *)(((uintptr_t)(table + count) + 63) / 64 * 64);
    for (size_t i = 0; i < count; i++) table[i] = first + i * bytes;
    ctx->kv.pages = table;
    return table;
}

void fc_attention_store_chunk(const struct attention *ctx, ptrdiff_t pair, ptrdiff_t chunk, void *page, void *scratch) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t b = pair / args->kv_heads, g = pair % args->kv_heads, key0 = chunk * FC_KV_CHUNK;
    const ptrdiff_t n = fc_smaller(FC_KV_CHUNK, fc_keys_of(args, b) - key0);
    const fc_kv_head head = fc_kv_head_at(&ctx->kv, page, 0);
    const fc_append_args as = {.cache = &ctx->kv, .type = args->kv_type, .k_stride = {0, args->k_stride[1], 0},
                               .v_stride = {0, args->v_stride[1], 0}};
    fc_kv_store(ctx->k, &as, &head, 0, n,
                (const char *)args->k + b * args->k_stride[0] + key0 * args->k_stride[1] + g * args->k_stride[2],
                (const char *)args->v + b * args->v_stride[0] + key0 * args->v_stride[1] + g * args->v_stride[2], 0,
                scratch);
}

static void pack_chunks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *ctx = context;
    const struct scratch r = fc_attention_scratch_of(ctx, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t pair = ctx->first_pair + i / ctx->kv.pages_a_row, chunk = i % ctx->kv.pages_a_row;
        const struct fc_range see = fc_visible_to(ctx->args, pair / ctx->args->kv_heads, 0, ctx->args->q_len - 1);
        if (chunk * FC_KV_CHUNK < see.hi && (chunk + 1) * FC_KV_CHUNK > see.lo)
            fc_attention_store_chunk(ctx, pair, chunk, ctx->kv.pages[i], r.store);
    }
}

fc_status fc_attention_pack_pages(struct attention *ctx) {
    const ptrdiff_t items = ctx->pairs * ctx->kv.pages_a_row;
    const ptrdiff_t values = fc_smaller(FC_KV_CHUNK, ctx->args->kv_len) * (ctx->args->head_dim + ctx->args->v_dim);
    const double ns = (double)values * fc_ns.page_value;
    return fc_static(fc_threads_within(ctx->threads, items, ns), items, ns, pack_chunks, ctx);
}

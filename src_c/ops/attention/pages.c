/* Keys and values into pages as attention multiplies them: those of plain arrays, or of a cache whose pages are others;
 * a cache's own are read where they lie. */
#include <stdint.h>

#include "../rows.h"
#include "attention.h"

ptrdiff_t fc_attention_page_bytes(const struct attention *ctx) {
    return fc_round_up(ctx->bytes ? fc_byte_page_bytes(ctx) : fc_kv_page_bytes(&ctx->kv), 64);
}

/* What a cache's tokens become on their way: (256, D) and (256, E) of float32 */
static ptrdiff_t decoded_bytes(const struct attention *ctx) {
    const ptrdiff_t values = fc_plus(ctx->args->head_dim, ctx->args->v_dim);
    return ctx->args->cache ? fc_times(FC_KV_CHUNK * 4, values) : 0;
}

size_t fc_attention_store_bytes(const struct attention *ctx) {
    const size_t bytes = ctx->bytes ? fc_byte_store_bytes(ctx) : fc_kv_store_bytes(&ctx->kv);
    return (size_t)fc_plus(decoded_bytes(ctx), (ptrdiff_t)bytes);
}

/* Not from a workspace, which would hold them until it goes. */
int fc_attention_new_pages(struct attention *ctx, fc_scratch *pages, ptrdiff_t pairs) {
    const size_t count = (size_t)fc_times(pairs, ctx->kv.pages_a_row), bytes = (size_t)fc_attention_page_bytes(ctx);
    if (count > SIZE_MAX / 2 / (bytes + sizeof(void *))) return -1;
    if (fc_scratch_alloc_huge(NULL, pages, 1, count * (bytes + sizeof(void *)) + 64)) return -1;
    void **table = (void **)(void *)pages->base;
    char *first = (char *)(((uintptr_t)(table + count) + 63) / 64 * 64);
    for (size_t i = 0; i < count; i++) table[i] = first + i * bytes;
    ctx->kv.pages = table;
    return 0;
}

/* n tokens of a head from key0 on: where they lie, or out of a cache's page in `decoded` */
static struct tokens tokens_of(const struct attention *ctx, ptrdiff_t b, ptrdiff_t g, ptrdiff_t chunk, ptrdiff_t n,
                               float *decoded) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t key0 = chunk * FC_KV_CHUNK, d = args->head_dim, e = args->v_dim;
    if (args->cache) {
        const fc_kv_head head = fc_kv_head_of(args->cache, b, g, chunk);
        fc_kv_read_head(args->cache, &head, n, decoded, decoded + FC_KV_CHUNK * d);
        return (struct tokens){FC_F32, (const char *)decoded, (const char *)(decoded + FC_KV_CHUNK * d), d * 4, e * 4};
    }
    return (struct tokens){
        .type = args->kv_type, .k_stride = args->k_stride[1], .v_stride = args->v_stride[1],
        .k = (const char *)args->k + b * args->k_stride[0] + key0 * args->k_stride[1] + g * args->k_stride[2],
        .v = (const char *)args->v + b * args->v_stride[0] + key0 * args->v_stride[1] + g * args->v_stride[2]};
}

void fc_attention_store_chunk(const struct attention *ctx, ptrdiff_t pair, ptrdiff_t chunk, void *page, void *scratch) {
    const fc_attention_args *args = ctx->args;
    const ptrdiff_t b = pair / args->kv_heads, g = pair % args->kv_heads;
    const ptrdiff_t n = fc_smaller(FC_KV_CHUNK, fc_keys_of(args, b) - chunk * FC_KV_CHUNK);
    const struct tokens from = tokens_of(ctx, b, g, chunk, n, scratch);
    char *rest = (char *)scratch + decoded_bytes(ctx);
    if (ctx->bytes) {
        fc_byte_store(ctx, page, n, &from, rest);
        return;
    }
    const fc_kv_head head = fc_kv_head_at(&ctx->kv, page, 0);
    const fc_append_args as = {.cache = &ctx->kv, .type = from.type, .k_stride = {0, from.k_stride, 0},
                               .v_stride = {0, from.v_stride, 0}};
    fc_kv_store(ctx->k, &as, &head, 0, n, from.k, from.v, 0, rest);
}

static void pack_chunks(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *ctx = context;
    const struct scratch r = fc_attention_scratch_of(ctx, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t pair = ctx->first_pair + i / ctx->kv.pages_a_row;
        const ptrdiff_t chunk = ctx->first_page + i % ctx->kv.pages_a_row;
        const struct fc_range see = fc_visible_to(ctx->args, pair / ctx->args->kv_heads, 0, ctx->args->q_len - 1);
        if (chunk * FC_KV_CHUNK < see.hi && (chunk + 1) * FC_KV_CHUNK > see.lo)
            fc_attention_store_chunk(ctx, pair, chunk, ctx->kv.pages[i], r.store);
    }
}

fc_status fc_attention_pack_pages(struct attention *ctx) {
    const ptrdiff_t items = ctx->pairs * ctx->kv.pages_a_row;
    const ptrdiff_t values = fc_smaller(FC_KV_CHUNK, ctx->args->kv_len) * (ctx->args->head_dim + ctx->args->v_dim);
    const double ns = (double)values * (ctx->bytes || ctx->args->cache ? 3 : 1) * fc_ns.page_value;
    return fc_static(fc_threads_within(ctx->threads, items, ns), items, ns, pack_chunks, ctx);
}

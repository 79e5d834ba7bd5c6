/* Keys and values of plain arrays into pages, where attention reads them; a cache's lie there already. */
#include <stdint.h>
#include <stdlib.h>

#include "../rows.h"
#include "attention.h"

/* Pages for `pairs` heads' keys and values; NULL without memory. */
void **fc_attention_new_pages(struct attention *t, ptrdiff_t pairs) {
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

void fc_attention_store_chunk(const struct attention *t, ptrdiff_t pair, ptrdiff_t chunk, void *page, void *scratch) {
    const fc_attention_args *a = t->a;
    const ptrdiff_t b = pair / a->kv_heads, g = pair % a->kv_heads, key0 = chunk * FC_KV_CHUNK;
    const ptrdiff_t n = fc_smaller(FC_KV_CHUNK, fc_keys_of(a, b) - key0);
    const fc_kv_head head = fc_kv_head_at(&t->kv, page, 0);
    const fc_append_args as = {.cache = &t->kv, .type = a->kv_type, .k_stride = {0, a->k_stride[1], 0},
                               .v_stride = {0, a->v_stride[1], 0}};
    fc_kv_store(t->k, &as, &head, 0, n, (const char *)a->k + b * a->k_stride[0] + key0 * a->k_stride[1] + g * a->k_stride[2],
                (const char *)a->v + b * a->v_stride[0] + key0 * a->v_stride[1] + g * a->v_stride[2], 0, scratch);
}

static void pack_chunks(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct attention *t = ctx;
    const struct scratch r = fc_attention_scratch_of(t, rank);
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t pair = t->first_pair + i / t->kv.pages_a_row, chunk = i % t->kv.pages_a_row;
        const struct fc_range see = fc_visible_to(t->a, pair / t->a->kv_heads, 0, t->a->q_len - 1);
        if (chunk * FC_KV_CHUNK < see.hi && (chunk + 1) * FC_KV_CHUNK > see.lo)
            fc_attention_store_chunk(t, pair, chunk, t->kv.pages[i], r.store);
    }
}

fc_status fc_attention_pack_pages(struct attention *t) {
    const ptrdiff_t items = t->pairs * t->kv.pages_a_row;
    const double ns = (double)(fc_smaller(FC_KV_CHUNK, t->a->kv_len) * (t->a->head_dim + t->a->v_dim)) * 0.4;
    return fc_static(fc_threads_within(t->threads, items, ns), items, ns, pack_chunks, t);
}

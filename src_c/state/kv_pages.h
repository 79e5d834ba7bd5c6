/* Where the keys and values of one head lie in a page of a key/value cache; forge.h has the picture. */
#ifndef FC_KV_PAGES_H
#define FC_KV_PAGES_H

#include "../kernels.h"

typedef struct {
    char *k, *v;              /* panels of 16 keys: (256 / 16, lines); panels of 16 channels: (E / 16, lines) */
    float *k_scale, *v_scale; /* (256) each, FC_KV_I8; else NULL */
    ptrdiff_t k_panel, v_panel, line; /* bytes */
    ptrdiff_t k_lines;                /* lines of a panel of keys */
} fc_kv_head;

fc_kv_head fc_kv_head_at(const fc_kv_cache *cache, void *page, ptrdiff_t g);

/* Head g of the page that holds positions from chunk * FC_KV_CHUNK on, of row b */
static inline fc_kv_head fc_kv_head_of(const fc_kv_cache *c, ptrdiff_t b, ptrdiff_t g, ptrdiff_t chunk) {
    return fc_kv_head_at(c, c->pages[b * c->pages_a_row + (c->ring ? chunk % c->pages_a_row : chunk)], g);
}

/* What one head's tokens become on their way: rows of 16 tokens, a thread's scratch of fc_kv_store_bytes(cache). */
size_t fc_kv_store_bytes(const fc_kv_cache *cache);

/* Slots [slot, slot + n) of a page <- n tokens of one head; position: that of the first, for RoPE. args: type, strides,
 * cache and table; k, v: the first token's. */
void fc_kv_store(const struct fc_kernels *kernels, const fc_append_args *args, const fc_kv_head *head, ptrdiff_t slot,
                 ptrdiff_t n, const char *k, const char *v, int64_t position, void *scratch);

/* The tokens of slots [0, n) of one head as float32: k (n, D), v (n, E) */
void fc_kv_read_head(const fc_kv_cache *cache, const fc_kv_head *head, ptrdiff_t n, float *k, float *v);

#endif

/* Which keys a query sees: the only place that knows causal, window, lengths and positions (masks are numbers added to
 * scores, and no business of this file).
 *
 * Keys and queries have ascending positions, so what a query sees is an interval of keys, and later queries see
 * intervals that begin and end no earlier. Without kv_positions key j lies at j; without q_positions the queries are
 * the last of the row's keys. */
#ifndef FC_VISIBLE_H
#define FC_VISIBLE_H

#include "rows.h"

/* Keys [lo, hi) of a row */
struct fc_range {
    ptrdiff_t lo, hi;
};

static inline ptrdiff_t fc_keys_of(const fc_attention_args *a, ptrdiff_t b) {
    return a->kv_lens ? a->kv_lens[b] : a->kv_len;
}

/* How many of the n keys of row b lie at positions <= p */
static inline ptrdiff_t fc_keys_upto(const fc_attention_args *a, ptrdiff_t b, ptrdiff_t n, int64_t p) {
    if (!a->kv_positions) return p < 0 ? 0 : p < n ? p + 1 : n;
    const int64_t *at = a->kv_positions + b * a->kv_positions_stride;
    ptrdiff_t lo = 0, hi = n;
    while (lo < hi) {
        const ptrdiff_t middle = lo + (hi - lo) / 2;
        if (at[middle] <= p) lo = middle + 1;
        else hi = middle;
    }
    return lo;
}

/* What query i of row b sees: positions <= its own if causal, and > its own - window if there is one */
static inline struct fc_range fc_visible(const fc_attention_args *a, ptrdiff_t b, ptrdiff_t i) {
    const ptrdiff_t n = fc_keys_of(a, b);
    const int64_t p = a->q_positions ? a->q_positions[b * a->q_positions_stride + i] : i + n - a->q_len;
    int64_t before;
    struct fc_range see = {0, a->causal ? fc_keys_upto(a, b, n, p) : n};
    if (a->window && !__builtin_sub_overflow(p, a->window, &before)) see.lo = fc_keys_upto(a, b, n, before);
    if (see.lo > see.hi) see.lo = see.hi;
    return see;
}

/* What queries [first, last] of row b see between them; what none of them sees may lie inside. */
static inline struct fc_range fc_visible_to(const fc_attention_args *a, ptrdiff_t b, ptrdiff_t first, ptrdiff_t last) {
    return (struct fc_range){fc_visible(a, b, first).lo, fc_visible(a, b, last).hi};
}

/* The part of `see` in the chunk of n keys from key0 on, counted from there */
static inline struct fc_range fc_visible_in(struct fc_range see, ptrdiff_t key0, ptrdiff_t n) {
    const ptrdiff_t lo = see.lo - key0, hi = see.hi - key0;
    return (struct fc_range){lo < 0 ? 0 : fc_smaller(lo, n), hi < 0 ? 0 : fc_smaller(hi, n)};
}

#endif

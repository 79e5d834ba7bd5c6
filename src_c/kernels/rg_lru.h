/* The real-gated linear recurrent unit (arXiv 2402.19427), channels in lanes:
 *     a = 2^(rate sigmoid(r)),   rate = -8 log2(e) softplus(param)
 *     h = a h + sqrt(1 - a^2) sigmoid(i) x;   where a sequence begins  h = sigmoid(i) x
 * Token after token, so that no cut of a sequence changes a bit. An a that remembers a million tokens is 1 - 10^-6: it
 * would lose half of that as a float, and 1 - a^2 all. So a is never made, but 2^n and q, a = 2^n (1 + q), of which
 * 1 - a keeps every bit, as 1 - 2^n is 0 or at least 1/2; and 1 - a^2 = (1 - a) (1 + a). */

static void rg_lru_rates(float *rate, const float *param, ptrdiff_t n) {
    for (ptrdiff_t c = 0; c < n; c += FC_N) {
        const vf steps = vf_softplus(vf_get_upto(FC_F32, param, c, n));
        vf_put_upto(FC_F32, rate, c, steps * vf_set1(-8 * 1.44269504f), n);
    }
}

/* 2^n and *q for x = n + f <= 0, |f| <= 1/2, 2^f = 1 + q; 0 in the place of a 2^n that is no normal float */
FC_INLINE vf decay_parts(vf x, vf *q) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    x = vf_max(vf_set1(-127.0f), x);
    const vf t = x + magic, f = x - (t - magic);
    *q = f * vf_exp2_slope(f);
    return vf_power_of_2(t);
}

FC_INLINE void rg_lru_vector(const struct fc_rg_lru *s, ptrdiff_t c) {
    const vf rate = vf_load(s->rate + c), one = vf_set1(1.0f);
    vf h = s->from ? vf_get_upto(FC_F32, s->from, c, s->channels) : vf_zero();
    float *x = s->x + c;
    const float *in = s->i + c, *r = s->r + c;
    const uint8_t *begins = s->begins;
    const char *next[3] = {s->next[0] + c * s->size, s->next[1] + c * s->size, s->next[2] + c * s->size};
    for (ptrdiff_t t = 0; t < s->tokens; t++, x += s->row, in += s->row, r += s->row) {
        const vf u = vf_times_sigmoid(vf_load(x), vf_load(in));
        if (begins && begins[t * s->begins_stride]) {
            h = u;
        } else {
            vf q, whole = decay_parts(rate * vf_times_sigmoid(one, vf_load(r)), &q);
            const vf rest = vf_fma(-whole, q, one - whole); /* 1 - a */
            const vf added = vf_sqrt(rest * (vf_set1(2.0f) - rest)) * u;
            h *= whole;
            /* q times infinity would be the other one */
            h += vf_fma(q, vf_if_lt(vf_abs(h), vf_set1(INFINITY), h, vf_zero()), added);
        }
        vf_store(x, h);
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++) {
            __builtin_prefetch(next[k], 0, 3);
            next[k] += s->next_stride[k];
        }
    }
    vf_put_upto(FC_F32, s->to, c, h, s->channels);
}

/* A state that nothing is added to decays into subnormal numbers, where it would stay, at a fortieth of the speed: they
 * count as 0. */
static void rg_lru(const struct fc_rg_lru *s) {
    const uint64_t before = vf_flush_subnormals();
    for (ptrdiff_t c = 0; c < s->channels; c += FC_N) rg_lru_vector(s, c);
    vf_keep_subnormals(before);
}

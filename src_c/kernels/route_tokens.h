/* Mixture of depths (arXiv 2404.02258), a row at a time: a token's logit r = x . weight, and the token after a block
 *     (1 - r) x + r y,  y = block(x)
 * which is x + r (y - x), with the bits of y at r = 1 and of x at r = 0 (but for the sign of a zero). */

/* Eight chains hide the latency; the tree depends on n alone. */
FC_INLINE void router_logit_any(fc_dtype t, float *logit, const void *x, const float *weight, ptrdiff_t n) {
    vf acc[8] = {0};
    ptrdiff_t i = 0;
    for (; i + 8 * FC_N <= n; i += 8 * FC_N)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            acc[j] = vf_fma(vf_get(t, x, i + j * FC_N), vf_load(weight + i + j * FC_N), acc[j]);
    for (; i < n; i += FC_N) acc[0] = vf_fma(vf_get_upto(t, x, i, n), vf_get_upto(FC_F32, weight, i, n), acc[0]);
    const float sum = vf_sum(((acc[0] + acc[1]) + (acc[2] + acc[3])) + ((acc[4] + acc[5]) + (acc[6] + acc[7])));
    memcpy((char *)(void *)logit, &sum, 4); /* which may lie on any byte */
}

/* out may be x or y */
FC_INLINE void gate_update_any(fc_dtype t, void *out, const void *x, const void *y, float gate, ptrdiff_t n) {
    const vf r = vf_set1(gate), rest = vf_set1(1.0f - gate);
    for (ptrdiff_t i = 0; i < n; i += FC_N)
        vf_put_upto(t, out, i, vf_fma(r, vf_get_upto(t, y, i, n), rest * vf_get_upto(t, x, i, n)), n);
}

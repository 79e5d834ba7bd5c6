/* Weights that arrive unpacked: made into float32 panels [k][FC_PANEL] of n <= FC_PANEL columns, zeros beyond, or
 * streamed. */

/* from rows: W[k] at w + k*ldw, n contiguous columns */
FC_INLINE void panel_rows_any(fc_dtype t, float *panel, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < k; i++, panel += FC_PANEL, w = (const char *)w + ldw)
        for (int j = 0; j < FC_PANEL; j += FC_N)
            vf_store(panel + j, n >= j + FC_N ? vf_get(t, w, j) : vf_get_n(t, w, j, n > j ? n - j : 0));
}

/* from columns: column j at w + j*ldw, k contiguous; FC_N x FC_N blocks are transposed in registers */
FC_INLINE void panel_cols_any(fc_dtype t, float *panel, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n) {
    for (int j0 = 0; j0 < FC_PANEL; j0 += FC_N)
        for (ptrdiff_t i = 0; i < k; i += FC_N) {
            ptrdiff_t rows = k - i < FC_N ? k - i : FC_N;
            vf block[FC_N];
            if (rows == FC_N && j0 + FC_N <= n && t == FC_F32) {
                vf_load_transposed(block, (const char *)w + j0 * ldw + i * 4, ldw);
            } else {
                for (int j = 0; j < FC_N; j++)
                    block[j] = j0 + j >= n     ? vf_zero()
                               : rows == FC_N ? vf_get(t, (const char *)w + (j0 + j) * ldw, i)
                                              : vf_get_n(t, (const char *)w + (j0 + j) * ldw, i, rows);
                vf_transpose(block);
            }
            if (rows == FC_N) {
#pragma GCC unroll 16
                for (int j = 0; j < FC_N; j++) vf_store(panel + (i + j) * FC_PANEL + j0, block[j]);
            } else {
                for (ptrdiff_t j = 0; j < rows; j++) vf_store(panel + (i + j) * FC_PANEL + j0, block[j]);
            }
        }
}

/* c[n] += x[k] W, W in plain rows: few rows of x cannot pay for packing, so W streams past once, eight rows
 * at a time, and c stays in L1. The chain over k is the tile's. */
FC_INLINE void gemv_rows_any(fc_dtype t, float *c, const float *x, const void *w, ptrdiff_t ldw, ptrdiff_t k,
                             ptrdiff_t n) {
    ptrdiff_t i = 0;
    for (; i + 8 <= k; i += 8)
        for (ptrdiff_t j = 0; j < n; j += FC_N) {
            vf acc = vf_get_upto(FC_F32, c, j, n);
#pragma GCC unroll 8
            for (int u = 0; u < 8; u++)
                acc = vf_fma(vf_load1(x + i + u), vf_get_upto(t, (const char *)w + (i + u) * ldw, j, n), acc);
            vf_put_upto(FC_F32, c, j, acc, n);
        }
    for (; i < k; i++)
        for (ptrdiff_t j = 0; j < n; j += FC_N)
            vf_put_upto(FC_F32, c, j,
                        vf_fma(vf_load1(x + i), vf_get_upto(t, (const char *)w + i * ldw, j, n),
                               vf_get_upto(FC_F32, c, j, n)), n);
}

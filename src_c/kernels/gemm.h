/* C[m][panels*16] (+)= X[m][k] W,   each output one chain of multiply-adds over k in order.
 *
 * W comes in panels of 16 columns: element (k, 16p + j) is w[p*panel_stride + k*k_stride + j], so a packed
 * matrix, a packed block of keys and the plain rows of V are the same operand.  A tile is FC_MR rows by up to
 * FC_NV vectors of accumulators in registers; m = 1 runs the same chain with one row, hence the same bits.
 * ldc, ldx in bytes. C is written in whole panels. Reads nothing beyond row m-1, panel panels-1. */

#define FC_PER_PANEL (16 / FC_N)
#if FC_BYTES == 64 || !defined(__x86_64__)
enum { FC_MR = 6, FC_NV = 4 }; /* 32 registers: 24 accumulators, 4 of W, 1 of x */
#elif FC_BYTES == 32
enum { FC_MR = 6, FC_NV = 2 }; /* 16 registers: 12 accumulators, 2 of W, 1 of x */
#else
enum { FC_MR = 4, FC_NV = 2 }; /* 16 registers, and SSE multiplies need a copy */
#endif

FC_INLINE vf gemm_w(const float *w, ptrdiff_t panel_stride, int j) {
    return vf_load(w + j / FC_PER_PANEL * panel_stride + j % FC_PER_PANEL * FC_N);
}

FC_INLINE void gemm_f32_tile(const int mr, const int nv, float *c, ptrdiff_t ldc, const float *x, ptrdiff_t ldx,
                             const float *w, ptrdiff_t panel_stride, ptrdiff_t k_stride, ptrdiff_t k, int accumulate) {
    vf acc[FC_MR][FC_NV];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            acc[i][j] = accumulate ? vf_load((const char *)c + i * ldc + j * FC_BYTES) : vf_zero();
    for (; k > 0; k--, x++, w += k_stride) {
        vf wv[FC_NV];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) wv[j] = gemm_w(w, panel_stride, j);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            vf xi = vf_set1(*(const float *)((const char *)x + i * ldx));
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) acc[i][j] = vf_fma(xi, wv[j], acc[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) vf_store((char *)c + i * ldc + j * FC_BYTES, acc[i][j]);
}

/* Two k at once: w holds [16][2] bfloat16 lines, x pairs (k, k+1); the chain takes k, then k+1. */
#ifdef FC_HAS_BF16_DOT
FC_INLINE vf gemm_dot2(vf acc, vu w, uint32_t x) {
    return vf_dot_bf16(acc, w, (vu){0} + x);
}
#else
FC_INLINE vf gemm_dot2(vf acc, vu w, uint32_t x) {
    vu lo = (vu){0} + (x << 16), hi = (vu){0} + (x & 0xffff0000u);
    acc = vf_fma((vf)lo, (vf)(w << 16), acc);
    return vf_fma((vf)hi, (vf)(w & 0xffff0000u), acc);
}
#endif

FC_INLINE void gemm_bf16_tile(const int mr, const int nv, float *c, ptrdiff_t ldc, const uint16_t *x, ptrdiff_t ldx,
                              const uint16_t *w, ptrdiff_t panel_stride, ptrdiff_t k_stride, ptrdiff_t k,
                              int accumulate) {
    vf acc[FC_MR][FC_NV];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            acc[i][j] = accumulate ? vf_load((const char *)c + i * ldc + j * FC_BYTES) : vf_zero();
    for (; k > 0; k -= 2, x += 2, w += k_stride) {
        vu wv[FC_NV];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++)
            wv[j] = (vu)vf_load(w + j / FC_PER_PANEL * panel_stride + j % FC_PER_PANEL * 2 * FC_N);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            uint32_t xi;
            memcpy(&xi, (const char *)x + i * ldx, 4);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) acc[i][j] = gemm_dot2(acc[i][j], wv[j], xi);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) vf_store((char *)c + i * ldc + j * FC_BYTES, acc[i][j]);
}

/* All m rows under nv vectors of columns: tiles of FC_MR, then the rows that are left. */
#define GEMM_ROWS(TYPE)                                                                                                \
    FC_INLINE void gemm_##TYPE##_rows(const int nv, float *c, ptrdiff_t ldc, const FC_X_##TYPE *x, ptrdiff_t ldx,      \
                                      const FC_X_##TYPE *w, ptrdiff_t panel_stride, ptrdiff_t k_stride, ptrdiff_t m,   \
                                      ptrdiff_t k, int accumulate) {                                                   \
        for (; m >= FC_MR; m -= FC_MR, c += FC_MR * ldc / 4, x = (const void *)((const char *)x + FC_MR * ldx))        \
            gemm_##TYPE##_tile(FC_MR, nv, c, ldc, x, ldx, w, panel_stride, k_stride, k, accumulate);                   \
        switch (m) {                                                                                                   \
        case 5: gemm_##TYPE##_tile(5 < FC_MR ? 5 : 1, nv, c, ldc, x, ldx, w, panel_stride, k_stride, k, accumulate); break; \
        case 4: gemm_##TYPE##_tile(4 < FC_MR ? 4 : 1, nv, c, ldc, x, ldx, w, panel_stride, k_stride, k, accumulate); break; \
        case 3: gemm_##TYPE##_tile(3, nv, c, ldc, x, ldx, w, panel_stride, k_stride, k, accumulate); break;            \
        case 2: gemm_##TYPE##_tile(2, nv, c, ldc, x, ldx, w, panel_stride, k_stride, k, accumulate); break;            \
        case 1: gemm_##TYPE##_tile(1, nv, c, ldc, x, ldx, w, panel_stride, k_stride, k, accumulate); break;            \
        default: break;                                                                                                \
        }                                                                                                              \
    }                                                                                                                  \
    static void gemm_##TYPE(float *c, ptrdiff_t ldc, const FC_X_##TYPE *x, ptrdiff_t ldx, const FC_X_##TYPE *w,        \
                            ptrdiff_t panel_stride, ptrdiff_t k_stride, ptrdiff_t m, ptrdiff_t panels, ptrdiff_t k,    \
                            int accumulate) {                                                                          \
        const ptrdiff_t line = FC_N * (ptrdiff_t)(4 / sizeof(FC_X_##TYPE));                                            \
        ptrdiff_t v = 0, vectors = panels * FC_PER_PANEL;                                                              \
        for (; v + FC_NV <= vectors; v += FC_NV)                                                                       \
            gemm_##TYPE##_rows(FC_NV, c + v * FC_N, ldc, x, ldx,                                                       \
                               w + v / FC_PER_PANEL * panel_stride + v % FC_PER_PANEL * line, panel_stride, k_stride,  \
                               m, k, accumulate);                                                                      \
        if (FC_NV > 2 && v + 2 <= vectors) {                                                                           \
            gemm_##TYPE##_rows(2, c + v * FC_N, ldc, x, ldx,                                                           \
                               w + v / FC_PER_PANEL * panel_stride + v % FC_PER_PANEL * line, panel_stride, k_stride,  \
                               m, k, accumulate);                                                                      \
            v += 2;                                                                                                    \
        }                                                                                                              \
        if (v < vectors)                                                                                               \
            gemm_##TYPE##_rows(1, c + v * FC_N, ldc, x, ldx,                                                           \
                               w + v / FC_PER_PANEL * panel_stride + v % FC_PER_PANEL * line, panel_stride, k_stride,  \
                               m, k, accumulate);                                                                      \
    }

#define FC_X_f32 float
#define FC_X_bf16 uint16_t
GEMM_ROWS(f32)
GEMM_ROWS(bf16)

/* ---- operands that arrive unpacked: one panel [k][16], n <= 16 columns, zeros beyond ---- */

/* from rows: W[k] at w + k*ldw, n contiguous columns */
FC_INLINE void panel_rows_any(fc_dtype t, float *panel, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < k; i++, panel += 16, w = (const char *)w + ldw)
        for (int j = 0; j < 16; j += FC_N)
            vf_store(panel + j, n >= j + FC_N ? vf_get(t, w, j) : vf_get_n(t, w, j, n > j ? n - j : 0));
}

/* from columns: column j at w + j*ldw, k contiguous; FC_N x FC_N blocks are transposed in registers */
FC_INLINE void panel_cols_any(fc_dtype t, float *panel, const void *w, ptrdiff_t ldw, ptrdiff_t k, ptrdiff_t n) {
    for (int j0 = 0; j0 < 16; j0 += FC_N)
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
                for (int j = 0; j < FC_N; j++) vf_store(panel + (i + j) * 16 + j0, block[j]);
            } else {
                for (ptrdiff_t j = 0; j < rows; j++) vf_store(panel + (i + j) * 16 + j0, block[j]);
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
                acc = vf_fma(vf_set1(x[i + u]), vf_get_upto(t, (const char *)w + (i + u) * ldw, j, n), acc);
            vf_put_upto(FC_F32, c, j, acc, n);
        }
    for (; i < k; i++)
        for (ptrdiff_t j = 0; j < n; j += FC_N)
            vf_put_upto(FC_F32, c, j,
                        vf_fma(vf_set1(x[i]), vf_get_upto(t, (const char *)w + i * ldw, j, n),
                               vf_get_upto(FC_F32, c, j, n)), n);
}

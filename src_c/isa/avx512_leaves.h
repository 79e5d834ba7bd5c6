/* Leaves that AVX-512 replaces: all.h includes them after the common ones, which they may call. */

/* -inf where a byte is 0: 16 bytes become the bits of a mask register */
FC_INLINE vf bias_of(__m128i bytes) {
    const int hidden = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    return (vf)_mm512_mask_blend_ps((__mmask16)hidden, (__m512)vf_zero(), (__m512)vf_set1(-INFINITY));
}

static void bias_from_bool_masked(float *bias, const uint8_t *mask, ptrdiff_t n) {
    ptrdiff_t i = 0;
    for (; i + FC_N <= n; i += FC_N) vf_store(bias + i, bias_of(_mm_loadu_si128((const void *)(mask + i))));
    if (i < n) {
        uint8_t last[FC_N] = {0};
        memcpy(last, mask + i, (size_t)(n - i));
        vf_store_n(bias + i, bias_of(_mm_loadu_si128((const void *)last)), n - i);
    }
}

#ifdef FC_HAS_TILES
#define FC_TILE_LEAVES                                                                                                 \
    .gemm_u8 = gemm_u8_tiles, .gemm_u4 = gemm_u8_tiles, .gemm_u6 = gemm_u8_tiles,                                      \
    .gemm_i4_symmetric = gemm_i4_symmetric_tiles, .gemm_i4_affine = gemm_i4_affine_tiles,                              \
    .attention_strips = attention_strips, .byte_strips = byte_strips, .gemm_s8 = gemm_s8_tiles,                        \
    .paged_s8 = paged_s8_tiles,
#else
#define FC_TILE_LEAVES
#endif
#define FC_REPLACED .bias_from_bool = bias_from_bool_masked, FC_TILE_LEAVES

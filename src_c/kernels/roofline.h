/* Work of a known size, for measuring what the machine can do.
 * peak_*: chains of dependent multiply-adds in registers, enough of them to hide the latency. The operands come
 * from memory and every chain starts elsewhere, so nothing can be folded or shared; *sink takes the results. */

enum { PEAK_CHAINS = FC_BYTES == 64 ? 16 : 12 };

#define FC_OPS_F32 (2.0 * FC_N * PEAK_CHAINS)
#ifdef FC_HAS_TILES
#define FC_OPS_BF16 (4 * 16384.0) /* four tiles of 16 rows, 16 columns and 32 k */
#elif defined(FC_HAS_BF16_DOT)
#define FC_OPS_BF16 (4.0 * FC_N * PEAK_CHAINS)
#else
#define FC_OPS_BF16 0.0
#endif
#ifdef FC_HAS_TILES
#define FC_OPS_I8 (4 * 32768.0)
#elif defined(FC_HAS_I8_DOT)
#define FC_OPS_I8 (8.0 * FC_N * PEAK_CHAINS)
#else
#define FC_OPS_I8 (4.0 * FC_N * PEAK_CHAINS) /* int16 pairs: the exact int8 product of an ISA without the unit */
#endif
#if defined(FC_HAS_MADDUBS) && !defined(FC_HAS_I8_DOT)
#define FC_OPS_I4 (8.0 * FC_N * PEAK_CHAINS) /* nibbles by bytes: sums of pairs fit int16 */
#else
#define FC_OPS_I4 FC_OPS_I8
#endif

/* sink[0..2] in: factor, addend, start; sink[3] out */
static void peak_f32(float *sink, ptrdiff_t iterations) {
    vf acc[PEAK_CHAINS], factor = vf_set1(sink[0]), addend = vf_set1(sink[1]), total = vf_zero();
#pragma GCC unroll 16
    for (int j = 0; j < PEAK_CHAINS; j++) acc[j] = vf_set1(sink[2] * (float)(j + 1));
    for (; iterations > 0; iterations--)
#pragma GCC unroll 16
        for (int j = 0; j < PEAK_CHAINS; j++) acc[j] = vf_fma(acc[j], factor, addend);
#pragma GCC unroll 16
    for (int j = 0; j < PEAK_CHAINS; j++) total += acc[j];
    sink[3] = vf_sum(total);
}

#ifdef FC_HAS_TILES
/* Full tiles: four sums, two of x and two of W, which hold what sink[0..2] make of them */
#define FC_PEAK_TILES(name, dot)                                                                                       \
    static void name(float *sink, ptrdiff_t iterations) {                                                              \
        struct tile_shapes shapes = shapes_of_pairs(TILE_ROWS, TILE_LINES);                                            \
        float operand[TILE_ROWS * FC_N], sum[TILE_ROWS * FC_N];                                                        \
        for (int i = 0; i < TILE_ROWS * FC_N; i++) operand[i] = sink[i % 2] * sink[2];                                 \
        tiles_begin(&shapes);                                                                                          \
        tile_load(4, operand, FC_LINE);                                                                                \
        tile_load(5, operand, FC_LINE);                                                                                \
        tile_load(6, operand, FC_LINE);                                                                                \
        tile_load(7, operand, FC_LINE);                                                                                \
        for (; iterations > 0; iterations--) {                                                                         \
            dot(0, 4, 6);                                                                                              \
            dot(1, 4, 7);                                                                                              \
            dot(2, 5, 6);                                                                                              \
            dot(3, 5, 7);                                                                                              \
        }                                                                                                              \
        tile_store(0, sum, FC_LINE);                                                                                   \
        tiles_end();                                                                                                   \
        sink[3] = sum[0];                                                                                              \
    }
FC_PEAK_TILES(peak_bf16, tile_dot_bf16)
FC_PEAK_TILES(peak_i8, tile_dot_s8u8)
#else
static void peak_bf16(float *sink, ptrdiff_t iterations) {
#ifdef FC_HAS_BF16_DOT
    vf acc[PEAK_CHAINS], total = vf_zero();
    vu factor = (vu)vf_set1(sink[0]), x = (vu)vf_set1(sink[1]);
#pragma GCC unroll 16
    for (int j = 0; j < PEAK_CHAINS; j++) acc[j] = vf_set1(sink[2] * (float)(j + 1));
    for (; iterations > 0; iterations--)
#pragma GCC unroll 16
        for (int j = 0; j < PEAK_CHAINS; j++) acc[j] = vf_dot_bf16(acc[j], factor, x);
#pragma GCC unroll 16
    for (int j = 0; j < PEAK_CHAINS; j++) total += acc[j];
    sink[3] = vf_sum(total);
#else
    sink[3] = (float)iterations;
#endif
}

/* The product of an ISA without the unit takes the accumulator itself as a factor: constant ones would be hoisted. */
FC_INLINE vi peak_i8_step(vi acc, vi factor, vi x) {
#ifdef FC_HAS_I8_DOT
    return vi_dot_i8(acc, factor, x);
#else
    (void)factor;
    return vi_add_madd16(acc, acc, x);
#endif
}

/* acc = step(acc, factor, x) in each chain */
FC_INLINE void peak_steps(float *sink, ptrdiff_t iterations, vi x, vi (*step)(vi, vi, vi)) {
    vi acc[PEAK_CHAINS], factor = (vi)vf_set1(sink[0]), total = {0};
#pragma GCC unroll 16
    for (int j = 0; j < PEAK_CHAINS; j++) acc[j] = (vi)vf_set1(sink[2] * (float)(j + 1));
    for (; iterations > 0; iterations--)
#pragma GCC unroll 16
        for (int j = 0; j < PEAK_CHAINS; j++) acc[j] = step(acc[j], factor, x);
#pragma GCC unroll 16
    for (int j = 0; j < PEAK_CHAINS; j++) total ^= acc[j];
    sink[3] = (float)total[0];
}

static void peak_i8(float *sink, ptrdiff_t iterations) {
    vi x = (vi)vf_set1(sink[1]);
#ifndef FC_HAS_I8_DOT
    x &= 0xFFFF; /* the lower halves of acc, of floats with few digits, are 0: no chain overflows */
#endif
    peak_steps(sink, iterations, x, peak_i8_step);
}
#endif

static void peak_i4(float *sink, ptrdiff_t iterations) {
#if defined(FC_HAS_MADDUBS) && !defined(FC_HAS_I8_DOT)
    peak_steps(sink, iterations, (vi)vf_set1(sink[1]), vi_add_maddubs);
#else
    peak_i8(sink, iterations);
#endif
}

static void read_sum(float *sum, const float *data, ptrdiff_t n) {
    vf acc[8] = {0};
    ptrdiff_t i = 0;
    for (; i + 8 * FC_N <= n; i += 8 * FC_N)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) acc[j] += vf_load(data + i + j * FC_N);
    for (; i < n; i += FC_N) acc[0] += vf_get_upto(FC_F32, data, i, n);
    *sum = vf_sum(((acc[0] + acc[1]) + (acc[2] + acc[3])) + ((acc[4] + acc[5]) + (acc[6] + acc[7])));
}

/* out = data, written past the caches: an ordinary store reads its line first, and would halve the figure's worth. */
static void copy_stream(float *out, const float *data, ptrdiff_t n) {
    ptrdiff_t i = (ptrdiff_t)(-(uintptr_t)out % FC_BYTES / 4);
    if (i > n) i = n;
    memcpy(out, data, (size_t)i * 4);
    for (; i + FC_N <= n; i += FC_N) vf_stream(out + i, vf_load(data + i));
    vf_stream_end();
    memcpy(out + i, data + i, (size_t)(n - i) * 4);
}

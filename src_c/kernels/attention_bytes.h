/* Attention whose products are bytes: what is not in attention.h.
 *
 * Queries and weights are unsigned, keys and values signed, in panels of lines [k / 4][16][4] as int8 weights have them.
 * Sums of products are exact; then they are float32. Where products are made in pairs of 16 bits (maddubs) queries and
 * weights have 7 bits, so that two of them fit: 2 * 127 * 127 < 2^15. */

#if defined(FC_HAS_I8_DOT)
enum { FC_BYTE_QUERY = 127, FC_BYTE_WEIGHT = 255 };
#elif defined(FC_HAS_MADDUBS)
enum { FC_BYTE_QUERY = 63, FC_BYTE_WEIGHT = 127 };
#else
enum { FC_BYTE_QUERY = 127, FC_BYTE_WEIGHT = 127 };
#endif

/* ---- products ---- */

#if FC_BYTES == 64
enum { FC_BYTE_MR = 6, FC_BYTE_NV = 4 };
#else
enum { FC_BYTE_MR = 4, FC_BYTE_NV = 2 }; /* 16 registers: 8 accumulators, 2 of W, 1 of x, 1 product, 1 of ones */
#endif

/* acc + x[4] w[4], x the same four unsigned bytes in every lane */
FC_INLINE vi byte_step(vi acc, vi x, vi w) {
#if defined(FC_HAS_I8_DOT)
    return vi_dot_i8(acc, x, w);
#elif defined(FC_HAS_MADDUBS)
    return vi_add_madd16(acc, vi_maddubs(x, w), (vi){0} + 0x00010001);
#else
    typedef int16_t vs16 __attribute__((vector_size(FC_BYTES)));
    const vi even = (vi)(((vs16)w << 8) >> 8), odd = (vi)((vs16)w >> 8);
    acc = vi_add_madd16(acc, even, x & 0x00ff00ff);
    return vi_add_madd16(acc, odd, (vi)((vu)x >> 8) & 0x00ff00ff);
#endif
}

/* Rows [row, row + mr) and nv vectors of columns. Scores: c = start + x w, integers. `weigh`: c = sum over blocks of
 * scale x w */
FC_INLINE void byte_tile(const int weigh, const int mr, const int nv, const struct fc_byte_product *g, ptrdiff_t row,
                         ptrdiff_t vector) {
    const char *w = (const char *)g->w + vector / FC_PER_PANEL * g->panel_stride + vector % FC_PER_PANEL * FC_BYTES;
    const char *x = (const char *)g->x + row * g->ldx;
    const ptrdiff_t ldx = g->ldx, panel_stride = g->panel_stride;
    char *c = (char *)g->c + row * g->ldc + vector * FC_BYTES;
    for (ptrdiff_t block = 0; block < g->blocks; block++) {
        vi acc[FC_BYTE_MR][FC_BYTE_NV];
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) acc[i][j] = weigh ? (vi){0} : (vi)vf_load(g->start + (vector + j) * FC_N);
        for (ptrdiff_t lines = g->lines; lines > 0; lines--, x += 4, w += FC_LINE) {
            vi wv[FC_BYTE_NV];
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++)
                wv[j] = (vi)vf_load(w + j / FC_PER_PANEL * panel_stride + j % FC_PER_PANEL * FC_BYTES);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) {
                int32_t four;
                memcpy(&four, x + i * ldx, 4);
                const vi xv = (vi){0} + four;
#pragma GCC unroll 8
                for (int j = 0; j < nv; j++) acc[i][j] = byte_step(acc[i][j], xv, wv[j]);
            }
        }
        char *to = c;
        const float *scale = g->scale + row * g->ld_scale + block;
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++, to += g->ldc, scale += g->ld_scale) {
            const vf by = weigh ? vf_set1(*scale) : vf_zero();
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) {
                const vf before = weigh && block ? vf_load(to + j * FC_BYTES) : vf_zero();
                vf_store(to + j * FC_BYTES, weigh ? vf_fma(vf_from_int(acc[i][j]), by, before) : (vf)acc[i][j]);
            }
            __asm__ volatile("" : "+r"(to), "+r"(scale)); /* no addresses of all rows, for which there are no registers */
        }
    }
}

typedef void gemm_byte_tile(const struct fc_byte_product *g, ptrdiff_t row, ptrdiff_t vector);
#define FC_BYTE_TILE(name, weigh, mr, nv)                                                                              \
    static __attribute__((noinline)) void name(const struct fc_byte_product *g, ptrdiff_t row, ptrdiff_t vector) {     \
        byte_tile(weigh, (mr) < FC_BYTE_MR ? (mr) : FC_BYTE_MR, nv, g, row, vector);                                   \
    }
#define FC_BYTE_TILES(name, weigh, nv)                                                                                 \
    FC_BYTE_TILE(name##_1, weigh, 1, nv)                                                                               \
    FC_BYTE_TILE(name##_2, weigh, 2, nv)                                                                               \
    FC_BYTE_TILE(name##_3, weigh, 3, nv)                                                                               \
    FC_BYTE_TILE(name##_4, weigh, 4, nv)                                                                               \
    FC_BYTE_TILE(name##_5, weigh, 5, nv)                                                                               \
    FC_BYTE_TILE(name##_6, weigh, 6, nv)                                                                               \
    static gemm_byte_tile *const name[] = {NULL, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};

/* As few tiles as the rows fit in, all of nearly the same height */
FC_INLINE void byte_columns(gemm_byte_tile *const by_rows[], const struct fc_byte_product *g, ptrdiff_t vector) {
    const ptrdiff_t tiles = (g->m + FC_BYTE_MR - 1) / FC_BYTE_MR;
    for (ptrdiff_t row = 0, rows, t = 0; t < tiles; t++, row += rows) {
        rows = (g->m - row + tiles - t - 1) / (tiles - t);
        by_rows[rows](g, row, vector);
    }
}

FC_BYTE_TILES(byte_scores_tile, 0, FC_BYTE_NV)
FC_BYTE_TILES(byte_values_tile, 1, FC_BYTE_NV)
#if FC_BYTES == 64
FC_BYTE_TILES(byte_scores_pair, 0, 2)
FC_BYTE_TILES(byte_values_pair, 1, 2)
FC_BYTE_TILES(byte_scores_single, 0, 1)
FC_BYTE_TILES(byte_values_single, 1, 1)
#endif

/* C[m][16 panels], as fc_byte_product says */
static void gemm_bytes(const struct fc_byte_product *g) {
    const ptrdiff_t vectors = g->panels * FC_PER_PANEL;
    ptrdiff_t v = 0;
    for (; v + FC_BYTE_NV <= vectors; v += FC_BYTE_NV)
        byte_columns(g->scale ? byte_values_tile : byte_scores_tile, g, v);
#if FC_BYTES == 64 /* else a tile's columns are one panel, or half of one */
    for (; v + 2 <= vectors; v += 2) byte_columns(g->scale ? byte_values_pair : byte_scores_pair, g, v);
    if (v < vectors) byte_columns(g->scale ? byte_values_single : byte_scores_single, g, v);
#endif
}

/* ---- rotation ---- */

/* Lane i of a: its partner, lane i ^ step; and of a and b, taken apart into halves, or into quarters whose neighbours
 * belong together, the larger */
#if FC_N == 16
FC_INLINE vf partner_of(vf a, const int step) {
    if (step == 1) return (vf)vi_shuffle((vi)a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    if (step == 2) return (vf)vi_shuffle((vi)a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    if (step == 4) return (vf)vi_shuffle((vi)a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return (vf)vi_shuffle((vi)a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
FC_INLINE vu max_of_halves(vu a, vu b) {
    return vu_max((vu)vi_two(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                  (vu)vi_two(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
}
FC_INLINE vu max_of_quarters(vu a, vu b) {
    return vu_max((vu)vi_two(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                  (vu)vi_two(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
}
#elif FC_N == 8
FC_INLINE vf partner_of(vf a, const int step) {
    if (step == 1) return (vf)vi_shuffle((vi)a, 1, 0, 3, 2, 5, 4, 7, 6);
    if (step == 2) return (vf)vi_shuffle((vi)a, 2, 3, 0, 1, 6, 7, 4, 5);
    return (vf)vi_shuffle((vi)a, 4, 5, 6, 7, 0, 1, 2, 3);
}
FC_INLINE vu max_of_halves(vu a, vu b) {
    return vu_max((vu)vi_two(a, b, 0, 1, 2, 3, 8, 9, 10, 11),
                  (vu)vi_two(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
}
FC_INLINE vu max_of_quarters(vu a, vu b) {
    return vu_max((vu)vi_two(a, b, 0, 1, 4, 5, 8, 9, 12, 13),
                  (vu)vi_two(a, b, 2, 3, 6, 7, 10, 11, 14, 15));
}
#else
FC_INLINE vf partner_of(vf a, const int step) {
    if (step == 1) return (vf)vi_shuffle((vi)a, 1, 0, 3, 2);
    return (vf)vi_shuffle((vi)a, 2, 3, 0, 1);
}
FC_INLINE vu max_of_halves(vu a, vu b) {
    return vu_max((vu)vi_two(a, b, 0, 1, 4, 5),
                  (vu)vi_two(a, b, 2, 3, 6, 7));
}
FC_INLINE vu max_of_quarters(vu a, vu b) {
    return vu_max((vu)vi_two(a, b, 0, 2, 4, 6),
                  (vu)vi_two(a, b, 1, 3, 5, 7));
}
#endif

/* partner + a in lower lanes, partner - a in upper ones */
FC_INLINE vf butterfly(vf a, const int step) {
    vf sign = vf_zero();
#pragma GCC unroll 16
    for (int i = 0; i < FC_N; i++) sign[i] = i & step ? -1.0f : 1.0f;
    return vf_fma(a, sign, partner_of(a, step));
}

enum { FC_HELD = 8 }; /* vectors that pass through several stages in registers */

/* `count` vectors: x <- x norm, then a +- its partner at a distance of 1, 2, 4, .. up to half of b, or of what is held:
 * in this order, which every ISA keeps */
FC_INLINE void first_stages(float *x, const int count, ptrdiff_t b, vf norm) {
    vf a[FC_HELD];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        a[i] = vf_load(x + i * FC_N) * norm;
        if (b > 1) a[i] = butterfly(a[i], 1);
        if (b > 2) a[i] = butterfly(a[i], 2);
#if FC_N > 4
        if (b > 4) a[i] = butterfly(a[i], 4);
#endif
#if FC_N > 8
        if (b > 8) a[i] = butterfly(a[i], 8);
#endif
    }
#pragma GCC unroll 4
    for (int step = 1; step < count; step *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            if (i & step) continue;
            const vf low = a[i];
            a[i] = low + a[i + step];
            a[i + step] = low - a[i + step];
        }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) vf_store(x + i * FC_N, a[i]);
}

/* x[n] <- H x / sqrt(b) for blocks of b, H Hadamard's matrix, b the largest power of 2 that divides n: its own inverse.
 * x: zeros from n on, to whole vectors. */
static void hadamard(float *x, ptrdiff_t n) {
    const ptrdiff_t b = n & -n, held = b < FC_HELD * FC_N ? b : FC_HELD * FC_N;
    const vf norm = vf_set1(1.0f / __builtin_sqrtf((float)b));
    for (ptrdiff_t i = 0; i < n; i += held < FC_N ? FC_N : held) {
        if (held == FC_HELD * FC_N) first_stages(x + i, FC_HELD, FC_HELD * FC_N, norm);
        else if (held == 4 * FC_N) first_stages(x + i, 4, 4 * FC_N, norm);
        else if (held == 2 * FC_N) first_stages(x + i, 2, 2 * FC_N, norm);
        else first_stages(x + i, 1, b, norm);
    }
    for (ptrdiff_t step = held; step < b; step *= 2)
        for (ptrdiff_t i = 0; i < n; i += 2 * step)
            for (ptrdiff_t j = i; j < i + step; j += FC_N) {
                const vf low = vf_load(x + j), high = vf_load(x + j + step);
                vf_store(x + j, low + high);
                vf_store(x + j + step, low - high);
            }
}

/* ---- numbers to bytes ---- */

/* The largest lane; the sum of all; the largest of numbers without a sign, a NaN if there is one: their bits are in
 * that order */
#define FC_ACROSS(name, type, join)                                                                                    \
    FC_INLINE float name(type a) {                                                                                     \
        a = FC_N > 8 ? join(a, (type)partner_of((vf)a, FC_N / 2)) : a;                                                 \
        a = FC_N > 4 ? join(a, (type)partner_of((vf)a, 4)) : a;                                                        \
        a = join(a, (type)partner_of((vf)a, 2));                                                                       \
        return ((vf)join(a, (type)partner_of((vf)a, 1)))[0];                                                           \
    }
#define FC_PLUS(a, b) ((a) + (b))
FC_ACROSS(highest_of, vf, vf_max)
FC_ACROSS(sum_of, vf, FC_PLUS)
FC_ACROSS(largest_of, vu, vu_max)
#undef FC_PLUS
#undef FC_ACROSS

/* x[n] ~ scale q[n], q in -qmax..qmax, to nearest even, and the sum of q; as `quantize`. x: zeros from n on, to whole
 * vectors, and so q */
static void to_bytes(int8_t *q, float *scale, int32_t *sum, const float *x, ptrdiff_t n, float qmax) {
    const vf magic = vf_set1(12582912.0f);
    vu top = {0};
    vi total = {0};
    for (ptrdiff_t i = 0; i < n; i += FC_N) top = vu_max((vu)vf_abs(vf_load(x + i)), top);
    const float largest = largest_of(top);
    float inverse;
    quantize_scales(scale, &inverse, largest, largest * 0.0f, qmax);
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        const vi v = inverse == 0.0f ? (vi){0} : (vi)vf_fma(vf_load(x + i), vf_set1(inverse), magic) - 0x4b400000;
        total += v;
        vi_put8(q + i, v);
    }
    *sum = vi_sum(total);
}

/* ---- softmax ---- */

enum { FC_BYTE_BLOCK = 64, FC_BYTE_BLOCKS = FC_KV_CHUNK / FC_BYTE_BLOCK }; /* keys whose weights share a scale */

/* 2^x for x <= 0 to 1e-4, 1 for 0: what is rounded to a byte anyway. Under 2^-100 it stays that: no product of it is
 * subnormal, and whatever it is added to is 1 or more. A NaN stays one. */
FC_INLINE vf exp2_for_bytes(vf x) {
    const vf magic = vf_set1(12582912.0f);
    x = vf_max(vf_set1(-100.0f), x);
    const vf t = x + magic, r = x - (t - magic);
    vf p = vf_fma(r, vf_set1(0.05500893f), vf_set1(0.24221096f));
    p = vf_fma(r, p, vf_set1(0.69328293f));
    p = vf_fma(r, p, vf_set1(1.0f));
    return (vf)((vu)p + ((vu)t << 23));
}

/* v in lanes i, i + 1, .. of [lo, hi), else -inf */
FC_INLINE vf only_within(vf v, ptrdiff_t i, ptrdiff_t lo, ptrdiff_t hi) {
    vi lane = {0};
#pragma GCC unroll 16
    for (int j = 0; j < FC_N; j++) lane[j] = j;
    const vu in = (vu)(lane >= (int)(lo - i)) & (vu)(lane < (int)(hi - i));
    return (vf)(((vu)v & in) | ((vu)vf_set1(-INFINITY) & ~in));
}

/* What a row's scores are: `plain`, in units of log2(e), or with softcap or bias; `all` 64 keys seen, or some */
FC_INLINE vf byte_score(const struct fc_byte_row *r, ptrdiff_t i, const int plain, const int all) {
    vf s = vf_from_int((vi)vf_load(r->s + i)) * vf_load(r->k_scale + i);
    s = vf_fma(s, vf_set1(r->scale), vf_set1(r->shift[(size_t)i / FC_PANEL]));
    if (!plain && r->softcap > 0.0f) s = vf_set1(r->softcap) * vf_tanh(s / vf_set1(r->softcap));
    if (!plain && r->bias) {
        const vf bias = vf_load(r->bias + i);
        s = unless_hidden(bias, s + bias, bias);
    }
    return all ? s : only_within(s, i, r->lo, r->hi);
}

/* s (64) <- scores; top: of each of four runs of vectors */
FC_INLINE void byte_scores(const struct fc_byte_row *r, ptrdiff_t at, vf top[4], const int plain, const int all) {
    for (ptrdiff_t i = at; i < at + FC_BYTE_BLOCK; i += 4 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const vf s = byte_score(r, i + j * FC_N, plain, all);
            top[j] = vf_max(s, top[j]);
            vf_store(r->s + i + j * FC_N, s);
        }
}

/* s (64) <- e^(s - max) v_scale, 0 where a key is hidden, whatever its v_scale; the largest of them. Sums of
 * e^(s - max) are added to total. */
FC_INLINE vu byte_values(const struct fc_byte_row *r, ptrdiff_t at, vf max, vf total[4], const int plain,
                         const int all) {
    vu top = {0};
    for (ptrdiff_t i = at; i < at + FC_BYTE_BLOCK; i += 4 * FC_N)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const vf s = vf_load(r->s + i + j * FC_N), off = s - max;
            const vf e = exp2_for_bytes(plain ? off : off * vf_set1(1.44269504f));
            vf w = e * vf_load(r->v_scale + i + j * FC_N);
            if (!plain || !all) w = (vf)((vu)w & ~(vu)(s == vf_set1(-INFINITY)));
            total[j] += e;
            top = vu_max((vu)w, top);
            vf_store(r->s + i + j * FC_N, w);
        }
    return top;
}

/* A quarter of the lanes for each of four vectors: its largest lane */
FC_INLINE vf largest_of_four(const vu v[4]) {
    vu top = max_of_quarters(max_of_halves(v[0], v[1]), max_of_halves(v[2], v[3]));
#if FC_N > 8
    top = vu_max(top, (vu)partner_of((vf)top, 2));
#endif
#if FC_N > 4
    top = vu_max(top, (vu)partner_of((vf)top, 1));
#endif
    return (vf)top;
}

/* bytes of 64 weights */
FC_INLINE void put_weights(uint8_t *u, const float *w, float inverse) {
    for (int i = 0; i < FC_BYTE_BLOCK; i += 4 * FC_N) {
        vi four[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            four[j] = (vi)vf_fma(vf_load(w + i + j * FC_N), vf_set1(inverse), vf_set1(12582912.0f)) - 0x4b400000;
        vi_put8_four(u + i, four);
    }
}

/* Of 64 keys from `at` on a row sees all, in every lane of a vector */
FC_INLINE int sees_all(const struct fc_byte_row *r, ptrdiff_t at) {
    return at >= r->lo && at + FC_BYTE_BLOCK <= r->hi;
}

/* s <- scores; their largest */
FC_INLINE float row_scores(const struct fc_byte_row *given, const int plain) {
    const struct fc_byte_row local = *given, *r = &local; /* in registers: no store through s changes it */
    vf top[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) top[j] = vf_set1(-INFINITY);
    for (ptrdiff_t at = r->lo / FC_BYTE_BLOCK * FC_BYTE_BLOCK; at < r->hi; at += FC_BYTE_BLOCK)
        if (sees_all(r, at)) byte_scores(r, at, top, plain, 1);
        else byte_scores(r, at, top, plain, 0);
    return highest_of(vf_max(vf_max(top[0], top[1]), vf_max(top[2], top[3])));
}

/* s <- weights times v_scale, their scales, and what makes bytes of them, (4); the sum of the weights */
FC_INLINE float row_values(const struct fc_byte_row *given, float max, float *inverses, const int plain) {
    const struct fc_byte_row local = *given, *r = &local;
    const vf shift = vf_set1(max == -INFINITY ? 0.0f : max), least = vf_set1(0x1p-100f);
    vf total[4] = {{0}};
    vu largest[FC_BYTE_BLOCKS] = {{0}};
    for (ptrdiff_t at = r->lo / FC_BYTE_BLOCK * FC_BYTE_BLOCK; at < r->hi; at += FC_BYTE_BLOCK)
        largest[at / FC_BYTE_BLOCK] = sees_all(r, at) ? byte_values(r, at, shift, total, plain, 1)
                                                      : byte_values(r, at, shift, total, plain, 0);
    const vf w = largest_of_four(largest);
    const vf scale = vf_if_lt(least, w, w * (1.0f / FC_BYTE_WEIGHT), vf_zero()) + w * 0.0f; /* NaN of a NaN */
    const vf inverse = vf_if_lt(least, w, vf_set1(FC_BYTE_WEIGHT) / w, vf_zero());
#pragma GCC unroll 4
    for (int b = 0; b < FC_BYTE_BLOCKS; b++)
        r->w_scale[b] = scale[b * (FC_N / 4)], inverses[b] = inverse[b * (FC_N / 4)];
    const float sum = sum_of((total[0] + total[1]) + (total[2] + total[3]));
    return max == -INFINITY && sum == sum ? 0.0f : sum;
}

FC_INLINE void row_bytes(const struct fc_byte_row *r, const float *inverses) {
    for (ptrdiff_t at = 0; at < FC_KV_CHUNK; at += FC_BYTE_BLOCK)
        if (at + FC_BYTE_BLOCK <= r->lo || at >= r->hi) memset(r->w + at, 0, FC_BYTE_BLOCK);
        else put_weights(r->w + at, r->s + at, inverses[at / FC_BYTE_BLOCK]);
}

/* Each step for all rows, so that none waits for what a row's lanes have in common. */
FC_INLINE void byte_weights_of(const struct fc_byte_row *rows, ptrdiff_t count, float *max, float *sum,
                               const int plain) {
    float inverses[FC_BYTE_ROWS][FC_BYTE_BLOCKS];
    for (ptrdiff_t i = 0; i < count; i++) max[i] = row_scores(rows + i, plain);
    for (ptrdiff_t i = 0; i < count; i++) sum[i] = row_values(rows + i, max[i], inverses[i], plain);
    for (ptrdiff_t i = 0; i < count; i++) row_bytes(rows + i, inverses[i]);
    for (ptrdiff_t i = 0; plain && i < count; i++) max[i] *= 0.693147181f;
}

static __attribute__((noinline)) void byte_weights_masked(const struct fc_byte_row *rows, ptrdiff_t count, float *max,
                                                          float *sum) {
    byte_weights_of(rows, count, max, sum, 0);
}

/* Rows' scores become weights; of each the max, and the sum of e^(s - max). Nothing seen: zeros, -inf and 0. */
static void byte_weights(const struct fc_byte_row *rows, ptrdiff_t count, float *max, float *sum) {
    if (rows->softcap > 0.0f || rows->bias) byte_weights_masked(rows, count, max, sum);
    else byte_weights_of(rows, count, max, sum, 1);
}

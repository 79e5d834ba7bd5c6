/* One head of a state-space or linear-attention layer, token after token:
 *     S = decay S + k u^T,   y_r = S^T q_r          S (n, p), k and q (n), u and y (p)
 * Mamba-2 (arXiv 2405.21060) is  decay = e^(dt A),  u = dt x,  k = B,  q = C,  and then  y + D x,  times silu(z).
 *
 * A piece of S stays in registers over a block of tokens: lanes are p, so that no sum crosses them, and each y is a
 * chain over n. A block of tokens only says how long a piece stays, so that no bit depends on it. */

/* h[j] = S[n0 + j] from p0 on, `rows` of them, zeros beyond p */
FC_INLINE void state_in(vf h[FC_N], const struct fc_head_scan *s, ptrdiff_t n0, ptrdiff_t p0, int rows) {
    const ptrdiff_t lanes = s->p - p0 < FC_N ? s->p - p0 : FC_N;
    const char *from = s->from ? s->from + n0 * s->from_n + p0 * s->from_p : NULL;
    if (!from) {
        for (int j = 0; j < rows; j++) h[j] = vf_zero();
    } else if (s->from_p == 4) {
        for (int j = 0; j < rows; j++) {
            const char *row = from + j * s->from_n;
            h[j] = lanes == FC_N ? vf_load(row) : vf_load_n((const float *)(const void *)row, lanes);
        }
    } else if (rows == FC_N && lanes == FC_N) {
        vf_load_transposed(h, from, s->from_p);
    } else {
        float square[FC_N][FC_N] = {{0}};
        for (ptrdiff_t i = 0; i < lanes; i++) memcpy(square[i], from + i * s->from_p, (size_t)rows * 4);
        vf all[FC_N];
        vf_load_transposed(all, (const char *)square, sizeof square[0]);
        for (int j = 0; j < rows; j++) h[j] = all[j];
    }
}

FC_INLINE void state_out(const vf h[FC_N], const struct fc_head_scan *s, ptrdiff_t n0, ptrdiff_t p0, int rows) {
    const ptrdiff_t lanes = s->p - p0 < FC_N ? s->p - p0 : FC_N;
    char *to = s->to + n0 * s->to_n + p0 * s->to_p;
    if (s->to_p == 4) {
        for (int j = 0; j < rows; j++) {
            char *row = to + j * s->to_n;
            if (lanes == FC_N) vf_store(row, h[j]);
            else vf_store_n((float *)(void *)row, h[j], lanes);
        }
    } else {
        vf row[FC_N];
        for (int j = 0; j < FC_N; j++) row[j] = j < rows ? h[j] : vf_zero();
        vf_transpose(row);
        for (ptrdiff_t i = 0; i < lanes; i++) {
            if (rows == FC_N) vf_store(to + i * s->to_p, row[i]);
            else memcpy(to + i * s->to_p, &row[i], (size_t)rows * 4);
        }
    }
}

/* `rows` of S from n on and `columns` vectors of p from p0 on, over all tokens of the block; adds their share to y, n
 * after n: no bit depends on how many go together. each_n: whether every n has a decay of its own. h: column after
 * column, FC_N apart. */
FC_INLINE void rows_over_tokens(const struct fc_head_scan *s, vf *h, ptrdiff_t n, ptrdiff_t p0, const int rows,
                                const int columns, const int each_n) {
    /* in registers: stores to y might change *s, for all that the compiler knows */
    const ptrdiff_t tokens = s->tokens, queries = s->queries, kind = s->kind, token = s->token, width = s->width;
    const float *k = s->keys + n / FC_PANEL * s->line + n % FC_PANEL, *u = s->u + p0, *decays = s->decay;
    float *y = s->y + p0;
    vf x[2][FC_N];
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 16
        for (int j = 0; j < rows; j++) x[c][j] = h[c * FC_N + j];
    for (ptrdiff_t t = 0; t < tokens; t++, k += token, u += width, y += width) {
        const vf decay = each_n ? vf_zero() : vf_load1(decays + t);
        const vf ut[2] = {vf_load(u), columns == 2 ? vf_load(u + FC_N) : vf_zero()};
#pragma GCC unroll 16
        for (int j = 0; j < rows; j++) {
            const vf kj = vf_load1(k + j), kept = each_n ? vf_load1(k + (1 + queries) * kind + j) : decay;
#pragma GCC unroll 2
            for (int c = 0; c < columns; c++) x[c][j] = vf_fma(ut[c], kj, kept * x[c][j]);
        }
        const float *q = k + kind;
        float *yr = y;
        ptrdiff_t r = 0;
        do {
            vf sum[2] = {vf_load(yr), columns == 2 ? vf_load(yr + FC_N) : vf_zero()};
#pragma GCC unroll 16
            for (int j = 0; j < rows; j++) {
                const vf qj = vf_load1(q + j);
#pragma GCC unroll 2
                for (int c = 0; c < columns; c++) sum[c] = vf_fma(x[c][j], qj, sum[c]);
            }
#pragma GCC unroll 2
            for (int c = 0; c < columns; c++) vf_store(yr + c * FC_N, sum[c]);
            q += kind, yr += tokens * width;
        } while (++r < queries);
    }
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 16
        for (int j = 0; j < rows; j++) h[c * FC_N + j] = x[c][j];
}

/* As many n as fit into the registers beside `columns` vectors of p: with two of these a k and a q serve twice. */
FC_INLINE void square_over_tokens(const struct fc_head_scan *s, ptrdiff_t n0, ptrdiff_t p0, int rows, const int columns,
                                  int each_n) {
    vf h[2 * FC_N];
    for (int c = 0; c < columns; c++) state_in(h + c * FC_N, s, n0, p0 + c * FC_N, rows);
    if (rows == 1) {
        rows_over_tokens(s, h, n0, p0, 1, columns, each_n);
    } else {
        for (int j = 0; j < FC_N; j += FC_N / columns)
            rows_over_tokens(s, h + j, n0 + j, p0, FC_N / columns, columns, each_n);
    }
    for (int c = 0; c < columns; c++) state_out(h + c * FC_N, s, n0, p0 + c * FC_N, rows);
}

FC_INLINE void columns_over_tokens(const struct fc_head_scan *s, ptrdiff_t n0, ptrdiff_t begin, ptrdiff_t end, int rows,
                                   int each_n) {
    ptrdiff_t p0 = begin;
    for (; p0 + FC_N < end; p0 += 2 * FC_N) square_over_tokens(s, n0, p0, rows, 2, each_n);
    if (p0 < end) square_over_tokens(s, n0, p0, rows, 1, each_n);
}

/* Squares of the same n and neighbouring p one after the other: a few columns of u and y, and k and q of FC_N n, stay in
 * the first cache. */
FC_INLINE void head_outer_any(const struct fc_head_scan *s, int each_n) {
    enum { COLUMNS = 64 };
    for (ptrdiff_t begin = 0; begin < s->p; begin += COLUMNS) {
        const ptrdiff_t end = s->p - begin < COLUMNS ? s->p : begin + COLUMNS;
        ptrdiff_t n0 = 0;
        for (; n0 + FC_N <= s->n; n0 += FC_N) columns_over_tokens(s, n0, begin, end, FC_N, each_n);
        for (; n0 < s->n; n0++) columns_over_tokens(s, n0, begin, end, 1, each_n);
    }
}

static void head_outer(const struct fc_head_scan *s) {
    const uint64_t before = vf_flush_subnormals(); /* a state dies away where nothing comes in */
    memset(s->y, 0, (size_t)(s->queries * s->tokens * s->width) * 4);
    if (s->decay) head_outer_any(s, 0);
    else head_outer_any(s, 1);
    vf_keep_subnormals(before);
}

/* ---- a block's inputs as float32, and its results ---- */

/* The next head's row begins where this one ends: by the time it is asked for, it is in the second cache. */
FC_INLINE void prefetch_after(const void *row, ptrdiff_t bytes) {
    for (ptrdiff_t i = 0; i < bytes; i += FC_LINE) __builtin_prefetch((const char *)row + bytes + i, 0, 2);
}

/* out[t] = x[t] factor scale[t], n of each of `tokens` rows: 16 neighbours together, `line` floats to the next 16,
 * `token` to the next row. scale may be NULL. */
FC_INLINE void head_rows_any(fc_dtype type, float *out, ptrdiff_t token, ptrdiff_t line, const void *x, ptrdiff_t ldx,
                             ptrdiff_t tokens, ptrdiff_t n, const float *scale, float factor) {
    for (ptrdiff_t t = 0; t < tokens; t++, out += token, x = (const char *)x + ldx) {
        const vf by = vf_set1(scale ? scale[t] * factor : factor);
        for (ptrdiff_t i = 0; i < n; i += FC_N)
            vf_store(out + i / FC_PANEL * line + i % FC_PANEL, vf_get_upto(type, x, i, n) * by);
        prefetch_after(x, n * fc_size_of(type));
    }
}

/* out[i] = x[i], `stride` bytes from one to the next */
FC_INLINE void scalars_f32_any(fc_dtype type, float *out, const void *x, ptrdiff_t stride, ptrdiff_t n) {
    const ptrdiff_t size = type == FC_F32 ? 4 : 2;
    const char *at = x;
    for (ptrdiff_t i = 0; i < n; i += FC_N) {
        const ptrdiff_t count = n - i < FC_N ? n - i : FC_N;
        float part[FC_N] = {0};
        for (ptrdiff_t j = 0; j < count; j++, at += stride) memcpy((char *)part + j * size, at, (size_t)size);
        vf_store_n(out + i, vf_get(type, part, 0), count);
    }
}

/* out = (y + D x) silu(z) of each token; x, z may be NULL */
FC_INLINE void head_output_any(fc_dtype type, const struct fc_head_output *o, ptrdiff_t tokens, ptrdiff_t p) {
    const vf d = vf_set1(o->d);
    for (ptrdiff_t t = 0; t < tokens; t++) {
        const float *y = o->y + t * o->width;
        const char *x = o->x ? (const char *)o->x + t * o->ldx : NULL;
        const char *z = o->z ? (const char *)o->z + t * o->ldz : NULL;
        char *out = (char *)o->out + t * o->ldo;
        for (ptrdiff_t i = 0; i < p; i += FC_N) {
            vf a = vf_load(y + i);
            if (x) a = vf_fma(o->ds ? vf_get_upto(FC_F32, o->ds, i, p) : d, vf_get_upto(type, x, i, p), a);
            if (z) a *= vf_activate(FC_SILU, vf_get_upto(type, z, i, p));
            vf_put_upto(type, out, i, a, p);
        }
        prefetch_after(out, p * fc_size_of(type));
        if (z) prefetch_after(z, p * fc_size_of(type));
    }
}

/* dt = clip(softplus(dt + bias)),  decay = e^(dt A) */
static void ssd_steps(float *dt, float *decay, ptrdiff_t tokens, const struct fc_ssd_steps *s) {
    for (ptrdiff_t t = 0; t < tokens; t += FC_N) {
        const ptrdiff_t count = tokens - t < FC_N ? tokens - t : FC_N;
        vf d = vf_load_n(dt + t, count) + vf_set1(s->bias);
        if (s->softplus) d = vf_softplus(d);
        d = vf_min(vf_set1(s->hi), vf_max(vf_set1(s->lo), d));
        vf_store_n(dt + t, d, count);
        vf_store_n(decay + t, vf_exp(d * vf_set1(s->a)), count);
    }
}

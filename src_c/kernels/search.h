/* What turns the integers of a group of W back into numbers, chosen so that the error is small: for each column
 *     W[k] ~ scale u[k] + minimum,   u[k] = round((W[k] - minimum) / scale) within 0..top
 * with a little sum over k of h[k] (W[k] - that)^2. Without minima, minimum = -zero scale.
 * From a rounding u the best scale and minimum follow by least squares, and from these another rounding. That begins at
 * several roundings, whose steps are finer or coarser than the range / top and shifted by a third of one. What is found
 * is kept where it is better than the range alone, both rounded as the format holds them.
 * Lanes are columns; products and sums are not fused, so the results are the same on every ISA. */

/* Steps of the range, y = (w - middle) / step, as scale v + minimum, v = u - top / 2 */
struct fc_fit {
    vf error, scale, minimum;
};

FC_INLINE vf vf_rint(vf a) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    return (a + magic) - magic;
}

FC_INLINE vf vf_within(vf a, float least, float most) { return vf_min(vf_max(a, vf_set1(least)), vf_set1(most)); }

/* 1 / a, or 0 where that is no ordinary number */
FC_INLINE vf vf_inverse(vf a) {
    const vf one = vf_set1(1.0f), none = vf_zero(), least = vf_set1(0x1p-100f);
    return vf_if_lt(least, vf_abs(a), one / a, none);
}

FC_INLINE vf vf_half(vf a) {
    uint16_t half[FC_N];
    vf_to_f16(half, a);
    return vf_from_f16(half);
}

/* The same, but where float16 has under 64 of its least steps the next one away from zero: integers that stand for
 * scales in units of `a` are then smaller, and none of them is lost with it. */
FC_INLINE vf vf_half_up(vf a) {
    const vf step = vf_set1(0x1p-24f), steps = vf_abs(a) * vf_set1(0x1p24f), near = vf_rint(steps);
    const vf up = (near + vf_if_lt(near, steps, vf_set1(1.0f), vf_zero())) * step;
    return vf_if_lt(steps, vf_set1(64.0f), vf_if_lt(a, vf_zero(), -up, up), vf_half(a));
}

/* sum of h (w - W)^2, w (group, FC_PANEL) */
FC_INLINE vf error_of(const float *w, const float *h, ptrdiff_t group, float top, vf scale, vf minimum) {
    const vf inverse = vf_inverse(scale);
    vf error = vf_zero();
    for (ptrdiff_t i = 0; i < group; i++) {
        const vf x = vf_load(w + i * FC_PANEL);
        const vf d = x - (scale * vf_rint(vf_within((x - minimum) * inverse, 0.0f, top)) + minimum);
        error += vf_set1(h[i]) * d * d;
    }
    return error;
}

/* Least squares from the rounding v = round(y factor + shift). minima: 0, then minimum = 0 and v = u - zero. */
FC_INLINE struct fc_fit fit(const float *w, const float *h, ptrdiff_t group, const struct fc_search *s, vf middle,
                            vf inverse, vf factor, vf shift) {
    const float zero = s->minima ? 0.5f * (float)s->top : (float)s->zero;
    vf n = vf_zero(), v1 = n, v2 = n, y1 = n, y2 = n, vy = n;
    for (ptrdiff_t i = 0; i < group; i++) {
        const vf y = (vf_load(w + i * FC_PANEL) - middle) * inverse, hi = vf_set1(h[i]), hy = hi * y;
        const vf v = vf_rint(vf_within(y * factor + (shift + zero), 0.0f, (float)s->top)) - zero, hv = hi * v;
        n += hi;
        v1 += hv;
        v2 += hv * v;
        y1 += hy;
        y2 += hy * y;
        vy += hy * v;
    }
    struct fc_fit f;
    if (s->minima) {
        f.scale = (n * vy - v1 * y1) / (n * v2 - v1 * v1);
        f.minimum = (y1 - f.scale * v1) / n;
    } else {
        f.scale = vy / v2;
        f.minimum = vf_zero();
    }
    f.error = y2 - f.scale * vy - f.minimum * y1;
    return f;
}

FC_INLINE void keep_better(struct fc_fit *best, struct fc_fit f) {
    best->scale = vf_if_lt(f.error, best->error, f.scale, best->scale);
    best->minimum = vf_if_lt(f.error, best->error, f.minimum, best->minimum);
    best->error = vf_if_lt(f.error, best->error, f.error, best->error);
}

/* Steps finer by 1, 2, 3 cut ends off; one coarser by 1, or by 2, leaves a level, or one at each end. */
FC_INLINE struct fc_fit fit_affine(const float *w, const float *h, ptrdiff_t group, const struct fc_search *s,
                                   vf middle, vf inverse, struct fc_fit best) {
    const float top = (float)s->top;
    const vf coarser = vf_set1((top - 1) / top), coarsest = vf_set1((top - 2) / top);
    keep_better(&best, fit(w, h, group, s, middle, inverse, coarser, vf_set1(-0.5f)));
    keep_better(&best, fit(w, h, group, s, middle, inverse, coarsest, vf_zero()));
    for (int finer = 0; finer <= 3; finer++)
        for (int third = -1; third <= 1; third++)
            keep_better(&best, fit(w, h, group, s, middle, inverse, vf_set1((top + (float)finer) / top),
                                   vf_set1((float)third / 3.0f)));
    return best;
}

/* The value of largest magnitude is given -zero, or zero - 1, and half a step less or more */
FC_INLINE struct fc_fit fit_symmetric(const float *w, const float *h, ptrdiff_t group, const struct fc_search *s,
                                      vf inverse, struct fc_fit best) {
    const float zero = (float)s->zero;
    for (int half = -2; half <= 3; half++)
        for (int end = 0; end <= 1; end++) {
            const float steps = (end ? 1.0f - zero : zero) + (end ? -0.5f : 0.5f) * (float)half;
            keep_better(&best, fit(w, h, group, s, vf_zero(), inverse, vf_set1(steps / zero), vf_zero()));
        }
    return best;
}

/* The smallest and the largest value of each column, and that of largest magnitude */
FC_INLINE void range_of(const float *w, ptrdiff_t group, vf *lo, vf *hi) {
    *lo = *hi = vf_load(w);
    for (ptrdiff_t i = 1; i < group; i++) {
        const vf x = vf_load(w + i * FC_PANEL);
        *lo = vf_min(x, *lo);
        *hi = vf_max(x, *hi);
    }
}

/* scale and minimum of a group, not rounded, from its range alone and as searched; minima are 0 or less if `below` */
FC_INLINE void search_group(vf usual[2], vf found[2], const float *w, const float *h, ptrdiff_t group,
                            const struct fc_search *s, int below) {
    const float top = (float)s->top, zero = (float)s->zero;
    const vf none = vf_zero();
    vf lo, hi, step, middle = none;
    range_of(w, group, &lo, &hi);
    if (below) lo = vf_min(lo, none);
    if (s->minima) {
        step = (hi - lo) / vf_set1(top);
        middle = lo + vf_set1(0.5f * top) * step;
    } else {
        step = vf_if_lt(hi, -lo, lo, hi) / vf_set1(-zero);
        lo = vf_set1(-zero) * step;
    }
    const vf inverse = vf_inverse(step), scale = vf_set1(1.0f);
    struct fc_fit best = {error_of(w, h, group, top, step, lo) * inverse * inverse, scale, none};
    best = s->minima ? fit_affine(w, h, group, s, middle, inverse, best) : fit_symmetric(w, h, group, s, inverse, best);
    for (int again = 0; again < 2; again++) {
        const vf factor = vf_set1(1.0f) / best.scale;
        keep_better(&best, fit(w, h, group, s, middle, inverse, factor, -best.minimum * factor));
    }
    usual[0] = step, usual[1] = lo;
    if (s->minima && !below) usual[0] = (hi - vf_half(lo)) / vf_set1(top);
    found[0] = best.scale * step;
    found[1] = s->minima ? middle + best.minimum * step - vf_set1(0.5f * top) * found[0] : vf_set1(-zero) * found[0];
    if (below) found[1] = vf_min(found[1], none);
}

/* Whichever makes the smaller error as float16, that of the range if none does, into scale and minimum. What is found is
 * tried with its levels one lower and one higher too: so weights that lie on 14 of 16 levels, or more, keep them all. */
FC_INLINE void choose_halves(float *scale, float *minimum, const float *w, const float *h, ptrdiff_t group,
                             const struct fc_search *s, const vf usual[2], const vf found[2]) {
    const float top = (float)s->top;
    const vf zero = vf_set1((float)-s->zero);
    const vf a = vf_half(usual[0]), a_min = s->minima ? vf_half(usual[1]) : zero * a;
    const vf b = vf_half(found[0]);
    vf best = error_of(w, h, group, top, a, a_min), chosen = usual[0], chosen_min = usual[1];
    for (int lower = s->minima ? -1 : 0; lower <= (s->minima ? 1 : 0); lower++) {
        const vf from = found[1] - (float)lower * b, b_min = s->minima ? vf_half(from) : zero * b;
        const vf error = error_of(w, h, group, top, b, b_min);
        chosen = vf_if_lt(error, best, b, chosen);
        chosen_min = vf_if_lt(error, best, from, chosen_min);
        best = vf_if_lt(error, best, error, best);
    }
    vf_store(scale, chosen);
    vf_store(minimum, chosen_min);
}

/* ---- blocks of groups whose scales are integers ---- */

enum { FC_MOST_GROUPS = 16 };

/* Integers for the scale and the minimum of a group beside those nearest to what was found, and zeros: whichever makes
 * the smallest error. */
FC_INLINE void choose_integers(vf *scale, vf *minimum, const float *w, const float *h, const struct fc_search *s, vf d,
                               vf m) {
    const float least = s->minima ? 0.0f : -128.0f, most = s->minima ? 63.0f : 127.0f, top = (float)s->top;
    const vf zero = vf_set1((float)-s->zero), first = *scale, second = *minimum;
    *scale = *minimum = vf_zero();
    vf best = error_of(w, h, s->group, top, *scale, *minimum);
    for (int a = -1; a <= 1; a++)
        for (int b = s->minima ? -1 : 0; b <= (s->minima ? 1 : 0); b++) {
            const vf i = vf_within(first + (float)a, least, most), j = vf_within(second + (float)b, 0.0f, 63.0f);
            const vf error = error_of(w, h, s->group, top, d * i, s->minima ? -(m * j) : zero * (d * i));
            *scale = vf_if_lt(error, best, i, *scale);
            *minimum = vf_if_lt(error, best, j, *minimum);
            best = vf_if_lt(error, best, error, best);
        }
}

/* Sums of  w ~ d p + m q,  p = scale u, q = -minimum, or p = scale (u - zero) */
struct fc_sums {
    vf pp, pq, qq, pw, qw;
};

FC_INLINE void add_sums(struct fc_sums *sums, const float *w, const float *h, const struct fc_search *s, vf scale,
                        vf minimum, vf d, vf m) {
    const vf zero = vf_set1((float)s->zero), q = s->minima ? -minimum : vf_zero();
    const vf factor = vf_inverse(d * scale), lowest = s->minima ? m * q : -zero * (d * scale);
    for (ptrdiff_t i = 0; i < s->group; i++) {
        const vf x = vf_load(w + i * FC_PANEL), hi = vf_set1(h[i]);
        const vf u = vf_rint(vf_within((x - lowest) * factor, 0.0f, (float)s->top));
        const vf p = scale * (s->minima ? u : u - zero), hp = hi * p, hq = hi * q;
        sums->pp += hp * p;
        sums->pq += hp * q;
        sums->qq += hq * q;
        sums->pw += hp * x;
        sums->qw += hq * x;
    }
}

/* d and m by least squares, where that has an answer */
FC_INLINE void fit_factors(vf *d, vf *m, const struct fc_search *s, const struct fc_sums *f) {
    const vf none = vf_zero();
    if (!s->minima) {
        *d = vf_half_up(vf_if_lt(none, f->pp, f->pw / f->pp, *d));
        return;
    }
    const vf determinant = f->pp * f->qq - f->pq * f->pq, least = f->pp * f->qq * vf_set1(1e-5f);
    const vf new_d = (f->pw * f->qq - f->qw * f->pq) / determinant;
    const vf new_m = (f->pp * f->qw - f->pq * f->pw) / determinant;
    vf usable = vf_if_lt(none, new_d, new_m, none);
    usable = vf_if_lt(least, determinant, usable, none);
    *m = vf_half_up(vf_if_lt(none, usable, new_m, *m));
    *d = vf_half_up(vf_if_lt(none, usable, new_d, *d));
}

/* A block of a vector's columns: d, m, and the integers of each group, all as floats, FC_PANEL apart */
FC_INLINE void search_super(float *out, const float *w, const float *h, const struct fc_search *s) {
    vf scale[FC_MOST_GROUPS], minimum[FC_MOST_GROUPS], usual[2], found[2];
    const vf none = vf_zero();
    const ptrdiff_t size = s->group * FC_PANEL;
    vf d = none, m = none;
    for (int g = 0; g < s->groups; g++) {
        search_group(usual, found, w + g * size, h + g * s->group, s->group, s, 1);
        scale[g] = found[0];
        minimum[g] = -found[1];
        d = vf_if_lt(vf_abs(d), vf_abs(scale[g]), scale[g], d);
        m = vf_max(minimum[g], m);
    }
    d = vf_half_up(d / vf_set1(s->minima ? 63.0f : -128.0f));
    m = s->minima ? vf_half_up(m / vf_set1(63.0f)) : none;
    for (int again = 0; again < 2; again++) {
        struct fc_sums sums = {none, none, none, none, none};
        const vf per_d = vf_inverse(d), per_m = vf_inverse(m);
        for (int g = 0; g < s->groups; g++) {
            vf i = vf_rint(vf_within(scale[g] * per_d, -128.0f, 127.0f));
            vf j = vf_rint(vf_within(minimum[g] * per_m, 0.0f, 63.0f));
            choose_integers(&i, &j, w + g * size, h + g * s->group, s, d, m);
            if (again) {
                vf_store(out + (2 + 2 * g) * FC_PANEL, i);
                vf_store(out + (3 + 2 * g) * FC_PANEL, j);
                continue;
            }
            add_sums(&sums, w + g * size, h + g * s->group, s, i, j, d, m);
            scale[g] = i;
            minimum[g] = j;
        }
        if (again) break;
        fit_factors(&d, &m, s, &sums);
        for (int g = 0; g < s->groups; g++) scale[g] = scale[g] * d, minimum[g] = minimum[g] * m;
    }
    vf_store(out, d);
    vf_store(out + FC_PANEL, m);
}

/* out (2 + 2 groups, FC_PANEL) of a block of one group, as scale and minimum alone (2, FC_PANEL) */
static void search(float *out, const float *w, const float *h, const struct fc_search *s) {
    for (int j = 0; j < FC_PANEL; j += FC_N) {
        vf usual[2], found[2];
        if (s->groups > 1) {
            search_super(out + j, w + j, h, s);
            continue;
        }
        search_group(usual, found, w + j, h, s->group, s, 0);
        choose_halves(out + j, out + FC_PANEL + j, w + j, h, s->group, s, usual, found);
    }
}

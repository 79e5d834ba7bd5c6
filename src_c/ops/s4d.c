/* Diagonal state spaces: A, B, C and dt to the modes of a recurrence, token after token (heads.h), and to the kernel of
 * the convolution that is the same. Modes are made in double: they are few, and every token multiplies their errors. */
#include <math.h>

#include "heads.h"

enum { MOST_COLUMNS = 64 }; /* channels of an item: their modes stay in the second cache */

struct complex_number {
    double re, im;
};

static struct complex_number times(struct complex_number a, struct complex_number b) {
    return (struct complex_number){a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

static struct complex_number over(struct complex_number a, struct complex_number b) {
    const double square = b.re * b.re + b.im * b.im;
    return (struct complex_number){(a.re * b.re + a.im * b.im) / square, (a.im * b.re - a.re * b.im) / square};
}

/* number i of complex64 x, which may lie on any byte */
static struct complex_number get_complex(const float *x, ptrdiff_t i) {
    return (struct complex_number){fc_get_float(x, 2 * i), fc_get_float(x, 2 * i + 1)};
}

/* e^z - 1, of full precision where z is small */
static struct complex_number exp_minus_1(struct complex_number z) {
    const double half = sin(z.im / 2), grown = expm1(z.re);
    return (struct complex_number){grown * cos(z.im) - 2 * half * half, (grown + 1) * sin(z.im)};
}

struct mode {
    struct complex_number da, db;
};

/* zero-order hold  dA = e^(dt A), dB = (dA - 1) / A B;   bilinear  dA = (1 + dt A / 2) / (1 - dt A / 2),
 * dB = dt / (1 - dt A / 2) B */
static struct mode discretized(const fc_s4d_modes_args *s, ptrdiff_t channel, ptrdiff_t n) {
    const double dt = fc_get_float(s->dt, channel);
    const struct complex_number a = get_complex(s->a, channel * s->n + n), b = get_complex(s->b, channel * s->n + n),
                                z = {dt * a.re, dt * a.im}, step = {dt, 0};
    if (s->bilinear) {
        const struct complex_number below = {1 - z.re / 2, -z.im / 2}, above = {1 + z.re / 2, z.im / 2};
        return (struct mode){over(above, below), times(over(step, below), b)};
    }
    const struct complex_number grown = exp_minus_1(z);
    const int still = a.re == 0 && a.im == 0;
    return (struct mode){{exp(z.re) * cos(z.im), exp(z.re) * sin(z.im)}, times(still ? step : over(grown, a), b)};
}

/* ---- modes of the recurrence ---- */

static void mode_floats(const fc_s4d_modes_args *s, ptrdiff_t channel, ptrdiff_t n, float *out) {
    const struct mode m = discretized(s, channel, n);
    const struct complex_number c = get_complex(s->c, channel * s->n + n);
    const float re = (float)m.da.re, im = (float)m.da.im;
    const double low_re = m.da.re - re, low_im = m.da.im - im; /* NaN where dA is infinite, which leaves it so */
    const float floats[FC_MODE_FLOATS] = {re, im, (float)low_re, (float)low_im, (float)m.db.re, (float)m.db.im,
                                       (float)(2 * c.re), (float)(-2 * c.im)};
    for (int i = 0; i < FC_MODE_FLOATS; i++) out[i * FC_PANEL] = floats[i];
}

static void make_modes(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const fc_s4d_modes_args *s = context;
    (void)rank;
    for (ptrdiff_t channel = begin; channel < end; channel++) {
        float *panel = s->modes + channel / FC_PANEL * s->n * FC_MODE_FLOATS * FC_PANEL + channel % FC_PANEL;
        for (ptrdiff_t n = 0; n < s->n; n++) mode_floats(s, channel, n, panel + n * FC_MODE_FLOATS * FC_PANEL);
    }
}

/* of a mode: two exponentials, a sine and two cosines in double */
static const double NS_PER_MODE = 100;

fc_status fc_s4d_modes(const fc_s4d_modes_args *s) {
    if (!FC_IS_OURS(s)) return FC_BAD_SIZE;
    const double ns = (double)s->n * NS_PER_MODE;
    return fc_static(fc_threads_for(s->channels, ns), s->channels, ns, make_modes, (void *)(uintptr_t)s);
}

ptrdiff_t fc_s4d_modes_floats(ptrdiff_t channels, ptrdiff_t n) {
    return fc_times(fc_times(fc_round_up(channels, FC_PANEL), n), FC_MODE_FLOATS);
}

/* ---- the recurrence ---- */

static void no_keys(struct head_block *at) { (void)at; } /* modes are the same for every token */

static void fill(struct head_block *at) {
    const fc_s4d_scan_args *a = at->heads->args;
    struct fc_head_scan *s = &at->scan;
    s->line = a->n * FC_MODE_FLOATS * FC_PANEL;
    s->keys = a->modes + at->p0 / FC_PANEL * s->line;
    const char *u = (const char *)a->u + at->b * a->u_stride[0] + at->start * a->u_stride[1];
    at->heads->k->head_rows[a->type](at->u, s->width, FC_PANEL, u + at->p0 * fc_size_of(a->type), a->u_stride[1],
                                     s->tokens, s->p, NULL, 1.0f);
}

static void put(const struct head_block *at) {
    const fc_s4d_scan_args *a = at->heads->args;
    const ptrdiff_t skipped = at->p0 * fc_size_of(a->type);
    const struct fc_head_output o = {
        .out = (char *)a->out + at->b * a->out_stride[0] + at->start * a->out_stride[1] + skipped,
        .y = at->scan.y,
        .x = a->d ? (const char *)a->u + at->b * a->u_stride[0] + at->start * a->u_stride[1] + skipped : NULL,
        .ldo = a->out_stride[1],
        .width = at->scan.width,
        .ldx = a->u_stride[1],
        .ds = a->d ? a->d + at->p0 : NULL,
    };
    at->heads->k->head_output[a->type](&o, at->scan.tokens, at->scan.p);
}

fc_status fc_s4d_scan(const fc_s4d_scan_args *a) {
    if (!FC_IS_OURS(a)) return FC_BAD_SIZE;
    const ptrdiff_t state_stride[3] = {a->state_stride[0], 0, a->state_stride[1]},
                    new_state_stride[3] = {a->new_state_stride[0], 0, a->new_state_stride[1]};
    struct heads heads = {
        .k = fc_k,
        .args = a,
        .batch = a->batch,
        .heads = 1,
        .seq = a->seq,
        .n = 2 * a->n,
        .p = a->channels,
        .queries = 1,
        .state = a->state,
        .new_state = a->new_state,
        .state_stride = state_stride,
        .new_state_stride = new_state_stride,
        .by_p = 1,
        .modes = 1,
        .most_columns = MOST_COLUMNS,
        .share = 1,
        .fill_keys = no_keys,
        .fill = fill,
        .put = put,
    };
    return fc_heads_run(&heads, a->workspace);
}

/* ---- the convolution's kernel ---- */

struct kernels_of {
    const struct fc_kernels *k;
    const fc_s4d_modes_args *s;
    float *out; /* (channels, length) */
    ptrdiff_t length;
    fc_scratch scratch; /* a thread: powers (n, 2, 8), step (n, 2) */
};

static void make_kernels(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct kernels_of *ctx = context;
    const fc_s4d_modes_args *s = ctx->s;
    double *powers = fc_scratch_of(&ctx->scratch, rank), *step = powers + 2 * FC_POWERS * s->n;
    for (ptrdiff_t channel = begin; channel < end; channel++) {
        for (ptrdiff_t n = 0; n < s->n; n++) {
            const struct mode m = discretized(s, channel, n);
            struct complex_number c = get_complex(s->c, channel * s->n + n), power = {1, 0};
            c.re *= 2, c.im *= 2;
            for (int i = 0; i < FC_POWERS; i++, power = times(power, m.da)) {
                const struct complex_number term = times(times(c, m.db), power);
                powers[2 * FC_POWERS * n + i] = term.re, powers[2 * FC_POWERS * n + FC_POWERS + i] = term.im;
            }
            step[2 * n] = power.re, step[2 * n + 1] = power.im;
        }
        ctx->k->mode_powers(ctx->out + channel * ctx->length, powers, step, s->n, ctx->length);
    }
}

fc_status fc_s4d_kernel(float *out, const fc_s4d_modes_args *s, ptrdiff_t length) {
    if (!FC_IS_OURS(s)) return FC_BAD_SIZE;
    struct kernels_of ctx = {.k = fc_k, .s = s, .out = out, .length = length};
    const double ns = (double)s->n * (NS_PER_MODE + (double)length * 12 * fc_ns.flop);
    const int threads = fc_threads_for(s->channels, ns);
    if (fc_scratch_alloc(s->workspace, &ctx.scratch, threads, (size_t)fc_times(s->n, (2 * FC_POWERS + 2) * 8)))
        return FC_NO_MEMORY;
    fc_status status = fc_static(threads, s->channels, ns, make_kernels, &ctx);
    fc_scratch_free(&ctx.scratch);
    return status;
}

/* Checks the C kernels against plain double loops, without Python: for an emulator or a new CPU.
 * tools/check_aarch64.sh builds and runs it. Prints one line per op and ISA; exit status 1 if any is off. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "forge.h"

static uint64_t state = 1;
static float uniform(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 40) / (1 << 23) - 1.0);
}
static float *random_floats(ptrdiff_t n) {
    float *p = malloc((size_t)(n ? n : 1) * sizeof *p);
    for (ptrdiff_t i = 0; i < n; i++) p[i] = uniform();
    return p;
}

static int failures;
static double worst;
/* |got - expected| against `bound`: a multiple of 2^-24 that the caller derives from the op. */
static void expect(double got, double expected, double bound) {
    double error = fabs(got - expected) / (bound + 1e-300);
    if (!(error <= worst)) worst = error;
}
static void report(const char *op) {
    printf("%-18s %-16s error / bound %.3f %s\n", fc_isa(), op, worst, worst <= 1 ? "" : "FAILED");
    failures += !(worst <= 1);
    worst = 0;
}
static const double U = 1.0 / (1 << 24);

static fc_rows one_row(void) {
    fc_rows rows;
    memset(&rows, 0, sizeof rows);
    rows.size = sizeof rows;
    return rows;
}
static fc_rows dense_rows(ptrdiff_t m, ptrdiff_t out_bytes, ptrdiff_t x_bytes) {
    fc_rows rows = one_row();
    rows.ndim = 1;
    rows.shape[0] = m;
    rows.stride[0][0] = out_bytes;
    rows.stride[1][0] = x_bytes;
    return rows;
}

static void check_rows(ptrdiff_t n) {
    float *x = random_floats(n), *w = random_floats(n), *b = random_floats(n), *y = random_floats(n);
    fc_rows rows = one_row();
    double square = 0, mean = 0, variance = 0, sum = 0, peak = -1e30, size = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        square += (double)x[i] * x[i] / (double)n;
        mean += x[i] / (double)n;
        size += fabs(x[i]) / (double)n;
        peak = fmax(peak, x[i]);
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        variance += (x[i] - mean) * (x[i] - mean) / (double)n;
        sum += exp(x[i] - peak);
    }
    fc_rms_norm(FC_F32, y, NULL, x, NULL, w, &rows, n, 1e-6f, 1.0f);
    for (ptrdiff_t i = 0; i < n; i++) {
        double e = x[i] / sqrt(square + 1e-6) * (1.0 + w[i]);
        expect(y[i], e, (double)(n + 10) * U * fabs(x[i] / sqrt(square + 1e-6)) * (1 + fabs(w[i])));
    }
    fc_layer_norm(FC_F32, y, NULL, x, NULL, w, b, &rows, n, 1e-5f);
    for (ptrdiff_t i = 0; i < n; i++) {
        double scale = fabs(w[i]) / sqrt(variance + 1e-5);
        expect(y[i], (x[i] - mean) / sqrt(variance + 1e-5) * w[i] + b[i],
               (1.5 * (double)n + 10) * U * (scale * (fabs(x[i] - mean) + size) + fabs(b[i])));
    }
    fc_softmax(FC_F32, y, x, &rows, n);
    for (ptrdiff_t i = 0; i < n; i++) {
        double e = exp(x[i] - peak) / sum;
        expect(y[i], e, (double)(n + 10) * U * e * (1 + fabs(x[i] - peak)));
    }
    for (ptrdiff_t i = 0; i < n; i++) x[i] *= 8;
    fc_glu(FC_SILU, FC_F32, y, x, w, &rows, n);
    for (ptrdiff_t i = 0; i < n; i++) expect(y[i], x[i] / (1 + exp(-x[i])) * w[i], 9 * U * fabs((double)x[i] * w[i]));
    fc_activate(FC_GELU, FC_F32, y, x, &rows, n);
    for (ptrdiff_t i = 0; i < n; i++) expect(y[i], 0.5 * x[i] * erfc(-x[i] / sqrt(2)), 9 * U * fabs(x[i]));
    free(x), free(w), free(b), free(y);
}

/* float16 and bfloat16 in and out of the vector words: relu of a value and its negative. */
static void check_halves(ptrdiff_t n) {
    uint16_t *x = malloc((size_t)n * 2 + 2), *y = malloc((size_t)n * 2 + 2);
    float *wide = random_floats(n);
    fc_rows rows = one_row();
    for (ptrdiff_t i = 0; i < n; i++) x[i] = (uint16_t)(0x3c00 + 37 * i % 0x400 + (i & 1) * 0x8000);
    for (int type = FC_F16; type <= FC_BF16; type++) {
        fc_activate(FC_RELU, (fc_dtype)type, y, x, &rows, n);
        fc_convert((fc_dtype)type, wide, x, n);
        for (ptrdiff_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)x[i] << 16;
            float bf16;
            memcpy(&bf16, &bits, 4);
            double f16 = (1 + (x[i] & 0x3ff) / 1024.0) * (x[i] >> 15 ? -1 : 1);
            expect(wide[i], type == FC_BF16 ? bf16 : f16, 0);
            expect(y[i], x[i] >> 15 ? 0 : x[i], 0);
        }
    }
    free(x), free(y), free(wide);
}

static void check_rope(ptrdiff_t pairs, int interleaved) {
    enum { S = 3, H = 2 };
    ptrdiff_t d = 2 * pairs + 3;
    float *x = random_floats(S * H * d), *y = random_floats(S * H * d);
    float *cosine = random_floats(S * pairs), *sine = random_floats(S * pairs);
    fc_rope_args a = {.size = sizeof a, .type = FC_F32, .out = y, .x = x, .cos = cosine, .sin = sine, .batch = 1,
                      .seq = S, .heads = H, .head_dim = d, .rotary_pairs = pairs, .interleaved = interleaved};
    a.x_stride[1] = a.out_stride[1] = H * d * 4;
    a.x_stride[2] = a.out_stride[2] = d * 4;
    fc_rope(&a);
    for (ptrdiff_t r = 0; r < S * H; r++)
        for (ptrdiff_t i = 0; i < pairs; i++) {
            ptrdiff_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + pairs;
            double p = x[r * d + first], q = x[r * d + second];
            double c = cosine[r / H * pairs + i], s = sine[r / H * pairs + i];
            expect(y[r * d + first], p * c - q * s, 3 * U * (fabs(p) + fabs(q)));
            expect(y[r * d + second], q * c + p * s, 3 * U * (fabs(p) + fabs(q)));
        }
    free(x), free(y), free(cosine), free(sine);
}

/* Half of S tokens, and these back in place; the gates of the others are no larger. */
static void check_routing(ptrdiff_t n) {
    enum { S = 10, C = 5 };
    float *x = random_floats(S * n), *w = random_floats(n), *y = random_floats(C * n), logits[S], gate[C];
    float *out = malloc((size_t)(S * n) * 4 + 4);
    int64_t chosen[C];
    fc_rows rows = dense_rows(S, 0, n * 4), places = dense_rows(C, n * 4, n * 4);
    fc_router_logits(FC_F32, logits, x, w, &rows, n);
    for (ptrdiff_t s = 0; s < S; s++) {
        double e = 0, size = 0;
        for (ptrdiff_t i = 0; i < n; i++) e += (double)x[s * n + i] * w[i], size += fabs((double)x[s * n + i] * w[i]);
        expect(logits[s], e, (double)(n + 1) * U * size);
    }
    fc_largest_logits(chosen, gate, logits, 1, S, C);
    memcpy(out, x, (size_t)(S * n) * 4);
    places.index[0] = places.index[1] = chosen;
    places.stride[2][0] = n * 4;
    fc_gate_update(FC_F32, out, out, y, gate, &places, n);
    for (ptrdiff_t s = 0, c = 0; s < S; s++) {
        const int goes = c < C && chosen[c] == s;
        for (ptrdiff_t j = 0; !goes && j < C; j++) expect(logits[s] > gate[j], 0, 0);
        if (goes) expect(gate[c], logits[s], 0);
        for (ptrdiff_t i = 0; i < n; i++) {
            double r = goes ? logits[s] : 0, p = x[s * n + i], q = goes ? y[c * n + i] : 0;
            expect(out[s * n + i], (1 - r) * p + r * q, goes ? 4 * U * ((1 + fabs(r)) * fabs(p) + fabs(r * q)) : 0);
        }
        c += goes;
    }
    free(x), free(w), free(y), free(out);
}

static void check_linear(ptrdiff_t m, ptrdiff_t k, ptrdiff_t n) {
    float *x = random_floats(m * k), *w = random_floats(k * n), *bias = random_floats(n), *y = random_floats(m * n);
    float *columns = random_floats(k * n), *first = random_floats(m * n);
    for (ptrdiff_t i = 0; i < k; i++)
        for (ptrdiff_t j = 0; j < n; j++) columns[j * k + i] = w[i * n + j];
    fc_rows rows = dense_rows(m, n * 4, k * 4);
    fc_linear_args a = {.size = sizeof a, .type = FC_F32, .out = first, .x = x, .rows = &rows, .m = m, .k = k, .n = n,
                        .layout = FC_ROWS, .weight = w, .ldw = n * 4, .bias = bias};
    fc_linear(&a);
    a.layout = FC_COLS, a.weight = columns, a.ldw = k * 4, a.out = y;
    fc_linear(&a);
    for (ptrdiff_t i = 0; i < m; i++)
        for (ptrdiff_t j = 0; j < n; j++) {
            double sum = bias[j], size = fabs(bias[j]);
            for (ptrdiff_t l = 0; l < k; l++) {
                sum += (double)x[i * k + l] * w[l * n + j];
                size += fabs((double)x[i * k + l] * w[l * n + j]);
            }
            expect(y[i * n + j], sum, (double)(k + 2) * U * size);
            expect(y[i * n + j], first[i * n + j], 0);
        }
    free(x), free(w), free(bias), free(y), free(columns), free(first);
}

/* Where column j of row k lies in a panel of the integer formats, and what turns it into W. */
struct place {
    int u;
    double scale, zero, minimum;
};
static double half_at(const uint8_t *p) {
    uint16_t bits;
    float value;
    memcpy(&bits, p, 2);
    fc_convert(FC_F16, &value, &bits, 1);
    return value;
}
static struct place place_of(fc_layout layout, ptrdiff_t group, const uint8_t *panel, ptrdiff_t k, ptrdiff_t j) {
    const ptrdiff_t block = layout == FC_PACKED_I4_SYMMETRIC ? 64 : group, r = k % block;
    const ptrdiff_t bytes = layout == FC_PACKED_I8 ? block * 16 : block * 8;
    const uint8_t *b = panel + k / block * (bytes + 64), *params = b + bytes;
    if (layout == FC_PACKED_I8) {
        float scale;
        memcpy(&scale, params + j * 4, 4);
        return (struct place){b[r / 4 * 64 + j * 4 + r % 4], scale, 128, 0};
    }
    const uint8_t both = b[r / 8 * 64 + j * 4 + r % 4];
    const int u = r % 8 < 4 ? both & 15 : both >> 4;
    if (layout == FC_PACKED_I4_SYMMETRIC) return (struct place){u, half_at(params + r / 32 * 32 + j * 2), 8, 0};
    return (struct place){u, half_at(params + j * 2), 0, half_at(params + 32 + j * 2)};
}

/* Any bytes are a weight, but for the scales; x is whole numbers up to those it is rounded to, so that its scales are
 * 1. */
static void check_rounded(fc_layout layout, fc_rounds rounding, ptrdiff_t group, ptrdiff_t m, ptrdiff_t k,
                          ptrdiff_t n) {
    const float most = rounding == FC_ROUND_I8 ? 127 : 2047;
    const ptrdiff_t block = layout == FC_PACKED_I4_SYMMETRIC ? 64 : group;
    const ptrdiff_t bytes = layout == FC_PACKED_I8 ? block * 16 : block * 8;
    const ptrdiff_t panels = (n + 15) / 16, stride = (k + block - 1) / block * (bytes + 64);
    uint8_t *data = malloc((size_t)(panels * stride));
    float *x = random_floats(m * k), *y = random_floats(m * n);
    for (ptrdiff_t i = 0; i < panels * stride; i++) data[i] = (uint8_t)(int)(uniform() * 128 + 128);
    for (uint8_t *b = data; b < data + panels * stride; b += bytes + 64)
        for (int j = 0; j < 32; j++) {
            const float wide = uniform();
            const uint16_t half = (uint16_t)(0x2c00 + (int)(uniform() * 512 + 512));
            if (layout == FC_PACKED_I8) memcpy(b + bytes + j / 2 * 4, &wide, 4);
            else memcpy(b + bytes + j * 2, &half, 2);
        }
    for (ptrdiff_t i = 0; i < m * k; i++) x[i] = i % k % 32 ? rintf(x[i] * most) : most;
    fc_rows rows = dense_rows(m, n * 4, k * 4);
    fc_linear(&(fc_linear_args){.size = sizeof(fc_linear_args), .type = FC_F32, .out = y, .x = x, .rows = &rows,
                                .m = m, .k = k, .n = n, .layout = layout, .weight = data, .group = group,
                                .rounding = rounding});
    for (ptrdiff_t i = 0; i < m; i++)
        for (ptrdiff_t j = 0; j < n; j++) {
            double sum = 0, size = 0;
            for (ptrdiff_t l = 0; l < k; l++) {
                const struct place w = place_of(layout, group, data + j / 16 * stride, l, j % 16);
                sum += x[i * k + l] * (w.scale * (w.u - w.zero) + w.minimum);
                size += fabs(x[i * k + l]) * (fabs(w.scale * (w.u - w.zero)) + fabs(w.minimum));
            }
            expect(y[i * n + j], sum, (double)(k / 16 + 8) * U * size);
        }
    free(data), free(x), free(y);
}

static void check_packed(fc_layout layout, ptrdiff_t group, ptrdiff_t m, ptrdiff_t k, ptrdiff_t n) {
    check_rounded(layout, FC_ROUND_I8, group, m, k, n);
    check_rounded(layout, FC_ROUND_I12, group, m, k, n);
}

/* Causal, grouped: query h reads head h / 2; the queries are the last q_len of kv_len positions. */
static void check_attention(ptrdiff_t q_len, ptrdiff_t kv_len, ptrdiff_t d) {
    enum { H = 4, G = 2 };
    float *q = random_floats(q_len * H * d), *k = random_floats(kv_len * G * d), *v = random_floats(kv_len * G * d);
    float *y = random_floats(q_len * H * d);
    double *p = malloc((size_t)kv_len * sizeof *p), scale = 1 / sqrt((double)d);
    fc_attention_args a = {.size = sizeof a, .out = y, .q = q, .k = k, .v = v, .batch = 1, .q_len = q_len,
                           .kv_len = kv_len, .heads = H, .kv_heads = G, .head_dim = d, .v_dim = d, .causal = 1,
                           .scale = (float)scale};
    a.q_stride[1] = a.out_stride[1] = H * d * 4, a.q_stride[2] = a.out_stride[2] = d * 4;
    a.k_stride[1] = a.v_stride[1] = G * d * 4, a.k_stride[2] = a.v_stride[2] = d * 4;
    fc_attention(&a);
    for (ptrdiff_t i = 0; i < q_len; i++)
        for (ptrdiff_t h = 0; h < H; h++) {
            ptrdiff_t seen = i + kv_len - q_len + 1;
            double sum = 0, largest = 0;
            for (ptrdiff_t j = 0; j < seen; j++) {
                double s = 0, size = 0;
                for (ptrdiff_t c = 0; c < d; c++) {
                    double t = scale * q[(i * H + h) * d + c] * k[(j * G + h / 2) * d + c];
                    s += t, size += fabs(t);
                }
                sum += p[j] = exp(s);
                largest = fmax(largest, size);
            }
            for (ptrdiff_t c = 0; c < d; c++) {
                double e = 0, size = 0;
                for (ptrdiff_t j = 0; j < seen; j++) {
                    e += p[j] / sum * v[(j * G + h / 2) * d + c];
                    size += p[j] / sum * fabs(v[(j * G + h / 2) * d + c]);
                }
                expect(y[(i * H + h) * d + c], e,
                       (2 * (double)(d + 8) * (1 + largest) + 3 * (double)seen + 16) * U * size);
            }
        }
    free(q), free(k), free(v), free(y), free(p);
}

/* The keys in two pieces, the second at 256: the bits of one call. */
static void check_carried(ptrdiff_t q_len, ptrdiff_t kv_len, ptrdiff_t d) {
    enum { H = 4, G = 2 };
    float *q = random_floats(q_len * H * d), *k = random_floats(kv_len * G * d), *v = random_floats(kv_len * G * d);
    float *y = random_floats(q_len * H * d), *whole = random_floats(q_len * H * d);
    float *carried = random_floats(q_len * H * (d + 2));
    int64_t *at = malloc((size_t)q_len * sizeof *at);
    fc_attention_args a = {.size = sizeof a, .out = whole, .q = q, .k = k, .v = v, .batch = 1, .q_len = q_len,
                           .kv_len = kv_len, .heads = H, .kv_heads = G, .head_dim = d, .v_dim = d, .causal = 1,
                           .scale = 0.1f, .q_positions = at};
    a.q_stride[1] = a.out_stride[1] = H * d * 4, a.q_stride[2] = a.out_stride[2] = d * 4;
    a.k_stride[1] = a.v_stride[1] = G * d * 4, a.k_stride[2] = a.v_stride[2] = d * 4;
    for (ptrdiff_t i = 0; i < q_len; i++) at[i] = i * kv_len / q_len;
    fc_attention(&a);
    for (ptrdiff_t i = 0; i < q_len * H; i++) carried[i * (d + 2) + d] = -INFINITY, carried[i * (d + 2) + d + 1] = 0;
    a.out = y, a.carried = carried, a.kv_len = 256;
    fc_attention(&a);
    a.k = k + 256 * G * d, a.v = v + 256 * G * d, a.kv_len = kv_len - 256, a.finish = 1;
    for (ptrdiff_t i = 0; i < q_len; i++) at[i] -= 256;
    fc_attention(&a);
    for (ptrdiff_t i = 0; i < q_len * H * d; i++) expect(y[i], whole[i], 0);
    free(q), free(k), free(v), free(y), free(whole), free(carried), free(at);
}

int main(void) {
    for (int i = 0; i < fc_num_isas(); i++) {
        if (!fc_isa_name(i)) continue;
        fc_use_isa(fc_isa_name(i));
        for (ptrdiff_t n = 0; n <= 70; n++) check_rows(n);
        check_rows(4099);
        report("rows");
        for (ptrdiff_t n = 0; n <= 70; n++) check_halves(n);
        report("float16, bfloat16");
        for (ptrdiff_t pairs = 1; pairs <= 40; pairs++) check_rope(pairs, 0), check_rope(pairs, 1);
        report("rope");
        for (ptrdiff_t n = 1; n <= 70; n++) check_routing(n);
        report("routing");
        for (ptrdiff_t m = 1; m <= 15; m++)
            for (ptrdiff_t n = 1; n <= 67; n += 11) check_linear(m, 3 * n + m, n);
        check_linear(33, 515, 130);
        report("linear");
        for (ptrdiff_t m = 1; m <= 13; m++)
            for (ptrdiff_t n = 1; n <= 67; n += 11) {
                check_packed(FC_PACKED_I8, 128, m, 5 * n + m, n), check_packed(FC_PACKED_I8, 32, m, 3 * n + m, n);
                check_packed(FC_PACKED_I4_SYMMETRIC, 32, m, 5 * n + m, n),
                    check_packed(FC_PACKED_I4_AFFINE, 64, m, 5 * n + m, n);
            }
        check_packed(FC_PACKED_I8, 128, 33, 2049, 50), check_packed(FC_PACKED_I4_AFFINE, 64, 33, 4099, 50);
        report("int8, int4");
        for (ptrdiff_t d = 16; d <= 80; d += 13) check_attention(1, 40, d), check_attention(29, 300, d);
        report("attention");
        for (ptrdiff_t d = 16; d <= 80; d += 13) check_carried(1, 600, d), check_carried(60, 511, d);
        report("attention in pieces");
    }
    return failures != 0;
}

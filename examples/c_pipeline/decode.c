/* A stack of LLaMA blocks that is fed its own output, token by token, in C alone.
 *     make && ./decode [FILE]        FILE gets what the last block made of each token, (TOKENS, HIDDEN) float32
 * Weights are random numbers in the shape of a checkpoint's: (out_features, in_features). */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "forge.h"

enum { LAYERS = 4, HIDDEN = 256, INNER = 688, HEADS = 8, KV_HEADS = 2, HEAD_DIM = 32, TOKENS = 64 };
enum { PANEL = 16, HALF = HEAD_DIM / 2, QUERIES = HEADS * HEAD_DIM, KEYS = KV_HEADS * HEAD_DIM };
static const float EPS = 1e-6f;

static void *zeros(ptrdiff_t bytes) {
    const size_t lines = ((size_t)bytes + 63) / 64 * 64;
    void *p = aligned_alloc(64, lines);
    if (!p) exit(1);
    return memset(p, 0, lines);
}

/* (n) from -scale to scale */
static float *random_floats(ptrdiff_t n, double scale) {
    static uint64_t state = 1;
    float *p = zeros(n * 4);
    for (ptrdiff_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        p[i] = (float)(((double)(state >> 40) / (1 << 23) - 1) * scale);
    }
    return p;
}

/* A weight (n, k) into panels (n / 16, k, 16), panel_stride bytes apart. */
static void pack(char *panels, ptrdiff_t panel_stride, ptrdiff_t k, ptrdiff_t n) {
    float *w = random_floats(n * k, sqrt(3.0 / (double)k));
    if (fc_pack_columns(FC_F32, panels, panel_stride, w, k * 4, k, n) != FC_OK) exit(1);
    free(w);
}

/* x (M, k) -> (M, n) */
static fc_matrix matrix(ptrdiff_t k, ptrdiff_t n) {
    const ptrdiff_t panel = k * PANEL * 4;
    char *panels = zeros((n + PANEL - 1) / PANEL * panel);
    pack(panels, panel, k, n);
    return (fc_matrix){.layout = FC_PACKED_F32, .data = panels};
}

/* x (M, k) -> silu(x gate) * (x up), (M, n): panels of the two take turns */
static fc_matrix gated_pair(ptrdiff_t k, ptrdiff_t n) {
    const ptrdiff_t panel = k * PANEL * 4;
    char *panels = zeros((n + PANEL - 1) / PANEL * 2 * panel);
    pack(panels, 2 * panel, k, n);
    pack(panels + panel, 2 * panel, k, n);
    return (fc_matrix){.layout = FC_PACKED_F32, .data = panels};
}

/* One row with room for `tokens` tokens, in pages of FC_KV_CHUNK */
static fc_kv_cache new_cache(ptrdiff_t tokens) {
    fc_kv_cache kv = {.size = sizeof kv, .type = FC_KV_F32, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .v_dim = HEAD_DIM};
    kv.pages_a_row = (tokens + FC_KV_CHUNK - 1) / FC_KV_CHUNK;
    void **pages = zeros(kv.pages_a_row * (ptrdiff_t)sizeof *pages);
    for (ptrdiff_t i = 0; i < kv.pages_a_row; i++) pages[i] = zeros(fc_kv_page_bytes(&kv));
    kv.pages = pages;
    return kv;
}

/* cos, sin (positions, HALF) of position * 10000^(-2 pair / HEAD_DIM) */
static void angles(float *cosine, float *sine, ptrdiff_t positions) {
    for (ptrdiff_t i = 0; i < positions * HALF; i++) {
        const double angle = (double)(i / HALF) * pow(10000, -2.0 * (double)(i % HALF) / HEAD_DIM);
        cosine[i] = (float)cos(angle), sine[i] = (float)sin(angle);
    }
}

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    if (argc > 2 || (argc > 1 && argv[1][0] == '-')) {
        fprintf(stderr, "usage: %s [FILE]\n", argv[0]);
        return 2;
    }
    float *ones = zeros(HIDDEN * 4), *cosine = zeros(TOKENS * HALF * 4), *sine = zeros(TOKENS * HALF * 4);
    for (ptrdiff_t i = 0; i < HIDDEN; i++) ones[i] = 1;
    angles(cosine, sine, TOKENS);

    const fc_norm norm = {.kind = FC_RMS_NORM, .weight = ones, .eps = EPS};
    fc_attention_weights attention[LAYERS];
    fc_mlp_weights mlp[LAYERS];
    fc_layer layers[LAYERS];
    fc_kv_cache caches[LAYERS];
    fc_attention_state held[LAYERS];
    void *states[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        attention[i] = (fc_attention_weights){
            .heads = HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .qkv = {matrix(HIDDEN, QUERIES + 2 * KEYS)},
            .qkv_columns = {QUERIES + 2 * KEYS}, .out = matrix(QUERIES, HIDDEN), .scale = (float)(1 / sqrt(HEAD_DIM))};
        mlp[i] = (fc_mlp_weights){.inner = INNER, .up = gated_pair(HIDDEN, INNER), .down = matrix(INNER, HIDDEN),
                                  .activation = FC_SILU};
        layers[i] = (fc_layer){.mixer = {.kind = FC_ATTENTION, .weights = &attention[i], .norm = norm},
                               .mlp = {.kind = FC_GATED_MLP, .weights = &mlp[i], .norm = norm}, .residual_scale = 1};
        caches[i] = new_cache(TOKENS);
        held[i] = (fc_attention_state){.kv = &caches[i], .cos = cosine, .sin = sine, .rotary_pairs = HALF};
        states[i] = &held[i];
    }
    const fc_model model = {.hidden = HIDDEN, .layers = layers, .n_layers = LAYERS};

    float *x = random_floats(HIDDEN, 1), *out = zeros(TOKENS * HIDDEN * 4);
    const fc_rows one_row = {.size = sizeof one_row};
    fc_workspace *workspace = fc_workspace_new();
    const double start = seconds();
    for (int64_t t = 0; t < TOKENS; t++) {
        const fc_forward_args token = {.size = sizeof token, .model = &model, .states = states, .x = x, .batch = 1,
                                       .seq = 1, .start = &t, .workspace = workspace};
        if (fc_forward(&token) != FC_OK) return 1;
        memcpy(out + t * HIDDEN, x, HIDDEN * 4);
        fc_rms_norm(FC_F32, x, NULL, x, NULL, ones, &one_row, HIDDEN, EPS, 0);
    }
    const double rate = TOKENS / (seconds() - start);

    double checksum = 0;
    for (ptrdiff_t i = 0; i < TOKENS * HIDDEN; i++) checksum += out[i];
    printf("%s, %d threads: %d tokens at %.0f a second, checksum %.6f\n", fc_isa(), fc_get_num_threads(), TOKENS, rate,
           checksum);
    if (argc > 1) {
        FILE *file = fopen(argv[1], "wb");
        if (!file || fwrite(out, 4, TOKENS * HIDDEN, file) != TOKENS * HIDDEN || fclose(file)) return 1;
    }
    return 0;
}

/* ggml's ssm_scan, timed: ggml_scans LIBRARIES THREADS REPEATS SEQ HEADS HEAD_DIM N
 * HEAD_DIM 1: Mamba-1, A (heads, n), one group; else Mamba-2, A (heads). Prints microseconds, one call a line. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "ggml-backend.h"
#include "ggml.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

/* uniform in [low, high) */
static void fill(struct ggml_tensor *t, float low, float high) {
    const size_t n = (size_t)ggml_nelements(t);
    float *values = malloc(n * sizeof *values);
    static uint32_t seed = 1;
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = low + (high - low) * (float)(seed >> 8) / 16777216.0f;
    }
    ggml_backend_tensor_set(t, values, 0, n * sizeof *values);
    free(values);
}

int main(int argc, char **argv) {
    if (argc < 8) return 2;
    const int threads = atoi(argv[2]), repeats = atoi(argv[3]);
    const int64_t seq = atoll(argv[4]), heads = atoll(argv[5]), dim = atoll(argv[6]), n = atoll(argv[7]);
    ggml_backend_load_all_from_path(argv[1]);
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    if (!cpu) return 3;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    ggml_backend_set_n_threads_t set_threads =
        (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set_threads) set_threads(cpu, threads);
    struct ggml_context *ctx = ggml_init((struct ggml_init_params){ggml_tensor_overhead() * 32 + ggml_graph_overhead(),
                                                                   NULL, true});
    struct ggml_tensor *s = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n, dim, heads, 1);
    struct ggml_tensor *x = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, dim, heads, seq, 1);
    struct ggml_tensor *dt = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, heads, seq, 1);
    struct ggml_tensor *a = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, dim == 1 ? n : 1, heads);
    struct ggml_tensor *b = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n, 1, seq, 1);
    struct ggml_tensor *c = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n, 1, seq, 1);
    struct ggml_tensor *ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    struct ggml_cgraph *graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ggml_ssm_scan(ctx, s, x, dt, a, b, c, ids, 1));
    if (!ggml_backend_alloc_ctx_tensors(ctx, cpu)) return 4;
    fill(s, -1, 1), fill(x, -1, 1), fill(dt, -6, 0), fill(a, -16, -1), fill(b, -1, 1), fill(c, -1, 1);
    ggml_backend_tensor_set(ids, &(int32_t){0}, 0, sizeof(int32_t));
    for (int i = -2; i < repeats; i++) {
        const double begin = now();
        if (ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) return 5;
        if (i >= 0) printf("%.1f\n", now() - begin);
    }
    return 0;
}

/* Tokens into a key/value cache. */
#include "rows.h"

static void body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const fc_append_args *a = ctx;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t b = i / a->seq, s = i % a->seq;
        const int64_t position = a->start[b] + s;
        if (a->count && s >= a->count[b]) continue;
        const char *from = (const char *)a->from + b * a->from_stride[0] + s * a->from_stride[1];
        char *to = (char *)a->to + b * a->to_stride[0] + (a->ring ? position % a->ring : position) * a->to_stride[1];
        for (ptrdiff_t h = 0; h < a->heads; h++)
            fc_convert_row(a->to_type, to + h * a->to_stride[2], a->from_type, from + h * a->from_stride[2], a->n, 1.0f);
    }
}

fc_status fc_append(const fc_append_args *args) {
    const double ns = (double)(args->heads * args->n) * 0.2 + 20;
    const ptrdiff_t tokens = args->batch * args->seq;
    return fc_static(fc_threads_for(tokens, ns), tokens, ns, body, (void *)args);
}

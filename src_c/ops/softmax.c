/* Softmax over rows. */
#include "rows.h"

struct softmax {
    fc_dtype type;
    char *out;
    const char *x;
    const fc_rows *rows;
    ptrdiff_t n;
};

static void body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct softmax *a = ctx;
    fc_cursor c;
    (void)rank;
    fc_cursor_at(&c, a->rows, begin);
    for (ptrdiff_t i = begin; i < end; i++, fc_cursor_next(&c))
        fc_k->softmax[a->type](a->out + c.at[0], a->x + c.at[1], a->n);
}

fc_status fc_softmax(fc_dtype type, void *out, const void *x, const fc_rows *rows, ptrdiff_t n) {
    struct softmax a = {type, out, x, rows, n};
    ptrdiff_t count = fc_rows_count(rows);
    double ns = (double)n * 0.8 + 20;
    return fc_static(fc_threads_for(count, ns), count, ns, body, &a);
}

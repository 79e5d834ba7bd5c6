/* Rows of a table by id, scaled, in another dtype where asked. */
#include <string.h>

#include "rows.h"

enum { PIECE = 512 };

struct embedding {
    fc_dtype table_type, out_type;
    char *out;
    const char *table;
    const int64_t *ids;
    ptrdiff_t n, ldtable;
    float scale;
};

static void body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct embedding *a = ctx;
    const ptrdiff_t in_size = a->table_type == FC_F32 ? 4 : 2, out_size = a->out_type == FC_F32 ? 4 : 2;
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++) {
        const char *row = a->table + a->ids[i] * a->ldtable;
        char *out = a->out + i * a->n * out_size;
        for (ptrdiff_t j = 0; j < a->n; j += PIECE) {
            ptrdiff_t n = a->n - j < PIECE ? a->n - j : PIECE;
            float wide[PIECE];
            fc_k->to_f32[a->table_type](wide, row + j * in_size, n, a->scale);
            fc_k->from_f32[a->out_type](out + j * out_size, wide, n, 1.0f);
        }
    }
}

fc_status fc_embedding(fc_dtype table_type, fc_dtype out_type, void *out, const void *table, const int64_t *ids,
                       ptrdiff_t count, ptrdiff_t n, ptrdiff_t ldtable, float scale) {
    struct embedding a = {table_type, out_type, out, table, ids, n, ldtable, scale};
    double ns = (double)n * 0.3 + 50;
    return fc_static(fc_threads_for(count, ns), count, ns, body, &a);
}

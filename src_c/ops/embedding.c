/* Rows of a table by id, scaled, in another dtype where asked. */
#include "rows.h"

struct embedding {
    const struct fc_kernels *k;
    fc_dtype table_type, out_type;
    char *out;
    const char *table;
    const int64_t *ids;
    ptrdiff_t n, ldtable;
    float scale;
};

static void look_up_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct embedding *ctx = context;
    const ptrdiff_t out_size = fc_size_of(ctx->out_type);
    (void)rank;
    for (ptrdiff_t i = begin; i < end; i++)
        fc_convert_row(ctx->k, ctx->out_type, ctx->out + i * ctx->n * out_size, ctx->table_type,
                       ctx->table + ctx->ids[i] * ctx->ldtable, ctx->n, ctx->scale);
}

fc_status fc_embedding(fc_dtype table_type, fc_dtype out_type, void *out, const void *table, const int64_t *ids,
                       ptrdiff_t count, ptrdiff_t n, ptrdiff_t ldtable, float scale) {
    struct embedding ctx = {fc_k, table_type, out_type, out, table, ids, n, ldtable, scale};
    double ns = (double)n * fc_ns.lookup + fc_ns.lookup_row;
    return fc_static(fc_threads_for(count, ns), count, ns, look_up_rows, &ctx);
}

/* A model's forward pass: embedding, layers, last norm and projection, inside one parallel region. Which parts a layer
 * has is data; how the residual stream goes round them is all that this file knows. A part of a new kind is a file
 * beside this one and a line in `parts`. */
#include "pass.h"

static part_of_layer *const parts[FC_PART_KINDS] = {
    [FC_ATTENTION] = attention_part, [FC_GATED_MLP] = mlp_part, [FC_MLP] = mlp_part, [FC_CALLED] = called_part,
    [FC_MAMBA] = mamba_part, [FC_MAMBA2] = mamba2_part, [FC_SHORT_CONV] = short_conv_part,
    [FC_RG_LRU] = rg_lru_part};

/* ---- steps that parts share ---- */

static fc_rows rows_of(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t x, ptrdiff_t residual) {
    return (fc_rows){
        .size = sizeof(fc_rows), .ndim = 1, .shape = {rows}, .stride = {{out * 4}, {x * 4}, {residual * 4}}};
}

static fc_status norm_rows(float *out, const float *x, const fc_norm *norm, const fc_rows *rows, ptrdiff_t n) {
    if (norm->kind == FC_LAYER_NORM)
        return fc_layer_norm(FC_F32, out, NULL, x, NULL, norm->weight, norm->bias, rows, n, norm->eps);
    return fc_rms_norm(FC_F32, out, NULL, x, NULL, norm->weight, rows, n, norm->eps, norm->offset);
}

fc_status normalise(float *out, const float *x, const fc_norm *norm, ptrdiff_t rows, ptrdiff_t row, ptrdiff_t heads,
                    ptrdiff_t n) {
    const fc_rows each = {.size = sizeof each, .ndim = 2, .shape = {rows, heads},
                          .stride = {{row * 4, n * 4}, {0, 0}, {row * 4, n * 4}, {0, 0}}};
    return norm_rows(out, x, norm, &each, n);
}

/* fc_linear takes an RMSNorm with weights along; for any other norm x is a copy. */
static fc_status project_as(const struct pass *p, fc_linear_args *args, const fc_matrix *w, const fc_norm *norm) {
    const fc_norm_kind kind = norm ? norm->kind : FC_NO_NORM;
    fc_scratch copy = {0};
    fc_status status = FC_OK;
    fc_rows rows = *args->rows;
    args->type = FC_F32, args->layout = w->layout, args->weight = w->data, args->group = w->group, args->bias = w->bias;
    args->rounding = w->rounding, args->workspace = p->workspace;
    if (kind == FC_RMS_NORM && norm->weight) {
        args->norm = norm->weight, args->norm_eps = norm->eps, args->norm_offset = norm->offset;
    } else if (kind != FC_NO_NORM) {
        const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {args->m},
                              .stride = {{args->k * 4}, {0}, {rows.stride[1][0]}, {0}}};
        if (fc_scratch_alloc(p->workspace, &copy, 1, (size_t)float_bytes(args->m, args->k))) return FC_NO_MEMORY;
        status = norm_rows((float *)(void *)copy.base, args->x, norm, &each, args->k);
        args->x = copy.base, rows.stride[1][0] = args->k * 4, args->rows = &rows;
    }
    if (status == FC_OK) status = fc_linear(args);
    fc_scratch_free(&copy);
    return status;
}

fc_status project(const struct pass *p, float *out, ptrdiff_t out_stride, const float *x, ptrdiff_t rows,
                  ptrdiff_t x_stride, const fc_matrix *w, ptrdiff_t k, ptrdiff_t n, const fc_norm *norm,
                  const float *residual) {
    const fc_rows each = rows_of(rows, out_stride, x_stride, out_stride);
    fc_linear_args args = {
        .size = sizeof args, .out = out, .x = x, .residual = residual, .rows = &each, .m = rows, .k = k, .n = n};
    return project_as(p, &args, w, norm);
}

fc_status project_gated(const struct pass *p, float *out, const float *x, const fc_matrix *w, ptrdiff_t k, ptrdiff_t n,
                        const fc_norm *norm, fc_activation activation) {
    const fc_rows each = rows_of(p->rows, n, k, n);
    fc_linear_args args = {.size = sizeof args, .out = out, .x = x, .rows = &each, .m = p->rows, .k = k, .n = n,
                           .gated = 1, .activation = activation};
    return project_as(p, &args, w, norm);
}

fc_status widen(const struct pass *p, const fc_ranks *inner, fc_scratch *wide, const float *y, ptrdiff_t y_stride) {
    if (fc_scratch_alloc(p->workspace, wide, 1, (size_t)float_bytes(p->rows, inner->n))) return FC_NO_MEMORY;
    return inner->call(inner->self, (float *)(void *)wide->base, y, p->rows, inner->n, y_stride);
}

fc_status project_out(const struct pass *p, const fc_part *part, float *out, const float *y, ptrdiff_t y_stride,
                      const fc_matrix *w, ptrdiff_t n, const float *residual) {
    const fc_ranks *ranks = part->ranks;
    const ptrdiff_t first = ranks ? ranks->first : 0, columns = ranks && ranks->count ? ranks->count : p->hidden;
    fc_scratch wide = {0};
    fc_status status = FC_OK;
    if (part->inner) {
        status = widen(p, part->inner, &wide, y, y_stride);
        y = (const float *)(const void *)wide.base, y_stride = n = part->inner->n;
    }
    if (status == FC_OK)
        status = project(p, out + first, p->hidden, y, p->rows, y_stride, w, n, columns, NULL,
                         residual ? residual + first : NULL);
    fc_scratch_free(&wide);
    return status;
}

fc_status activate(float *y, fc_activation f, ptrdiff_t rows, ptrdiff_t n) {
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {rows}, .stride = {{n * 4}, {n * 4}}};
    return fc_activate(f, FC_F32, y, y, &each, n);
}

/* ---- the residual stream ---- */

struct sum {
    const struct pass *p;
    float *out;        /* (M, hidden) */
    const float *x, *y; /* likewise */
    float scale;
};

static void add_scaled_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct sum *ctx = context;
    const ptrdiff_t n = ctx->p->hidden;
    (void)rank;
    ctx->p->k->add_scaled(ctx->out + begin * n, ctx->x + begin * n, ctx->y + begin * n, ctx->scale, (end - begin) * n);
}

fc_status add_scaled(const struct pass *p, float *out, const float *x, const float *y, float scale) {
    const double ns = (double)p->hidden * fc_ns.add_scaled;
    return fc_static(fc_threads_for(p->rows, ns), p->rows, ns, add_scaled_rows, &(struct sum){p, out, x, y, scale});
}

struct product {
    float *y;
    const float *x;
    ptrdiff_t y_row, x_row, n;
};

static void multiply_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct product *ctx = context;
    (void)rank;
    for (ptrdiff_t r = begin; r < end; r++) {
        float *y = ctx->y + r * ctx->y_row;
        const float *x = ctx->x + r * ctx->x_row;
        for (ptrdiff_t i = 0; i < ctx->n; i++) y[i] *= x[i];
    }
}

fc_status multiply(const struct pass *p, float *y, ptrdiff_t y_row, const float *x, ptrdiff_t x_row, ptrdiff_t n) {
    const double ns = (double)n * fc_ns.add_scaled;
    return fc_static(fc_threads_for(p->rows, ns), p->rows, ns, multiply_rows, &(struct product){y, x, y_row, x_row, n});
}

static int is_sum(const fc_ranks *ranks) { return ranks && !ranks->count; }

/* out = post_norm(part(norm(x))) + residual */
static fc_status run_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                          const float *residual) {
    const int normed = part->post_norm.kind != FC_NO_NORM, late = residual && (normed || is_sum(part->ranks));
    fc_scratch own = {0};
    if (late && fc_scratch_alloc(p->workspace, &own, 1, (size_t)float_bytes(p->rows, p->hidden))) return FC_NO_MEMORY;
    float *y = late ? (float *)(void *)own.base : out;
    fc_status status = parts[part->kind](p, part, state, y, x, late ? NULL : residual);
    if (status == FC_OK) status = exchange(part->ranks, y, p->rows, p->hidden);
    if (status == FC_OK && normed) status = normalise(y, y, &part->post_norm, p->rows, p->hidden, 1, p->hidden);
    if (status == FC_OK && late) status = add_scaled(p, out, residual, y, 1.0f);
    fc_scratch_free(&own);
    return status;
}

/* x += scale part(x); without a norm behind the part and a scale, its last product adds x itself */
static fc_status add_part(const struct pass *p, const fc_part *part, void *state, float *x, float *y, float scale) {
    if (part->kind == FC_NO_PART) return FC_OK;
    if (scale == 1.0f && part->post_norm.kind == FC_NO_NORM) return run_part(p, part, state, x, x, x);
    const fc_status status = run_part(p, part, state, y, x, NULL);
    return status == FC_OK ? add_scaled(p, x, x, y, scale) : status;
}

/* The ranks of parts that all are shares of the same ones and are added up before anything else: then they exchange what
 * the sum is. Else NULL. */
static const fc_ranks *in_common(const fc_part *const *added, int n) {
    for (int i = 0; i < n; i++)
        if (added[i]->post_norm.kind != FC_NO_NORM || added[i]->ranks != added[0]->ranks) return NULL;
    return added[0]->ranks;
}

/* y = mixer(x) + what is beside it (x) + with `mlp` that of x */
static fc_status run_added(const struct pass *p, const fc_layer *layer, void *const *states, float *y, const float *x,
                           int mlp) {
    const fc_part *added[3] = {&layer->mixer};
    void *const of[3] = {states[0], layer->beside ? states[1] : NULL, NULL};
    int n = 1;
    if (layer->beside) added[n++] = layer->beside;
    if (mlp) added[n++] = &layer->mlp;
    const fc_ranks *ranks = in_common(added, n);
    fc_status status = FC_OK;
    for (int i = 0; i < n && status == FC_OK; i++)
        status = (ranks ? parts[added[i]->kind] : run_part)(p, added[i], of[i], y, x, i ? y : NULL);
    return status == FC_OK ? exchange(ranks, y, p->rows, p->hidden) : status;
}

struct halves {
    float *out;          /* (M, 2 hidden) */
    const float *x, *e;  /* (M, hidden) */
    ptrdiff_t n;
};

static void join_rows(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct halves *ctx = context;
    const ptrdiff_t n = ctx->n;
    (void)rank;
    for (ptrdiff_t r = begin; r < end; r++) {
        memcpy(ctx->out + 2 * r * n, ctx->x + r * n, (size_t)n * 4);
        memcpy(ctx->out + (2 * r + 1) * n, ctx->e + r * n, (size_t)n * 4);
    }
}

/* y = x + mlp(attention(x | e)), e the embeddings */
static fc_status run_ahead(const struct pass *p, const fc_layer *layer, void *state, float *y, const float *x) {
    const double ns = 2 * (double)p->hidden * fc_ns.add_scaled;
    fc_scratch both;
    if (fc_scratch_alloc(p->workspace, &both, 1, (size_t)fc_times(2, float_bytes(p->rows, p->hidden))))
        return FC_NO_MEMORY;
    struct halves halves = {(float *)(void *)both.base, x, p->embedded, p->hidden};
    fc_status status = fc_static(fc_threads_for(p->rows, ns), p->rows, ns, join_rows, &halves);
    if (status == FC_OK) status = run_part(p, layer->ahead[0], state, y, halves.out, NULL);
    if (status == FC_OK) status = run_part(p, layer->ahead[1], NULL, y, y, x);
    fc_scratch_free(&both);
    return status;
}

fc_status run_layer(const struct pass *p, const fc_layer *layer, void *const *states, float *x, float *y) {
    const int parallel = layer->parallel && layer->mixer.kind != FC_NO_PART && layer->mlp.kind != FC_NO_PART;
    fc_status status;
    if (layer->ahead[0]) {
        status = run_ahead(p, layer, states[1], y, x);
        if (status == FC_OK) status = run_part(p, &layer->mixer, states[0], x, y, x);
    } else if (!parallel && !layer->beside) {
        status = add_part(p, &layer->mixer, states[0], x, y, layer->residual_scale);
    } else {
        status = run_added(p, layer, states, y, x, parallel);
        if (status == FC_OK) status = add_scaled(p, x, x, y, layer->residual_scale);
    }
    return status == FC_OK && !parallel ? add_part(p, &layer->mlp, NULL, x, y, layer->residual_scale) : status;
}

/* ---- the whole ---- */

struct forward {
    const fc_forward_args *args;
    struct pass p;
    float *x, *y; /* (M, hidden): the residual stream, and what a part gave */
    float *embedded; /* likewise; NULL: no layer looks back at it */
};

static int looks_back(const fc_model *m) {
    for (ptrdiff_t i = 0; i < m->n_layers; i++)
        if (m->layers[i].ahead[0]) return 1;
    return 0;
}

static fc_status look_up(const struct forward *ctx, const int64_t *rows) {
    const fc_model *m = ctx->args->model;
    if (!m->embedding)
        return fc_embedding_packed(m->table.layout, m->table.group, FC_F32, ctx->x, m->table.data, rows, ctx->p.rows,
                                   m->hidden, m->embedding_scale);
    return fc_embedding(m->embedding_type, FC_F32, ctx->x, m->embedding, rows, ctx->p.rows, m->hidden,
                        m->ld_embedding, m->embedding_scale);
}

static int is_here(const fc_model *m, int64_t id) { return id >= m->first_token && id < m->first_token + m->vocab; }

/* Each token's row is some rank's, and 0 in the sum's other terms */
static fc_status look_up_over_ranks(const struct forward *ctx) {
    const fc_model *m = ctx->args->model;
    const struct pass *p = &ctx->p;
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)fc_times(p->rows, 8))) return FC_NO_MEMORY;
    int64_t *rows = (int64_t *)(void *)scratch.base; /* (M) of this rank's table; of others' tokens any, 0 */
    for (ptrdiff_t i = 0; i < p->rows; i++)
        rows[i] = is_here(m, ctx->args->ids[i]) ? ctx->args->ids[i] - m->first_token : 0;
    fc_status status = look_up(ctx, rows);
    for (ptrdiff_t i = 0; i < p->rows; i++)
        if (!is_here(m, ctx->args->ids[i])) memset(ctx->x + i * m->hidden, 0, (size_t)m->hidden * 4);
    fc_scratch_free(&scratch);
    return status == FC_OK ? exchange(m->ranks, ctx->x, p->rows, m->hidden) : status;
}

static fc_status embed(const struct forward *ctx) {
    if (!ctx->args->ids) return FC_OK;
    return ctx->args->model->ranks ? look_up_over_ranks(ctx) : look_up(ctx, ctx->args->ids);
}

static fc_status results(const struct forward *ctx) {
    const fc_forward_args *args = ctx->args;
    const fc_model *m = args->model;
    const struct pass *p = &ctx->p;
    const ptrdiff_t every = args->last_only ? p->seq : 1;
    fc_status status = FC_OK;
    if (args->logits)
        status = project(p, args->logits, m->vocab, ctx->x + (every - 1) * m->hidden, p->rows / every,
                         every * m->hidden, &m->head, m->hidden, m->vocab, &m->norm, NULL);
    if (status == FC_OK && args->hidden)
        status = normalise(args->hidden, ctx->x, &m->norm, p->rows, m->hidden, 1, m->hidden);
    return status;
}

static fc_status forward_program(void *context) {
    const struct forward *ctx = context;
    void *const *states = ctx->args->states;
    fc_status status = embed(ctx);
    if (ctx->embedded && status == FC_OK)
        memcpy(ctx->embedded, ctx->x, (size_t)float_bytes(ctx->p.rows, ctx->p.hidden));
    for (ptrdiff_t i = 0; i < ctx->args->model->n_layers && status == FC_OK; i++) {
        const fc_layer *layer = ctx->args->model->layers + i;
        status = layer->router ? routed_layer(&ctx->p, layer, *states, ctx->x)
                               : run_layer(&ctx->p, layer, states, ctx->x, ctx->y);
        states += layer->beside || layer->ahead[0] ? 2 : 1;
        if (status == FC_OK && ctx->p.rows > 1 && fc_interrupted()) status = FC_INTERRUPTED;
    }
    return status == FC_OK ? results(ctx) : status;
}

/* given (M): positions, or NULL */
static void count_tokens(struct pass *p, const int64_t *given) {
    for (ptrdiff_t b = 0; b < p->batch; b++) {
        p->lens[b] = p->start[b] + p->seq;
        if (p->lens[b] > p->longest) p->longest = p->lens[b];
        for (ptrdiff_t i = 0; i < p->seq; i++) p->positions[b * p->seq + i] = given ? *given++ : p->start[b] + i;
    }
}

fc_status fc_forward(const fc_forward_args *args) {
    if (!FC_IS_OURS(args)) return FC_BAD_SIZE;
    struct forward ctx = {.args = args, .p = {.k = fc_k, .workspace = args->workspace, .batch = args->batch,
                                              .seq = args->seq, .rows = args->batch * args->seq,
                                              .hidden = args->model->hidden, .start = args->start}};
    fc_scratch scratch;
    const int back = looks_back(args->model);
    const ptrdiff_t numbers = fc_times(fc_plus(args->batch, ctx.p.rows), 8),
                    streams = fc_times(back ? 3 : 2, float_bytes(ctx.p.rows, ctx.p.hidden));
    if (ctx.p.rows == 0) return FC_OK;
    if (fc_scratch_alloc(args->workspace, &scratch, 1, (size_t)fc_plus(numbers, streams))) return FC_NO_MEMORY;
    ctx.p.lens = (int64_t *)(void *)scratch.base;
    ctx.p.positions = ctx.p.lens + args->batch;
    ctx.y = (float *)(void *)(scratch.base + numbers);
    ctx.x = args->x ? args->x : ctx.y + ctx.p.rows * ctx.p.hidden;
    ctx.p.embedded = ctx.embedded = back ? ctx.y + 2 * ctx.p.rows * ctx.p.hidden : NULL;
    count_tokens(&ctx.p, args->positions);
    const fc_status status = args->waits ? forward_program(&ctx) : fc_parallel_region(forward_program, &ctx);
    fc_scratch_free(&scratch);
    return status;
}

/* A model's forward pass: embedding, layers, last norm and projection, inside one parallel region. Which parts a layer has
 * is data; how the residual stream goes round them is all that this file knows. A part of a new kind is a file beside
 * this one and a line in `parts`. */
#include "pass.h"

static part_of_layer *const parts[FC_PART_KINDS] = {
    [FC_ATTENTION] = attention_part, [FC_GATED_MLP] = mlp_part, [FC_MLP] = mlp_part, [FC_CALLED] = called_part};

/* ---- steps that parts share ---- */

static fc_rows rows_of(ptrdiff_t rows, ptrdiff_t out, ptrdiff_t x, ptrdiff_t residual) {
    return (fc_rows){.size = sizeof(fc_rows), .ndim = 1, .shape = {rows}, .stride = {{out * 4}, {x * 4}, {residual * 4}}};
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
static fc_status project_as(const struct pass *p, fc_linear_args *a, const fc_matrix *w, const fc_norm *norm) {
    fc_scratch copy = {0};
    fc_status status = FC_OK;
    fc_rows rows = *a->rows;
    a->type = FC_F32, a->layout = w->layout, a->weight = w->data, a->group = w->group, a->bias = w->bias;
    a->workspace = p->workspace;
    if (norm->kind == FC_RMS_NORM && norm->weight) {
        a->norm = norm->weight, a->norm_eps = norm->eps, a->norm_offset = norm->offset;
    } else if (norm->kind != FC_NO_NORM) {
        const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {a->m}, .stride = {{a->k * 4}, {0}, {rows.stride[1][0]}, {0}}};
        if (fc_scratch_alloc(p->workspace, &copy, 1, (size_t)(a->m * a->k) * 4)) return FC_NO_MEMORY;
        status = norm_rows((float *)(void *)copy.base, a->x, norm, &each, a->k);
        a->x = copy.base, rows.stride[1][0] = a->k * 4, a->rows = &rows;
    }
    if (status == FC_OK) status = fc_linear(a);
    fc_scratch_free(&copy);
    return status;
}

fc_status project(const struct pass *p, float *out, const float *x, ptrdiff_t rows, ptrdiff_t x_stride, const fc_matrix *w,
                  ptrdiff_t k, ptrdiff_t n, const fc_norm *norm, const float *residual) {
    const fc_rows each = rows_of(rows, n, x_stride, n);
    fc_linear_args a = {.size = sizeof a, .out = out, .x = x, .residual = residual, .rows = &each, .m = rows, .k = k, .n = n};
    return project_as(p, &a, w, norm);
}

fc_status project_gated(const struct pass *p, float *out, const float *x, const fc_matrix *w, ptrdiff_t k, ptrdiff_t n,
                        const fc_norm *norm, fc_activation activation) {
    const fc_rows each = rows_of(p->rows, n, k, n);
    fc_linear_args a = {.size = sizeof a, .out = out, .x = x, .rows = &each, .m = p->rows, .k = k, .n = n, .gated = 1,
                        .activation = activation};
    return project_as(p, &a, w, norm);
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

static void add_scaled_rows(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct sum *s = ctx;
    const ptrdiff_t n = s->p->hidden;
    (void)rank;
    s->p->k->add_scaled(s->out + begin * n, s->x + begin * n, s->y + begin * n, s->scale, (end - begin) * n);
}

/* out = x + scale y */
static fc_status add_scaled(const struct pass *p, float *out, const float *x, const float *y, float scale) {
    const double ns = (double)p->hidden * 0.2;
    return fc_static(fc_threads_for(p->rows, ns), p->rows, ns, add_scaled_rows, &(struct sum){p, out, x, y, scale});
}

/* out = post_norm(part(norm(x))) + residual */
static fc_status run_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                          const float *residual) {
    if (part->post_norm.kind == FC_NO_NORM) return parts[part->kind](p, part, state, out, x, residual);
    fc_scratch own = {0};
    if (residual && fc_scratch_alloc(p->workspace, &own, 1, (size_t)(p->rows * p->hidden) * 4)) return FC_NO_MEMORY;
    float *y = residual ? (float *)(void *)own.base : out;
    fc_status status = parts[part->kind](p, part, state, y, x, NULL);
    if (status == FC_OK) status = normalise(y, y, &part->post_norm, p->rows, p->hidden, 1, p->hidden);
    if (status == FC_OK && residual) status = add_scaled(p, out, residual, y, 1.0f);
    fc_scratch_free(&own);
    return status;
}

/* x += scale part(x); without a norm behind the part and a scale, its last product adds x itself */
static fc_status add_part(const struct pass *p, const fc_part *part, void *state, float *x, float *y, float scale) {
    if (part->kind == FC_NO_PART) return FC_OK;
    if (scale == 1.0f && part->post_norm.kind == FC_NO_NORM) return parts[part->kind](p, part, state, x, x, x);
    const fc_status status = run_part(p, part, state, y, x, NULL);
    return status == FC_OK ? add_scaled(p, x, x, y, scale) : status;
}

static fc_status run_layer(const struct pass *p, const fc_layer *layer, void *state, float *x, float *y) {
    const int both = layer->mixer.kind != FC_NO_PART && layer->mlp.kind != FC_NO_PART;
    if (!layer->parallel || !both) {
        const fc_status status = add_part(p, &layer->mixer, state, x, y, layer->residual_scale);
        return status == FC_OK ? add_part(p, &layer->mlp, NULL, x, y, layer->residual_scale) : status;
    }
    fc_status status = run_part(p, &layer->mixer, state, y, x, NULL);
    if (status == FC_OK) status = run_part(p, &layer->mlp, NULL, y, x, y);
    return status == FC_OK ? add_scaled(p, x, x, y, layer->residual_scale) : status;
}

/* ---- the whole ---- */

struct forward {
    const fc_forward_args *a;
    struct pass p;
    float *x, *y; /* (M, hidden): the residual stream, and what a part gave */
};

static fc_status embed(const struct forward *f) {
    const fc_model *m = f->a->model;
    if (!f->a->ids) return FC_OK;
    return fc_embedding(m->embedding_type, FC_F32, f->x, m->embedding, f->a->ids, f->p.rows, m->hidden, m->ld_embedding,
                        m->embedding_scale);
}

static fc_status results(const struct forward *f) {
    const fc_forward_args *a = f->a;
    const fc_model *m = a->model;
    const struct pass *p = &f->p;
    const ptrdiff_t every = a->last_only ? p->seq : 1;
    fc_status status = FC_OK;
    if (a->logits)
        status = project(p, a->logits, f->x + (every - 1) * m->hidden, p->rows / every, every * m->hidden, &m->head,
                         m->hidden, m->vocab, &m->norm, NULL);
    if (status == FC_OK && a->hidden) status = normalise(a->hidden, f->x, &m->norm, p->rows, m->hidden, 1, m->hidden);
    return status;
}

static fc_status forward_program(void *ctx) {
    const struct forward *f = ctx;
    fc_status status = embed(f);
    for (ptrdiff_t i = 0; i < f->a->model->n_layers && status == FC_OK; i++) {
        status = run_layer(&f->p, f->a->model->layers + i, f->a->states[i], f->x, f->y);
        if (status == FC_OK && f->p.rows > 1 && fc_interrupted()) status = FC_INTERRUPTED;
    }
    return status == FC_OK ? results(f) : status;
}

static void count_tokens(struct pass *p) {
    for (ptrdiff_t b = 0; b < p->batch; b++) {
        p->lens[b] = p->start[b] + p->seq;
        if (p->lens[b] > p->longest) p->longest = p->lens[b];
        for (ptrdiff_t i = 0; i < p->seq; i++) p->positions[b * p->seq + i] = p->start[b] + i;
    }
}

fc_status fc_forward(const fc_forward_args *a) {
    if (!FC_IS_OURS(a)) return FC_BAD_SIZE;
    struct forward f = {.a = a, .p = {.k = fc_k, .workspace = a->workspace, .batch = a->batch, .seq = a->seq,
                                      .rows = a->batch * a->seq, .hidden = a->model->hidden, .start = a->start}};
    fc_scratch scratch;
    const size_t rows = (size_t)f.p.rows, numbers = ((size_t)a->batch + rows) * 8;
    if (rows == 0) return FC_OK;
    if (fc_scratch_alloc(a->workspace, &scratch, 1, numbers + 2 * rows * (size_t)f.p.hidden * 4)) return FC_NO_MEMORY;
    f.p.lens = (int64_t *)(void *)scratch.base;
    f.p.positions = f.p.lens + a->batch;
    f.y = (float *)(void *)(scratch.base + numbers);
    f.x = a->x ? a->x : f.y + f.p.rows * f.p.hidden;
    count_tokens(&f.p);
    const fc_status status = fc_parallel_region(forward_program, &f);
    fc_scratch_free(&scratch);
    return status;
}

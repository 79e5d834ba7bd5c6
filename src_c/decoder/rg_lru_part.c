/* FC_RG_LRU: one product for y and x; the convolution of x; the two gates, a small product for each head; the
 * recurrence, which is told where rows begin; f(y) times what it gives; the output projection. */
#include "recurrent.h"

struct rg_lru_pass {
    const struct pass *p;
    const fc_rg_lru_weights *w;
    const fc_recurrent_state *s;
    ptrdiff_t width;
    float *yx;      /* (M, 2 width) */
    float *u;       /* (M, width): x after the convolution, then what the recurrence gives */
    float *i, *r;   /* (M, width) */
    uint8_t *begin; /* (M): whether a token is its row's first */
};

static fc_status gates(const struct rg_lru_pass *t) {
    const ptrdiff_t block = t->w->block, heads = t->w->heads;
    fc_status status = FC_OK;
    for (ptrdiff_t g = 0; g < 2 * heads && status == FC_OK; g++) {
        const ptrdiff_t first = g % heads * block;
        status = project(t->p, (g < heads ? t->i : t->r) + first, t->width, t->u + first, t->p->rows, t->width,
                         t->w->gates + g, block, block, NULL, NULL);
    }
    return status;
}

static fc_status scan_rows(const struct rg_lru_pass *t, const struct rows_state *s) {
    const ptrdiff_t seq = t->p->seq, at = s->row * seq * t->width, row = t->width * 4;
    const ptrdiff_t state = (t->w->conv.width - 1) * t->width; /* floats of a slot before h */
    return fc_rg_lru(&(fc_rg_lru_args){
        .size = sizeof(fc_rg_lru_args), .type = FC_F32, .out = t->u + at, .x = t->u + at, .input_gate = t->i + at,
        .recurrence_gate = t->r + at, .new_state = s->to + state, .state = s->from ? s->from + state : NULL,
        .param = t->w->param, .reset = t->begin + s->row * seq, .batch = s->batch, .seq = seq, .channels = t->width,
        .out_stride = {seq * row, row}, .x_stride = {seq * row, row}, .input_gate_stride = {seq * row, row},
        .recurrence_gate_stride = {seq * row, row}, .reset_stride = {seq, 1}, .new_state_stride = s->apart,
        .state_stride = s->apart, .workspace = t->p->workspace});
}

static fc_status scan(const struct rg_lru_pass *t) {
    const ptrdiff_t calls = state_calls(t->s, t->p->batch);
    fc_status status = FC_OK;
    for (ptrdiff_t i = 0; i < t->p->rows; i++) t->begin[i] = t->p->positions[i] == 0;
    for (ptrdiff_t i = 0; i < calls && status == FC_OK; i++) {
        const struct rows_state s = state_of_call(t->s, t->p->batch, calls, i);
        status = scan_rows(t, &s);
    }
    return status == FC_OK ? relay(t->s, 1) : status;
}

/* u *= f(y) */
static fc_status gate(const struct rg_lru_pass *t) {
    const fc_rows each = {.size = sizeof each, .ndim = 1, .shape = {t->p->rows},
                          .stride = {{t->width * 4}, {t->width * 8}, {t->width * 4}, {0}}};
    return fc_glu(t->w->activation, FC_F32, t->u, t->yx, t->u, &each, t->width);
}

fc_status rg_lru_part(const struct pass *p, const fc_part *part, void *state, float *out, const float *x,
                      const float *residual) {
    const fc_rg_lru_weights *w = part->weights;
    const ptrdiff_t width = w->heads * w->block, floats = float_bytes(p->rows, 5 * width);
    struct rg_lru_pass t = {.p = p, .w = w, .s = state, .width = width};
    fc_scratch scratch;
    if (fc_scratch_alloc(p->workspace, &scratch, 1, (size_t)fc_plus(floats, p->rows))) return FC_NO_MEMORY;
    t.yx = (float *)(void *)scratch.base;
    t.u = t.yx + p->rows * 2 * width;
    t.i = t.u + p->rows * width;
    t.r = t.i + p->rows * width;
    t.begin = (uint8_t *)(void *)(t.r + p->rows * width);
    fc_status status = project(p, t.yx, 2 * width, x, p->rows, p->hidden, &w->in, p->hidden, 2 * width, &part->norm,
                               NULL);
    if (status == FC_OK) status = convolve(p, t.s, t.u, t.yx + width, width * 8, &w->conv, width, 0);
    if (status == FC_OK) status = gates(&t);
    if (status == FC_OK) status = scan(&t);
    if (status == FC_OK) status = gate(&t);
    if (status == FC_OK) status = project_out(p, part, out, t.u, width, &w->out, width, residual);
    fc_scratch_free(&scratch);
    return status;
}

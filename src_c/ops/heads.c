/* See heads.h. */
#include "heads.h"

static ptrdiff_t padded(ptrdiff_t n) { return fc_round_up(n, FC_PANEL); }

/* Floats of each part of a thread's scratch, in its order. */
struct parts {
    ptrdiff_t steps, keys, u, y, tile;
};

static struct parts parts_of(const struct heads *c) {
    const ptrdiff_t block = fc_times(FC_HEAD_TOKENS, padded(c->columns));
    return (struct parts){
        .steps = FC_HEAD_STEPS * FC_HEAD_TOKENS,
        .keys = fc_times(c->kinds * FC_HEAD_TOKENS, padded(c->n)),
        .u = block,
        .y = fc_times(c->queries, block),
        .tile = c->delta ? fc_times(2 * FC_PANEL, c->n) : 0,
    };
}

static int alloc_scratch(struct heads *c, fc_workspace *workspace, int threads) {
    const struct parts p = parts_of(c);
    const ptrdiff_t floats = fc_plus(fc_plus(fc_plus(p.steps, p.keys), fc_plus(p.u, p.y)), p.tile);
    return fc_scratch_alloc(workspace, &c->scratch, threads, (size_t)fc_times(floats, 4));
}

/* Strides of the keys: the rank-one update reads 16 n of all kinds of one token after the other, the delta rule all n
 * of one kind. */
static void lay_out(struct head_block *at, const struct parts *p, float *scratch) {
    const struct heads *c = at->heads;
    struct fc_head_scan *s = &at->scan;
    at->steps = scratch;
    at->keys = at->steps + p->steps;
    at->u = at->keys + p->keys;
    s->keys = at->keys, s->u = at->u, s->y = at->u + p->u;
    s->tile = s->y + p->y;
    s->kind = c->delta ? padded(c->n) : FC_PANEL;
    s->token = c->kinds * s->kind;
    s->line = c->delta ? FC_PANEL : FC_HEAD_TOKENS * s->token;
    s->decay = c->each_n ? NULL : at->steps;
    s->beta = c->delta ? at->steps + FC_HEAD_TOKENS : NULL;
    s->n = c->n, s->queries = c->queries, s->width = padded(c->columns);
}

static char *place(const void *state, const ptrdiff_t *stride, const struct head_block *at) {
    const ptrdiff_t from_p = at->heads->by_p ? stride[2] : 4;
    return (char *)(uintptr_t)state + at->b * stride[0] + at->h * stride[1] + at->p0 * from_p;
}

/* S before the block, which before the first is the caller's, and after it. */
static void place_states(struct head_block *at) {
    const struct heads *c = at->heads;
    struct fc_head_scan *s = &at->scan;
    const int first = at->start == 0;
    const void *before = first ? c->state : c->new_state;
    const ptrdiff_t *stride = first ? c->state_stride : c->new_state_stride;
    s->from = before ? place(before, stride, at) : NULL;
    s->from_n = c->by_p ? 4 : stride[2], s->from_p = c->by_p ? stride[2] : 4;
    s->to = place(c->new_state, c->new_state_stride, at);
    s->to_n = c->by_p ? 4 : c->new_state_stride[2], s->to_p = c->by_p ? c->new_state_stride[2] : 4;
}

/* Item i from at->start on. Without tokens its state is copied, which any leaf does but the delta rule's. */
static void run_block(struct head_block *at, ptrdiff_t i, int new_keys) {
    const struct heads *c = at->heads;
    at->b = i / c->parts / c->heads, at->h = i / c->parts % c->heads, at->p0 = i % c->parts * c->columns;
    at->scan.p = fc_smaller(c->columns, c->p - at->p0);
    place_states(at);
    if (!at->scan.tokens) {
        (c->modes ? c->k->head_modes : c->k->head_outer)(&at->scan);
        return;
    }
    if (new_keys) c->fill_keys(at);
    c->fill(at);
    (c->modes ? c->k->head_modes : c->delta ? c->k->head_delta : c->k->head_outer)(&at->scan);
    c->put(at);
}

/* All items of a row go through a block of tokens before any goes on: what a token brings its heads lies side by side,
 * and rows of one head are pages apart. */
static void run_items(void *context, ptrdiff_t begin, ptrdiff_t end, int rank) {
    const struct heads *c = context;
    const struct parts p = parts_of(c);
    const ptrdiff_t row = c->heads * c->parts, together = c->share * c->parts;
    struct head_block at = {.heads = c};
    lay_out(&at, &p, fc_scratch_of(&c->scratch, rank));
    for (ptrdiff_t stop; begin < end; begin = stop) {
        stop = fc_smaller(end, (begin / row + 1) * row);
        at.start = c->span.begin;
        do { /* once where there are no tokens */
            at.scan.tokens = fc_smaller(FC_HEAD_TOKENS, c->span.end - at.start);
            for (ptrdiff_t i = begin; i < stop; i++) run_block(&at, i, i == begin || i % together == 0);
            at.start += at.scan.tokens;
        } while (at.start < c->span.end);
    }
}

fc_status fc_heads_run(struct heads *c, fc_workspace *workspace) {
    const int threads = fc_get_num_threads();
    const ptrdiff_t whole = c->batch * c->heads, panels = padded(c->p) / FC_PANEL;
    if (!whole || !c->p || !(c->n || c->seq)) return FC_OK;
    c->parts = whole < 2 * threads ? fc_smaller(panels, (2 * threads + whole - 1) / whole) : 1;
    c->columns = (panels + c->parts - 1) / c->parts * FC_PANEL;
    if (c->most_columns) c->columns = fc_smaller(c->columns, c->most_columns);
    c->parts = (c->p + c->columns - 1) / c->columns;
    const ptrdiff_t items = whole * c->parts, span = fc_smaller(FC_SPAN, c->seq > 0 ? c->seq : 1);
    /* a product and two additions a token, and the way to and from memory */
    const double ns = (double)c->n * (double)c->columns * ((double)span * 8 * fc_ns.flop + 8 * fc_ns.plain_byte);
    const int used = fc_threads_within(threads, items, ns);
    if (alloc_scratch(c, workspace, used)) return FC_NO_MEMORY;
    const fc_status status = fc_static_spans(used, items, ns, run_items, c, c->seq, &c->span);
    fc_scratch_free(&c->scratch);
    return status;
}

/* How many threads this much work deserves, and the only parallel region. Nothing else knows OpenMP.
 * One level, never nested; work is split over outputs only, so the split never changes a bit. */
#ifndef FC_THREADS_H
#define FC_THREADS_H

#include <stddef.h>

#include "forge.h"

typedef void fc_body(void *ctx, ptrdiff_t begin, ptrdiff_t end, int rank);

/* Threads for `items` items of `ns` nanoseconds each on one thread; 1 when splitting would not pay. An op that asks for
 * several regions reads fc_get_num_threads() once and asks fc_threads_within that: the count may change meanwhile, and
 * scratch is for the ranks of the first reading. */
int fc_threads_for(ptrdiff_t items, double ns);
int fc_threads_within(int limit, ptrdiff_t items, double ns);

/* body(ctx, begin, end, rank) over [0, items) on `threads` threads, rank < threads.
 * fc_static: one run of neighbours a thread. fc_dynamic: one item at a time, for uneven items.
 * The calling thread polls between pieces when the whole is long; FC_INTERRUPTED then leaves items undone. An op that
 * the poll itself calls (a signal handler's, a finaliser's) runs on that thread alone. */
fc_status fc_static(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx);
fc_status fc_dynamic(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx);

/* For items that go through a sequence token after token: fc_static over them for each span of FC_SPAN tokens,
 * [begin, end) in *span while it lasts, once where there are none; what an item remembers lies in memory between two
 * spans. ns: of an item and a span. Signals are polled between spans: fc_static alone would cut long sequences into
 * pieces of an item or two, and neighbours, which read the same lines and pages, would no longer go together. */
enum { FC_SPAN = 512 };
struct fc_span {
    ptrdiff_t begin, end;
};
fc_status fc_static_spans(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx, ptrdiff_t seq,
                          struct fc_span *span);

/* program(ctx) on the calling thread. Its fc_static and fc_dynamic share one parallel region, whose other threads wait
 * for them without leaving it: cheaper than a region each where ops are short. */
fc_status fc_parallel_region(fc_status (*program)(void *ctx), void *ctx);

/* Whether the user wants to stop (Ctrl-C), asked of the border. For drivers of several ops, between them. */
int fc_interrupted(void);

#endif

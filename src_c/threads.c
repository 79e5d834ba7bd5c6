/* How many threads work deserves, and regions of one op: see threads.h; team.c has those of a program. A fork after a
 * parallel region would leave the child without libgomp's workers and hang it: a prepare handler lets the team go
 * before every fork. Other runtimes: the child runs serial. */
#include "threads.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "team.h"

/* Below this much serial work a second thread costs more than it brings (docs/threads.md). */
static const double PARALLEL_NS = 12e3;
static const double POLL_NS = 20e6;

static int wanted;         /* fc_set_num_threads; 0: what OpenMP says */
static int (*poll_signals)(void);
static _Thread_local int polling;          /* inside poll_signals: ops are serial */

#ifdef _OPENMP
static int omp_at_start;   /* omp_get_max_threads() at load: a lower value later is threadpoolctl's limit */
static int serial_child;   /* forked, with a runtime that cannot let its team go */
#if defined(__GNUC__) && !defined(__clang__)
#define FC_LIBGOMP 1
static void before_fork(void) { omp_pause_resource_all(omp_pause_hard); }
#else
static void in_child(void) { serial_child = 1; }
#endif

__attribute__((constructor)) static void watch_forks(void) {
    omp_at_start = omp_get_max_threads();
    if (getenv("FORGE_C_NO_FORK_HANDLER")) return; /* for the test that shows the hang */
#ifdef FC_LIBGOMP
    pthread_atfork(before_fork, NULL, NULL);
#else
    pthread_atfork(NULL, NULL, in_child);
#endif
}
#endif

const char *fc_openmp(void) {
#ifdef FC_LIBGOMP
    return "libgomp";
#elif defined(_OPENMP)
    return "libomp";
#else
    return "none";
#endif
}

int fc_bound_cpus(int *cpus, int n) {
    int count = 0;
    (void)cpus, (void)n;
#ifdef _OPENMP
    for (int place = 0; omp_get_proc_bind() != omp_proc_bind_false && place < omp_get_num_places(); place++) {
        const int size = omp_get_place_num_procs(place);
        int *ids = malloc((size_t)size * sizeof *ids + 1);
        if (!ids) return 0;
        omp_get_place_proc_ids(place, ids);
        for (int i = 0; i < size; i++, count++)
            if (count < n) cpus[count] = ids[i];
        free(ids);
    }
#endif
    return count;
}

void fc_set_num_threads(int n) { __atomic_store_n(&wanted, n, __ATOMIC_RELAXED); }

int fc_get_num_threads(void) {
#ifdef _OPENMP
    if (serial_child) return 1;
    int n = __atomic_load_n(&wanted, __ATOMIC_RELAXED), limit = omp_get_max_threads();
    if (n == 0 || limit < omp_at_start) n = n && n < limit ? n : limit;
    return n;
#else
    return 1;
#endif
}

void fc_set_poll(int (*poll)(void)) { poll_signals = poll; }

int fc_threads_within(int limit, ptrdiff_t items, double ns) {
    if (items < 2 || (double)items * ns < PARALLEL_NS) return 1;
    return items < limit ? (int)items : limit;
}

int fc_threads_for(ptrdiff_t items, double ns) { return fc_threads_within(fc_get_num_threads(), items, ns); }

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* The poll runs the program's own code, which may call ops: those must not give work to a region whose
 * leader waits here for them: they are serial. */
static int poll_alone(void) {
    const int outer = polling;
    polling = 1;
    const int stop = poll_signals();
    polling = outer;
    return stop;
}

static int stopped(struct fc_region *r, int rank) {
    if (rank == 0 && r->poll && now_ns() - r->polled_at > POLL_NS) {
        if (poll_alone()) __atomic_store_n(&r->stop, 1, __ATOMIC_RELAXED);
        r->polled_at = now_ns();
    }
    return __atomic_load_n(&r->stop, __ATOMIC_RELAXED);
}

void fc_region_piece(struct fc_region *r, int rank, ptrdiff_t begin, ptrdiff_t end) {
    if (begin < end && !stopped(r, rank)) r->body(r->ctx, begin, end, rank);
}

/* One run of neighbours a thread, cut into pieces for the poll. */
static void run_static(struct fc_region *r, int rank, int threads) {
    ptrdiff_t begin = r->items * rank / threads, end = r->items * (rank + 1) / threads;
    for (; begin < end && !stopped(r, rank); begin += r->piece)
        fc_region_piece(r, rank, begin, begin + r->piece < end ? begin + r->piece : end);
}

#ifdef _OPENMP
static void run_dynamic(struct fc_region *r, int rank) {
    for (;;) {
        ptrdiff_t i = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED);
        if (i >= r->items || stopped(r, rank)) return;
        fc_region_piece(r, rank, i, i + 1);
    }
}
#endif

int fc_interrupted(void) { return poll_signals && poll_alone(); }

int fc_polling(void) { return polling; }

static fc_status run_region(int threads, ptrdiff_t items, double ns, int dynamic, fc_body *body, void *ctx) {
    struct fc_region r = {.items = items, .piece = items, .dynamic = dynamic, .body = body, .ctx = ctx};
    if ((double)items * ns > POLL_NS && poll_signals) {
        r.poll = 1;
        r.polled_at = now_ns();
        r.piece = ns * 4 > POLL_NS ? 1 : (ptrdiff_t)(POLL_NS / 4 / ns);
    }
    if (polling) threads = 1;
    if (threads > 1 && fc_team_takes(items)) fc_team_run(&r, threads);
#ifdef _OPENMP
    else if (threads > 1 && !fc_in_team()) {
#pragma omp parallel num_threads(threads)
        {
            if (dynamic) run_dynamic(&r, omp_get_thread_num());
            else run_static(&r, omp_get_thread_num(), omp_get_num_threads());
        }
    }
#endif
    else run_static(&r, 0, 1);
    return r.stop ? FC_INTERRUPTED : FC_OK;
}

fc_status fc_static(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx) {
    return run_region(threads, items, ns, 0, body, ctx);
}

fc_status fc_dynamic(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx) {
    return run_region(threads, items, ns, 1, body, ctx);
}

fc_status fc_static_spans(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx, ptrdiff_t seq,
                          struct fc_span *span) {
    fc_status status = FC_OK;
    span->begin = 0;
    do {
        span->end = seq - span->begin > FC_SPAN ? span->begin + FC_SPAN : seq;
        status = fc_static(threads, items, ns, body, ctx);
        span->begin = span->end;
        if (status == FC_OK && span->begin < seq && fc_interrupted()) status = FC_INTERRUPTED;
    } while (span->begin < seq && status == FC_OK);
    return status;
}

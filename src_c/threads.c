/* See threads.h. A fork after a parallel region would leave the child without libgomp's workers and hang it:
 * a prepare handler lets the team go before every fork. Other runtimes: the child runs serial. */
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Below this much serial work a second thread costs more than it brings (docs/threads.md). */
static const double PARALLEL_NS = 12e3;
static const double POLL_NS = 20e6;
enum { SPINS = 4000 }; /* some 100 us */

static inline void pause_cpu(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int wanted;         /* fc_set_num_threads; 0: what OpenMP says */
static int omp_at_start;   /* omp_get_max_threads() at load: a lower value later is threadpoolctl's limit */
static int serial_child;   /* forked, with a runtime that cannot let its team go */
static int (*poll_signals)(void);

#ifdef _OPENMP
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

int fc_threads_for(ptrdiff_t items, double ns) {
    if (items < 2 || (double)items * ns < PARALLEL_NS) return 1;
    int n = fc_get_num_threads();
    return items < n ? (int)items : n;
}

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* What the threads of one region share. Only rank 0, the calling thread, polls. */
struct region {
    ptrdiff_t items, piece, next;
    int poll, stop, dynamic;
    double polled_at;
    fc_body *body;
    void *ctx;
};

static int stopped(struct region *r, int rank) {
    if (rank == 0 && r->poll && now_ns() - r->polled_at > POLL_NS) {
        if (poll_signals()) __atomic_store_n(&r->stop, 1, __ATOMIC_RELAXED);
        r->polled_at = now_ns();
    }
    return __atomic_load_n(&r->stop, __ATOMIC_RELAXED);
}

static void run_static(struct region *r, int rank, int threads) {
    ptrdiff_t begin = r->items * rank / threads, end = r->items * (rank + 1) / threads;
    for (; begin < end && !stopped(r, rank); begin += r->piece)
        r->body(r->ctx, begin, begin + r->piece < end ? begin + r->piece : end, rank);
}

static void run_dynamic(struct region *r, int rank) {
    for (;;) {
        ptrdiff_t i = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED);
        if (i >= r->items || stopped(r, rank)) return;
        r->body(r->ctx, i, i + 1, rank);
    }
}

static void run_share(struct region *r, int rank, int threads) {
    if (r->dynamic) run_dynamic(r, rank);
    else run_static(r, rank, threads);
}

/* ---- one region for many: fc_together ---- */

/* The threads of fc_together's region. Rank 0 hands out a region by counting `turn` up, the others count `done` up. */
struct team {
    int size;
    struct region *region; /* of this turn; NULL: go home */
    int threads;           /* of the team that take part in it */
    char line[64];
    unsigned turn;
    char another_line[64];
    unsigned done;
};
static _Thread_local struct team *my_team; /* of the thread that runs a program */

/* Until *value is not `old`. Spins for a while, then lets others have the core. */
static void wait_while(const unsigned *value, unsigned old) {
    for (int spins = 0; __atomic_load_n(value, __ATOMIC_ACQUIRE) == old; spins++) {
        if (spins < SPINS) pause_cpu();
        else sched_yield();
    }
}

static void follow(struct team *t, int rank) {
    for (unsigned turn = 0;; turn++) {
        wait_while(&t->turn, turn);
        if (!t->region) return;
        if (rank < t->threads) run_share(t->region, rank, t->threads);
        __atomic_fetch_add(&t->done, 1, __ATOMIC_RELEASE);
    }
}

/* region NULL ends the team. Returns when every other thread has done its part. */
static void lead(struct team *t, struct region *region, int threads) {
    const unsigned others = (unsigned)t->size - 1;
    t->region = region;
    t->threads = threads < t->size ? threads : t->size;
    __atomic_store_n(&t->done, 0, __ATOMIC_RELAXED);
    __atomic_fetch_add(&t->turn, 1, __ATOMIC_RELEASE);
    if (!region) return;
    run_share(region, 0, t->threads);
    for (unsigned done; (done = __atomic_load_n(&t->done, __ATOMIC_ACQUIRE)) < others;) wait_while(&t->done, done);
}

fc_status fc_together(fc_status (*program)(void *ctx), void *ctx) {
    const int threads = fc_get_num_threads();
    if (threads < 2 || my_team) return program(ctx);
    fc_status status = FC_OK;
#ifdef _OPENMP
    struct team t = {.size = 1};
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num() == 0) {
            t.size = omp_get_num_threads();
            my_team = &t;
            status = program(ctx);
            my_team = NULL;
            lead(&t, NULL, 0);
        } else {
            follow(&t, omp_get_thread_num());
        }
    }
#endif
    return status;
}

int fc_interrupted(void) { return poll_signals && poll_signals(); }

/* ---- */

static fc_status run(int threads, ptrdiff_t items, double ns, int dynamic, fc_body *body, void *ctx) {
    struct region r = {.items = items, .piece = items, .dynamic = dynamic, .body = body, .ctx = ctx};
    if ((double)items * ns > POLL_NS && poll_signals) {
        r.poll = 1;
        r.polled_at = now_ns();
        r.piece = ns * 4 > POLL_NS ? 1 : (ptrdiff_t)(POLL_NS / 4 / ns);
    }
    if (threads > 1 && my_team) lead(my_team, &r, threads);
#ifdef _OPENMP
    else if (threads > 1) {
#pragma omp parallel num_threads(threads)
        run_share(&r, omp_get_thread_num(), omp_get_num_threads());
    }
#endif
    else run_static(&r, 0, 1);
    return r.stop ? FC_INTERRUPTED : FC_OK;
}

fc_status fc_static(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx) {
    return run(threads, items, ns, 0, body, ctx);
}

fc_status fc_dynamic(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx) {
    return run(threads, items, ns, 1, body, ctx);
}

int fc_scratch_alloc(fc_scratch *s, int threads, size_t bytes) {
    /* A spare line between slices, and never a multiple of 4096: equal low bits would collide in L1. */
    s->stride = (bytes + 127) / 64 * 64;
    if (s->stride % 4096 == 0) s->stride += 64;
    s->block = NULL;
    if ((size_t)threads > (SIZE_MAX - 64) / s->stride) return -1;
    s->block = malloc((size_t)threads * s->stride + 64);
    if (!s->block) return -1;
    s->base = (char *)(((uintptr_t)s->block + 63) / 64 * 64);
    return 0;
}

void fc_scratch_free(fc_scratch *s) { free(s->block); }

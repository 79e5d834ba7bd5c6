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

static inline void pause_cpu(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int wanted;         /* fc_set_num_threads; 0: what OpenMP says */
static int (*poll_signals)(void);
static _Thread_local struct team *my_team; /* of the thread that runs a program */
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

/* What the threads of one region share. Only rank 0, the calling thread, polls. */
struct region {
    ptrdiff_t items, piece, next;
    int poll, stop, dynamic;
    double polled_at;
    fc_body *body;
    void *ctx;
};

/* The poll runs the program's own code, which may call ops: those must not give work to the team or the region whose
 * leader waits here for them. */
static int poll_alone(void) {
    struct team *const team = my_team;
    const int outer = polling;
    my_team = NULL, polling = 1;
    const int stop = poll_signals();
    my_team = team, polling = outer;
    return stop;
}

static int stopped(struct region *r, int rank) {
    if (rank == 0 && r->poll && now_ns() - r->polled_at > POLL_NS) {
        if (poll_alone()) __atomic_store_n(&r->stop, 1, __ATOMIC_RELAXED);
        r->polled_at = now_ns();
    }
    return __atomic_load_n(&r->stop, __ATOMIC_RELAXED);
}

static void run_piece(struct region *r, int rank, ptrdiff_t begin, ptrdiff_t end) {
    if (begin < end && !stopped(r, rank)) r->body(r->ctx, begin, end, rank);
}

/* One run of neighbours a thread, cut into pieces for the poll. */
static void run_static(struct region *r, int rank, int threads) {
    ptrdiff_t begin = r->items * rank / threads, end = r->items * (rank + 1) / threads;
    for (; begin < end && !stopped(r, rank); begin += r->piece)
        run_piece(r, rank, begin, begin + r->piece < end ? begin + r->piece : end);
}

#ifdef _OPENMP
static void run_dynamic(struct region *r, int rank) {
    for (;;) {
        ptrdiff_t i = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED);
        if (i >= r->items || stopped(r, rank)) return;
        run_piece(r, rank, i, i + 1);
    }
}
#endif

/* ---- fc_together: the threads of one region wait for work, piece by piece ----
 * ticket: turn << 32 | next piece. Whoever moves it from v to v + 1 owns the piece, and since every change of the other
 * fields is preceded by a change of ticket, also knows that they belong to v's turn. Rank 0 goes on when all pieces are
 * done: a thread that the system has not let run takes none, and is not waited for. */
struct team {
    int size, over;
    struct region *region;
    ptrdiff_t chunk; /* items a piece */
    uint32_t pieces;
    int threads; /* ranks that may take part */
    char line[64];
    uint64_t ticket;
    char another_line[64];
    uint32_t done; /* pieces */
};
enum { CLOSED = 0x40000000, PIECES_A_THREAD = 4, SPINS = 4000 /* some 100 us */ };

static void wait_a_little(int *spins) {
    if (++*spins < SPINS) pause_cpu();
    else sched_yield();
}

/* One piece of the turn at hand; 0 if there is none for this rank. */
static int take_piece(struct team *t, int rank) {
    uint64_t v = __atomic_load_n(&t->ticket, __ATOMIC_ACQUIRE);
    const uint32_t piece = (uint32_t)v;
    if (piece >= __atomic_load_n(&t->pieces, __ATOMIC_ACQUIRE)) return 0;
    if (rank >= __atomic_load_n(&t->threads, __ATOMIC_ACQUIRE)) return 0;
    struct region *r = __atomic_load_n(&t->region, __ATOMIC_ACQUIRE);
    const ptrdiff_t chunk = __atomic_load_n(&t->chunk, __ATOMIC_ACQUIRE);
    if (!__atomic_compare_exchange_n(&t->ticket, &v, v + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return 1;
    const ptrdiff_t begin = piece * chunk, end = begin + chunk < r->items ? begin + chunk : r->items;
    run_piece(r, rank, begin, end);
    __atomic_fetch_add(&t->done, 1, __ATOMIC_RELEASE);
    return 1;
}

#ifdef _OPENMP
static void follow(struct team *t, int rank) {
    for (int spins = 0; !__atomic_load_n(&t->over, __ATOMIC_ACQUIRE);) {
        if (take_piece(t, rank)) spins = 0;
        else wait_a_little(&spins);
    }
}
#endif

static void lead(struct team *t, struct region *r, int threads) {
    const uint64_t turn = (__atomic_load_n(&t->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    const ptrdiff_t share = r->items / ((ptrdiff_t)threads * PIECES_A_THREAD);
    const ptrdiff_t chunk = r->dynamic || share < 1 ? 1 : share < r->piece ? share : r->piece;
    const uint32_t pieces = (uint32_t)((r->items + chunk - 1) / chunk);
    __atomic_store_n(&t->ticket, turn << 32 | CLOSED, __ATOMIC_RELEASE);
    __atomic_store_n(&t->region, r, __ATOMIC_RELEASE);
    __atomic_store_n(&t->chunk, chunk, __ATOMIC_RELEASE);
    __atomic_store_n(&t->pieces, pieces, __ATOMIC_RELEASE);
    __atomic_store_n(&t->threads, threads, __ATOMIC_RELEASE);
    __atomic_store_n(&t->done, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&t->ticket, turn << 32, __ATOMIC_RELEASE);
    while (take_piece(t, 0)) {}
    for (int spins = 0; __atomic_load_n(&t->done, __ATOMIC_ACQUIRE) < pieces;) wait_a_little(&spins);
}

fc_status fc_together(fc_status (*program)(void *ctx), void *ctx) {
    const int threads = fc_get_num_threads();
    if (threads < 2 || my_team || polling) return program(ctx);
    fc_status status = FC_OK;
#ifdef _OPENMP
    struct team t = {.ticket = CLOSED};
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num() == 0) {
            t.size = omp_get_num_threads();
            my_team = &t;
            status = program(ctx);
            my_team = NULL;
            __atomic_store_n(&t.over, 1, __ATOMIC_RELEASE);
        } else {
            follow(&t, omp_get_thread_num());
        }
    }
#endif
    return status;
}

int fc_interrupted(void) { return poll_signals && poll_alone(); }

/* ---- */

static fc_status run(int threads, ptrdiff_t items, double ns, int dynamic, fc_body *body, void *ctx) {
    struct region r = {.items = items, .piece = items, .dynamic = dynamic, .body = body, .ctx = ctx};
    if ((double)items * ns > POLL_NS && poll_signals) {
        r.poll = 1;
        r.polled_at = now_ns();
        r.piece = ns * 4 > POLL_NS ? 1 : (ptrdiff_t)(POLL_NS / 4 / ns);
    }
    if (polling) threads = 1;
    if (threads > 1 && my_team && items < CLOSED) lead(my_team, &r, threads < my_team->size ? threads : my_team->size);
#ifdef _OPENMP
    else if (threads > 1 && !my_team) {
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
    return run(threads, items, ns, 0, body, ctx);
}

fc_status fc_dynamic(int threads, ptrdiff_t items, double ns, fc_body *body, void *ctx) {
    return run(threads, items, ns, 1, body, ctx);
}

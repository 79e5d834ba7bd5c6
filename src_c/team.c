/* fc_parallel_region: a program of several ops in one parallel region. The calling thread, the leader, runs the
 * program; the others, the workers, wait for the regions of its ops and take them piece by piece without leaving their
 * own.
 *
 * ticket: number of the region << 32 | next piece. Whoever moves it from v to v + 1 owns the piece, and since every
 * change of the other fields is preceded by a change of ticket, also knows that they belong to v's region. The leader
 * goes on when all pieces are done: a worker that the system has not let run takes none, and is not waited for. */
#include "team.h"

#include <sched.h>
#ifdef _OPENMP
#include <omp.h>
#endif

struct team {
    int size, over;
    struct fc_region *region;
    ptrdiff_t chunk; /* items a piece */
    uint32_t pieces;
    int threads; /* ranks that may take part */
    char line[64];
    uint64_t ticket;
    char another_line[64];
    uint32_t done; /* pieces */
};
enum { CLOSED = 0x40000000, PIECES_A_THREAD = 4, SPINS = 4000 /* some 100 us */ };

static _Thread_local struct team *my_team; /* of the leader, while its program runs */

int fc_in_team(void) { return my_team != NULL; }

int fc_team_takes(ptrdiff_t items) { return my_team && items < CLOSED; }

static inline void pause_cpu(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_a_little(int *spins) {
    if (++*spins < SPINS) pause_cpu();
    else sched_yield();
}

/* One piece of the region at hand; 0 if there is none for this rank. */
static int take_piece(struct team *t, int rank) {
    uint64_t v = __atomic_load_n(&t->ticket, __ATOMIC_ACQUIRE);
    const uint32_t piece = (uint32_t)v;
    if (piece >= __atomic_load_n(&t->pieces, __ATOMIC_ACQUIRE)) return 0;
    if (rank >= __atomic_load_n(&t->threads, __ATOMIC_ACQUIRE)) return 0;
    struct fc_region *r = __atomic_load_n(&t->region, __ATOMIC_ACQUIRE);
    const ptrdiff_t chunk = __atomic_load_n(&t->chunk, __ATOMIC_ACQUIRE);
    if (!__atomic_compare_exchange_n(&t->ticket, &v, v + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return 1;
    const ptrdiff_t begin = piece * chunk, end = begin + chunk < r->items ? begin + chunk : r->items;
    fc_region_piece(r, rank, begin, end);
    __atomic_fetch_add(&t->done, 1, __ATOMIC_RELEASE);
    return 1;
}

#ifdef _OPENMP
static void work_until_over(struct team *t, int rank) {
    for (int spins = 0; !__atomic_load_n(&t->over, __ATOMIC_ACQUIRE);) {
        if (take_piece(t, rank)) spins = 0;
        else wait_a_little(&spins);
    }
}
#endif

void fc_team_run(struct fc_region *r, int threads) {
    struct team *const t = my_team;
    if (threads > t->size) threads = t->size;
    const uint64_t number = (__atomic_load_n(&t->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    const ptrdiff_t share = r->items / ((ptrdiff_t)threads * PIECES_A_THREAD);
    const ptrdiff_t chunk = r->dynamic || share < 1 ? 1 : share < r->piece ? share : r->piece;
    const uint32_t pieces = (uint32_t)((r->items + chunk - 1) / chunk);
    __atomic_store_n(&t->ticket, number << 32 | CLOSED, __ATOMIC_RELEASE);
    __atomic_store_n(&t->region, r, __ATOMIC_RELEASE);
    __atomic_store_n(&t->chunk, chunk, __ATOMIC_RELEASE);
    __atomic_store_n(&t->pieces, pieces, __ATOMIC_RELEASE);
    __atomic_store_n(&t->threads, threads, __ATOMIC_RELEASE);
    __atomic_store_n(&t->done, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&t->ticket, number << 32, __ATOMIC_RELEASE);
    while (take_piece(t, 0)) {}
    for (int spins = 0; __atomic_load_n(&t->done, __ATOMIC_ACQUIRE) < pieces;) wait_a_little(&spins);
}

fc_status fc_parallel_region(fc_status (*program)(void *ctx), void *ctx) {
    const int threads = fc_get_num_threads();
    if (threads < 2 || my_team || fc_polling()) return program(ctx);
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
            work_until_over(&t, omp_get_thread_num());
        }
    }
#endif
    return status;
}

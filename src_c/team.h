/* What threads.c and team.c share: one region of work. Nobody else includes this. */
#ifndef FC_TEAM_H
#define FC_TEAM_H

#include "threads.h"

/* What the threads of one region share. Only rank 0, the calling thread, polls. */
struct fc_region {
    ptrdiff_t items, piece, next;
    int poll, stop, dynamic;
    double polled_at;
    fc_body *body;
    void *ctx;
};

/* Items [begin, end), unless the region is to stop */
void fc_region_piece(struct fc_region *r, int rank, ptrdiff_t begin, ptrdiff_t end);

/* Whether the calling thread is inside the poll's own code: ops are serial there. */
int fc_polling(void);

/* Whether the calling thread leads a team; whether that can take so many items; and these on `threads` of it, or all.
 */
int fc_in_team(void);
int fc_team_takes(ptrdiff_t items);
void fc_team_run(struct fc_region *r, int threads);

#endif

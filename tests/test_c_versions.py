"""A caller that was built for another forge.h is refused: it would be misread. The version says which one runs."""

from __future__ import annotations

from pathlib import Path

from child import run_c

import forge_c

PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include "forge.h"

/* `call`, which takes what `size` belongs to, with every size but its own: refused, and out as it was */
#define REFUSES(size, call)                                                                                            \
    do {                                                                                                               \
        const size_t own = size, others[] = {0, 1, 8, own - 8, own - 1, own + 1, own + 8, (size_t)-1};                 \
        for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {                                                \
            size = others[i];                                                                                          \
            if ((call) != FC_BAD_SIZE) return printf("%s takes %zu\n", #call, others[i]), 1;                           \
        }                                                                                                              \
        size = own;                                                                                                    \
        for (int i = 0; i < 32; i++)                                                                                   \
            if (out[i] != 7) return printf("%s writes\n", #call), 1;                                                   \
        if ((call) != FC_OK) return printf("%s refuses its own size\n", #call), 1;                                     \
        for (int i = 0; i < 32; i++) out[i] = 7;                                                                       \
    } while (0)

int main(void) {
    float out[32], x[16] = {1}, page[4096 * 2];
    void *pages[1] = {page};
    int64_t start[1] = {0};
    for (int i = 0; i < 32; i++) out[i] = 7;
    if (fc_version() != FC_VERSION) return printf("the library is %d, the header %d\n", fc_version(), FC_VERSION), 1;

    fc_rows rows = {.size = sizeof rows};
    REFUSES(rows.size, fc_softmax(FC_F32, out, x, &rows, 4));
    REFUSES(rows.size, fc_rms_norm(FC_F32, out, NULL, x, NULL, NULL, &rows, 4, 1e-6f, 0));
    REFUSES(rows.size, fc_layer_norm(FC_F32, out, NULL, x, NULL, NULL, NULL, &rows, 4, 1e-6f));
    REFUSES(rows.size, fc_activate(FC_SILU, FC_F32, out, x, &rows, 4));
    REFUSES(rows.size, fc_glu(FC_SILU, FC_F32, out, x, x, &rows, 4));

    fc_linear_args l = {.size = sizeof l, .out = out, .x = x, .rows = &rows, .m = 1, .k = 4, .n = 4, .layout = FC_ROWS,
                        .weight = x, .ldw = 16};
    REFUSES(l.size, fc_linear(&l));
    REFUSES(rows.size, fc_linear(&l));

    fc_rope_args r = {.size = sizeof r, .out = out, .x = x, .cos = x, .sin = x, .batch = 1, .seq = 1, .heads = 1,
                      .head_dim = 4, .rotary_pairs = 2};
    REFUSES(r.size, fc_rope(&r));

    fc_kv_cache c = {.size = sizeof c, .kv_heads = 1, .head_dim = 4, .v_dim = 4, .pages_a_row = 1, .pages = pages};
    fc_append_args p = {.size = sizeof p, .cache = &c, .k = x, .v = x, .batch = 1, .seq = 1, .start = start};
    if (fc_kv_page_bytes(&c) > (ptrdiff_t)sizeof page) return printf("pages are longer than here\n"), 1;
    memset(page, 0, sizeof page);
    REFUSES(p.size, fc_append(&p));
    REFUSES(c.size, fc_append(&p));
    REFUSES(c.size, fc_kv_read(&c, 0, 0, 1, out, out + 16));

    fc_attention_args a = {.size = sizeof a, .out = out, .q = x, .cache = &c, .batch = 1, .q_len = 1, .kv_len = 1,
                           .heads = 1, .kv_heads = 1, .head_dim = 4, .v_dim = 4, .scale = 1};
    REFUSES(a.size, fc_attention(&a));
    REFUSES(c.size, fc_attention(&a));

    fc_conv1d_args v = {.size = sizeof v, .out = out, .x = x, .new_state = out, .layout = FC_COLS, .weight = x,
                        .ldw = 4, .batch = 1, .seq = 1, .channels = 1, .width = 1};
    REFUSES(v.size, fc_conv1d(&v));
    fc_scan_args s = {.size = sizeof s, .out = out, .u = x, .delta = x, .new_state = out + 1, .a = x, .b = x, .c = x,
                      .batch = 1, .seq = 1, .channels = 1, .n = 1, .lda = 4};
    REFUSES(s.size, fc_selective_scan(&s));
    fc_rg_lru_args g = {.size = sizeof g, .out = out, .x = x, .input_gate = x, .recurrence_gate = x, .param = x,
                        .new_state = out + 1, .batch = 1, .seq = 1, .channels = 1};
    REFUSES(g.size, fc_rg_lru(&g));
    return 0;
}
"""


def test_structs_of_another_size_are_refused(tmp_path):
    assert run_c(tmp_path, PROGRAM) == (0, "")


def test_the_header_has_the_version_of_the_package():
    major, minor, patch = map(int, forge_c.__version__.split(".")[:3])
    assert f"FC_VERSION = {10000 * major + 100 * minor + patch} " in Path(forge_c.get_include(), "forge.h").read_text()

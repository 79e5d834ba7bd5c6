"""How a product is cut into items for threads: a pure function of sizes, compiled here by itself."""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from child import compile_c

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).parents[1] / "src_c"
PROGRAM = """
#include "ops/cut.h"

double cut_of(ptrdiff_t *out, ptrdiff_t m, ptrdiff_t panels, ptrdiff_t rows, int in_order, int threads, int tile) {
    const struct fc_blocks sizes = {.tile_rows = tile, .many_rows = 48, .few_panels = 4, .many_panels = 16};
    const struct fc_cut c = fc_cut_product(&sizes, m, panels, rows, in_order, threads);
    const ptrdiff_t found[] = {c.tile_panels, c.tiles, c.block_rows, c.blocks, c.item_blocks};
    for (int i = 0; i < 5; i++) out[i] = found[i];
    return fc_cut_fullness(&c, m, panels, threads);
}
"""
THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 64)
TILE_ROWS = (4, 6, 12)


class Cut(NamedTuple):
    tile_panels: int
    tiles: int
    block_rows: int
    blocks: int
    item_blocks: int


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "cut.c").write_text(PROGRAM)
    compile_c("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}", folder / "cut.c", "-o",
              folder / "cut.so")
    function = ctypes.CDLL(str(folder / "cut.so")).cut_of
    function.restype = ctypes.c_double

    def call(m: int, panels: int, threads: int, tile: int = 12, rows: int = 384, in_order: bool = False):
        out = (ctypes.c_ssize_t * 5)()
        fullness = function(out, ctypes.c_ssize_t(m), ctypes.c_ssize_t(panels), ctypes.c_ssize_t(rows), int(in_order),
                            threads, tile)
        return Cut(*out), fullness

    return call


def longest(c: Cut, m: int, panels: int, threads: int) -> int:
    """Rows times panels of the thread that has most, when each takes a run of neighbours."""
    items = c.tiles * c.blocks // c.item_blocks
    sizes = []
    for i in range(items * c.item_blocks):
        tile, block = divmod(i, c.blocks)
        sizes.append(min(c.tile_panels, panels - tile * c.tile_panels) * min(c.block_rows, m - block * c.block_rows))
    ends = [items * t // threads * c.item_blocks for t in range(threads + 1)]
    return max(sum(sizes[a:b]) for a, b in zip(ends, ends[1:], strict=False))


def test_the_items_are_the_whole_product_and_no_more(cut):
    for m, panels, threads, tile, in_order in product((1, 5, 48, 49, 333, 2049), (1, 3, 48, 313, 688), THREADS,
                                                      TILE_ROWS, (False, True)):
        c, fullness = cut(m, panels, threads, tile, in_order=in_order)
        case = m, panels, threads, tile, in_order, c
        assert 0 < c.tile_panels <= (16 if m > 48 else 4) and 0 < c.block_rows <= 384, case
        assert (c.tiles - 1) * c.tile_panels < panels <= c.tiles * c.tile_panels, case
        assert (c.blocks - 1) * c.block_rows < m <= c.blocks * c.block_rows, case
        assert c.item_blocks == (c.blocks if in_order else 1), case
        assert 0 < fullness <= 1, case
        assert longest(c, m, panels, threads) * threads * fullness == pytest.approx(m * panels), case


def test_large_products_keep_every_thread_busy(cut):
    """The sizes of models: up to 16 threads work for 0.85 of the time of the one that has most."""
    for m, n, threads, tile in product((128, 192, 333, 512, 1000, 2048), (2048, 3072, 4096, 5000, 5632, 11008, 16384),
                                       (t for t in THREADS if t <= 16), TILE_ROWS):
        panels = (n + 15) // 16
        c, _ = cut(m, panels, threads, tile)
        assert m * panels >= 0.85 * threads * longest(c, m, panels, threads), (m, n, threads, tile, c)


def test_what_one_size_of_tile_left_idle(cut):
    """43 tiles of 16 panels on 16 threads are three rounds, the last for 11 of them."""
    c, fullness = cut(192, 688, 16)
    assert fullness > 0.94 and c.tile_panels < 16
    assert cut(192, 688, 1)[0].tile_panels == 16


@pytest.mark.parametrize("threads", [1, 2])
def test_a_low_last_block_leaves_tiles_and_blocks_large(cut, threads):
    """Of 333 rows in blocks of 192 the last has 141, of 313 panels the last tile one: no thread works for either as
    long as for a whole one."""
    for m, panels in ((333, 313), (352, 320), (333, 320)):
        c, fullness = cut(m, panels, threads, tile=32, rows=256)
        assert c[:1] + c[2:] == (16, 192, 2, 1) and fullness > 0.94, (m, panels, c)


def test_one_thread_has_the_largest_tiles_and_blocks_of_even_height(cut):
    assert cut(512, 256, 1)[0] == Cut(16, 16, 264, 2, 1)
    assert cut(385, 256, 1)[0] == Cut(16, 16, 204, 2, 1)
    assert cut(384, 256, 1)[0] == Cut(16, 16, 384, 1, 1)

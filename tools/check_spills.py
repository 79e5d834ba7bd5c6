"""Lists the loops of the product kernels that keep vectors on the stack, in the library that this Python imports.

    python tools/check_spills.py [LIBRARY]

A tile's accumulators must stay in registers while it walks the lines of W: stores to the stack inside an innermost loop
cost more than the products beside them. Prints a line a loop. Exit status 1 if a loop over lines of a tile of 256- or
512-bit vectors stores more than one vector in 12 products there (fewer hide under them), or if a kernel named below is
gone. The rest is listed only: loads without stores are constants that found no register, and the baseline's loops, in
short registers, are not tuned.
"""
from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

_GEMM = r"gemm_(f32|bf16|s8|(u8|u6|u4|i4_symmetric|i4_affine)_(int|planes))"
# One entry a kind of product kernel; each must be in the library, so that a renamed one is not passed over.
KERNELS = [re.compile(kernel) for kernel in (
    rf"{_GEMM}_tile_\d", rf"{_GEMM}_tall_\d", rf"{_GEMM}_pair_\d", rf"{_GEMM}_single_\d", rf"{_GEMM}_few",
    r"few_\w+_1", r"gemv_rows_\w+", r"paged_(f32|bf16|s8)_tile_\d", r"paged_s8_single_\d",
    r"byte_(scores|values)_tile_\d", "attention_row", "pv_partial_lines")]
PRODUCTS = re.compile(r"vfn?madd|vdpbf16ps|vpdp(busd|wssd)|vpmaddwd|vpmaddubsw|pmaddwd|mulps")
STACK = re.compile(r"-?(0x)?[0-9a-f]*\(%r[sb]p")


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def wide(self) -> bool:
        return bool(re.search(r"%[xyz]mm", self.text))


class Loop(NamedTuple):
    function: str
    body: list[Instruction]

    @property
    def products(self) -> int:
        return sum(bool(PRODUCTS.match(i.text)) for i in self.body)

    @property
    def over_lines(self) -> bool:
        """Whether this is a wide tile's walk over the lines of W: it asks for later ones. A walk over chunks of
        integers asks for scales, and makes float32 of sums: innermost only where gcc put the lines' loop elsewhere."""
        chunks = self.function.startswith("gemm_") and any("cvtdq2ps" in i.text for i in self.body)
        asks = any(i.text.startswith("prefetch") for i in self.body)
        return asks and not chunks and any("%ymm" in i.text or "%zmm" in i.text for i in self.body)

    def _on_stack(self, store: bool) -> int:
        """Vector moves to the stack, or reads of it."""
        touching = [i.text for i in self.body if i.wide and STACK.search(i.text)]
        return sum(bool(re.search(r",[^,]*\(%r[sb]p[^,]*\)$", text)) == store for text in touching)

    @property
    def stores(self) -> int:
        return self._on_stack(True)

    @property
    def loads(self) -> int:
        return self._on_stack(False)


def functions(library: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Every function whose name says that it is a product kernel; the ISAs' copies follow each other."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    name, body = "", []
    for line in [*text.stdout.splitlines(), "0 <end>:"]:
        if head := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            if any(kernel.fullmatch(name.split(".")[0]) for kernel in KERNELS):
                yield name, body
            name, body = head[1], []
        elif code := re.match(r"^\s*([0-9a-f]+):\s+(\S.*?)\s*(#.*)?$", line):
            body.append(Instruction(int(code[1], 16), code[2].removeprefix("{vex} ")))


def loops(name: str, body: list[Instruction]) -> Iterator[Loop]:
    """The innermost loops: jumps back that no other jump back lies within."""
    at = {i.address: n for n, i in enumerate(body)}
    jumps = [(n, re.match(r"j\w+\s+([0-9a-f]+)", i.text)) for n, i in enumerate(body)]
    spans = [(at[to], n) for n, m in jumps if m and (to := int(m[1], 16)) in at and at[to] <= n]
    for first, last in spans:
        if not any(other != (first, last) and first <= other[0] and other[1] <= last for other in spans):
            yield Loop(name, body[first:last + 1])


def main() -> int:
    if len(sys.argv) > 1:
        library = sys.argv[1]
    else:
        from forge_c import get_library_dir
        library = f"{get_library_dir()}/libforge_c.so"
    kernels = list(functions(library))
    missing = [kernel.pattern for kernel in KERNELS if not any(kernel.fullmatch(n.split(".")[0]) for n, _ in kernels)]
    found = [loop for name, body in kernels for loop in loops(name, body) if loop.products >= 4]
    print(f"{'function':26} instructions  vector  products  stack stores  stack loads")
    for loop in found:
        wide = sum(i.wide for i in loop.body)
        print(f"{loop.function:26} {len(loop.body):12} {wide:7} {loop.products:9} {loop.stores:13} {loop.loads:12}")
    for pattern in missing:
        print(f"{library}: no function is named {pattern}")
    bad = [loop for loop in found if loop.over_lines and loop.stores * 12 > loop.products]
    tuned = sum(loop.over_lines for loop in found)
    print(f"{len(found)} loops, {tuned} over lines of tuned tiles, {len(bad)} of them spill")
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())

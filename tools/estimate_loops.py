#!/usr/bin/env python3
"""What the product kernels' inner loops take on cores that are not at hand: cycles of a pass, beside the floor.

    python tools/estimate_loops.py [LIBRARY] [--all] [--llvm-mca PATH] [--page [docs/loops.md]]

Of each kernel on each ISA the loop over the lines of W with most products, as check_spills.py finds it in the library.
*Floor*: its products at the rate of their units, which roofline() has measured on such cores. *Estimate*: llvm-mca's
cycles of a pass, everything in the first-level cache. A loop of which that is the floor waits for nothing but its
products, as long as W comes in time, which no such model sees.

Instructions are renamed for llvm-mca where LLVM 19 has their rate wrong: on Sapphire Rapids 512-bit multiplications
have two ports and not one; on Zen 4 a dot product goes as fast as a multiply-add, and a broadcast from memory is a
load. It has no rates for AMX, whose loops are not here. It needs llvm-mca 16 or later (Debian: llvm-19).
"""
from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from check_spills import Instruction, Loop, functions, loops

PAGE = Path(__file__).resolve().parent.parent / "docs" / "loops.md"
ITERATIONS = 200
FEWEST = 8  # products of a loop that is shown
EMPTY = Loop("", [])
SHOWN = re.compile(r"gemm_\w+_tile|gemm_(u8|i4_\w+)_(int|planes)_pair")
PRODUCTS = re.compile(r"vfn?madd|vdpbf16ps|vpdp|vpmaddwd|vpmaddubsw")
NOPS = re.compile(r"(cs |data16 )*nop|xchg\s+%ax,%ax")


class Core(NamedTuple):
    """A kind of core, its name for llvm-mca, cycles of a product (the first pattern that its text holds), and what
    llvm-mca is given in the place of an instruction."""
    name: str
    llvm: str
    cycles: dict[str, float]
    stand_ins: dict[str, str]

    def floor(self, products: list[str]) -> float:
        return sum(next(cycles for pattern, cycles in self.cycles.items() if re.search(pattern, text))
                   for text in products)

    def renamed(self, text: str) -> str:
        for pattern, other in self.stand_ins.items():
            if re.match(pattern, text):
                return re.sub(r"^\S+", other, text)
        return text


CORES = (
    Core("Zen 4", "znver4", {"zmm": 1.0, "": 0.5},
         {r"vdpbf16ps|vpdp\w+": "vfmadd231ps", r"vp?broadcast\w+ +\S*\(": "vmovups"}),
    Core("Sapphire Rapids", "sapphirerapids", {"vdpbf16ps": 2.0, "": 0.5},
         {r"(vfn?madd\w+|vpdp\w+|vpmadd\w+|vmulps)\s.*zmm": "vaddps"}),
)


def isas(library: str) -> tuple[list[int], list[str]]:
    """(addresses, ascending; the ISA from there on): local symbols follow the name of their file."""
    text = subprocess.run(["readelf", "-sW", library], capture_output=True, text=True, check=True).stdout
    file, found = "", []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].rstrip(":").isdigit():
            continue
        if fields[3] == "FILE":
            file = fields[7].removesuffix(".c")
        elif fields[3] == "FUNC" and fields[4] == "LOCAL":
            found.append((int(fields[1], 16), file))
    found.sort()
    return [address for address, _ in found], [file for _, file in found]


def widest(library: str) -> dict[tuple[str, str], Loop]:
    """(ISA, kernel without its number of rows) -> its loop."""
    addresses, files = isas(library)
    best: dict[tuple[str, str], Loop] = {}
    for name, body in functions(library):
        isa = files[bisect_right(addresses, body[0].address) - 1]
        kernel = re.sub(r"_\d+$", "", name.split(".")[0])
        for loop in loops(kernel, body):
            if len(_products(loop)) >= FEWEST and _rank(loop) > _rank(best.get((isa, kernel), EMPTY)):
                best[isa, kernel] = loop._replace(function=name.split(".")[0])
    return best


def _rank(loop: Loop) -> tuple[bool, int]:
    """Walks over the lines of W before others, then by products."""
    return loop.over_lines, len(_products(loop))


def _products(loop: Loop) -> list[str]:
    return [i.text for i in loop.body if PRODUCTS.match(i.text)]


def assembly(core: Core, body: list[Instruction]) -> str:
    """What llvm-mca reads: no padding, and every jump to one label."""
    lines = [re.sub(r"^(j\w+)\s.*", r"\1 .L0", core.renamed(i.text)) for i in body if not NOPS.match(i.text)]
    return ".L0:\n" + "\n".join(lines) + "\n"


def simulated(llvm_mca: str, core: Core, loop: Loop) -> float:
    """Cycles of a pass."""
    done = subprocess.run([llvm_mca, "-march=x86-64", f"-mcpu={core.llvm}", f"-iterations={ITERATIONS}", "-json"],
                          input=assembly(core, loop.body), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{loop.function}, {core.llvm}: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    return json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]["TotalCycles"] / ITERATIONS


def cells(llvm_mca: str, core: Core, loop: Loop) -> list[str]:
    products = _products(loop)
    floor, estimate = core.floor(products), simulated(llvm_mca, core, loop)
    return [f"{floor:.1f}", f"{estimate:.1f}", f"{100 * min(1.0, floor / estimate):.0f} %"]


def table(llvm_mca: str, library: str, everything: bool) -> list[str]:
    """Markdown."""
    lines = ["| kernel | ISA | instructions | products | "
             + " | ".join(f"{core.name}: floor | estimate | floor of it" for core in CORES) + " |",
             "| --- | --- | --: | --: |" + " --: |" * 3 * len(CORES)]
    rows: dict[tuple[str, ...], list[str]] = {}  # the cells but the ISA's -> the ISAs
    for (isa, _), loop in sorted(widest(library).items(), key=lambda item: (item[0][1], item[0][0])):
        if isa == "base" or not (everything or SHOWN.match(loop.function)):  # in short registers, and not tuned
            continue
        figures = [cell for core in CORES for cell in cells(llvm_mca, core, loop)]
        key = loop.function, str(len(loop.body)), str(len(_products(loop))), *figures
        rows.setdefault(key, []).append(isa)
    lines += [f"| {function} | {', '.join(on)} | {' | '.join(rest)} |" for (function, *rest), on in rows.items()]
    return lines


def put(page: Path, lines: list[str]) -> None:
    """Between the page's two comments."""
    text, found = re.subn(r"(<!-- estimates: [^\n]*-->\n).*?(<!-- end of estimates -->)",
                          lambda m: m[1] + "\n" + "\n".join(lines) + "\n\n" + m[2], page.read_text(), flags=re.DOTALL)
    if found != 1:
        raise RuntimeError(f"{page} has {found} places for estimates, expected one")
    page.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", help="default: the installed forge_c's")
    parser.add_argument("--llvm-mca", default=shutil.which("llvm-mca-19") or "llvm-mca", metavar="PATH")
    parser.add_argument("--all", action="store_true", help="also the kernels of few rows and attention")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, metavar="FILE", help="put the table there too")
    args = parser.parse_args()
    if not args.library:
        from forge_c import get_library_dir
        args.library = f"{get_library_dir()}/libforge_c.so"
    if not shutil.which(args.llvm_mca):
        print(f"estimate_loops.py: {args.llvm_mca} is not there, see --llvm-mca", file=sys.stderr)
        return 2
    lines = table(args.llvm_mca, args.library, args.all)
    print(*lines, sep="\n")
    if args.page:
        put(args.page, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

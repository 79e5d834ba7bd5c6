"""From the JSON files of pytest-benchmark to a page: a table and plots for each component."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import plots
from machine import Limits, Work, compute_seconds, memory_seconds, share

_IMPLEMENTATIONS = ("forge_c", "numpy", "torch", "onnxruntime")
_TITLES = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "softmax": "Softmax", "rope": "Rotary positions",
           "swiglu": "SwiGLU", "activations": "Activations", "linear": "Linear",
           "attention": "Grouped-query attention", "kv_cache": "KV cache", "transformer": "Transformer block",
           "mixture_of_depths": "Mixture of depths",
           "ssd_scan": "Mamba-2's scan", "gated_delta": "Gated delta rule", "s4d": "Diagonal state spaces",
           "causal_conv1d": "Causal convolution", "selective_scan": "Mamba's scan", "rg_lru": "Griffin's recurrence",
           "ring_attention": "Attention over ranks", "distributed_scan": "Mamba's scan over ranks",
           "models": "The embedded model",
           "mission": "Modern components and what they replace"}


@dataclass
class Row:
    """One implementation of one case; `rounds` has its median time in each round. A curve's cases differ in length."""
    component: str
    case: str
    variant: str
    impl: str
    work: Work
    tokens: int
    note: str
    curve: str
    length: int
    rounds: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return median(self.rounds.values())

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a share of their median."""
        return (max(self.rounds.values()) - min(self.rounds.values())) / self.seconds

    def times_faster(self, than: Row) -> float:
        """Median over rounds of the ratio within a round."""
        both = self.rounds.keys() & than.rounds.keys()
        return median(than.rounds[r] / self.rounds[r] for r in both)


def merge(files: list[tuple[int, Path]]) -> tuple[list[Row], dict[str, str]]:
    """(rows in the order of the suites, version of each implementation) of the files (round, path)."""
    rows: dict[tuple[str, ...], Row] = {}
    versions: dict[str, str] = {}
    for number, path in files:
        document = json.loads(path.read_text())
        for b in document["benchmarks"]:
            x: dict[str, Any] = b["extra_info"]
            versions[x["impl"]] = document["machine_info"]["bench_version"]
            key = (x["component"], b["group"], x["variant"], x["impl"])
            work = Work(*(x[name] for name in Work._fields))
            row = rows.setdefault(key, Row(*key, work, x["tokens"], x["note"], x["curve"], x["length"]))
            row.rounds[number] = b["stats"]["median"]
    order = {key: i for i, key in enumerate(dict.fromkeys((r.component, r.case) for r in rows.values()))}
    return sorted(rows.values(), key=lambda r: (list(_TITLES).index(r.component), order[r.component, r.case])), versions


def baseline(row: Row, rows: list[Row]) -> Row | None:
    """NumPy's row of the same case: the float32 one, or of the same variant where variants are different work."""
    numpy = {r.variant: r for r in rows if r.impl == "numpy" and (r.component, r.case) == (row.component, row.case)}
    return numpy.get("float32") or numpy.get(row.variant)


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def rate_text(row: Row, limits: Limits) -> str:
    """In the unit of whatever limits this work."""
    by_bytes = row.work.flops == 0 or memory_seconds(row.work, limits) > compute_seconds(row.work, limits)
    amount, unit = (row.work.read + row.work.written, "GB/s") if by_bytes else (row.work.flops, "GFLOP/s")
    rate = f"{amount / row.seconds / 1e9:.3g} {unit}"
    return f"{rate}, {row.tokens / row.seconds:.0f} tokens/s" if row.tokens else rate


def table(rows: list[Row], limits: Limits) -> list[str]:
    """Markdown lines."""
    noted = any(row.note for row in rows)
    lines = ["| case | variant | implementation | time | spread | rate | of limit | times NumPy |",
             "| --- | --- | --- | --: | --: | --: | --: | --: |"]
    if noted:
        lines = [lines[0] + " note |", lines[1] + " --- |"]
    for case, group in groupby(rows, key=lambda r: r.case):
        for i, row in enumerate(sorted(group, key=lambda r: (r.variant, _IMPLEMENTATIONS.index(r.impl)))):
            reached, base = share(row.work, row.seconds, limits), baseline(row, rows)
            cells = [case if i == 0 else "", row.variant, row.impl, time_text(row.seconds), f"{100 * row.spread:.0f} %",
                     rate_text(row, limits), "–" if reached is None else f"{100 * reached:.0f} %",
                     "–" if base is None else f"{row.times_faster(base):.2f}"]
            lines.append("| " + " | ".join(cells + ([row.note] if noted else [])) + " |")
    return lines


def limits_table(limits: Limits) -> list[str]:
    names = {"fp32_gflops": "float32 multiply-add, GFLOP/s", "bf16_gflops": "bfloat16 dot product, GFLOP/s",
             "int8_gops": "int8 dot product, GOP/s", "int4_gops": "int4 by int8 dot product, GOP/s",
             "read_gbs": "memory read, GB/s",
             "copy_gbs": "memory copy, GB/s read and written"}
    return ["| limit | measured |", "| --- | --: |",
            *(f"| {title} | {limits[key]:.0f} |" for key, title in names.items())]


def write(rows: list[Row], limits: Limits, about: str, extra: list[str], folder: Path, page: str) -> Path:
    """folder/<page>.md and its plots in folder/<page>/."""
    lines = ["# Benchmarks of components", "", about, "", "[The index](../benchmarks.md) names other machines.", "",
             "Every implementation runs in a process of its own, one after the other, in rounds; a time is the median "
             "over rounds of the median within a round, and spread is how far the rounds lie apart. Data is random. "
             "Unless a case fits in cache by nature, calls rotate through buffers that together exceed the last-level "
             "cache. *Of limit* is the least time that the work can take here, the larger of operations over the peak "
             "and bytes over the memory rate, divided by the time; – where everything stays in cache and there is "
             "little to compute. A share over 100 % is memory's: others use this machine too, and its rate changes "
             "from second to second. Results go into memory that is there (`out=`, ONNX Runtime's bound buffers) "
             "wherever an implementation's operation takes it: NumPy's and torch's activations, softmax and "
             "products do, torch's norms and attention do not; a case that says *new result* makes a new array each "
             "call. *Times NumPy* is NumPy's time for the same work, in float32, over this one, within a round.", "",
             *limits_table(limits), "", *extra]
    for component, group in groupby(rows, key=lambda r: r.component):
        mine = list(group)
        lines += ["", f"## {_TITLES[component]}", "", *table(mine, limits)]
        title = _TITLES[component]
        ratios = [(row, row.times_faster(base)) for row in mine
                  if row.impl != "numpy" and (base := baseline(row, mine)) is not None]
        if plots.dots(title, ratios, folder / page / f"{component}.svg"):
            lines += ["", f"![{title}: times as fast as NumPy]({page}/{component}.svg)"]
        if plots.curves(title, mine, limits, folder / page / f"{component}-length.svg"):
            lines += ["", f"![{title}: time against length]({page}/{component}-length.svg)"]
    if plots.roofline(rows, limits, folder / page / "roofline.svg"):
        lines += ["", "## Roofline", "", f"![Operations a second against operations a byte]({page}/roofline.svg)"]
    path = folder / f"{page}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def put(page: Path, name: str, text: str) -> None:
    """Between the page's two comments of that name."""
    old = page.read_text()
    new, found = re.subn(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", lambda m: m[1] + text + m[2], old,
                         flags=re.DOTALL)
    if found != 1:
        raise RuntimeError(f"{page} has {found} places for {name}, expected one")
    page.write_text(new)

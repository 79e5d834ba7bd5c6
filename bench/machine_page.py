"""A machine's page from its figures, and the index of machines: Markdown and pictures, no measuring."""
from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import plots
from cases import CASES, TITLES
from machine import FOOTPRINT, Limits, Work, share
from peers_table import Entry, Sizes, table
from peers_table import Row as ModelRow
from report import Row, put, rate_text, time_text

from forge_c.models.weights.random import SHAPES

_PEERS = ("numpy", "torch", "onnxruntime")
_NAMES = {"numpy": "NumPy", "torch": "torch", "onnxruntime": "ONNX Runtime"}
_UNITS = {"fp32_gflops": "float32 multiply-add, GFLOP/s", "bf16_gflops": "bfloat16 dot product, GFLOP/s",
          "int8_gops": "int8 dot product, GOP/s", "int4_gops": "int4 by int8, GOP/s",
          "read_gbs": "memory read, GB/s", "copy_gbs": "memory copy, GB/s read and written"}
_HOW = [
    "How: every implementation is a process of its own, and they take turns: within a round each works for a moment at "
    "every variant of a case, one to five rounds one after the other. A time is the median over rounds of the median "
    "within a round. Beside it stands the share of this machine's limit, the larger of operations over the peak and of "
    "bytes over the memory's rate, at the same number of threads; – where there is no limit to compare with. What has "
    "fewer bits can be widened, so that no peak counts that is lower than float32's. Under a "
    "peer's name stands its time and then, in bold, that over forge_c's: the median over rounds of the ratio within a "
    "round, in brackets the lowest and the highest. More than 1 means that forge_c is faster. What a peer does not "
    "have in a format is compared with what it has: NumPy with its float32, attention in lower precision with the "
    "others' of the same arrays.", "",
    "Memory is warm for everyone: results go into arrays that are there (`out=`, bound buffers) where an operation "
    "takes them, and freed memory stays in the process where it makes new ones. Cases that memory limits rotate "
    f"through buffers of {FOOTPRINT >> 20} MiB together, and the limits' rates of memory are those over arrays of "
    "that size; where the last cache is larger, as a share of a big server's can be, they are not those of DRAM alone. "
    "Cases of one row and prompts find their operands in the caches. Data is random.", ""]
_MODELS = [
    "Random weights, everyone in a process of its own, one after the other; rates in tokens a second, the median over "
    "rounds. pp is a prompt, of which the last token's logits are computed; tg decodes one token at a time from an "
    "empty cache. llama.cpp's files hold every matrix in the format named. *Of limit*: of a prompt, two operations a "
    "weight and token over the peak of the format's unit; of decoding, the bytes of weights that a step reads over the "
    "read rate of memory. A ratio is the median (lowest to highest) over rounds of the ratio within a round."]


class Figures:
    """What was measured on one machine."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.limits: dict[int, Limits] = {int(n): each for n, each in found["limits"]["by_threads"].items()}
        self.most = max(self.limits)
        self.cells = [cell for cell in found["cells"] if cell["threads"] in self.limits]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.cells)

    def of_case(self, name: str, threads: int) -> list[dict[str, Any]]:
        return [cell for cell in self.cells if cell["case"] == name and cell["threads"] == threads]

    def share(self, cell: Mapping[str, Any]) -> float | None:
        """Of the limit at the cell's number of threads."""
        return share(work(cell), median(cell["seconds"]), self.limits[cell["threads"]])

    def row(self, cell: Mapping[str, Any]) -> Row:
        """As report.py and plots.py have it."""
        return Row(cell["section"], cell["case"], cell["variant"], cell["impl"], work(cell), 0, "", cell["curve"],
                   cell["length"], dict(enumerate(cell["seconds"])))

    def peer(self, cell: Mapping[str, Any], impl: str) -> dict[str, Any] | None:
        """What an implementation's cell is to be compared with a cell of forge_c."""
        theirs = {c["variant"]: c for c in self.of_case(cell["case"], cell["threads"]) if c["impl"] == impl}
        beside = (cell["variant"], cell["beside"], *(("float32",) if impl == "numpy" else ()))
        return next((theirs[name] for name in beside if name in theirs), None)


def work(cell: Mapping[str, Any]) -> Work:
    return Work(cell["read"], cell["written"], cell["flops"], _unit(cell), cell["in_memory"])


def _unit(cell: Mapping[str, Any]) -> str:
    """Of the products: those of lower precision run in its unit."""
    name = cell["variant"].rpartition("precision ")[2] if "precision " in cell["variant"] else cell["dtype"]
    return str(name)


def _ratios(cell: Mapping[str, Any], peer: Mapping[str, Any]) -> list[float]:
    return sorted(b / a for a, b in zip(cell["seconds"], peer["seconds"], strict=False))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _beside(cell: Mapping[str, Any], peer: Mapping[str, Any] | None) -> str:
    if peer is None:
        return "–"
    ratios = _ratios(cell, peer)
    return f"{time_text(median(peer['seconds']))}, **{median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def section(figures: Figures, name: str) -> list[str]:
    """The table of one section's cases at all threads."""
    lines = ["| case | variant | forge_c | rate | of limit | " + " | ".join(_NAMES[p] for p in _PEERS) + " |",
             "| --- | --- | --: | --: | --: |" + " --: |" * len(_PEERS)]
    mine = [c for c in figures if (c["section"], c["threads"], c["impl"]) == (name, figures.most, "forge_c")]
    for case, group in groupby(mine, key=lambda c: c["case"]):
        for at, cell in enumerate(group):
            cells = [case if at == 0 else "", cell["variant"], time_text(median(cell["seconds"])),
                     rate_text(figures.row(cell), figures.limits[figures.most]), _percent(figures.share(cell)),
                     *(_beside(cell, figures.peer(cell, impl)) for impl in _PEERS)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines if mine else []


def limits_tables(figures: Figures) -> list[str]:
    """By threads, and memory by the size of the arrays."""
    keys = [key for key in figures.limits[figures.most] if key != "threads"]
    counts = sorted(n for n in figures.limits if n == figures.most or n & (n - 1) == 0)
    lines = ["| limit | " + " | ".join(f"{n} thread{'s' if n > 1 else ''}" for n in counts) + " |",
             "| --- |" + " --: |" * len(counts)]
    for key in keys:
        lines.append(f"| {_UNITS.get(key, key)} | " + " | ".join(
            f"{figures.limits[n][key]:.0f}" if figures.limits[n].get(key) else "–" for n in counts) + " |")
    memory = figures.found["limits"]["memory"]
    lines += ["", "Memory against the size of an array, at all threads; one that fits into a cache shows what it does:",
              "", "| array of | " + " | ".join(f"{size >> 20} MiB" for size, *_ in memory) + " |",
              "| --- |" + " --: |" * len(memory)]
    for at, what in ((1, "read"), (2, "copy, read and written")):
        lines.append(f"| {what}, GB/s | " + " | ".join(f"{each[at]:.0f}" for each in memory) + " |")
    return lines


def threads_table(figures: Figures) -> list[str]:
    """Rates of the cases that were measured at every number of threads."""
    counts = sorted({cell["threads"] for cell in figures})
    names = [case.name for case in CASES if case.threads]
    lines = ["| case | variant | implementation | " + " | ".join(
        f"{n} thread{'s' if n > 1 else ''}" for n in counts) + " |", "| --- | --- | --- |" + " --: |" * len(counts)]
    for name in names:
        mine = [cell for cell in figures if cell["case"] == name]
        variants = list(dict.fromkeys(cell["variant"] for cell in mine))
        keys = sorted(dict.fromkeys((cell["variant"], cell["impl"]) for cell in mine),
                      key=lambda key: variants.index(key[0]))
        for at, (variant, impl) in enumerate(keys):
            by_threads = {c["threads"]: c for c in mine if (c["variant"], c["impl"]) == (variant, impl)}
            cells = []
            for count in counts:
                cell = by_threads.get(count)
                cells.append("" if cell is None else f"{rate_text(figures.row(cell), figures.limits[count])}, "
                             f"{_percent(figures.share(cell))}")
            lines.append(f"| {name if at == 0 else ''} | {variant} | {impl} | " + " | ".join(cells) + " |")
    return lines if len(counts) > 1 else []


def models_table(figures: Figures) -> list[str]:
    """Whole models: a table for each shape and number of threads."""
    lines: list[str] = []
    rows = figures.found["models"]
    for shape, threads in dict.fromkeys((row["shape"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["threads"]) == (shape, threads)]
        held = [ModelRow(Entry(row["implementation"], row["format"]), row["test"],
                         {n: [rate] for n, rate in enumerate(row["tokens_per_second"])}, {}, row["step_bytes"])
                for row in sorted(mine, key=lambda row: row["test"])]
        limits = [figures.limits[threads]] * max(len(row.samples) for row in held)
        lines += ["", f"{shape}, threads {threads}:", "", *table(held, limits, Sizes.of(SHAPES[shape]))]
    return [*_MODELS, *lines] if lines else []


def about(found: Mapping[str, Any]) -> str:
    """The machine and the run in words."""
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in sorted(found["versions"]) if name != "forge_c")
    runs = found["runs"]
    when: dict[tuple[str, str], list[str]] = {}
    for name, run in runs.items():
        when.setdefault((run["date"], run["version"]), []).append(name)
    dates = "; ".join(f"{date}, forge_c {version}" + (f": {', '.join(names)}" if len(when) > 1 else "")
                      for (date, version), names in when.items())
    others = max((run["others"] for run in runs.values()), default=0.0)
    return (f"{found['details']}; forge_c's kernels for {found['limits']['isa']}. {dates}. {versions}. Others took up "
            f"to {100 * others:.0f} % of the processors meanwhile.")


def write(found: Mapping[str, Any], folder: Path) -> Path:
    """folder/<machine>.md, and its pictures in folder/<machine>/ where matplotlib is installed."""
    path = folder / f"{found['name']}.md"
    if find_spec("matplotlib"):
        _draw(Figures(found), folder / found["name"])
    path.write_text(page_text(found, {each.stem for each in (folder / found["name"]).glob("*.svg")}))
    return path


def page_text(found: Mapping[str, Any], pictures: Collection[str]) -> str:
    """The page, with those of the pictures that there are."""
    figures, name = Figures(found), found["name"]

    def picture(stem: str, text: str) -> list[str]:
        return ["", f"![{text}]({name}/{stem}.svg)"] if stem in pictures else []

    lines = [f"# {title(found)}", "", about(found), "",
             f"Written by `python bench/page.py` from [{name}.json]({name}.json); [the index](../benchmarks.md) names "
             "other machines.", "", "## Limits", "", *limits_tables(figures),
             *picture("roofline", "Operations a second against operations a byte"), "", *_HOW]
    for key, heading in TITLES.items():
        if rows := section(figures, key):
            lines += [f"## {heading}", "", *rows, *picture(f"{key}-length", f"{heading}: time against length"), ""]
    if rows := threads_table(figures):
        lines += ["## Threads", "", "Rates, and the share of the limit at that number of threads.", "", *rows,
                  *picture("threads", "Rates against threads"), ""]
    if rows := models_table(figures):
        lines += ["## A whole model", "", *rows, ""]
    there = {f"{cell['case']}, threads {cell['threads']}" for cell in figures} | {
        f"{row['implementation']} {row['format']}, threads {row['threads']}" for row in found["models"]}
    left_out = [each for run in found["runs"].values() for each in dict.fromkeys(run["left_out"]) if each not in there]
    if left_out:
        lines += ["## Left out", "", "Not measured, for want of time, of memory or of the program: "
                  + "; ".join(left_out) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def title(found: Mapping[str, Any]) -> str:
    held = f", held to {found['asked']}" if found["asked"] else ""
    return f"{found['family']}, {found['cpus']} CPU{'s' if found['cpus'] > 1 else ''}{held}"


def _draw(figures: Figures, folder: Path) -> None:
    """Whatever there is something to draw of."""
    limits = figures.limits[figures.most]
    rows = [figures.row(cell) for cell in figures if cell["threads"] == figures.most]
    plots.roofline(rows, limits, folder / "roofline.svg")
    for key, heading in TITLES.items():
        mine = [row for row in rows if row.component == key]
        plots.curves(heading, mine, limits, folder / f"{key}-length.svg")
    names = [case.name for case in CASES if case.threads]
    panels = [(name, [(cell["impl"], cell["variant"], cell["threads"], _rate(cell)) for cell in figures
                      if cell["case"] == name]) for name in names]
    panels = [(name, points) for name, points in panels if len({threads for _, _, threads, _ in points}) > 1]
    plots.over_threads(panels, folder / "threads.svg")


def _rate(cell: Mapping[str, Any]) -> float:
    """G operations a second, or where there are none or few, GB a second."""
    moved = cell["read"] + cell["written"]
    amount = cell["flops"] if cell["flops"] > 100 * moved else moved
    return float(amount / median(cell["seconds"]) / 1e9)


def index_lines(found: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The table of machines whose figures are kept."""
    lines = ["| machine | kernels | measured | float32 | bfloat16 | int8 | read | copy |",
             "| --- | --- | --- | --: | --: | --: | --: | --: |"]
    for link, each in found:
        limits, runs = Figures(each).limits[Figures(each).most], each["runs"].values()
        when = max(run["date"] for run in runs)
        versions = sorted({run["version"] for run in runs})
        lines.append(f"| [{title(each)}]({link}) | {each['limits']['isa']} | {when}, {' to '.join(versions)} | "
                     + " | ".join(f"{limits[key]:.0f}" if limits[key] else "–" for key in (
                         "fp32_gflops", "bf16_gflops", "int8_gops", "read_gbs", "copy_gbs")) + " |")
    return lines


def put_index(page: Path) -> None:
    """The machines whose figures lie in the folder beside the page, between its two comments."""
    found = [(f"{path.parent.name}/{path.stem}.md", json.loads(path.read_text()))
             for path in sorted(page.with_suffix("").glob("*.json"))]
    put(page, "machines", "\n" + "\n".join(index_lines(found)) + "\n\n" if found else "")

"""A page's pictures: speed beside NumPy's, time against length, operations a second against operations a byte."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import Limits, compute_seconds, memory_seconds

if TYPE_CHECKING:
    from report import Row

_COLOURS = {"forge_c": "#1b6ca8", "numpy": "#999999", "torch": "#d1495b", "onnxruntime": "#66a182"}
_DASHES = {"float32": "-", "bfloat16": "--", "int8": ":"}
_MARKERS = "osD^vP*X"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "forge_c", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    _pyplot().close(figure)


def bars(title: str, ratios: Sequence[tuple[Row, float]], path: Path) -> bool:
    """A bar for each row's speed relative to NumPy, from the top; False if there is none."""
    if not ratios:
        return False
    ratios = ratios[::-1]
    figure, axes = _pyplot().subplots(figsize=(8, 0.9 + 0.2 * len(ratios)))
    axes.barh(range(len(ratios)), [ratio - 1 for _, ratio in ratios], left=1,
              color=[_COLOURS[row.impl] for row, _ in ratios])
    axes.set_yticks(range(len(ratios)), [f"{row.case}: {row.impl} {row.variant}" for row, _ in ratios])
    for i, (_, ratio) in enumerate(ratios):
        axes.text(ratio, i, f" {ratio:.3g} ", va="center", ha="left" if ratio >= 1 else "right")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15, y=0.01)
    axes.set_title(f"{title}: times as fast as NumPy")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def curves(title: str, rows: Sequence[Row], limits: Limits, path: Path) -> bool:
    """A panel for each curve: time against length, a line an implementation and variant, and the float32 limit."""
    drawn = sorted((row for row in rows if row.curve), key=lambda row: row.curve)
    panels = [(name, list(group)) for name, group in groupby(drawn, key=lambda row: row.curve)]
    if not panels:
        return False
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for ax, (name, group) in zip(axes[0], panels, strict=True):
        for key in dict.fromkeys((row.impl, row.variant) for row in group):
            line = sorted((row.length, row.seconds) for row in group if (row.impl, row.variant) == key)
            ax.plot(*zip(*line, strict=True), color=_COLOURS[key[0]], linestyle=_DASHES.get(key[1], "-."), marker=".",
                    label=" ".join(key))
        least = sorted((row.length, max(compute_seconds(row.work, limits), memory_seconds(row.work, limits)))
                       for row in group if (row.impl, row.variant) == ("forge_c", "float32"))
        ax.plot(*zip(*least, strict=True), color="black", linewidth=0.8, label="limit, float32")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("length, tokens")
        ax.set_ylabel("seconds")
        ax.set_title(name)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title}: time against length")
    figure.tight_layout()
    _save(figure, path)
    return True


def roofline(rows: Sequence[Row], limits: Limits, path: Path) -> bool:
    """Operations a second against operations a byte, under the machine's limits; False where nothing multiplies."""
    points = [row for row in rows if row.work.flops]
    if not points:
        return False
    figure, ax = _pyplot().subplots(figsize=(8, 5))
    intensities = [row.work.flops / (row.work.read + row.work.written) for row in points]
    ends = min(0.25, *intensities), 2 * max(intensities)
    for key, unit in (("fp32_gflops", "float32"), ("bf16_gflops", "bfloat16"), ("int8_gops", "int8")):
        if limits[key]:
            knee = limits[key] / limits["read_gbs"]
            xs = (ends[0], knee, max(ends[1], 2 * knee))
            ax.plot(xs, [min(limits[key], x * limits["read_gbs"]) for x in xs], color="black", linewidth=0.8,
                    linestyle=_DASHES[unit])
            ax.text(max(ends[1], 2 * knee), limits[key], f" {unit}", va="center")
    components = list(dict.fromkeys(row.component for row in points))
    seen = set()
    for row, intensity in zip(points, intensities, strict=True):
        label = f"{row.impl}, {row.component}"
        ax.plot(intensity, row.work.flops / row.seconds / 1e9, linestyle="", color=_COLOURS[row.impl],
                marker=_MARKERS[components.index(row.component) % len(_MARKERS)], markersize=5,
                fillstyle="full" if row.variant.startswith("float32") else "none",
                label="" if label in seen else label)
        seen.add(label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte of inputs and results")
    ax.set_ylabel("GFLOP/s or GOP/s")
    ax.set_title("Roofline: lines are this machine's limits; filled marks are float32")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.06, 1))
    _save(figure, path)
    return True

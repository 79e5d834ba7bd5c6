"""A page's pictures: speed beside NumPy's, time against length, operations a second against operations a byte."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import Limits, compute_seconds, memory_seconds

if TYPE_CHECKING:
    from report import Row

_COLOURS = {"forge_c": "#1b6ca8", "numpy": "#999999", "torch": "#d1495b", "onnxruntime": "#66a182",
            "llama.cpp": "#e39b2d"}
_LAYERS = {"attention": "#d1495b", "mamba": "#1b6ca8"}
_DASHES = {"float32": "-", "bfloat16": "--", "int8": ":", "int4": "-."}
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


def dots(title: str, ratios: Sequence[tuple[Row, float]], path: Path) -> bool:
    """A group for each case and in it a line for each variant, with a dot for each implementation's speed relative to
    NumPy's; False if there is none."""
    if not ratios:
        return False
    labels: list[tuple[float, str]] = []
    y, figure, axes = 0.0, *_pyplot().subplots(figsize=(8, 1))
    for case, group in groupby(ratios, key=lambda pair: pair[0].case):
        labels.append((y, case))
        pairs = list(group)
        lines: dict[str, list[tuple[Row, float]]] = {row.variant: [] for row, _ in pairs}
        for row, ratio in pairs:
            lines[row.variant].append((row, ratio))
        for variant, line in lines.items():
            y += 1
            labels.append((y, variant))
            axes.axhline(y, color="#eeeeee", linewidth=0.8, zorder=0)
            for row, ratio in line:
                axes.plot(ratio, y, "o", color=_COLOURS[row.impl], markersize=6 if row.impl == "forge_c" else 4.5)
                if row.impl == "forge_c":
                    axes.annotate(f"{ratio:.2g}", (ratio, y), (0, 4), textcoords="offset points", ha="center",
                                  color=_COLOURS[row.impl], fontsize=7)
        y += 1.6
    figure.set_size_inches(8, 0.8 + 0.22 * y)
    axes.set_ylim(y - 0.6, -1)
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels])
    for (_, text), tick in zip(labels, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if text in {row.case for row, _ in ratios} else "normal")
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color="black", linewidth=0.8)
    _factor_ticks(axes, [1.0, *(ratio for _, ratio in ratios)])
    axes.set_xlabel("times as fast as NumPy")
    axes.spines[["top", "right", "left"]].set_visible(False)
    _colour_legend(axes, {row.impl for row, _ in ratios})
    axes.set_title(title, loc="left", pad=22)
    _save(figure, path)
    return True


def _factor_ticks(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at 0.5, 1, 2, 5, 10, ... over the values."""
    low, high = min(values) / 1.3, max(values) * 1.3
    ticks = [digit * 10.0**e for e in range(-5, 6) for digit in (1, 2, 5) if low <= digit * 10.0**e <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _colour_legend(axes: Any, names: Collection[str]) -> None:
    """What each colour is, above the axes."""
    shown = [axes.plot([], [], "o", color=colour, label=name)[0] for name, colour in _COLOURS.items() if name in names]
    axes.legend(handles=shown, frameon=False, ncols=len(shown), loc="lower left", bbox_to_anchor=(0, 1))


def curves(title: str, rows: Sequence[Row], limits: Limits, path: Path) -> bool:
    """A panel for each curve: time against length, a line an implementation and variant, and the float32 limit."""
    drawn = sorted((row for row in rows if row.curve), key=lambda row: row.curve)
    panels = [(name, list(group)) for name, group in groupby(drawn, key=lambda row: row.curve)]
    panels = [(name, group) for name, group in panels if len({row.length for row in group}) > 1]
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
        _length_ticks(ax, sorted({row.length for row in group}))
        ax.set_xlabel("length, tokens")
        ax.set_ylabel("seconds")
        ax.set_title(name)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title}: time against length")
    figure.tight_layout()
    _save(figure, path)
    return True


def _length_ticks(axes: Any, lengths: Sequence[int]) -> None:
    """Of a logarithmic x axis, every second one where there are many."""
    shown = lengths[:: 2 if len(lengths) > 5 else 1]
    axes.set_xticks(shown, [f"{n}" if n < 1024 else f"{n >> 10}k" for n in shown])
    axes.grid(color="#dddddd", linewidth=0.6)


def over_threads(panels: Sequence[tuple[str, Sequence[tuple[str, str, int, float]]]], path: Path) -> bool:
    """A panel for each case: (implementation, variant, threads, rate), a line an implementation and variant."""
    if not panels:
        return False
    columns = min(3, len(panels))
    figure, axes = _pyplot().subplots(-(-len(panels) // columns), columns, squeeze=False,
                                      figsize=(4.2 * columns, 3.2 * -(-len(panels) // columns)))
    for ax, (name, points) in zip(axes.flat, panels, strict=False):
        for impl, variant in dict.fromkeys(point[:2] for point in points):
            line = sorted(point[2:] for point in points if point[:2] == (impl, variant))
            ax.plot(*zip(*line, strict=True), color=_COLOURS[impl], linestyle=_DASHES.get(variant, "-."), marker=".")
        counts = sorted({point[2] for point in points})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_title(name, loc="left")
        ax.set_xlabel("threads")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_visible(False)
    shown = list(dict.fromkeys((impl, variant) for _, points in panels for impl, variant, *_ in points))
    handles = [axes.flat[0].plot([], [], color=_COLOURS[impl], linestyle=_DASHES.get(variant, "-."),
                                 label=f"{impl} {variant}")[0] for impl, variant in shown]
    figure.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("G operations a second, or GB a second where memory is the limit")
    figure.tight_layout()
    _save(figure, path)
    return True


def against_length(found: Mapping[str, Any], path: Path) -> None:
    """Bytes of state, seconds of a token and of a prompt's token against the tokens before, of attention and Mamba."""
    panels = (("bytes", "state, MB", 2.0**-20), ("step", "a token of decoding, ms", 1e3),
              ("prompt", "a token of a prompt, ms", 1e3))
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(10, 3.2))
    for ax, (what, label, unit) in zip(axes, panels, strict=True):
        for layer, colour in _LAYERS.items():
            ax.plot(found["length"], [unit * value for value in found[layer][what]], color=colour, marker=".")
            ax.annotate({"mamba": "Mamba"}.get(layer, layer), (found["length"][-1], unit * found[layer][what][-1]),
                        (5, -3), textcoords="offset points", color=colour)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        _length_ticks(ax, found["length"])
        ax.set_xlabel("tokens before")
        ax.set_title(label, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def against_capacity(found: Mapping[str, Any], path: Path) -> None:
    """Time of a routed block beside the dense one's, against the share of tokens that goes through."""
    figure, ax = _pyplot().subplots(figsize=(4.5, 3.4))
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="as many as go through")
    ax.plot(found["capacity"], [t / found["dense"] for t in found["routed"]], color=_COLOURS["forge_c"], marker=".",
            label="measured")
    ax.set_xlim(0, 1.02)
    ax.set_ylim(bottom=0)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_xlabel("capacity: share of the tokens that goes through")
    ax.set_ylabel("time, of the dense block's")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)


def tokens(rates: Sequence[tuple[str, str, str, float]], path: Path) -> None:
    """A whole model, a panel a test: a line for each width of its weights, and in it a dot for each implementation's
    tokens a second. rates: (test, implementation, width, tokens/s)."""
    tests = list(dict.fromkeys(test for test, *_ in rates))
    widths = list(dict.fromkeys(width for _, _, width, _ in rates))
    figure, axes = _pyplot().subplots(1, len(tests), figsize=(4 * len(tests), 0.9 + 0.35 * len(widths)), sharey=True)
    for ax, test in zip(axes, tests, strict=True):
        for _, impl, width, rate in (each for each in rates if each[0] == test):
            ax.plot(rate, widths.index(width), "o", color=_COLOURS[impl], markersize=7)
            ax.annotate(f"{rate:.0f}", (rate, widths.index(width)), (0, 6), textcoords="offset points", ha="center",
                        fontsize=7, color=_COLOURS[impl])
        ax.set_ylim(len(widths) - 0.5, -0.7)
        ax.set_xlim(0, 1.1 * max(rate for name, _, _, rate in rates if name == test))
        ax.set_yticks(range(len(widths)), widths)
        ax.grid(color="#eeeeee", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(f"{test}, tokens a second")
        ax.spines[["top", "right", "left"]].set_visible(False)
    _colour_legend(axes[0], {impl for _, impl, _, _ in rates})
    figure.tight_layout()
    _save(figure, path)


def roofline(rows: Sequence[Row], limits: Limits, path: Path) -> bool:
    """Operations a second against operations a byte, under the machine's limits; False where nothing multiplies."""
    points = [row for row in rows if row.work.flops]
    if not points:
        return False
    figure, ax = _pyplot().subplots(figsize=(8, 5))
    intensities = [row.work.flops / (row.work.read + row.work.written) for row in points]
    ends = min(0.25, *intensities), 2 * max(intensities)
    for key, unit in (("fp32_gflops", "float32"), ("bf16_gflops", "bfloat16"), ("int8_gops", "int8"),
                      ("int4_gops", "int4")):
        if limits[key] and (unit != "int4" or limits[key] > 1.1 * limits["int8_gops"]):
            knee = limits[key] / limits["read_gbs"]
            xs = (ends[0], knee, max(ends[1], 2 * knee))
            ax.plot(xs, [min(limits[key], x * limits["read_gbs"]) for x in xs], color="black", linewidth=0.8,
                    linestyle=_DASHES[unit])
            ax.text(max(ends[1], 2 * knee), limits[key], f" {unit}", va="center")
    components = list(dict.fromkeys(row.component for row in points))
    for row, intensity in zip(points, intensities, strict=True):
        ax.plot(intensity, row.work.flops / row.seconds / 1e9, linestyle="", color=_COLOURS[row.impl],
                marker=_MARKERS[components.index(row.component) % len(_MARKERS)], markersize=5,
                fillstyle="full" if row.variant.startswith("float32") else "none")
    for i, name in enumerate(components):
        ax.plot([], [], linestyle="", color="black", fillstyle="none", marker=_MARKERS[i % len(_MARKERS)], label=name)
    ax.add_artist(ax.legend(frameon=False, fontsize=7, loc="lower right"))
    _colour_legend(ax, {row.impl for row in points})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte of inputs and results")
    ax.set_ylabel("GFLOP/s or GOP/s")
    ax.set_title("Roofline: lines are this machine's limits; filled marks are float32", loc="left", pad=22)
    ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True

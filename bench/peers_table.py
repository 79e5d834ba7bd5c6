"""What models_vs_peers.py has measured, as a table: rates, shares of the machine's limits, ratios within rounds."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from machine import Limits

# llama.cpp's format -> forge_c's of the same width; bytes of a weight in the formats that peers keep.
_SAME_WIDTH = {"BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int4"}
_WEIGHT_BYTES = {"BF16": 2.0, "bfloat16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
EXPLANATION = [
    "Every implementation runs in a process of its own, one after the other, in rounds; a rate is the median over "
    "rounds of the median within a round, counting the tokens of all sequences. pp is a prompt, of which the last "
    "token's logits are computed; tg decodes one token at a time from an empty cache, and with x8 at its end one token "
    "of each of eight sequences. llama.cpp's files hold every matrix in the format named, output included. *Of limit*: "
    "for a prompt two operations a weight and token over the peak of the format's unit (float32's where that of "
    "bfloat16 is lower; – where there is none for int8), for decoding the bytes of weights that a step reads over the "
    "read bandwidth, or its operations over the peak where they take longer; limits are measured before and after each "
    "round, and the higher counts; what multiplies in a unit that is not measured, as torch does in AMX, can exceed "
    "them. A ratio is the median (lowest to highest) over rounds of the ratio within a round."]


class Entry(NamedTuple):
    """An implementation, the format of its weights, and how many sequences it decodes at a time."""
    implementation: str
    form: str
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.form}" + (f" x {self.batch}" if self.batch > 1 else "")

    @property
    def width(self) -> str:
        """The format in forge_c's words."""
        return _SAME_WIDTH.get(self.form, self.form)


class Sizes(NamedTuple):
    """Weights of the blocks and of the output matrix; the embedding has as many as that."""
    blocks: int
    head: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Sizes:
        d = config["hidden_size"]
        heads = config["num_attention_heads"] + config["num_key_value_heads"]
        block = 2 * d * config["head_dim"] * heads + 3 * d * config["intermediate_size"]
        return Sizes(config["num_hidden_layers"] * block, d * config["vocab_size"])

    def file_bytes(self, form: str) -> float:
        return (self.blocks + 2 * self.head) * _WEIGHT_BYTES[form]


@dataclass
class Row:
    """One test of one entry: tokens per second of each run in each round, and how much of the processors others took
    in the round; step_bytes if the implementation told."""
    entry: Entry
    test: str
    samples: dict[int, list[float]] = field(default_factory=dict)
    others: dict[int, float] = field(default_factory=dict)
    step_bytes: int | None = None

    @property
    def rates(self) -> dict[int, float]:
        """Of each round, the median of its runs."""
        return {number: median(samples) for number, samples in self.samples.items()}

    def share(self, limits: Sequence[Limits], sizes: Sizes) -> float | None:
        """Of the limit, the median over rounds; None where there is no limit to compare with."""
        shares = [rate * floor for number, rate in self.rates.items()
                  if (floor := self._seconds_per_token(limits[number], sizes)) is not None]
        return median(shares) if shares else None

    def _seconds_per_token(self, limits: Limits, sizes: Sizes) -> float | None:
        """The least that a token can take."""
        name = {"float32": "fp32_gflops", "bfloat16": "bf16_gflops", "int4": "int4_gops"}.get(self.entry.width,
                                                                                             "int8_gops")
        peak = max(limits[name], limits["fp32_gflops"]) if name == "bf16_gflops" else limits[name] or None
        if self.test.startswith("pp"):
            tokens = int(self.test[2:])
            return 2 * (sizes.blocks + sizes.head / tokens) / peak / 1e9 if peak else None
        moved = self.step_bytes or (sizes.blocks + sizes.head) * _WEIGHT_BYTES[self.entry.form]
        products = 2 * (sizes.blocks + sizes.head) / peak if peak else 0.0
        return max(moved / limits["read_gbs"] / self.entry.batch, products) / 1e9

    def ratios(self, other: Row) -> list[float]:
        """Sorted, one for each round that has both: this rate over the other's."""
        mine, others = self.rates, other.rates
        return sorted(mine[number] / others[number] for number in mine.keys() & others.keys())

    def as_json(self, limits: Sequence[Limits], sizes: Sizes) -> dict[str, Any]:
        return {"implementation": self.entry.implementation, "format": self.entry.form, "batch": self.entry.batch,
                "test": self.test, "tokens_per_second": self.samples, "others": self.others,
                "step_bytes": self.step_bytes, "median": median(self.rates.values()),
                "of_limit": self.share(limits, sizes)}


def _comparison(row: Row, rows: Mapping[tuple[Entry, str], Row]) -> tuple[list[float], str]:
    """(ratios, of what): a peer's with forge_c in the same width, forge_c's with its own bfloat16 or one sequence."""
    entry, base = row.entry, Entry("forge_c", row.entry.width)
    if entry.implementation != "forge_c":
        other = rows.get((base, row.test))
        return (other.ratios(row), f"forge_c {base.form} over this") if other else ([], "")
    if entry.batch > 1:
        other = rows.get((base, re.sub(r"x\d+$", "", row.test)))
        return (row.ratios(other), "this over one sequence") if other else ([], "")
    other = rows.get((Entry("forge_c", "bfloat16"), row.test))
    return (row.ratios(other), "this over forge_c bfloat16") if other and other is not row else ([], "")


def table(rows: Sequence[Row], limits: Sequence[Limits], sizes: Sizes) -> list[str]:
    """Markdown lines, test by test."""
    lines = ["| test | implementation | format | tokens/s | of limit | ratio (rounds) | of |",
             "| --- | --- | --- | --: | --: | --: | --- |"]
    by_key = {(row.entry, row.test): row for row in rows}
    for test in dict.fromkeys(row.test for row in rows):
        for row in (r for r in rows if r.test == test):
            reached, (ratios, meaning) = row.share(limits, sizes), _comparison(row, by_key)
            ratio = f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})" if ratios else ""
            lines.append(f"| {test} | {row.entry.implementation} | {row.entry.form} | "
                         f"{median(row.rates.values()):.1f} | {'–' if reached is None else f'{100 * reached:.0f} %'} | "
                         f"{ratio} | {meaning if ratios else ''} |")
    return lines


def limits_text(limits: Sequence[Limits]) -> str:
    """The machine's limits in words: the median over rounds, and the range where there are several."""
    def figure(key: str) -> str:
        values = sorted(each[key] for each in limits)
        return f"{median(values):.0f}" + (f" ({values[0]:.0f}–{values[-1]:.0f})" if len(values) > 1 else "")

    return (f"float32 {figure('fp32_gflops')}, bfloat16 {figure('bf16_gflops')} GFLOP/s, int8 {figure('int8_gops')}, "
            f"int4 by int8 {figure('int4_gops')} GOP/s, read {figure('read_gbs')} GB/s")

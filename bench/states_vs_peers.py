"""Models with a state in the place of a cache, random weights: forge_c against llama.cpp and transformers.

    python bench/states_vs_peers.py --llama-bench avx2=BUILD/bin/llama-bench --llama-quantize BUILD/bin/llama-quantize

A build of llama.cpp is named by the ISA that forge_c's kernels are to use beside it. The GGUF files of each shape, F16
by bench/model_gguf.py and what llama-quantize makes of it, stay in --cache (1 GB). In each round every implementation
runs once, in a process of its own and in turns; a ratio is the median over rounds of the ratio within a round. A peer
that is not named is left out; transformers needs --python with torch, which transformers and gguf are installed beside.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import machine
from processes import HERE, Measure, Test, forge_c, llama_cpp, output, say, transformers

from forge_c.models.spec.families import model_spec
from forge_c.models.weights.random import SHAPES

_SHAPES = ("mamba-130m", "mamba2-130m")
# (forge_c's format, the peer, the peer's format): a row of the table each
_PAIRS = (("bfloat16", "llama.cpp", "F16"), ("int8", "llama.cpp", "Q8_0"),
          ("int8, inputs int8", "llama.cpp", "Q8_0"), ("int4", "llama.cpp", "Q4_0"),
          ("float32", "transformers", "float32"), ("bfloat16", "transformers", "bfloat16"))
_FORMS = ("float32", "bfloat16", "int8", "int8, inputs int8", "int4")
_EXPLANATION = (
    "Every implementation runs in a process of its own, in turns; a rate is the median over rounds of the median "
    "within a round, a ratio the median (lowest to highest) over rounds of the ratio within a round. pp is a prompt, "
    "of which the last token's logits are computed, by forge_c in passes of 256 tokens; tg decodes one token at a "
    "time from an empty state. llama.cpp's files are F16, and what its quantiser makes of that with no options, which "
    "holds the embedding of Q4_0, here the output too, in Q6_K; forge_c's int4 is a mix as well. llama.cpp rounds the "
    "inputs of these to 8 bits, forge_c's int8 to 12 unless inputs int8 is asked for, its int4 to 8. *GB/s* is what "
    "decoding moves: the weights that a step reads, and the state, which it reads and writes. *Of limit*: of a "
    "prompt, its multiply-adds over the peak of the format's unit, the recurrence not counted; of decoding, those "
    "bytes over the bandwidths of memory, the state's over that of a copy, all measured in the same process. A state "
    "that stays in the cache can be faster.")


class Sample(NamedTuple):
    """Of one process: tokens per second, the bytes that a step moves a second, and the share of the limit, 0 where
    that is not known."""
    rate: float
    bandwidth: float
    share: float


# (shape, ISA or "" where it has none, implementation, format) -> of each round: pp or tg -> sample
Key = tuple[str, str, str, str]
Samples = dict[Key, list[dict[str, Sample]]]
Run = Callable[[], list[Test]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-bench", action="append", default=[], metavar="ISA=PATH", help="may be repeated")
    parser.add_argument("--llama-quantize", metavar="PATH", help="makes the files for --llama-bench")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="has torch, transformers and gguf")
    parser.add_argument("--isa", action="append", default=[], help="forge_c alone by these too; may be repeated")
    parser.add_argument("--shape", action="append", choices=_SHAPES, help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--repeats", type=int, help="runs of each test in a process; their median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of 64 and 8 tokens: a smoke run")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "forge_c_gguf", metavar="DIR")
    parser.add_argument("--page", type=Path, nargs="?", const=machine.page("states"),
                        metavar="FILE", help="write the table there too (default: docs/benchmarks/<machine>-states.md)")
    args = parser.parse_args()
    if args.llama_bench and not args.llama_quantize:
        parser.error("--llama-bench needs --llama-quantize")
    args.builds = {isa: os.path.abspath(path) for isa, path in (each.split("=", 1) for each in args.llama_bench)}
    args.isa = list(dict.fromkeys([*args.builds, *args.isa])) or [machine.measure_limits(quick=True)["isa"]]
    args.shape = args.shape or list(_SHAPES)
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.cache = args.cache.absolute()
    return args


def _gguf(shape: str, args: argparse.Namespace) -> dict[str, Path]:
    """The files of a shape by their formats, written where they are not there yet."""
    config = json.dumps(dict(SHAPES[shape]))
    stem = f"{shape}-{zlib.crc32(config.encode()):08x}"
    files = {form: args.cache / f"{stem}-{form}.gguf" for _, peer, form in _PAIRS if peer == "llama.cpp"}
    args.cache.mkdir(parents=True, exist_ok=True)
    for form, path in files.items():
        if path.exists():
            continue
        say(f"writing {path}")
        if form == "F16":
            output([args.python, str(HERE / "model_gguf.py"), str(path), form, config])
        else:
            unfinished = path.with_suffix(".part")
            output([os.path.abspath(args.llama_quantize), str(files["F16"]), str(unfinished), form])
            unfinished.rename(path)
    return files


def _runs(shape: str, args: argparse.Namespace, sizes: Measure) -> dict[Key, Run]:
    """What a round runs of a shape, in this order."""
    runs: dict[Key, Run] = {}
    files = _gguf(shape, args) if args.builds else {}
    for isa in args.isa:
        for form in _FORMS:
            runs[shape, isa, "forge_c", form] = partial(forge_c, ["--shape", shape, *_options(form)], sizes, isa)
        for form, path in files.items() if isa in args.builds else ():
            runs[shape, isa, "llama.cpp", form] = partial(llama_cpp, args.builds[isa], path, sizes)
    for form, peer, _ in () if args.without_transformers else [p for p in _PAIRS if p[1] == "transformers"]:
        runs[shape, "", peer, form] = partial(transformers, args.python, SHAPES[shape], sizes, form)
    return runs


def _options(form: str) -> list[str]:
    dtype, _, inputs = form.partition(", inputs ")
    return ["--dtype", dtype, *(["--activations", inputs] if inputs else [])]


def _state_bytes(shape: str) -> int:
    """Of one sequence."""
    return sum(4 * layer.mixer.floats for layer in model_spec(dict(SHAPES[shape])).layers)


def _sample(test: Test, shape: str, limits: machine.Limits | None) -> Sample:
    rate, state = median(test["tokens_per_second"]), _state_bytes(shape)
    if test["test"].startswith("pp"):
        return Sample(rate, 0.0, test.get("of_limit", 0.0))
    weights = test.get("step_bytes") or test["file_bytes"]  # the embedding is the output
    work = machine.Work(weights + state, state, 0, "", in_memory=True)
    least = machine.memory_seconds(work, limits) if limits else 0.0
    return Sample(rate, rate * (work.read + work.written), rate * least)


def _rounds(args: argparse.Namespace, sizes: Measure) -> tuple[Samples, list[float], set[str]]:
    """(samples, the bandwidth of reading that forge_c's processes measured, versions). A run that fails says why."""
    samples, reading, versions = Samples(), [], set[str]()
    runs: dict[Key, Run] = {}
    for shape in args.shape:
        runs |= _runs(shape, args, sizes)
    for number in range(args.rounds):
        say(f"round {number + 1}, {time.strftime('%X')}")
        for key, run in list(runs.items()):
            try:
                tests = run()
            except RuntimeError as error:
                say(f"  {' '.join(key)}: skipped: {error}")
                del runs[key]
                samples.pop(key, None)
                continue
            found = {test["test"][:2]: _sample(test, key[0], test.get("limits")) for test in tests}
            samples.setdefault(key, []).append(found)
            reading += [test["limits"]["read_gbs"] for test in tests[:1] if "limits" in test]
            versions |= {f"{key[2]} {test['version']}" for test in tests if "version" in test}
            say(f"  {' '.join(key)}: {found['pp'].rate:.1f}, {found['tg'].rate:.1f}")
    return samples, reading, versions


def _cells(samples: list[dict[str, Sample]], test: str) -> list[str]:
    """Tokens per second, GB/s, share of the limit."""
    rate, bandwidth, share = (median(each) for each in zip(*(each[test] for each in samples), strict=True))
    return [f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}", f"{bandwidth / 1e9:.1f}" if bandwidth else "–",
            f"{100 * share:.0f} %" if share else "–"]


def _table(samples: Mapping[Key, list[dict[str, Sample]]]) -> list[str]:
    """Markdown: a row for each shape, ISA, test and pair of formats; without a peer, forge_c's alone."""
    lines = ["| shape | kernels | test | forge_c | tokens/s | GB/s | of limit | peer | tokens/s | GB/s | ratio |",
             "| --- | --- | --- | --- | --: | --: | --: | --- | --: | --: | --: |"]
    for shape, isa in dict.fromkeys(key[:2] for key in samples if key[1]):
        for test in ("pp", "tg"):
            for form, peer, theirs in _PAIRS:
                mine = samples.get((shape, isa, "forge_c", form))
                other = samples.get((shape, isa if peer == "llama.cpp" else "", peer, theirs))
                if mine and other:
                    ratios = sorted(a[test].rate / b[test].rate for a, b in zip(mine, other, strict=True))
                    cells = [*_cells(mine, test), f"{peer} {theirs}", *_cells(other, test)[:2],
                             f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"]
                    lines.append(f"| {shape} | {isa} | {test} | {form} | {' | '.join(cells)} |")
    return lines


def _alone(samples: Mapping[Key, list[dict[str, Sample]]]) -> list[str]:
    """Lines for a terminal: every figure."""
    return [f"{' '.join(key)} {test}: {', '.join(_cells(found, test))}"
            for key, found in samples.items() for test in ("pp", "tg")]


def main() -> int:
    args = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    prompt, new = (64, 8) if args.quick else (512, 128)
    neighbours = machine.Neighbours()
    samples, reading, versions = _rounds(args, Measure(prompt, new, args.repeats, args.threads))
    if not samples:
        sys.exit("states_vs_peers.py: nothing has run")
    about = (f"{datetime.date.today()}: {machine.family()} ({machine.cpu_model()}), {machine.cores()} CPUs, "
             f"{args.threads} threads; "
             f"{''.join(f'{version}; ' for version in sorted(versions))}{args.rounds} rounds; reading "
             f"{median(reading):.0f} GB/s at most; others took {100 * neighbours.share():.0f} % of the processors.")
    table = _table(samples)
    print(about, "", *_alone(samples), "", *table, sep="\n")
    if args.page:
        head = ["# Models with a state beside their peers", "",
                f"Written by `python bench/states_vs_peers.py`: random weights, a prompt of {prompt} (pp) and {new} "
                "decoded tokens (tg). The sizes of the models are those of state-spaces/mamba-130m and mamba2-130m.",
                "", about, "", *table, "", _EXPLANATION]
        args.page.write_text("\n".join(head) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

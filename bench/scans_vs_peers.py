"""Scans alone: forge_c against ggml's ssm_scan and what transformers does in PyTorch.

    python bench/scans_vs_peers.py --ggml avx2=BUILD/bin --include LLAMA.CPP/ggml/include

A build of llama.cpp's libraries is named by the ISA that forge_c's kernels are to use beside it; bench/ggml_scans.c is
compiled against it. In each round every implementation runs once, in a process of its own and in turns: the median of
its calls; a ratio is the median over rounds of the ratio within a round. All compute softplus of the steps and the
scan, in float32, without gate. *Of peak*: of Mamba-2, the operations of the cheaper of its two forms (in chunks of 64)
over the peak of float32 products of the same process; of Mamba-1, clock cycles a token, channel, state and core, by the
clock that this peak implies.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import machine
import numpy as np
from processes import HERE, output, say


class Case(NamedTuple):
    """Heads of head_dim 1 are Mamba-1's channels."""
    seq: int
    heads: int
    head_dim: int
    n: int

    @property
    def name(self) -> str:
        if self.head_dim == 1:
            return f"Mamba-1, {self.seq} x {self.heads}, n {self.n}"
        return f"Mamba-2, {self.seq} x {self.heads} heads of {self.head_dim}, n {self.n}"


_CASES = (Case(512, 1536, 1, 16), Case(512, 5120, 1, 16), Case(8192, 1536, 1, 16), Case(1, 5120, 1, 16),
          Case(512, 24, 64, 128), Case(2048, 24, 64, 128), Case(512, 80, 64, 128), Case(1, 80, 64, 128))
_FMA_LANES = {"base": 4, "avx2": 8, "avx_vnni": 8, "avx512": 16, "avx512_vnni": 16, "avx512_vnni_bf16": 16}


def _inputs(case: Case) -> tuple[np.ndarray, ...]:
    """x, dt, A, B, C, state"""
    rng, (seq, heads, dim, n) = np.random.default_rng(0), case

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(np.float32)

    shape = (heads,) if dim == 1 else (heads, dim)
    return (uniform(-1, 1, 1, seq, *shape), uniform(-6, 0, 1, seq, heads),
            uniform(-16, -1, *((heads, n) if dim == 1 else (heads,))), uniform(-1, 1, 1, seq, n),
            uniform(-1, 1, 1, seq, n), uniform(-1, 1, 1, *shape, n))


def _forge_c_call(case: Case) -> Callable[[], Any]:
    import forge_c as fc
    x, dt, a, b, c, state = _inputs(case)
    outs = np.empty_like(x), np.empty_like(state)
    if case.head_dim == 1:
        return lambda: fc.selective_scan(x, dt, a, b, c, delta_softplus=True, state=state, out=outs)
    b, c = b[:, :, None], c[:, :, None]
    return lambda: fc.ssd_scan(x, dt, a, b, c, dt_softplus=True, state=state, out=outs)


def _torch_call(case: Case) -> Callable[[], Any]:
    import torch_ops
    x, dt, a, b, c, state = _inputs(case)
    none = np.zeros(case.heads, np.float32)
    return torch_ops.selective_scan(x, dt, a, b, c, none, np.zeros_like(x), none, state, dtype="float32")


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds, after two calls that are not counted."""
    times = []
    for i in range(-2, repeats):
        begin = time.perf_counter()
        call()
        if i >= 0:
            times.append((time.perf_counter() - begin) * 1e6)
    return times


def _child(which: str, case: Case, repeats: int, threads: int) -> None:
    """Print the microseconds of each call, and what limits a forge_c process found."""
    if which == "torch":
        import torch
        torch.set_num_threads(threads)
        print(json.dumps({"us": _timed(_torch_call(case), repeats)}))
        return
    import forge_c as fc
    fc.set_num_threads(threads)
    us = _timed(_forge_c_call(case), repeats)
    print(json.dumps({"us": us, "gflops": fc.roofline(0.1, 64 << 20)["fp32_gflops"], "isa": fc.isa()}))


def _python(python: str, which: str, case: Case, args: argparse.Namespace, isa: str) -> dict[str, Any]:
    # torch is slow: a few calls of it are enough
    repeats = args.repeats if which == "forge_c" else min(args.repeats, 3)
    environment = {**os.environ, "FORGE_C_ISA": isa} if isa else os.environ
    return json.loads(output([python, str(HERE / "scans_vs_peers.py"), "--child", which, json.dumps(case),
                              str(repeats), str(args.threads)], environment))


def _ggml(program: Path, libraries: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    out = output([str(program), libraries, str(args.threads), str(args.repeats), *map(str, case)])
    return {"us": [float(line) for line in out.split()]}


def _compiled(libraries: str, include: str, folder: Path) -> Path:
    program = folder / ("ggml_scans_" + Path(libraries).name + str(len(list(folder.iterdir()))))
    output(["cc", "-O2", f"-I{include}", str(HERE / "ggml_scans.c"), "-o", str(program), f"-L{libraries}", "-lggml",
            "-lggml-base", f"-Wl,-rpath,{libraries}", "-lm"])
    return program


def _of_limit(case: Case, us: float, found: dict[str, Any], threads: int) -> str:
    seq, heads, dim, n = case
    if dim == 1:
        clock = found["gflops"] / threads / (4 * _FMA_LANES[found["isa"]])  # GHz: two fused units a core
        return f"{us * 1e3 * clock * threads / (seq * heads * n):.2f} cycles"
    chunk = min(64, seq)
    flops = seq * (heads * (4 * n * dim + chunk * dim) + chunk * n)
    return f"{flops / us / 1e3 / found['gflops']:.0%}" if seq > 1 else "–"


def _rows(args: argparse.Namespace, programs: dict[str, tuple[Path, str]]) -> list[str]:
    lines = ["| scan | kernels | forge_c | of peak | ggml | ratio | torch | ratio |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]
    for case in _CASES:
        for isa in args.isa:
            runs: dict[str, Callable[[], dict[str, Any]]] = {
                "forge_c": partial(_python, sys.executable, "forge_c", case, args, isa)}
            if isa in programs:
                runs["ggml"] = partial(_ggml, *programs[isa], case, args)
            if case.head_dim == 1 and not args.without_torch and case.seq <= 512:
                runs["torch"] = partial(_python, args.python, "torch", case, args, "")
            rounds: dict[str, list[float]] = {name: [] for name in runs}
            found: dict[str, Any] = {}
            for _ in range(args.rounds):
                for name, run in runs.items():
                    result = run()
                    rounds[name].append(median(result["us"]))
                    found = result if name == "forge_c" else found
            mine = median(rounds["forge_c"])
            cells = [case.name, isa, f"{mine:,.0f} us", _of_limit(case, mine, found, args.threads)]
            for peer in ("ggml", "torch"):
                if peer not in rounds:
                    cells += ["–", "–"]
                    continue
                ratios = [theirs / ours for theirs, ours in zip(rounds[peer], rounds["forge_c"], strict=True)]
                cells += [f"{median(rounds[peer]):,.0f} us",
                          f"{median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"]
            lines.append("| " + " | ".join(cells) + " |")
            say(lines[-1])
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        which, case, repeats, threads = sys.argv[2:]
        _child(which, Case(*json.loads(case)), int(repeats), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", action="append", default=[], metavar="ISA=FOLDER", help="may be repeated")
    parser.add_argument("--include", metavar="FOLDER", help="ggml's headers")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="has torch")
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10, help="calls in a process; their median counts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.ggml and not args.include:
        parser.error("--ggml needs --include")
    folders = {isa: os.path.abspath(folder) for isa, folder in (each.split("=", 1) for each in args.ggml)}
    args.isa = list(folders) or [machine.measure_limits(quick=True)["isa"]]
    with tempfile.TemporaryDirectory() as folder:
        programs = {isa: (_compiled(lib, args.include, Path(folder)), lib) for isa, lib in folders.items()}
        print(f"{args.threads} threads of {machine.cpu_model()}; {args.rounds} rounds.\n")
        print("\n".join(_rows(args, programs)))


if __name__ == "__main__":
    main()

"""Implementations that run in a process of their own: forge-c bench, llama-bench, and what else prints to stdout."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
_TIME_LIMIT = 1800  # seconds of one process
Test = dict[str, Any]  # "test", "tokens_per_second" of each run, and what else an implementation tells


class Measure(NamedTuple):
    """Tokens of the prompt and tokens decoded, runs of each in the process, threads, seconds until it is ended."""
    prompt: int
    new: int
    repeats: int
    threads: int
    limit: float = _TIME_LIMIT


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def output(command: Sequence[str], environment: Mapping[str, str] = os.environ, limit: float = _TIME_LIMIT) -> str:
    """stdout of a process; RuntimeError with the last line of its stderr."""
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done in {limit:.0f} s") from None
    except OSError as error:
        raise RuntimeError(str(error)) from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return done.stdout


def forge_c(arguments: Sequence[str], sizes: Measure, isa: str | None = None) -> list[Test]:
    """What `forge-c bench` measures with these arguments more."""
    out = output([sys.executable, "-m", "forge_c.cli", "bench", "--json", "--threads", str(sizes.threads),
                  "--prompt-tokens", str(sizes.prompt), "--new-tokens", str(sizes.new),
                  "--repeats", str(sizes.repeats), *arguments],
                 os.environ if isa is None else {**os.environ, "FORGE_C_ISA": isa}, sizes.limit)
    return [json.loads(line) for line in out.splitlines()]


def llama_cpp(llama_bench: str, model: Path, sizes: Measure) -> list[Test]:
    """What a llama-bench measures of a GGUF file."""
    out = output([llama_bench, "-m", str(model), "-p", str(sizes.prompt), "-n", str(sizes.new),
                  "-t", str(sizes.threads), "-r", str(sizes.repeats), "-o", "json"], limit=sizes.limit)
    return [{"test": f"pp{t['n_prompt']}" if t["n_prompt"] else f"tg{t['n_gen']}",
             "tokens_per_second": t["samples_ts"], "version": t["build_commit"], "file_bytes": t["model_size"]}
            for t in json.loads(out)]


def transformers(python: str, config: Mapping[str, Any], sizes: Measure, dtype: str) -> list[Test]:
    """What transformers' model of a config.json does in that interpreter."""
    out = output([python, str(HERE / "model_torch.py"), json.dumps(dict(config)), str(sizes.prompt), str(sizes.new),
                  str(sizes.repeats), str(sizes.threads), dtype], limit=sizes.limit)
    return [json.loads(line) for line in out.splitlines()]

"""forge-c generate | info | bench. A user's mistake is one line on stderr and exit status 2."""
from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # NumPy is imported only once there is work: --help answers at once
    from forge_c.models import Model
    from forge_c.models.generation import Generation

_USER_ERRORS = (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError, FloatingPointError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="forge-c", description="Run LLaMA-family models on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | info | bench")
    generate = commands.add_parser("generate", help="continue a prompt, as a stream")
    info = commands.add_parser("info", help="what this build, this machine and a model are")
    bench = commands.add_parser("bench", help="tokens per second of prompts and of generation")
    for command in (generate, info, bench):
        which = command.add_mutually_exclusive_group()
        which.add_argument("--model", metavar="DIR|FILE",
                           help="a Hugging Face folder or a GGUF file (default: the embedded model)")
        if command is info:
            which.add_argument("model", metavar="DIR|FILE", nargs="?", help="the same", default=argparse.SUPPRESS)
        if command is bench:
            which.add_argument("--shape", metavar="NAME", help="random weights of that size, such as llama-1.1b")
        command.add_argument("--dtype", default="auto",
                             help="auto, float32, bfloat16, int8 or int4 (default: %(default)s)")
        command.add_argument("--threads", type=int, metavar="N", help="default: the cores this process may use")
    generate.add_argument("--prompt", default=None, help="text to continue; - reads it from stdin")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-k", type=int, metavar="K")
    generate.add_argument("--top-p", type=float, metavar="P")
    generate.add_argument("--min-p", type=float, metavar="P")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the chat template")
    bench.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    bench.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="texts that decode at a time (default: 1)")
    bench.add_argument("--repeats", type=int, default=5, metavar="R", help="default: %(default)s")
    bench.add_argument("--json", action="store_true", help="one JSON object a test instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    name = "forge-c"
    warnings.showwarning = _warn
    try:
        try:
            args = _parser().parse_args(argv)
            name = f"forge-c {args.command}"
            return {"generate": _generate, "info": _info, "bench": _bench}[args.command](args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 0
    except _USER_ERRORS as error:
        reason = " ".join(str(error).split()).removeprefix(f"{name.split()[-1]}: ") or type(error).__name__
        print(f"{name}: {reason}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return 2
    except KeyboardInterrupt:
        return 130


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"forge-c: {message}", file=sys.stderr)


def _drop_output() -> None:
    """Nobody takes what is left; without this Python would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load(args: argparse.Namespace) -> Model:
    from forge_c import set_num_threads
    from forge_c.models import load, random_model

    if args.threads is not None:
        set_num_threads(args.threads)
    shape = getattr(args, "shape", None)
    return load(args.model, args.dtype) if shape is None else random_model(shape, args.dtype)


def _generate(args: argparse.Namespace) -> int:
    from forge_c.models.sampling import Sampler

    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    model = _load(args)
    prompt = "def " if args.prompt is None else _stdin() if args.prompt == "-" else args.prompt
    shown = "" if args.chat else prompt
    if args.chat:
        template: Any = getattr(model.tokenizer, "apply_chat_template", None)
        if template is None:
            raise ValueError("--chat: the model has no chat template")
        prompt = template([{"role": "user", "content": prompt}])
    stream = model.generate(prompt, args.max_new_tokens, seed=args.seed, stop=args.stop, stream=True,
                            **asdict(sampler))
    sys.stdout.write(shown)
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
        _print_speed(stream.run)
    return 0


def _stdin() -> str:
    """All of it, as UTF-8 in whatever locale."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin has byte 0x{error.object[error.start]:02x} at {error.start}, expected UTF-8") from None


def _print_speed(run: Generation) -> None:
    def rate(count: int, seconds: float) -> str:
        return f"{count / seconds:.1f} tokens/s" if seconds > 0 else "-"

    print(f"\nprompt {run.prompt_tokens} tokens, {rate(run.prompt_tokens, run.prompt_seconds)}; "
          f"decode {run.new_tokens} tokens, {rate(run.new_tokens, run.decode_seconds)}", file=sys.stderr)


def _info(args: argparse.Namespace) -> int:
    from forge_c.runtime import show_config

    model = _load(args)
    show_config()
    print(f"{'model':16} {args.model or 'embedded'}\n{'dtype':16} {model.dtype}\n{'bytes':16} {model.nbytes}")
    spec = model.config
    for name in ("model_type", "vocab_size", "hidden_size", "n_layers", "max_position_embeddings", "head", "embed",
                 "bos_token_id", "eos_token_ids"):
        print(f"{name:24} {getattr(spec, name)}")
    for row in model.info:
        print(f"{'stored as ' + row.type:24} {row.tensors} tensors, {row.nbytes} bytes, held as {row.held}")
    for layer in dict.fromkeys(spec.layers):
        print(f"{'layers ' + _numbers([i for i, one in enumerate(spec.layers) if one == layer]):24} {layer}")
    return 0


def _numbers(ids: list[int]) -> str:
    """Ascending numbers, runs of them as first-last: 0-3,5."""
    starts = [i for i in ids if i - 1 not in ids]
    stops = [i for i in ids if i + 1 not in ids]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def _bench(args: argparse.Namespace) -> int:
    from forge_c.models.speed import json_lines, table

    for name in ("prompt_tokens", "new_tokens", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    lines = json_lines if args.json else table
    for line in lines(_load(args), args.prompt_tokens, args.new_tokens, args.repeats, args.batch):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

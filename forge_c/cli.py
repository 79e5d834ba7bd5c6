"""forge-c generate | chat | info | bench. A user's mistake is one line on stderr and exit status 2."""
from __future__ import annotations

import argparse
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from forge_c.chat import Conversation, run, utf8_stdin
from forge_c.version import __version__

if TYPE_CHECKING:  # NumPy is imported only once there is work: --help answers at once
    from forge_c.models import Model
    from forge_c.models.generation import Generation, Stream

_RANKS = ("layout", "tensor", "timeout")  # arguments of parallel
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_USER_ERRORS = (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError, FloatingPointError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> tuple[_Parser, Mapping[str, _Parser]]:
    """The whole one, and that of each command."""
    parser = _Parser(prog="forge-c", description="Run LLaMA-family models on the CPU.",
                     epilog="Exit status: 0, 2 after a mistake, 130 after Ctrl-C.")
    parser.add_argument("--version", action="version", version=f"forge-c {__version__}")
    add = parser.add_subparsers(dest="command", required=True, metavar="generate | chat | info | bench").add_parser
    commands: dict[str, _Parser] = {
        "generate": add("generate", help="continue a text, as a stream"),
        "chat": add("chat", help="hold a conversation with a model that has a chat template"),
        "info": add("info", help="what this build, this machine and a model are"),
        "bench": add("bench", help="tokens per second of prompts and of generation")}
    for name, command in commands.items():
        which = command.add_mutually_exclusive_group()
        which.add_argument("--model", metavar="DIR|FILE",
                           help="a Hugging Face folder, a GGUF file, ORG/NAME, or what Model.save wrote (default: the "
                                "embedded model)")
        if name == "info":
            which.add_argument("model", metavar="DIR|FILE", nargs="?", help="the same", default=argparse.SUPPRESS)
        if name == "bench":
            which.add_argument("--shape", metavar="NAME", help="random weights of that size, such as llama-1.1b")
        command.add_argument("--dtype", default="auto",
                             help="auto, float32, bfloat16, int8 or int4 (default: %(default)s)")
        command.add_argument("--activations", choices=("int8", "int12"),
                             help="how inputs of integer weights are rounded: int12 is the exacter, int8 reads prompts "
                                  "faster (default: int12 for int8 weights, else int8)")
        command.add_argument("--threads", type=int, metavar="N", help="default: the cores this process may use")
    _add_generate(commands["generate"])
    _add_chat(commands["chat"])
    _add_bench(commands["bench"])
    return parser, commands


def _add_generate(generate: _Parser) -> None:
    text = generate.add_mutually_exclusive_group()
    text.add_argument("text", nargs="?", metavar="TEXT", help="text to continue; without it, what is piped in")
    text.add_argument("--prompt", metavar="TEXT", help="the same; - reads all of stdin, also its last line end")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    _add_sampling(generate, None, "greedy; the embedded model: model")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--chat", action="store_true", help="the text is a user's message: use the chat template")
    generate.add_argument("--no-special-tokens", action="store_true", help="add none to the text")
    _add_parallel(generate)


def _add_parallel(generate: _Parser) -> None:
    ranks = generate.add_argument_group("several processes, as in: mpiexec -n 4 forge-c generate --parallel ...")
    ranks.add_argument("--parallel", action="store_true", help="share prompt and cache; needs mpi4py: forge_c[mpi]")
    ranks.add_argument("--layout", choices=("zigzag", "striped", "contiguous"), help="of the prompt's tokens over "
                                                                                     "processes (default: zigzag)")
    ranks.add_argument("--tensor", type=int, metavar="T", help="processes that share each layer's weights (default: 1)")
    ranks.add_argument("--timeout", type=float, metavar="S", help="seconds to wait for another (default: 60)")


def _add_chat(chat: _Parser) -> None:
    chat.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: until it ends)")
    chat.add_argument("--context", type=int, metavar="N", help="tokens of the conversation (default: the model's "
                                                               "context, at most 4096)")
    _add_sampling(chat, "model", "model")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 0 on; without it, runs differ")
    return int(text)


def _add_sampling(command: _Parser, default: str | None, shown: str) -> None:
    command.add_argument("--sampling", choices=("model", "greedy"), default=default,
                         help="what holds of the options below that are not given: the settings of the model's makers, "
                              f"or the best token (default: {shown})")
    command.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--min-p", type=float, metavar="P")
    command.add_argument("--repetition-penalty", type=float, metavar="R")
    command.add_argument("--seed", type=_seed, metavar="N", help="the same texts each time (default: others)")
    command.add_argument("--cache-dtype", default="float32", help="float32, bfloat16 or int8 (default: %(default)s)")


def _add_bench(bench: _Parser) -> None:
    bench.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    bench.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="texts that decode at a time (default: 1)")
    bench.add_argument("--repeats", type=int, default=5, metavar="R", help="default: %(default)s")
    bench.add_argument("--json", action="store_true", help="one JSON object a test instead of a table")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    name = "forge-c"
    if sys.stdout is None:  # closed by whoever started it
        print("forge-c: standard output is closed", file=sys.stderr)
        return 2
    try:
        try:
            parser, commands = _parser()
            args, unknown = parser.parse_known_args(argv)
            if unknown:
                commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
            name = f"forge-c {args.command}"
            warnings.showwarning = partial(_warn, name)
            return {"generate": _generate, "chat": _chat, "info": _info, "bench": _bench}[args.command](args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 0
    except _USER_ERRORS as error:
        print(_line(name, str(error) or type(error).__name__), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return 2
    except KeyboardInterrupt:
        return 130


def _line(name: str, message: str) -> str:
    """One line of what went wrong; the command's name stands in it once, and no method's that it calls."""
    return f"{name}: {' '.join(message.split()).removeprefix(f'{name.split()[-1]}: ').removeprefix('generate: ')}"


def _warn(name: str, message: Warning | str, *_: object, **__: object) -> None:
    print(_line(name, str(message)), file=sys.stderr)


def _drop_output() -> None:
    """Nobody takes what is left; without this Python would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_threads(args: argparse.Namespace) -> None:
    from forge_c import set_num_threads
    from forge_c.threads import default_threads

    if args.threads is not None:
        set_num_threads(args.threads)
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if args.threads > cpus:
            warnings.warn(f"--threads is {args.threads}, and this process may use {cpus} CPUs: that is slower than "
                          f"{default_threads()[0]}", stacklevel=1)


def _load(args: argparse.Namespace) -> Model:
    from forge_c.models import load, random_model

    _set_threads(args)
    shape = getattr(args, "shape", None)
    options = {"dtype": args.dtype, "activations": args.activations}
    return load(args.model, **options) if shape is None else random_model(shape, **options)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of generate that decide how tokens are drawn. ValueError if they cannot be."""
    from forge_c.models.sampling import Sampler

    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    Sampler(**given)
    chosen = args.sampling or ("model" if args.model is None else "greedy")
    return given | {"sampling": "model" if chosen == "model" else None}


def _generate(args: argparse.Namespace) -> int:
    given = [name for name in _RANKS if getattr(args, name) is not None]
    if args.parallel:
        return _generate_on_ranks(args, {name: getattr(args, name) for name in given})
    if given:
        raise ValueError(f"--{given[0]} is given without --parallel")
    sampling = _sampling(args)
    model = _load(args)
    return _write(args, model, _text(args), sampling, sys.stdout, sys.stderr)


def _generate_on_ranks(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """On every process; the first one tells of errors, its own and those of others."""
    from forge_c.distributed import MPIComm, RankError, parallel
    from forge_c.distributed.command import from_first, on_all, spoken, threads_a_rank

    comm = MPIComm(timeout=options.get("timeout", 60.0))
    if comm.rank:
        warnings.simplefilter("ignore")
    try:
        with comm, spoken(comm, sys.stdout) as out, spoken(comm, sys.stderr) as notes:
            args.threads = args.threads or threads_a_rank(comm)
            sampling = on_all(comm, lambda: _sampling(args))
            if options.get("tensor", 1) == 1:
                model = parallel(on_all(comm, lambda: _load(args)), comm, **options)
            else:  # which reads no more than this rank's share
                on_all(comm, lambda: _set_threads(args))
                model = parallel(args.model, comm, dtype=args.dtype, activations=args.activations, **options)
            return _write(args, model, from_first(comm, lambda: _text(args)), sampling, out, notes)
    except (RankError, *_USER_ERRORS) as error:
        if comm.rank:
            return 2
        raise ValueError(str(error) or type(error).__name__) from error


def _write(args: argparse.Namespace, model: Model, text: str, sampling: dict[str, Any], out: TextIO,
           notes: TextIO) -> int:
    """What goes on from the text, to `out`, and to notes how fast that went."""
    if args.chat and getattr(model.tokenizer, "chat_template", None) is None:
        raise ValueError("--chat: the model has no chat template")
    prompt = {"messages": [{"role": "user", "content": text}]} if args.chat else {"prompt": text}
    stream = model.generate(**prompt, max_new_tokens=args.max_new_tokens, seed=args.seed, stop=args.stop, stream=True,
                            cache_dtype=args.cache_dtype, special_tokens=not args.no_special_tokens, **sampling)
    out.write("" if args.chat else text)
    try:
        with _reading(stream):
            for piece in stream:
                out.write(piece)
                out.flush()
    finally:
        out.write("\n")
        out.flush()
        _print_speed(stream.run, notes)
    return 0


def _chat(args: argparse.Namespace) -> int:
    options = _sampling(args) | {"max_new_tokens": args.max_new_tokens, "seed": args.seed,
                                 "cache_dtype": args.cache_dtype}
    return run(Conversation(_load(args), args.system, args.context, options), _reading)


@contextmanager
def _reading(stream: Stream) -> Iterator[None]:
    """A progress bar on a terminal for a prompt that takes over two seconds to read, gone when it is read."""
    from tqdm import tqdm

    with tqdm(desc="reading", unit="token", disable=None, delay=2.0, leave=False) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        stream.run.progress = progress
        yield


def _text(args: argparse.Namespace) -> str:
    """What is to be continued: an argument, or what is piped in, without its last line end, as a shell's $(...)."""
    if args.prompt == "-":
        return _stdin()
    if args.prompt is not None or args.text is not None:
        return str(args.text if args.prompt is None else args.prompt)
    piped = _stdin().removesuffix("\n") if _is_piped() else ""
    if not piped and args.model is not None:
        raise ValueError("no text: give it as an argument, or pipe it in")
    return piped or "def "


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file; a terminal, /dev/null or nothing is neither."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _stdin() -> str:
    """All of it."""
    with utf8_stdin() as file:
        return file.read()


def _print_speed(run: Generation, notes: TextIO) -> None:
    def rate(count: int, seconds: float) -> str:
        return f"{count / seconds:.1f} tokens/s" if seconds > 0 else "-"

    print(f"\nprompt {run.prompt_tokens} tokens, {rate(run.prompt_tokens, run.prompt_seconds)}; "
          f"decode {run.new_tokens} tokens, {rate(run.new_tokens, run.decode_seconds)}", file=notes)


def _info(args: argparse.Namespace) -> int:
    from forge_c.models.about import lines
    from forge_c.runtime import show_config

    model = _load(args)
    show_config()
    print(f"{'model':16} {args.model or 'embedded'}")
    for line in lines(model):
        print(line)
    return 0


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

"""The command line: what it prints, where, with which exit status, and how it ends when someone stops it."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_models
import numpy as np
import pytest
import tokenizers
from gguf_models import write_gguf
from model_folder import BYTES, following, small, tensors, write, write_chain, write_json
from pace import check_pace, processor_time_of, processor_time_of_children, slowness
from test_gguf_models import BLOCKS, of_blocks

from forge_c.cli import main
from forge_c.models import load, random_model
from forge_c.models.speed import json_lines

pytestmark = pytest.mark.usefixtures("two_threads")

SPEED = r"\nprompt {} tokens, (\d+\.\d tokens/s|-); decode {} tokens, (\d+\.\d tokens/s|-)\n"
# Buffered, as in a user's shell: a broken pipe may then show up as late as at the end of the process.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
COMMAND = [sys.executable, "-m", "forge_c.cli"]


def run(*arguments: Any, stdin: str | bytes | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=data, capture_output=True, timeout=120,
                          env=ENVIRONMENT | changes, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_closed_standard_output_is_one_line():
    for command in ("generate", "chat", "info"):
        done = subprocess.run(f"exec {sys.executable} -m forge_c.cli {command} >&-", shell=True, capture_output=True,
                              timeout=120, env=ENVIRONMENT, check=False, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr.decode()) == (2, "forge-c: standard output is closed\n")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Path:
    """After "H" it says "é, world!" and ends."""
    return write_chain(tmp_path_factory.mktemp("chain"), following([72, *"é, world!".encode(), 0]), eos=0)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    return write_chain(tmp_path_factory.mktemp("endless"), {97: 98, 98: 97})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("plain"), small(vocab_size=256, num_hidden_layers=1), tokenizer=BYTES)


def called(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command in this process."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


# ---- help ------------------------------------------------------------------------------------------

def test_help_answers_at_once():
    """200 ms of processor time."""
    def help_() -> None:
        done = run("--help")
        assert done.returncode == 0 and done.stderr == "" and "generate | chat | info | bench" in done.stdout

    check_pace(help_, 0.2, clock=processor_time_of_children)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["bench", "--bogus"], []])
def test_numpy_is_not_imported_before_there_is_work(arguments):
    code = (f"import sys, forge_c.cli\ntry: forge_c.cli.main({arguments})\nexcept SystemExit: pass\n"
            "print('numpy' in sys.modules, 'forge_c.functional' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(("command", "options"), [
    ("generate", "--model --dtype --activations --threads --prompt --max-new-tokens --temperature --top-k --top-p "
                 "--min-p --repetition-penalty --seed --stop --chat --sampling --cache-dtype --no-special-tokens"),
    ("chat", "--model --dtype --activations --threads --system --max-new-tokens --context --sampling "
             "--temperature --top-k --top-p --min-p --repetition-penalty --seed --cache-dtype"),
    ("info", "--model --dtype --activations --threads"),
    ("bench", "--model --shape --dtype --activations --threads --prompt-tokens --new-tokens --batch --repeats --json"),
])
def test_help_lists_every_option(capsys, command, options):
    status, out, _ = called(capsys, command, "--help")
    assert status == 0 and set(options.split()) <= set(re.findall(r"--[a-z-]+", out))


# ---- generate --------------------------------------------------------------------------------------

def test_the_embedded_model_draws_as_its_makers_say_unless_told(capsys):
    """Another folder is greedy by default: the same text each time."""
    options = ("generate", "def ", "--max-new-tokens", 40, "--seed", 3)
    default, said, greedy = (called(capsys, *options, *more)[1]
                             for more in ((), ("--sampling", "model"), ("--sampling", "greedy")))
    assert default == said != greedy


def test_the_embedded_model_by_default():
    done = run("generate", "--prompt", "def add(a, b):", "--max-new-tokens", 12)
    assert done.returncode == 0 and done.stdout.startswith("def add(a, b):") and done.stdout.endswith("\n")
    assert len(done.stdout) > len("def add(a, b):\n")
    assert re.fullmatch(SPEED.format(15, r"\d+"), done.stderr)


def test_generate_prints_the_prompt_and_what_follows(capsys, speaker):
    status, out, err = called(capsys, "generate", "--model", speaker, "--prompt", "H")
    assert (status, out) == (0, "Hé, world!\n")
    assert re.fullmatch(SPEED.format(2, 11), err)


@pytest.mark.parametrize(("options", "text"), [
    (["--max-new-tokens", "3"], "Hé,"), (["--stop", "wor"], "Hé, "), (["--stop", "ld", "--stop", ","], "Hé"),
    (["--max-new-tokens", "0"], "H"), (["--dtype", "bfloat16"], "Hé, world!"), (["--threads", "1"], "Hé, world!"),
    (["--temperature", "0.01", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.1", "--seed", "1"], "Hé, world!"),
])
def test_options(capsys, each_thread_count, speaker, options, text):
    status, out, _ = called(capsys, "generate", "--model", speaker, "--prompt", "H", *options)
    assert (status, out) == (0, text + "\n")


def test_a_seed_repeats_itself(capsys, plain):
    def text(seed: int) -> str:
        return called(capsys, "generate", "--model", plain, "--prompt", "x", "--max-new-tokens", 30, "--temperature", 2,
                      "--seed", seed)[1]

    assert text(1) == text(1) and len({text(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize(("stdin", "expected"), [("H", "Hé, world!\n"), ("so, é, w", "so, é, world!\n")])
def test_the_prompt_may_come_from_stdin(speaker, stdin, expected):
    done = run("generate", "--model", speaker, "--prompt", "-", stdin=stdin)
    assert (done.returncode, done.stdout) == (0, expected)


def test_a_chat(capsys, tmp_path):
    """The template's text goes in, only the answer comes out."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(
        ["</s>", "<user>", "hi", "<bot>", "hello", "there"])}, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    write_chain(tmp_path, following([3, 4, 5, 0]), vocab=16, eos=0, tokenizer={
        "chat_template": "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<bot>"})
    backend.save(str(tmp_path / "tokenizer.json"))
    status, out, err = called(capsys, "generate", "--model", tmp_path, "--prompt", "hi", "--chat")
    assert (status, out) == (0, "hello there\n")
    assert re.fullmatch(SPEED.format(3, 3), err)


@pytest.mark.parametrize("arguments", [["H"], ["--prompt", "H"], ["--max-new-tokens", "50", "H"]])
def test_the_text_is_an_argument(capsys, speaker, arguments):
    assert called(capsys, "generate", "--model", speaker, *arguments)[:2] == (0, "Hé, world!\n")


@pytest.mark.parametrize("stdin", ["so, é, w", "so, é, w\n"])
def test_the_text_may_be_piped_in(speaker, stdin, tmp_path):
    """Without its last line end, which echo adds. A file is as good as a pipe."""
    assert run("generate", "--model", speaker, stdin=stdin).stdout == "so, é, world!\n"
    (tmp_path / "text").write_text(stdin)
    with open(tmp_path / "text") as file:
        done = subprocess.run([*COMMAND, "generate", "--model", speaker], stdin=file, capture_output=True, check=True)
    assert done.stdout.decode() == "so, é, world!\n"


def test_no_text_at_all(speaker):
    for stdin in (b"", None):
        done = subprocess.run([*COMMAND, "generate", "--model", speaker], capture_output=True, check=False,
                              **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}))
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr == b"forge-c generate: no text: give it as an argument, or pipe it in\n"
    done = subprocess.run([*COMMAND, "generate", "--max-new-tokens", "3"], stdin=subprocess.DEVNULL, check=True,
                          capture_output=True)
    assert done.stdout.startswith(b"def ")


def test_special_tokens_may_be_left_out(capsys, speaker):
    _, _, err = called(capsys, "generate", "--model", speaker, "H", "--no-special-tokens")
    assert re.fullmatch(SPEED.format(1, 11), err)


def test_the_models_own_sampling(capsys, tmp_path):
    write(tmp_path, small(vocab_size=256), tokenizer=BYTES)
    write_json(tmp_path / "generation_config.json", {"do_sample": True, "temperature": 1.5, "top_k": 9})

    def text(*options: Any) -> str:
        return called(capsys, "generate", "--model", tmp_path, "x", "--seed", 3, "--max-new-tokens", 20, *options)[1]

    assert text("--sampling", "model") == text("--temperature", 1.5, "--top-k", 9) != text()
    assert text("--sampling", "model", "--temperature", 0) == text() == text("--sampling", "greedy")


@pytest.mark.parametrize("command", [COMMAND, [sys.executable, "-m", "forge_c"]])
def test_the_version(command):
    import forge_c

    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"forge-c {forge_c.__version__}\n", "")


def test_more_threads_than_the_machine_has_are_a_warning(capsys, each_thread_count, speaker):
    status, out, err = called(capsys, "generate", "--model", speaker, "H", "--threads", 200)
    assert (status, out) == (0, "Hé, world!\n")
    assert re.match(r"forge-c generate: --threads is 200, and this process may use \d+ CPUs: that is slower", err)


def test_a_warning_begins_as_an_error_does(capsys, tmp_path):
    write(tmp_path, small(vocab_size=256, max_position_embeddings=8), tokenizer=BYTES)
    status, _, err = called(capsys, "generate", "--model", tmp_path, "H", "--max-new-tokens", 20)
    assert status == 0 and err.startswith("forge-c generate: 22 tokens exceed the 8 that the model was made for\n")


# ---- info and bench --------------------------------------------------------------------------------

def test_info(capsys, plain):
    status, out, err = called(capsys, "info", "--model", plain, "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    found = dict(line.split(None, 1) for line in out.splitlines() if " " in line)
    import forge_c
    assert found["version"] == forge_c.__version__ and found["isa"] == forge_c.isa()
    assert found["threads"] == str(forge_c.get_num_threads()) and found["model"] == str(plain)
    assert (found["dtype"], found["model_type"], found["vocab_size"]) == ("bfloat16", "llama", "256")
    assert int(found["bytes"]) > 2 * 256 * 32
    norms = 3 * 32
    assert found["parameters"] == f"{(2 * 256 * 32 + 64 * 32 + 32 * 32 + 3 * 32 * 40 + norms) / 1e6:.2f} M"
    assert found["weights"] == f"bfloat16 {(int(found['bytes']) - 4 * norms) / 2**20:.2f} MiB, float32 0.00 MiB"
    assert (found["context"], found["tokenizer"]) == ("1024 tokens", "bytes")
    assert re.search(r"^chat template    none$", out, re.M) and re.search(r"^ends at          no token$", out, re.M)
    assert found["sampling"] == "the best token" and found["eos_token_ids"] == "none"
    assert re.search(r"^layers 0 +LayerSpec\(mixer=Attention\(.*window=None", out, re.M)


def test_info_names_the_layers_of_each_kind(capsys, tmp_path):
    """Every second layer of this family has a window."""
    status, out, _ = called(capsys, "info", "--model", golden_models.golden("gemma2").write(tmp_path / "m"))
    assert status == 0
    lines = [re.match(r"layers (\S+) .*window=(\w+)", line) for line in out.splitlines() if line.startswith("layers")]
    assert [line.groups() for line in lines if line] == [("0,2", "6"), ("1", "None")]


def test_info_about_a_tokenizer_and_a_saved_model(capsys, tmp_path):
    write(tmp_path / "m", small(eos_token_id=[3, 1]), tokenizer={"bos_token": "<s>", "chat_template": [
        {"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]})
    write_json(tmp_path / "m" / "generation_config.json", {"do_sample": True, "top_p": 0.9, "eos_token_id": [3, 1]})
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "m" / "tokenizer.json"))
    load(tmp_path / "m", "int8").save(tmp_path / "s")
    for folder, dtype in (("m", "int8"), ("s", "auto")):
        status, out, _ = called(capsys, "info", "--model", tmp_path / folder, "--dtype", dtype)
        found = dict(line.split(None, 1) for line in out.splitlines() if " " in line)
        assert status == 0 and found["tokenizer"] == "WordLevel, 3 tokens, 1 of them special"
        assert (found["sampling"], found["eos_token_ids"]) == ("temperature 1.0, top_p 0.9, top_k 50", "3, 1")
        assert re.search(r"^chat template    default, tool_use$", out, re.M)
        assert re.search(r"^ends at          1, 3$", out, re.M)
        assert re.match(r"int8 \d+\.\d\d MiB, bfloat16 0.01 MiB, float32 0.00 MiB", found["weights"])


@pytest.mark.parametrize("how", [["--model"], []])
def test_info_about_a_gguf_file(capsys, tmp_path, how):
    config = small()
    path = write_gguf(tmp_path / "m.gguf", config, tensors(config), more={
        "token_embd.weight": tensors(config)["model.embed_tokens.weight"].astype(np.float16)})
    status, out, err = called(capsys, "info", *how, path)
    assert (status, err) == (0, "") and re.search(rf"^model +{path}$", out, re.M)
    assert re.search(r"^stored as F16 +1 tensors, 6208 bytes, held as float32$", out, re.M)
    assert re.search(r"^stored as F32 +29 tensors, \d+ bytes, held as float32$", out, re.M)


def test_info_about_the_embedded_model(capsys):
    status, out, _ = called(capsys, "info")
    assert status == 0 and re.search(r"^model +embedded$", out, re.M) and re.search(r"^vocab_size +256$", out, re.M)


BENCH = ["--prompt-tokens", "24", "--new-tokens", "6", "--repeats", "2", "--threads", "1"]
HEAD = ["model", "size", "params", "isa", "threads", "test", "t/s", "of limit"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_bench(plain):
    done = run("bench", "--model", plain, *BENCH)
    assert (done.returncode, done.stderr) == (0, "")
    head, rule, prompt, decode = done.stdout.splitlines()
    assert cells(head) == HEAD and cells(rule) == ["---"] * 8
    params = 2 * 256 * 32 - 256 * 32 + 64 * 32 + 32 * 32 + 3 * 32 * 40
    for line, test in ((prompt, "pp24"), (decode, "tg6")):
        model, size, count, isa, threads, name, rate, share = cells(line)
        assert (model, count, name) == ("llama float32", f"{params / 1e6:.2f} M", test)
        assert re.fullmatch(r"\d+\.\d\d MiB", size) and isa and threads == "1"
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", rate) and float(rate.split()[0]) > 1
        assert re.fullmatch(r"\d+ %", share)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gbs", [1e-2, 1e-5])
@pytest.mark.parametrize(("dtype", "bf16"), [("float32", 9e-3), ("bfloat16", 0.0), ("bfloat16", 4e-3)])
def test_bench_against_its_limits(capsys, monkeypatch, each_thread_count, plain, dtype, bf16, gbs, batch):
    """So slow a machine that a share has digits; either the operations or the bytes are the floor of the time."""
    limits = {"fp32_gflops": 1e-3, "bf16_gflops": bf16, "read_gbs": gbs}
    monkeypatch.setattr("forge_c.models.speed.limits_now", lambda: limits)
    ticks = iter(np.arange(0, 1000, 0.25))
    monkeypatch.setattr("forge_c.models.speed.time.perf_counter", lambda: next(ticks))
    status, out, _ = called(capsys, "bench", "--model", plain, "--dtype", dtype, *BENCH, "--batch", batch)
    assert status == 0
    block, head = 64 * 32 + 32 * 32 + 3 * 32 * 40, 32 * 256
    itemsize, peak = (4, 1e-3) if dtype == "float32" else (2, bf16 or 1e-3)
    read = load(plain, dtype).nbytes - head * itemsize  # all but the embedding
    prompt = max(2 * (block * 24 + head) / peak, read / gbs) / 1e9 / 0.25
    decode = max(2 * (block + head) * 6 * batch / peak, 6 * read / gbs) / 1e9 / 0.25
    tests = ("pp24", 96, prompt), ("tg6" if batch == 1 else "tg6x3", 24 * batch, decode)
    for line, (name, rate, share) in zip(out.splitlines()[2:], tests, strict=True):
        assert cells(line)[5:] == [name, f"{rate:.2f} ± 0.00", f"{100 * share:.0f} %"]


def test_the_median_counts(capsys, monkeypatch, plain):
    """Runs of 1, 2 and 9 seconds."""
    monkeypatch.setattr("forge_c.models.speed.limits_now", lambda: {"fp32_gflops": 1e-3, "read_gbs": 1e-3})
    ticks = iter(2 * [0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr("forge_c.models.speed.time.perf_counter", lambda: next(ticks))
    status, out, _ = called(capsys, "bench", "--model", plain, *BENCH, "--repeats", 3)
    assert status == 0
    assert [cells(line)[6].split()[0] for line in out.splitlines()[2:]] == ["12.00", "3.00"]


@pytest.mark.slow
def test_bench_of_a_gguf_file_and_of_what_was_saved(capsys, each_thread_count, rng, tmp_path):
    """The format that most of its bytes are in is one of integers."""
    file, _ = of_blocks(tmp_path, rng, BLOCKS, {"other": "Q4_1"})
    load(file).save(tmp_path / "s")
    for path in (file, tmp_path / "s"):
        status, out, err = called(capsys, "bench", "--model", path, *BENCH)
        assert (status, err) == (0, "")
        assert [cells(line)[0] for line in out.splitlines()[2:]] == ["llama q4_1"] * 2


@pytest.mark.slow
def test_bench_of_a_shape_as_json(capsys, each_thread_count):
    status, out, err = called(capsys, "bench", "--shape", "llama-tiny", "--json", "--batch", 2, *BENCH)
    assert (status, err) == (0, "")
    prompt, decode = map(json.loads, out.splitlines())
    assert (prompt["test"], decode["test"]) == ("pp24", "tg6x2")
    params = 2 * (2 * 64 * (64 + 32) + 3 * 64 * 192) + 64 * 512
    for found in (prompt, decode):
        assert (found["model"], found["dtype"], found["params"], found["threads"]) == ("llama", "bfloat16", params, 1)
        assert len(found["tokens_per_second"]) == 2 and min(found["tokens_per_second"]) > 1
        assert 0 < found["of_limit"] and found["bytes"] - found["step_bytes"] == 2 * 64 * 512
        assert 2 * params < found["step_bytes"] < 2.1 * params and found["limits"]["read_gbs"] > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_bench_counts_what_went_through_routers(monkeypatch, two_threads, batch):
    """The floor of so slow a memory is the weights of the steps in which a token went through a layer."""
    limits = {"fp32_gflops": 1e9, "bf16_gflops": 1e9, "read_gbs": 1e-3}
    monkeypatch.setattr("forge_c.models.speed.limits_now", lambda: limits)
    ticks = iter(np.arange(0, 1000, 0.25))
    monkeypatch.setattr("forge_c.models.speed.time.perf_counter", lambda: next(ticks))
    model = random_model("llama-tiny-mod")
    prompt, decode = map(json.loads, json_lines(model, 24, 40, 1, batch))
    cache, most = model.new_cache(batch, 40), model._decoder.step_nbytes
    for step in np.random.default_rng(1).integers(0, 512, (40, batch, 1)):
        model(step, cache)
    layers = [sum(part.nbytes for part in layer[:2]) for layer in model._decoder._model.held]
    passes = [len({int(p) for row in cache.layers[i].positions for p in row}) for i in (1, 3)]
    read = most - sum(layers[i] * (1 - n / 40) for i, n in zip((1, 3), passes, strict=True))
    assert 0 < sum(passes) < 80 and decode["step_bytes"] == prompt["step_bytes"] == most
    assert abs(decode["read_bytes"] - read) <= 1 and prompt["read_bytes"] == most
    assert decode["of_limit"] == pytest.approx(40 * read / 1e-3 / 1e9 / 0.25)


# ---- mistakes --------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], str]] = [
    ([], "the following arguments are required"), (["talk"], "invalid choice: 'talk'"),
    (["generate", "--bogus"], "unrecognized arguments: --bogus"),
    (["generate", "--threads", "x"], "invalid int value: 'x'"),
    (["generate", "--max-new-tokens", "1.5"], "invalid int value: '1.5'"),
    (["generate", "--temperature", "hot"], "invalid float value: 'hot'"),
    (["generate", "--prompt"], "expected one argument"),
    (["generate", "--threads", "0"], "set_num_threads: n is 0"),
    (["info", "--threads", "-1"], "set_num_threads: n is -1"),
    (["generate", "--model", "/no/such/folder"], "load: /no/such/folder is not a folder"),
    (["info", "--model", "/no/such/folder"], "load: /no/such/folder is not a folder"),
    (["bench", "--model", "/no/such/folder"], "load: /no/such/folder is not a folder"),
    (["generate", "--model", "/no\nsuch\n\nfolder"], "load: /no such folder is not a folder"),
    (["generate", "--activations", "int12"], "load: activations is 'int12', expected None for bfloat16"),
    (["generate", "--dtype", "int3"], "load: dtype is 'int3', expected auto, float32, bfloat16, int8, int4, q"),
    (["generate", "--temperature", "-1"], "temperature is -1.0, expected a number >= 0"),
    (["generate", "--temperature", "nan"], "temperature is nan, expected a number >= 0"),
    (["generate", "--top-k", "0"], "top_k is 0, expected an integer >= 1"),
    (["generate", "--top-p", "1.5"], "top_p is 1.5, expected a number above 0 and at most 1"),
    (["generate", "--min-p", "-1"], "min_p is -1.0, expected a number from 0 to 1"),
    (["generate", "--repetition-penalty", "0"], "repetition_penalty is 0.0, expected a number > 0"),
    (["generate", "--max-new-tokens", "-4"], "max_new_tokens is -4, expected an integer >= 0"),
    (["generate", "--stop", ""], "stop is [''], expected texts that are not empty"),
    (["generate", "--seed", "-1", "--temperature", "1"], "argument --seed: '-1', expected a whole number from 0 on"),
    (["chat", "--seed", "-1"], "argument --seed: '-1', expected a whole number from 0 on; without it, runs differ"),
    (["chat", "--seed", "1.5"], "argument --seed: '1.5', expected a whole number from 0 on"),
    (["generate", "--chat"], "--chat: the model has no chat template"),
    (["bench", "--repeats", "0"], "--repeats is 0, expected at least 1"),
    (["bench", "--new-tokens", "0"], "--new-tokens is 0, expected at least 1"),
    (["bench", "--prompt-tokens", "-3"], "--prompt-tokens is -3, expected at least 1"),
    (["bench", "--batch", "0"], "--batch is 0, expected at least 1"),
    (["bench", "--shape", "llama-tiny", "--model", "x"], "argument --model: not allowed with argument --shape"),
    (["bench", "--shape", "llama"], "random_model: shape is 'llama', expected one of llama-1.1b, "),
    (["generate", "--shape", "llama-tiny"], "generate: unrecognized arguments: --shape (see forge-c generate --help)"),
    (["generate", "a", "--prompt", "b"], "argument --prompt: not allowed with argument TEXT"),
    (["generate", "--cache-dtype", "int4"], "cache_dtype is 'int4', expected one of float32, bfloat16, int8"),
    (["generate", "--sampling", "hot"], "invalid choice: 'hot'"),
    (["generate", "--model", "/no/such/folder", "x"], "load: /no/such/folder is not a folder"),
    (["chat"], "forge-c chat: the model has no chat template; forge-c generate continues a text"),
    (["chat", "--temperature", "-1"], "temperature is -1.0, expected a number >= 0"),
]


@pytest.mark.parametrize(("arguments", "reason"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, reason):
    status, out, err = called(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("forge-c") and err.endswith("\n") and err.count("\n") == 1 and reason in err


def damaged(folder: Path, case: str) -> None:
    if case == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif case == "family":
        write_json(folder / "config.json", small() | {"model_type": "rwkv"})
    elif case == "json":
        (folder / "config.json").write_text("{\n\n]")
    elif case == "tokenizer":
        (folder / "tokenizer_config.json").unlink()
    elif case == "nan":
        weights = tensors(small(vocab_size=256))
        weights["model.norm.weight"][0] = np.nan
        write(folder, small(vocab_size=256), weights, tokenizer=BYTES)
    else:
        (folder / case).unlink()


@pytest.mark.parametrize(("case", "reason"), [
    ("truncated", "model.safetensors"), ("family", "model_type is 'rwkv'"), ("json", "not valid JSON"),
    ("tokenizer", "a text prompt needs a tokenizer"), ("config.json", "has no config.json"),
    ("model.safetensors", "model.safetensors: no such file"),
])
def test_a_damaged_model_is_one_line_and_status_2(capsys, tmp_path, case, reason):
    damaged(write(tmp_path, small(vocab_size=256), tokenizer=BYTES), case)
    status, out, err = called(capsys, "generate", "--model", tmp_path, "--prompt", "x", "--max-new-tokens", 2)
    assert (status, out) == (2, "")
    assert err.startswith("forge-c generate: ") and err.count("\n") == 1 and reason in err


def test_nan_logits_end_with_one_line_after_the_text(capsys, tmp_path):
    damaged(tmp_path, "nan")
    status, _, err = called(capsys, "generate", "--model", tmp_path, "--prompt", "x")
    assert status == 2 and err.splitlines()[-1].endswith("the model's logits are NaN") and "Traceback" not in err


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_prompt_that_is_no_utf8(speaker, locale):
    done = run("generate", "--model", speaker, "--prompt", "-", stdin=b"caf\xe9!", LC_ALL=locale)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "forge-c generate: stdin has byte 0xe9 at 3, expected UTF-8\n"


@pytest.mark.parametrize(("arguments", "stdin", "changes"), [
    (["generate", "--prompt", "-"], b"\xff\xfe", {"PYTHONUTF8": "0", "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}),
    (["generate", "--model", "/no/such/folder"], None, {}), (["info"], None, {"FORGE_C_ISA": "mmx"}),
    (["generate", "--prompt", "é", "--max-new-tokens", "1"], None, {"PYTHONIOENCODING": "ascii"}),
], ids=["stdin", "folder", "isa", "encoding"])
def test_a_mistake_in_a_process_of_its_own(arguments, stdin, changes):
    done = run(*arguments, stdin=stdin, **changes)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert done.stderr.startswith("forge-c ") and done.stderr.count("\n") == 1


# ---- the end ---------------------------------------------------------------------------------------

def started(text: bytes, *arguments: Any) -> subprocess.Popen[bytes]:
    """The process, once it has written that text."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=ENVIRONMENT, bufsize=0)
    assert process.stdout is not None
    found = b""
    while len(found) < len(text):
        piece = process.stdout.read(len(text) - len(found))
        assert piece, "it ended too early"
        found += piece
    assert found == text and process.poll() is None
    return process


def ended(stdout: int, *arguments: str) -> tuple[int, bytes]:
    """(exit status, stderr) of a process that writes to this file descriptor, which is closed afterwards."""
    try:
        done = subprocess.run([*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, env=ENVIRONMENT,
                              timeout=60, check=False)
    finally:
        os.close(stdout)
    return done.returncode, done.stderr


@pytest.mark.alone
def test_an_interrupt_ends_quietly_with_130(endless):
    """The text so far is out, its line is ended, the speed is told."""
    process = started(b"abababab", "generate", "--model", endless, "--prompt", "a", "--max-new-tokens", 900_000)
    before = processor_time_of(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = b"", b""

    def end() -> None:
        nonlocal out, err
        out, err = process.communicate(timeout=60)

    assert processor_time_of_children(end) - before < 1.0 * slowness()
    assert process.returncode == 130
    assert re.fullmatch(rb"[ab]*\n", out)
    assert re.fullmatch(SPEED.format(2, r"\d+"), err.decode())


def test_a_reader_that_leaves_ends_it_quietly(endless):
    process = started(b"abab", "generate", "--model", endless, "--prompt", "a", "--max-new-tokens", 900_000)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["generate", "--help"],
                                       ["generate", "--prompt", "a", "--max-new-tokens", "2"]], ids=" ".join)
def test_a_reader_that_was_never_there_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    assert ended(writer, *arguments) == (0, b"")


def test_a_full_disk_is_a_mistake():
    status, err = ended(os.open("/dev/full", os.O_WRONLY), "generate", "--prompt", "a", "--max-new-tokens", "2")
    assert status == 2
    assert err.startswith(b"forge-c generate: ") and err.count(b"\n") == 1 and b"No space left on device" in err

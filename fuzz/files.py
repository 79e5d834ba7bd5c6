"""Mutated model folders, GGUF files, saved models and cache files: ValueError or OSError, at once, in little memory.

What still loads is also used: logits, generation, text both ways, a chat. The process may take 4 GB.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from model_folder import FAMILIES, STATE_SPACE, small, write
from tokenizers import decoders, pre_tokenizers, processors, trainers

import forge_c as fc
from fuzz import doing, gguf_model

SECONDS = 5.0  # of CPU time; as much of waiting is a hang
ALLOWED = (ValueError, OSError)
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 16, 1.5, 1e-300, 1e308, -1e308, 2**31, 2**32 + 1, 2**53 + 1, 2**63, 2**64,
    10**400, float("nan"), float("inf"), "", "x", "llama", "\ud800", "\0", "a" * 5000, [], {}, [1], [[]], {"a": 1},
    [None], [0.0] * 8, [1e308] * 8, "F64", "I8", "linear", "dynamic", "yarn", "longrope", "llama3", "su")
TEMPLATES = (
    "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "{% for %}", "{{ x.y.z }}",
    "{{ ''.__class__.__mro__ }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ raise_exception('no') }}",
    "{{ messages | tojson }}", "{{ 'a' * 3000000000 }}", "{{ '%2000000000d' % 1 }}", "{{ 9 ** 9 ** 9 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(10)|slice(100000000)|list }}", "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}", "{{ [0] * 400000000 }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}")

Rng = np.random.Generator
Files = dict[str, bytes]


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


# ---- time -------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """Raised by the alarm; no handler of the library's takes it for one of its errors."""


def timed(call: Callable[[], Any]) -> Any:
    """What call gives, or TooLong: 5 seconds of this process's time, or of waiting for something."""
    start, began = time.process_time(), time.monotonic()

    def handler(signum: int, frame: Any) -> None:
        used, passed = time.process_time() - start, time.monotonic() - began
        if used > SECONDS or passed > 8 + 10 * used:
            raise TooLong(f"{used:.0f} s of CPU time after {passed:.0f} s")
        signal.setitimer(signal.ITIMER_REAL, 1.0)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        result = call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    used = time.process_time() - start
    if used > SECONDS:
        raise TooLong(f"{used:.1f} s of CPU time")
    return result


def allowed(what: str, call: Callable[[], Any], *more: type[BaseException]) -> Any:
    """What call gives, None if it was refused as documented; anything else fails."""
    doing(what)
    try:
        return timed(call)
    except (*ALLOWED, *more):
        return None
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:200]}") from error


# ---- model folders ----------------------------------------------------------------------------------


def case(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fc.set_num_threads(1)
    folder = Path(os.environ["FUZZ_SCRATCH"]) / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    done: list[str] = []
    try:
        kind = rng.random()
        if kind < 0.2:
            mutated_cache(rng, folder, done)
        elif kind < 0.45:
            mutated_gguf(rng, folder, done)
        elif kind < 0.6:
            mutated_saved(rng, folder, done)
        else:
            mutated_model(rng, folder, done)
    except BaseException as error:
        error.add_note(", ".join(done))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def trained_tokenizer() -> bytes:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["the cat sat on the mat"] * 20, trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend.to_str().encode()


def tokenizer_files(rng: Rng) -> Files:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
                "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
                "extra_special_tokens": ["<e>"], "split_special_tokens": False}
    if rng.random() < 0.5:
        settings["added_tokens_decoder"] = {"270": {"content": "<think>", "special": False, "lstrip": False}}
    return {"tokenizer.json": trained_tokenizer(), "tokenizer_config.json": json.dumps(settings).encode(),
            "special_tokens_map.json": b'{"eos_token": {"content": "</s>"}, "unk_token": "<u>"}',
            "added_tokens.json": b'{"<x>": 270}', "generation_config.json": b'{"eos_token_id": [1]}'}


@cache
def base_folder(family: str, shards: int) -> Files:
    folder = Path(os.environ["FUZZ_SCRATCH"]) / f"{family}{shards}"
    layers = {} if family in STATE_SPACE else {"num_hidden_layers": 2}
    write(folder, small(family, vocab_size=300, **layers), shards=shards)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutated_model(rng: Rng, folder: Path, done: list[str]) -> None:
    family = pick(rng, (*FAMILIES, *STATE_SPACE))
    files = base_folder(family, pick(rng, (1, 1, 2))) | tokenizer_files(rng)
    done.append(family)
    for _ in range(int(rng.integers(1, 4))):
        name = pick(rng, ("config.json",) * 4 + ("tokenizer.json",) * 2 + tuple(files))
        if name in files:
            change_file(rng, files, name, done)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if rng.random() < 0.1:
        special_file(rng, folder / pick(rng, tuple(files) + ("chat_template.jinja",)), done)
    model = allowed("load", lambda: fc.models.load(folder, pick(rng, ("auto", "float32", "int8", "int4"))))
    if model is not None:
        use(rng, model)


def mutated_gguf(rng: Rng, folder: Path, done: list[str]) -> None:
    family = pick(rng, gguf_model.FAMILIES)
    done.append(f"{family} as GGUF")
    path = folder / pick(rng, ("model.gguf", "blob", "m-00001-of-00002.gguf"))
    path.write_bytes(gguf_model.written(rng, family, changed_bytes, done))
    if rng.random() < 0.05:
        special_file(rng, path, done)
    model = allowed("load", lambda: fc.models.load(path, pick(rng, ("auto", "auto", "float32", "int8"))))
    if model is not None:
        use(rng, model)


@cache
def base_saved(family: str, dtype: str) -> Files:
    """What Model.save writes."""
    folder = Path(os.environ["FUZZ_SCRATCH"]) / "saved"
    fc.models.load(write(folder / "m", small(family)), dtype).save(folder / "s")
    found = {path.name: path.read_bytes() for path in (folder / "s").iterdir()}
    shutil.rmtree(folder)
    return found


def mutated_saved(rng: Rng, folder: Path, done: list[str]) -> None:
    family, dtype = pick(rng, (*FAMILIES, *STATE_SPACE)), pick(rng, ("float32", "bfloat16", "int8", "int4"))
    done.append(f"{family} in {dtype}, saved")
    files = dict(base_saved(family, dtype))
    for _ in range(int(rng.integers(1, 4))):
        change_file(rng, files, "weights.bin" if rng.random() < 0.2 else "forge_c.json", done)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if rng.random() < 0.05:
        special_file(rng, folder / pick(rng, tuple(files)), done)
    model = allowed("load", lambda: fc.models.load(folder))
    if model is not None:
        use(rng, model)


def use(rng: Rng, model: Any) -> None:
    ids = rng.integers(0, model.config.vocab_size, (1, 12))
    allowed("model", lambda: model(ids))
    allowed("generate", lambda: model.generate(ids[0], 3), FloatingPointError)
    if model.tokenizer is None:
        return
    found = allowed("encode", lambda: model.tokenizer.encode("the cat sat, the tokenizer"))
    allowed("encode", lambda: model.tokenizer.encode("the cat</s> <think>", control_tokens=False))
    allowed("decode", lambda: model.tokenizer.decode(found or [1, 2, 3]))
    if hasattr(model.tokenizer, "apply_chat_template"):
        messages = [{"role": "user", "content": "hi"}]
        allowed("apply_chat_template", lambda: model.tokenizer.apply_chat_template(messages))
        allowed("encode_chat", lambda: model.tokenizer.encode_chat(messages, control_tokens=False))


def change_file(rng: Rng, files: Files, name: str, done: list[str]) -> None:
    content = files[name]
    if rng.random() < 0.25:
        files[name] = changed_bytes(rng, content)
        done.append(f"bytes of {name}")
    elif name.endswith(".json"):
        files[name] = changed_json(rng, content, done, name)
    elif name.endswith(".safetensors"):
        files[name] = changed_header(rng, content, done)


def changed_bytes(rng: Rng, content: bytes) -> bytes:
    """Cut, stretched, with noise in it, or in the first few hundred bytes of it."""
    data, reach = bytearray(content), len(content) if rng.random() < 0.5 else min(len(content), 300)
    at = int(rng.integers(0, reach + 1))
    how = pick(rng, ("cut", "cut", "flip", "noise", "insert", "repeat", "empty"))
    if how == "cut":
        return content[:at]
    if how == "flip" and data:
        for i in rng.integers(0, max(reach, 1), int(rng.integers(1, 6))):
            data[i] ^= 1 << int(rng.integers(8))
    elif how == "noise":
        data[at : at + 16] = rng.bytes(16)
    elif how == "insert":
        data[at:at] = pick(rng, (b"[" * 10000, b"{", b"]", b"\0", b'"', b"\xff\xfe", b"1e999999", b"9" * 10000, b",,"))
    elif how == "repeat":
        data[at:at] = data[max(at - 200, 0) : at]
    return b"" if how == "empty" else bytes(data)


def changed_json(rng: Rng, content: bytes, done: list[str], name: str) -> bytes:
    """One node of the document dropped, replaced, or put where it does not belong."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return changed_bytes(rng, content)
    if name == "config.json" and isinstance(document, dict) and rng.random() < 0.3:
        document["rope_scaling"] = random_rope(rng)
        done.append(f"rope_scaling {json.dumps(document['rope_scaling'])[:120]}")
    elif name == "tokenizer_config.json" and isinstance(document, dict) and rng.random() < 0.4:
        document["chat_template"] = pick(rng, TEMPLATES)
        done.append(f"template {document['chat_template'][:60]}")
    else:
        document = changed_node(rng, document, done, name)
    return json.dumps(document).encode(errors="surrogatepass")


def changed_node(rng: Rng, document: Any, done: list[str], name: str) -> Any:
    document = copy.deepcopy(document)
    node, key = document, None
    path = []
    parent: Any = None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.7):
        key = pick(rng, list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        path.append(str(key)[:30])
        parent, node = node, node[key]
    if parent is None:
        return pick(rng, HOSTILE)
    how, value = pick(rng, ("drop", "set", "set", "set", "add")), pick(rng, HOSTILE)
    done.append(f"{how} {'/'.join(path)} of {name} {repr(value)[:40]}")
    if how == "drop":
        del parent[key]
    elif how == "set":
        parent[key] = value
    elif isinstance(parent, dict):
        keys = ("x", "head_dim", "rope_theta", "sliding_window", "quantization_config", "factor", "")
        parent[pick(rng, keys)] = value
    else:
        parent.append(value)
    return document


def random_rope(rng: Rng) -> Any:
    keys = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "short_factor",
            "long_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "rope_theta",
            "partial_rotary_factor", "truncate")
    kinds = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "default", "x")
    found = {"rope_type": pick(rng, kinds)}
    for key in keys:
        if rng.random() < 0.5:
            found[key] = pick(rng, (1.0, 2.0, 8.0, 32, [1.0] * 4, [1.0] * 6, *HOSTILE))
    return found if rng.random() < 0.95 else pick(rng, HOSTILE)


def changed_header(rng: Rng, content: bytes, done: list[str]) -> bytes:
    """A safetensors file whose header says something else about the same data."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return changed_bytes(rng, content)
    if not isinstance(header, dict) or not header:
        return changed_bytes(rng, content)
    if rng.random() < 0.02:
        header["__metadata__"] = {f"k{i}": "v" for i in range(pick(rng, (1000, 300_000, 1_000_000)))}
        done.append(f"{len(header['__metadata__'])} metadata")
    else:
        header = changed_node(rng, header, done, "header")
    text = json.dumps(header).encode(errors="surrogatepass")
    claimed = len(text) if rng.random() < 0.9 else pick(rng, (0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1, 100 << 20))
    return claimed.to_bytes(8, "little") + text + content[8 + length :]


def special_file(rng: Rng, path: Path, done: list[str]) -> None:
    """Something that is no ordinary file in the place of one."""
    how = pick(rng, ("fifo", "folder", "loop", "zero", "full", "missing", "sparse", "unreadable"))
    done.append(f"{how} {path.name}")
    path.unlink(missing_ok=True)
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how in ("loop", "zero", "full"):
        path.symlink_to({"loop": path.name, "zero": "/dev/zero", "full": "/dev/full"}[how])
    elif how == "sparse":
        with open(path, "wb") as file:
            file.truncate(3 << 30)
    elif how == "unreadable":
        path.write_bytes(b"{}")
        path.chmod(0)


# ---- cache files ------------------------------------------------------------------------------------


@cache
def base_cache(dtype: str, window: int | None) -> bytes:
    path = Path(os.environ["FUZZ_SCRATCH"]) / f"base-{dtype}-{window}.npy"
    kept = fc.KVCache(2, 600, 2, 16, v_dim=8, dtype=dtype, window=window)
    k = np.random.default_rng(0).standard_normal((2, 200, 2, 24), np.float32)
    for _ in range(2):
        kept.append(k[..., :16], k[..., 16:], lens=[200, 70])
    kept.save(path)
    return path.read_bytes()


def mutated_cache(rng: Rng, folder: Path, done: list[str]) -> None:
    content, path = base_cache(pick(rng, ("float32", "bfloat16", "int8")), pick(rng, (None, 40))), folder / "cache.npy"
    how = rng.random()
    if how < 0.4:
        content = changed_bytes(rng, content)
    elif how < 0.95:
        content = changed_cache_header(rng, content, done)
    path.write_bytes(content)
    if how >= 0.95:
        special_file(rng, path, done)
    mode = pick(rng, (None, "r", "r+"))
    done.append(f"cache file, mode {mode}")
    loaded = allowed("KVCache.load", lambda: fc.KVCache.load(path, mode))
    if loaded is None:
        return
    done.append(repr(loaded))
    if loaded.nbytes < 1 << 28 and loaded.batch * loaded.seq_len < 1 << 16:
        use_cache(loaded)


def use_cache(kept: Any) -> None:
    heads, batch = kept.n_kv_heads, kept.batch
    allowed("read", lambda: list(kept))
    allowed("attention", lambda: fc.attention(np.ones((batch, 1, heads, kept.head_dim), np.float32), kept))
    k, v = (np.ones((batch, 1, heads, d), np.float32) for d in (kept.head_dim, kept.v_dim))
    allowed("append", lambda: kept.append(k, v))
    allowed("truncate", lambda: kept.truncate(0))
    allowed("flush", kept.flush)
    allowed("copy", kept.copy)


def changed_cache_header(rng: Rng, content: bytes, done: list[str]) -> bytes:
    """The JSON in the first records with another number in it, or far too much of it."""
    start = content.index(b"{", content.index(b"\n"))
    stop = content.index(b"\0", start)
    header = json.loads(content[start:stop])
    if rng.random() < 0.03:
        text = b'{"format": "forge_c.KVCache", "version": 2, "a": [' + b"[]," * pick(rng, (1000, 10**6, 10**7)) + b"0]}"
        done.append(f"{len(text)} bytes of header")
        data = np.zeros((len(text) // 64 + 2, 64), np.uint8)
        data.reshape(-1)[: len(text)] = np.frombuffer(text, np.uint8)
        return npy(data)
    for _ in range(int(rng.integers(1, 3))):
        if isinstance(header, dict) and rng.random() < 0.5:
            key = pick(rng, ("n_kv_heads", "head_dim", "v_dim", "max_seq_len", "window"))
            header[key] = pick(rng, (0, 1, 3, 255, 256, 257, 2**20, 2**32, 2**40, 2**40 + 1, 2**63))
            done.append(f"{key} = {header[key]}")
        else:
            header = changed_node(rng, header, done, "header")
    text = json.dumps(header).encode(errors="surrogatepass")
    return content[:start] + text.ljust(stop - start, b"\0") + content[stop + max(len(text) - (stop - start), 0) :]


def npy(a: Any) -> bytes:
    path = Path(os.environ["FUZZ_SCRATCH"]) / "made.npy"
    np.save(path, a)
    return path.read_bytes()

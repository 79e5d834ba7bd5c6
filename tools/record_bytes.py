"""The bytes of today's results: a hash for every op, layer and golden model on fixed inputs, on each ISA of this CPU.

    python tools/record_bytes.py > before.txt     ... change ...     python tools/record_bytes.py | diff before.txt -

A line is: ISA, case, the first 16 digits of a SHA-256 over dtypes, shapes and bytes. What a change of structure must
leave alone, this shows. Inputs come from seeds; nothing is stored. On another CPU the lines of an ISA are the same.
"""
from __future__ import annotations

import hashlib
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import golden_models  # noqa: E402
from op_table import LAYERS, OPS  # noqa: E402

import forge_c as fc  # noqa: E402
from forge_c import nn  # noqa: E402
from forge_c.packing import FORMATS  # noqa: E402

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Case = tuple[str, Callable[[], Any]]


def digest(results: Any) -> str:
    found = hashlib.sha256()
    for a in results if isinstance(results, tuple | list) else (results,):
        array = np.ascontiguousarray(a)
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def drawn(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32).astype(dtype)


def ops() -> Iterator[Case]:
    """Every op of the suite's table: small and large, in each dtype."""
    for op in OPS.values():
        for name, dtype in DTYPES.items():
            for big in (False, True):
                rng = np.random.default_rng(zlib.crc32(op.name.encode()))
                if big and not op.splits:
                    continue
                arrays = op.make(rng, dtype, big=big)
                yield f"op {op.name} {name} {'large' if big else 'small'}", lambda op=op, a=arrays: op.run(a)


def products() -> Iterator[Case]:
    """Every weight format at row counts, K and N that end in the middle of tiles, groups and panels."""
    for fmt, group in [(f, None) for f in FORMATS] + [("int4", 32)]:
        for k, n in ((512, 272), (77, 35), (1030, 100)):
            w = fc.pack(drawn(f"w{k}{n}", (k, n)), fmt, group_size=group)
            for m in (1, 2, 3, 5, 7, 13, 49, 200):
                for name, dtype in DTYPES.items():
                    x, residual = drawn(f"x{m}{k}", (m, k), dtype), drawn(f"r{m}{n}", (m, n), dtype)
                    yield (f"linear {fmt}/{group} {k}x{n} rows {m} {name}",
                           lambda x=x, w=w, r=residual, n=n: fc.linear(x, w, drawn("b", (n,)), residual=r))


def attentions() -> Iterator[Case]:
    """Arrays and caches of each dtype, decoding and prompts, head ratios, windows, lengths, softcap, sinks."""
    for heads, kv_heads, dim in ((4, 4, 64), (8, 2, 128), (8, 1, 40)):
        for q_len, kv_len in ((1, 900), (3, 600), (70, 70), (300, 300)):
            for name, dtype in DTYPES.items():
                q = drawn("q", (2, q_len, heads, dim), dtype)
                k, v = drawn("k", (2, kv_len, kv_heads, dim), dtype), drawn("v", (2, kv_len, kv_heads, dim), dtype)
                title = f"attention {heads}/{kv_heads} {dim} {q_len}x{kv_len} {name}"
                yield title, lambda a=(q, k, v): fc.attention(*a, causal=True, return_lse=True)
                yield f"{title} window", lambda a=(q, k, v): fc.attention(*a, causal=True, window=50, softcap=20.0)
                lens = np.array([kv_len, kv_len // 2])
                yield f"{title} lens", lambda a=(q, k, v), n=lens: fc.attention(*a, kv_lens=n, return_lse=True)
                for cache in ("float32", "bfloat16", "int8"):
                    yield f"{title} cache {cache}", lambda a=(q, k, v), c=cache: cached(*a, c)


def cached(q: Any, k: Any, v: Any, dtype: str) -> Any:
    batch, tokens, heads, dim = k.shape
    cache = fc.KVCache(batch, tokens, heads, dim, dtype=dtype)
    cache.append(k, v, rope=fc.rope_table(dim, tokens))
    return *fc.attention(q, cache, causal=True, return_lse=True), *cache


def layers() -> Iterator[Case]:
    for name, layer in LAYERS.items():
        arrays = layer.make(np.random.default_rng(1))
        yield f"layer {name}", lambda layer=layer, a=arrays: layer.run(a)
    for fmt in FORMATS:
        for name, dtype in DTYPES.items():
            block = nn.ModernTransformerBlock(64, 4, 2, max_seq_len=64, seed=3).astype(fmt)
            x = drawn("x", (2, 9, 64), dtype)
            yield f"layer ModernTransformerBlock {fmt} {name}", lambda b=block, x=x: b(x)
            yield f"layer ModernTransformerBlock cached {fmt} {name}", lambda b=block, x=x: b(x, use_cache=True)[0]


def models() -> Iterator[Case]:
    """The golden models: logits whole, and the last ones token by token; in float32 and in the other formats."""
    for name in golden_models.names():
        case = golden_models.golden(name)
        with tempfile.TemporaryDirectory() as folder:
            case.write(Path(folder))
            for fmt in FORMATS:
                model = fc.models.load(folder, fmt)
                yield f"model {name} {fmt}", lambda m=model, c=case: logits(m, c.ids)
    embedded = fc.models.load()
    yield "model embedded", lambda: np.frombuffer(embedded.generate("import os\n", 64).encode(), np.uint8)
    drawing = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    yield "model embedded drawn", lambda: np.array(embedded.generate(["def f(", "class A"], 48, **drawing))


def logits(model: fc.models.Model, ids: Any) -> Any:
    cache = model.new_cache(len(ids), ids.shape[1] + 3)
    return model(ids), model(ids[:, :-2], cache)[:, -1], model(ids[:, -2:-1], cache), model(ids[:, -1:], cache)


def main() -> None:
    isas = sys.argv[1:] or fc.available_isas()
    for isa in isas:
        fc.use_isa(isa)
        for part in (ops, products, attentions, layers, models):
            for title, run in part():
                print(isa, title.replace(" ", "."), digest(run()), flush=True)


if __name__ == "__main__":
    main()

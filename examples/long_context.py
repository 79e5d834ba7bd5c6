"""A long text is read once: its cache is kept in a file, and each question about it goes on from there.

    python examples/long_context.py [MODEL [FILE]]
"""
from __future__ import annotations

import inspect
import sys
import tempfile
import time
from pathlib import Path

import forge_c as fc


def main() -> None:
    model = fc.models.load(sys.argv[1] if len(sys.argv) > 1 else None)
    text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else inspect.getsource(tempfile.TemporaryDirectory)[:900]
    cache = model.new_cache(dtype="int8")  # a quarter of the bytes
    begin = time.perf_counter()
    model.generate(text, 0, cache=cache)
    print(f"read {cache.seq_len} tokens in {time.perf_counter() - begin:.2f} s, {cache.nbytes >> 10} KiB")
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder, "text.npy"))
        for question in ("\n\n    def close(self", "\n\n    def __enter__(self"):
            begin = time.perf_counter()
            own = fc.models.ModelCache.load(Path(folder, "text.npy"), model)
            answer = model.generate(question, 40, cache=own)
            print(f"{question.strip()}{answer.splitlines()[0]}   [{time.perf_counter() - begin:.2f} s]")


if __name__ == "__main__":
    main()

"""Search by meaning, as far as the model has any: texts as vectors, and the nearest to a question.

    python examples/embeddings.py [MODEL [QUESTION]]
"""
from __future__ import annotations

import sys

import forge_c as fc

TEXTS = ["for key in sorted(table):\n    print(key)", "class Point:\n    def __init__(self, x, y):\n        self.x = x",
         "import socket\nserver = socket.socket()", "while n > 1:\n    n = n // 2\n    count += 1",
         "with open(path) as file:\n    text = file.read()", "class Queue(list):\n    pass"]


def main() -> None:
    model = fc.models.load(sys.argv[1] if len(sys.argv) > 1 else None)
    question = sys.argv[2] if len(sys.argv) > 2 else "class Stack:\n    def __init__(self):\n        self.items = []"
    vectors = model.embed([question, *TEXTS])  # (n, hidden), of length 1
    alike = vectors[1:] @ vectors[0]
    for i in alike.argsort()[::-1]:
        print(f"{alike[i]:.3f}  {TEXTS[i].splitlines()[0]}")


if __name__ == "__main__":
    main()

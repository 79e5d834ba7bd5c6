"""The golden models: configurations, ids and logits in tests/golden/, weights from a seed.

tools/make_golden.py wrote the logits with transformers and torch; both sides draw each tensor from a generator
that NumPy keeps frozen, so that no weight needs to be stored.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One model and what transformers computed: ids (batch, seq), logits (batch, seq, vocab) float32."""

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]

    def weights(self) -> dict[str, NDArray[np.float32]]:
        return {name: weight(name, shape) for name, shape in self.shapes.items()}

    def write(self, folder: Path, *, shards: int = 1) -> Path:
        """A Hugging Face folder of this model."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        tensors = self.weights()
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        files = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(sorted(tensors))}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return folder


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The tensor of that name: N(0, 1/in) for matrices, 1 + N(0, 0.1) for norms, N(0, 0.1) for biases; those of a
    state space so that each counts."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight") or name.endswith("layernorm.weight"):
        return (1 + 0.1 * drawn).astype(np.float32)
    if "embed_tokens" in name or "embeddings" in name:
        return (0.5 * drawn).astype(np.float32)
    if name.endswith(("norm_f.weight", ".D")):
        return (1 + 0.3 * drawn).astype(np.float32)
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return drawn.astype(np.float32)
    if name.endswith("A_log"):  # decays from within a token to hundreds of them
        return (1.5 * drawn - 1).astype(np.float32)
    if name.endswith("recurrent_param"):  # likewise
        return (2 * drawn - 3).astype(np.float32)
    if name.endswith(("gate_weight", "gate_bias")):
        return (drawn * shape[-1] ** -0.5).astype(np.float32)
    if name.endswith(("conv1d.weight", "conv.conv.weight", "conv_1d.weight")):
        return (drawn * shape[-1] ** -0.5).astype(np.float32)
    return (drawn * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)).astype(np.float32)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def golden(name: str) -> Golden:
    document = json.loads((FOLDER / f"{name}.json").read_text())
    arrays = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
    shapes = {n: tuple(s) for n, s in document["shapes"].items()}
    return Golden(name, document["config"], shapes, arrays["ids"], arrays["logits"])

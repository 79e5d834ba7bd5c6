"""What the inputs of a model's matrices are like for texts of one's own; load(..., importance=) takes it."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forge_c.checks import unmasked
from forge_c.files import read_json
from forge_c.formats.gguf import open_gguf
from forge_c.models.gguf_tokenizer import gguf_tokenizer
from forge_c.models.hub import find
from forge_c.models.inputs import Inputs
from forge_c.models.model import EMBEDDED
from forge_c.models.saved import is_saved
from forge_c.models.spec import ModelSpec, model_spec, tensor_names
from forge_c.models.spec.gguf import gguf_spec
from forge_c.models.tokenizer import Tokenizer
from forge_c.models.tokenizer_files import load_tokenizer
from forge_c.models.weights import Checkpoint, GGUFCheckpoint, Tensors

_PIECE = 512  # tokens that see each other


def collect_importance(path: str | os.PathLike[str] | None, texts: Iterable[str | ArrayLike], *,
                       products: bool = False) -> dict[str, NDArray[np.float32]]:
    """Read texts with a model's weights as its files have them, and say how large the inputs of each matrix are.

    Args:
        path: as in load, but no folder that Model.save wrote; the model's own tokenizer reads the texts.
        texts: some thousand tokens of what the model is for: texts, or ids (n,) each.
        products: the mean products of each two inputs instead of the mean squares of each: packing then lets errors
            make up for each other, which takes longer, and in_features^2 float32 a matrix.

    Returns:
        tensor name -> (in_features,) or (in_features, in_features) float32. q_proj stands for k_proj and v_proj too,
        gate_proj for up_proj. np.savez(file, **result) keeps it; load takes what np.load(file) gives.

    >>> found = collect_importance(None, ["import os\\n"])
    >>> found["model.layers.0.self_attn.q_proj.weight"].shape
    (192,)
    """
    spec, checkpoint, tokenizer = _opened(path)
    given = [texts] if isinstance(texts, str) else list(texts)
    pieces = [ids[None, start:start + _PIECE] for text in given for ids in [_ids(text, tokenizer, spec)]
              for start in range(0, len(ids), _PIECE)]
    if not pieces:
        raise ValueError("collect_importance: texts hold no token, expected some thousand")
    inputs = Inputs(spec, checkpoint, pieces, products)
    for i in range(spec.n_layers):
        inputs.layer(i)
    return inputs.importance


def _opened(path: str | os.PathLike[str] | None) -> tuple[ModelSpec, Tensors, Tokenizer | None]:
    if path is not None and os.path.isfile(path):
        file = open_gguf(Path(path))
        spec = gguf_spec(file, frozenset())
        return spec, GGUFCheckpoint(file, spec), gguf_tokenizer(file.metadata, str(file.path))[0]
    if path is not None and is_saved(Path(path)):
        raise ValueError(f"collect_importance: {path} was packed already; give it the files that were")
    folder = EMBEDDED if path is None else find(path, lambda found: None)
    spec = model_spec(read_json(folder / "config.json"))
    return spec, Checkpoint(folder, tensor_names(spec.model_type)), load_tokenizer(folder)


def _ids(text: Any, tokenizer: Tokenizer | None, spec: ModelSpec) -> NDArray[np.int64]:
    """(n,) tokens of the vocabulary."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("collect_importance: texts need a tokenizer, and the model has none; pass ids")
        text = tokenizer.encode(text)
    ids = np.asarray(unmasked("collect_importance", "ids", text))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"collect_importance: ids have dtype {ids.dtype} and shape {ids.shape}, expected integers (n,)")
    if ids.size and not (0 <= int(ids.min()) and int(ids.max()) < spec.vocab_size):
        raise IndexError(f"collect_importance: ids go from {ids.min()} to {ids.max()}, expected 0 to "
                         f"{spec.vocab_size - 1}")
    return ids.astype(np.int64)

"""What forge-c info says of a model."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_c.models.options import context_of
from forge_c.models.sampling import model_sampling
from forge_c.models.saved import packed_weights
from forge_c.models.tokenizer import ByteTokenizer, NoText

if TYPE_CHECKING:
    from forge_c.models.model import Model


def lines(model: Model) -> Iterator[str]:
    """Name and value, a line each: sizes, formats, tokens, and every choice of the spec."""
    spec, held = model.config, held_bytes(model)
    about: dict[str, Any] = {
        "dtype": model.dtype, "bytes": model.nbytes, "parameters": f"{parameters(model) / 1e6:.2f} M",
        "weights": ", ".join(f"{name} {nbytes / 2**20:.2f} MiB" for name, nbytes in held.most_common()),
        "context": f"{context_of(spec)} tokens", "tokenizer": _tokenizer(model), "chat template": _template(model),
        "ends at": ", ".join(map(str, sorted(model.eos_token_ids))) or "no token",
        "sampling": ", ".join(f"{name} {value}" for name, value in model_sampling(model.generation_config).items())
                    or "the best token"}
    for name, value in about.items():
        yield f"{name:16} {value}"
    for name in ("model_type", "vocab_size", "hidden_size", "n_layers", "max_position_embeddings", "head", "embed",
                 "bos_token_id", "eos_token_ids"):
        yield f"{name:24} {_shown(getattr(spec, name))}"
    for row in model.info:
        yield f"{'stored as ' + row.type:24} {row.tensors} tensors, {row.nbytes} bytes, held as {row.held}"
    for layer in dict.fromkeys(spec.layers):
        yield f"{'layers ' + _numbers([i for i, one in enumerate(spec.layers) if one == layer]):24} {layer}"


def held_bytes(model: Model) -> Counter[str]:
    """Bytes of the weights in each format, each matrix counted once."""
    made = model._decoder._model
    found: Counter[str] = Counter()
    for weight in {id(one): one for one in packed_weights(made)}.values():
        found[weight.dtype] += weight.nbytes
    if isinstance(made.embedding, np.ndarray):
        found[made.embedding.dtype.name] += made.embedding.nbytes
    found["float32"] += max(0, model.nbytes - found.total())  # norms and biases
    return +found


def parameters(model: Model) -> int:
    """Numbers that the model was trained to have: a tied table counts once. Where layers share weights and have merged
    their own into them, each counts."""
    spec, made = model.config, model._decoder._model
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.head.tied else 2)
    vectors = {id(one): one for part in made.parts for one in _vectors(part.arguments or {})}
    return model._decoder.layer_params + tables + sum(v.size for v in vectors.values()) + _size(made.norm.weight)


def _vectors(arguments: dict[str, Any]) -> Iterator[Any]:
    for value in arguments.values():
        if isinstance(value, np.ndarray):
            yield value
        yield from (one for one in (getattr(value, "weight", None), getattr(value, "bias", None))
                    if isinstance(one, np.ndarray))


def _size(vector: Any) -> int:
    return 0 if vector is None else int(vector.size)


def _tokenizer(model: Model) -> str:
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return "none"
    if isinstance(tokenizer, NoText):
        return "none that can be read here"
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes"
    backend = getattr(tokenizer, "backend", None)
    return type(tokenizer).__name__ if backend is None else (
        f"{type(backend.model).__name__}, {backend.get_vocab_size(with_added_tokens=True)} tokens, "
        f"{len(tokenizer.special_ids)} of them special")


def _template(model: Model) -> str:
    template = getattr(model.tokenizer, "chat_template", None)
    if template is None:
        return "none"
    return "one" if isinstance(template, str) else ", ".join(sorted(template))


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _numbers(ids: list[int]) -> str:
    """Ascending numbers, runs of them as first-last: 0-3,5."""
    starts = [i for i in ids if i - 1 not in ids]
    stops = [i for i in ids if i + 1 not in ids]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))

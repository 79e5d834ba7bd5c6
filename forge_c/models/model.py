"""A whole model: loading it, calling it, text from it."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from forge_c.files import read_json
from forge_c.functional import KV_CHUNK
from forge_c.models.decoder import Decoder
from forge_c.models.generation import Generation
from forge_c.models.sampling import Sampler
from forge_c.models.spec import Attention, ModelSpec, model_spec
from forge_c.models.tokenizer import Tokenizer, check_text, load_tokenizer
from forge_c.models.weights import Checkpoint, RandomCheckpoint
from forge_c.models.weights.random import shape_config
from forge_c.packing import FORMATS, Format
from forge_c.state import ModelCache

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny_python"


def load(path: str | os.PathLike[str] | None = None, dtype: str = "auto", *, activations: str | None = None) -> Model:
    """Load a Hugging Face folder: config.json and safetensors, with tokenizer.json if it is there.

    Args:
        path: the folder; None for the embedded model, which writes Python byte by byte.
        dtype: how matrices are packed, "float32", "bfloat16", "int8" or "int4" (see forge_c.pack); "auto" is bfloat16
            for a checkpoint that holds nothing wider, else float32. Activations are float32. An int4 model holds its
            last projection in int8, and both integer formats the embedding table in bfloat16, where that is another.
        activations: how inputs of int8 and int4 matrices are rounded, "int8" or "int12" (see forge_c.pack); by default
            to 12 bits before int8 matrices, which keeps what these know, and to 8 before int4 ones.

    Families: llama, mistral, qwen2, qwen3, gemma, gemma2, phi3, smollm3, granite. Nothing in the folder is executed.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: an unknown family, a configuration that is not understood, or a damaged file; it says which.

    >>> model = load()
    >>> model.config.model_type, model.dtype
    ('llama', 'bfloat16')
    """
    _check_dtype("load", dtype)
    folder = EMBEDDED if path is None else Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: {folder} is not a folder; `hf download ORG/NAME --local-dir DIR` makes one")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"load: {folder} has no config.json")
    config = read_json(folder / "config.json")
    spec = model_spec(config)
    checkpoint = Checkpoint(folder)
    if dtype == "auto":
        dtype = "bfloat16" if checkpoint.dtypes() == {"BF16"} else "float32"
    _check_activations("load", activations, dtype)
    decoder = Decoder(spec, checkpoint, dtype, _bar, activations)
    return Model(decoder, load_tokenizer(folder), _eos_ids(folder, spec))


def _bar(layers: range) -> Iterable[int]:
    """A progress bar over the layers on a terminal, once that takes a second."""
    return tqdm(layers, desc="loading", unit="layer", disable=None, delay=1.0, leave=False)


def random_model(shape: str = "llama-1.1b", dtype: str = "auto", *, activations: str | None = None) -> Model:
    """A decoder of a known size with random weights and no tokenizer: what it says is noise, its speed is real.

    Args:
        shape: a name in forge_c.models.weights.random.SHAPES: "llama-1.1b" (1.1 billion weights), "llama-tiny", ...
        dtype, activations: as in load; "auto" is bfloat16.

    Raises:
        ValueError: an unknown shape or dtype.

    >>> random_model("llama-tiny")
    Model(model_type='llama', layers=2, hidden_size=64, heads=4/2, vocab_size=512, dtype='bfloat16')
    """
    _check_dtype("random_model", dtype)
    dtype = "bfloat16" if dtype == "auto" else dtype
    _check_activations("random_model", activations, dtype)
    spec = model_spec(shape_config(shape))
    return Model(Decoder(spec, RandomCheckpoint(), dtype, _bar, activations), None, frozenset())


def _check_dtype(function: str, dtype: str) -> None:
    if dtype not in ("auto", *FORMATS):
        raise ValueError(f"{function}: dtype is {dtype!r}, expected auto, {', '.join(FORMATS)}")


def _check_activations(function: str, activations: str | None, dtype: str) -> None:
    Format.checked(function, dtype, None).checked_activations(function, activations)


def _eos_ids(folder: Path, spec: ModelSpec) -> frozenset[int]:
    """Tokens that end a text: generation_config.json knows better than config.json."""
    path = folder / "generation_config.json"
    document = read_json(path) if path.exists() else {}
    given = document.get("eos_token_id") if isinstance(document, dict) else None
    ids = given if isinstance(given, list) else [given]
    found = {i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0}
    return frozenset(found or spec.eos_token_ids)


class Model:
    """A decoder with its tokenizer; made by `load`.

    Attributes:
        config: the ModelSpec.
        dtype: how its matrices are packed.
        tokenizer: encode(text) -> ids and decode(ids) -> text, or None.
        eos_token_ids: the tokens that end a text.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int]) -> None:
        self._decoder, self.tokenizer, self.eos_token_ids = decoder, tokenizer, eos_token_ids

    @property
    def config(self) -> ModelSpec:
        """Sizes and every choice that the forward pass depends on."""
        return self._decoder.spec

    @property
    def dtype(self) -> str:
        """Format of the packed matrices."""
        return self._decoder.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        return self._decoder.nbytes

    def __repr__(self) -> str:
        s = self.config
        return (f"Model(model_type={s.model_type!r}, layers={s.n_layers}, hidden_size={s.hidden_size}, "
                f"{_heads(s)}vocab_size={s.vocab_size}, dtype={self.dtype!r})")

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None, *, dtype: str = "float32") -> ModelCache:
        """An empty cache for `batch` rows of up to max_seq_len tokens, by default min(the model's context, 4096).

        Layers with a sliding window keep only what the window needs. dtype "float32", "bfloat16" or
        "int8", one scale a token and head.
        """
        return self._decoder.new_cache(batch, max_seq_len, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        """Another model over the same weights, which nothing can write to."""
        return Model(self._decoder, self.tokenizer, self.eos_token_ids)

    def __reduce__(self) -> NoReturn:
        raise TypeError("Model: a model is not pickled; load() the same folder in the other process")

    def __call__(self, ids: ArrayLike, cache: ModelCache | None = None, *,
                 last_only: bool = False) -> NDArray[np.float32]:
        """Logits (batch, seq, vocab) of ids (batch, seq); with a cache they come after what it holds, and join it.

        The bits do not depend on how a text is cut into calls, nor on the other rows. last_only: those after the last
        token alone, (batch, 1, vocab), as for filling a cache. All tokens join the cache, or on any error none.

        Raises:
            IndexError: an id outside the vocabulary.
            TypeError, ValueError: ids that are not integers or not (batch, seq), or a cache without room for them.
            RuntimeError: another thread is using the cache.
        """
        tokens = _checked_ids("model", ids, self.config.vocab_size, 2)
        batch, seq = tokens.shape
        if cache is None:
            cache = self.new_cache(max(batch, 1), max(seq, 1))
        elif not isinstance(cache, ModelCache):
            raise TypeError(f"model: cache is a {type(cache).__name__}, expected one from new_cache()")
        elif cache.kinds != self._decoder.kinds:
            raise ValueError("model: cache is one of another model, whose layers differ; expected one from new_cache()")
        elif cache.batch != batch:
            raise ValueError(f"model: ids has {batch} rows, expected {cache.batch} as the cache")
        elif cache.seq_len + seq > cache.max_seq_len:
            raise ValueError(f"model: {cache.seq_len} tokens in the cache and {seq} more exceed its max_seq_len "
                             f"{cache.max_seq_len}")
        logits = np.empty((batch, min(seq, 1) if last_only else seq, self.config.vocab_size), np.float32)
        with cache.locked():
            before = cache.lengths
            try:
                for start in range(0, seq if batch else 0, KV_CHUNK):
                    chunk, wanted = slice(start, start + KV_CHUNK), not last_only or start + KV_CHUNK >= seq
                    found, _ = self._decoder.forward(tokens[:, chunk], cache, logits=wanted, last_only=last_only)
                    if wanted:
                        logits[:, slice(None) if last_only else chunk] = found
            except BaseException as error:
                _go_back(cache, before, error)
                raise
        return logits

    def generate(self, prompt: Any, max_new_tokens: int = 128, *, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
                 seed: int | None = None, stop: str | Sequence[str] | None = None, stream: bool = False) -> Any:
        """Continue one prompt or several; the result holds only what is new.

        Args:
            prompt: a text or a list of texts (special tokens are added), or token ids: (n,) ints, or a list of such.
            max_new_tokens: at most this many; an end-of-text token ends a row before, and is not part of its text.
            temperature, top_k, top_p, min_p, repetition_penalty: see Sampler; by default the best token is taken.
            seed: the same seed gives the same tokens; each row draws as if it were alone.
            stop: texts that end a row; they are not part of the result's text.
            stream: return an iterator over pieces instead: of text, or of ids; (row, piece) for several prompts.

        Returns:
            str for a text, (m,) int64 ids for ids, and a list of those for several prompts.

        Raises:
            IndexError: an id outside the vocabulary.
            TypeError, ValueError: another wrong argument, or an empty prompt.

        >>> load().generate("import ", 4, stream=False) == "".join(load().generate("import ", 4, stream=True))
        True
        """
        rows, several, is_text = self._prompts(prompt)
        run = self._generation(rows, max_new_tokens, Sampler(temperature, top_k, top_p, min_p, repetition_penalty),
                               seed, stop)
        if stream:
            return _pieces(run, several, is_text)
        for _ in run.steps():
            pass
        results = [row.text if is_text else np.array(row.ids, np.int64) for row in run.rows]
        return results if several else results[0]

    def _generation(self, rows: list[NDArray[np.int64]], max_new_tokens: int, sampler: Sampler, seed: int | None,
                    stop: str | Sequence[str] | None) -> Generation:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens!r}, expected an integer >= 0")
        if stop is not None and not isinstance(stop, str | list | tuple):
            raise TypeError(f"generate: stop is {stop!r}, expected a text or several")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
            raise ValueError(f"generate: seed is {seed!r}, expected an integer >= 0")
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        if any(not isinstance(s, str) or not s for s in stops):
            raise ValueError(f"generate: stop is {stop!r}, expected texts that are not empty")
        if stops and self.tokenizer is None:
            raise ValueError("generate: stop needs a tokenizer, and the model's folder has none")
        longest = max((len(r) for r in rows), default=0) + max_new_tokens
        if longest > _context(self.config):
            warnings.warn(f"generate: {longest} tokens exceed the {_context(self.config)} that the model was made for",
                          stacklevel=3)
        return Generation(self._decoder, rows, int(max_new_tokens), sampler, seed, stops, self.eos_token_ids,
                          self.tokenizer)

    def _prompts(self, prompt: Any) -> tuple[list[NDArray[np.int64]], bool, bool]:
        """(ids of each prompt, whether there may be several, whether they are texts)."""
        is_text = isinstance(prompt, str) or (isinstance(prompt, list | tuple) and bool(prompt)
                                              and all(isinstance(p, str) for p in prompt))
        if is_text:
            several, texts = not isinstance(prompt, str), [prompt] if isinstance(prompt, str) else list(prompt)
            if self.tokenizer is None:
                raise ValueError("generate: a text prompt needs a tokenizer, and the model's folder has none; pass ids")
            for text in texts:
                check_text("generate: prompt", text)
            given: list[Any] = [self.tokenizer.encode(text) for text in texts]
        else:
            several = (isinstance(prompt, np.ndarray) and prompt.ndim > 1) or (
                isinstance(prompt, list | tuple) and any(np.ndim(p) > 0 for p in prompt))
            given = list(prompt) if several else [prompt]
        rows = [_checked_ids("generate", ids, self.config.vocab_size, 1) for ids in given]
        for i, row in enumerate(rows):
            if len(row) == 0:
                raise ValueError(f"generate: prompt {i} is empty, expected at least one token")
        return rows, several, is_text


def _heads(spec: ModelSpec) -> str:
    """Query and key/value heads of the first layer of attention, for repr."""
    first = next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)), None)
    return "" if first is None else f"heads={first.n_heads}/{first.n_kv_heads}, "


def _go_back(cache: ModelCache, lengths: NDArray[np.int64], error: BaseException) -> None:
    """All or nothing: forget the chunks of a call before `error`. A ring may have overwritten what that needs."""
    try:
        cache.truncate(lengths)
    except ValueError:
        error.add_note(f"model: the cache holds {cache.lengths.tolist()} tokens: a layer with a window could not go "
                       f"back to {lengths.tolist()}")


def _context(spec: ModelSpec) -> int:
    """How many tokens the model was made for, its position scaling included."""
    ropes = [layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope]
    scaling = ropes[0].scaling if ropes else {}
    if scaling.get("rope_type") in ("dynamic", "linear", "yarn"):
        return int(spec.max_position_embeddings * max(1.0, scaling.get("factor") or 1.0))
    return spec.max_position_embeddings


def _checked_ids(function: str, ids: ArrayLike, vocab: int, ndim: int) -> NDArray[np.int64]:
    a = np.asarray(ids)
    expected = "(batch, seq)" if ndim == 2 else "(n,)"
    if a.size and (a.dtype.kind not in "iu"):
        raise TypeError(f"{function}: ids has dtype {a.dtype}, expected integers")
    if a.ndim != ndim:
        raise ValueError(f"{function}: ids has shape {a.shape}, expected {expected}")
    outside = (a < 0) | (a >= vocab)
    if a.size and outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        raise IndexError(f"{function}: id {a[at]} at {list(at)} is outside the vocabulary of {vocab}")
    return a.astype(np.int64)


def _pieces(run: Generation, several: bool, is_text: bool) -> Iterator[Any]:
    for step in run.steps():
        for row, token, text in step:
            piece: Any = text if is_text else token
            if piece != "":
                yield (row, piece) if several else piece

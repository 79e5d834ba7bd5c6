"""A whole model: loading it, calling it, text from it."""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from tqdm import tqdm

from forge_c.checks import dtype_name, short, warn
from forge_c.files import read_json
from forge_c.formats.gguf import open_gguf
from forge_c.formats.layout import PACKED, Activations, Precision
from forge_c.models.decoder import STORED, Decoder
from forge_c.models.generation import Generation, LogitsProcessor, Stream
from forge_c.models.gguf_tokenizer import gguf_tokenizer
from forge_c.models.hub import find
from forge_c.models.options import Wishes, check_samples, checked_options, sampler_of
from forge_c.models.prompts import Prompts, checked_ids, conversations, texts_or_ids
from forge_c.models.sampling import Unsaid
from forge_c.models.saved import is_saved, load_saved, save_model
from forge_c.models.scoring import embedded, hidden_states, scored
from forge_c.models.spec import Attention, Head, ModelSpec, model_spec, tensor_names
from forge_c.models.spec.gguf import gguf_spec
from forge_c.models.tokenizer import Tokenizer
from forge_c.models.tokenizer_files import load_tokenizer
from forge_c.models.weights import Checkpoint, GGUFCheckpoint, RandomCheckpoint
from forge_c.models.weights.foreign import check_folder
from forge_c.models.weights.gguf import StoredType
from forge_c.models.weights.random import shape_config
from forge_c.packing import ROWS_OF, Format
from forge_c.state import ModelCache
from forge_c.state.model import all_or_nothing

DecoderOf = Callable[..., Decoder]  # of Decoder's arguments
EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny_python"


def load(path: str | os.PathLike[str] | None = None, dtype: DTypeLike = "auto", *,
         activations: Activations | None = None, attention_precision: Precision | None = None,
         ignore: str | Collection[str] = (), importance: Mapping[str, ArrayLike] | None = None) -> Model:
    """Load a Hugging Face folder (config.json and safetensors, with tokenizer.json if it is there), a GGUF file, or a
    folder that Model.save wrote.

    Args:
        path: the folder; or the file, by whatever name, or any file of those that a model is split into; or the model's
            name on the Hugging Face Hub, "ORG/NAME": the snapshot in the local cache, or a download where the
            huggingface_hub package is installed (a path that exists wins); None for the embedded model, which writes
            Python byte by byte.
        dtype: how matrices are packed, "float32", "bfloat16", "int8" or one of pack's other formats, which holds all of
            them; or "int4", which mixes formats of 4 to 8 bits by what an error costs (docs/accuracy.md); "auto" is
            bfloat16 for a checkpoint that holds nothing wider, else float32, and of a GGUF file each tensor as it is
            stored. Activations are float32. Formats of integers hold the embedding table in bfloat16, where that is
            not the last projection too.
        activations: how inputs of matrices of integers are rounded, "int8" or "int12" (see forge_c.pack); by default to
            12 bits before those of 8 bits, which keeps what these know, and to 8 before those of fewer.
        attention_precision: what attention multiplies in, "float32", "bfloat16" or "int8" (see forge_c.attention); by
            default as the cache holds keys and values. A cache of another dtype is converted in every pass, which
            prompts hardly feel, and tokens that are generated do.
        ignore: keys of config.json, or of a GGUF file, to take no notice of: there may be one that would be refused,
            since it could change the maths, and does not.
        importance: of formats under 8 bits, by which errors of weights are weighed: what collect_importance found of
            texts like those that the model is for. By default it is found of random tokens, while loading; {}: all
            weights count the same.

    Families: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3 (its text model), phi3, smollm3,
    granite, mamba, falcon_mamba, mamba2, bamba, falcon_h1, granitemoehybrid and nemotron_h (without experts), lfm2,
    recurrent_gemma, zamba2. Nothing in the folder or the file is executed.

    Raises:
        FileNotFoundError: no such folder, or a file is missing; it says what to get.
        ValueError: an unknown family, a configuration that is not understood, or a damaged file; it says which.

    >>> model = load()
    >>> model.config.model_type, model.dtype
    ('llama', 'bfloat16')
    """
    return load_with(Decoder, path, dtype, activations, attention_precision, ignore, importance)


def load_with(decoder: DecoderOf, path: str | os.PathLike[str] | None = None, dtype: DTypeLike = "auto",
              activations: Activations | None = None, attention_precision: Precision | None = None,
              ignore: str | Collection[str] = (), importance: Mapping[str, ArrayLike] | None = None) -> Model:
    """As load, with the decoder that this makes of a checkpoint."""
    dtype = _dtype_name("load", dtype)
    _check_importance(importance)
    _check_precision("load", attention_precision)
    ignored = _names("load", "ignore", ignore)
    model = _load(decoder, path, dtype, activations, ignored, importance)
    return model if attention_precision is None else model._attending_in(attention_precision)


def _load(decoder: DecoderOf, path: str | os.PathLike[str] | None, dtype: str, activations: Activations | None,
          ignored: frozenset[str], importance: Mapping[str, ArrayLike] | None) -> Model:
    """As load, by what is there."""
    if path is not None and os.path.exists(path) and not os.path.isdir(path):
        return _load_gguf(decoder, Path(path), dtype, activations, ignored, importance)
    if path is not None and is_saved(Path(path)):
        if decoder is not Decoder:
            raise ValueError(f"load: {path} was packed already, and is not cut into shares; expected the files that "
                             "it was packed from")
        return _load_saved(Path(path), dtype, activations, ignored, importance)
    folder = EMBEDDED if path is None else find(path, lambda found: _spec(found, ignored))
    spec = _spec(folder, ignored)
    checkpoint = Checkpoint(folder, tensor_names(spec.model_type))
    spec = replace(spec, head=_head(spec.head, checkpoint))
    if dtype == "auto":
        dtype = "bfloat16" if checkpoint.dtypes() == {"BF16"} else "float32"
    _check_activations("load", activations, dtype)
    settings = _generation_config(folder)
    again = partial(load, None if path is None else str(folder.absolute()), dtype, activations=activations,
                    ignore=ignored, importance=importance)
    return Model(decoder(spec, checkpoint, dtype, _bar, activations, importance), load_tokenizer(folder),
                 _eos_ids(settings, spec), generation_config=settings, source=again)


def _load_gguf(decoder: DecoderOf, path: Path, dtype: str, activations: Activations | None, ignored: frozenset[str],
               importance: Mapping[str, ArrayLike] | None) -> Model:
    """The model of a GGUF file: its own tokenizer too; nothing but the file is read."""
    file = open_gguf(path)
    spec = gguf_spec(file, ignored)
    checkpoint = GGUFCheckpoint(file, spec)
    _check_activations("load", activations, checkpoint.mostly() if dtype == "auto" else dtype)
    made = decoder(spec, checkpoint, STORED if dtype == "auto" else dtype, _bar, activations, importance)
    # Last: a large vocabulary takes as much memory meanwhile as the largest tensor does while it is packed.
    tokenizer, ends = gguf_tokenizer(file.metadata, str(file.path))
    stored = checkpoint.stored(None if dtype == "auto" else dtype)
    again = partial(load, str(path.absolute()), dtype, activations=activations, ignore=ignored, importance=importance)
    return Model(made, tokenizer, ends or frozenset(spec.eos_token_ids), source=again, info=stored)


def _load_saved(folder: Path, dtype: str, activations: Activations | None, ignored: frozenset[str],
                importance: Mapping[str, ArrayLike] | None) -> Model:
    """The model of a folder that Model.save wrote, as it was packed."""
    for name, value in (("activations", activations), ("importance", importance), ("ignore", sorted(ignored) or None)):
        if value is not None:
            raise ValueError(f"load: {name} is {short(value)}, and {folder} was packed already; expected nothing")
    decoder, eos, settings, stored = load_saved(folder, dtype)
    return Model(decoder, load_tokenizer(folder), eos, generation_config=settings, info=stored,
                 source=partial(load, str(folder.absolute()), dtype))


def _spec(folder: Path, ignored: frozenset[str]) -> ModelSpec:
    """What a folder's files say of the model, before its weights are read."""
    check_folder(folder, ignored)
    return model_spec(read_json(folder / "config.json"), ignored)


def _head(head: Head, checkpoint: Checkpoint) -> Head:
    """What the file says of the head, corrected by what it holds."""
    if head.tied and checkpoint.has_own_head:
        warn(f"load: {checkpoint.folder} holds an lm_head.weight of its own, which is used, though "
             "config.json has tie_word_embeddings true")
        return replace(head, tied=False)
    return replace(head, absent=True) if checkpoint.is_headless and not head.tied else head


def _names(function: str, argument: str, given: str | Collection[str]) -> frozenset[str]:
    """One name or several."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Collection) or any(not isinstance(name, str) for name in names):
        raise TypeError(f"{function}: {argument} is {short(given)}, expected names, such as (\"key\",)")
    return frozenset(names)


def _bar(layers: range) -> Iterable[int]:
    """A progress bar over the layers on a terminal, once that takes a second."""
    return tqdm(layers, desc="loading", unit="layer", disable=None, delay=1.0, leave=False)


def random_model(shape: str = "llama-1.1b", dtype: DTypeLike = "auto", *,
                 activations: Activations | None = None, attention_precision: Precision | None = None) -> Model:
    """A decoder of a known size with random weights and no tokenizer: what it says is noise, its speed is real.

    Args:
        shape: a name in forge_c.models.weights.random.SHAPES: "llama-1.1b" (1.1 billion weights), "llama-tiny", ...
        dtype, activations, attention_precision: as in load; "auto" is bfloat16.

    Raises:
        ValueError: an unknown shape or dtype.

    >>> random_model("llama-tiny")
    Model(model_type='llama', layers=2, hidden_size=64, heads=4/2, vocab_size=512, dtype='bfloat16')
    """
    return random_with(Decoder, shape, dtype, activations, attention_precision)


def random_with(decoder: DecoderOf, shape: str = "llama-1.1b", dtype: DTypeLike = "auto",
                activations: Activations | None = None, attention_precision: Precision | None = None) -> Model:
    """As random_model, with the decoder that this makes of its tensors."""
    dtype = _dtype_name("random_model", dtype)
    dtype = "bfloat16" if dtype == "auto" else dtype
    _check_activations("random_model", activations, dtype)
    _check_precision("random_model", attention_precision)
    spec = model_spec(shape_config(shape))
    checkpoint = RandomCheckpoint(routed=any(layer.router is not None for layer in spec.layers))
    model = Model(decoder(spec, checkpoint, dtype, _bar, activations), None, frozenset())
    return model if attention_precision is None else model._attending_in(attention_precision)


def _check_precision(function: str, precision: Any) -> None:
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"{function}: attention_precision is {short(precision)}, expected None, "
                         f"{', '.join(get_args(Precision))}")


def _check_importance(importance: Any) -> None:
    if importance is not None and not isinstance(importance, Mapping):
        raise TypeError(f"load: importance is a {type(importance).__name__}, expected what collect_importance gives")
    if importance and not any(str(key).startswith("model.layers.") for key in importance):
        raise ValueError(f"load: importance has no matrix of a layer, but {short(next(iter(importance)))}; expected "
                         "what collect_importance gives")


def _dtype_name(function: str, dtype: DTypeLike) -> str:
    """ValueError if it is none, as a name or as NumPy has it."""
    name: Any = dtype_name(dtype)
    if not isinstance(name, str) or name not in ("auto", *PACKED):
        raise ValueError(f"{function}: dtype is {dtype!r}, expected auto, {', '.join(PACKED)}")
    return name


def _check_activations(function: str, activations: Activations | None, dtype: str) -> None:
    Format.checked(function, dtype, None, ROWS_OF).checked_activations(function, activations)


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    document = read_json(path) if path.exists() else {}
    return document if isinstance(document, dict) else {}


def _eos_ids(settings: Mapping[str, Any], spec: ModelSpec) -> frozenset[int]:
    """Tokens that end a text: generation_config.json knows better than config.json."""
    given = settings.get("eos_token_id")
    ids = given if isinstance(given, list) else [given]
    found = {i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0}
    return frozenset(found or spec.eos_token_ids)


_TEMPERATURE, _PENALTY = Unsaid(0.0), Unsaid(1.0)


class Model:
    """A decoder with its tokenizer; made by `load`.

    Attributes:
        config: the ModelSpec.
        dtype: how its matrices are packed; of a GGUF file's that are held as they are stored, how most bytes are.
        tokenizer: encode(text) -> ids and decode(ids) -> text, or None.
        eos_token_ids: the tokens that end a text.
        generation_config: what its makers say about generation: the folder's generation_config.json.
        info: what a GGUF file stores: of each type how many tensors, their bytes in the file, and how they are held.

    copy.copy and copy.deepcopy make another model over the same weights. A pickle holds where a model was loaded from,
    and is loaded from there.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int], *,
                 generation_config: Mapping[str, Any] | None = None, source: Callable[[], Model] | None = None,
                 info: tuple[StoredType, ...] = ()) -> None:
        self._decoder, self.tokenizer, self.eos_token_ids = decoder, tokenizer, eos_token_ids
        self.generation_config = dict(generation_config or {})
        self.info = info
        self._source = source  # the call of load that made it

    @property
    def config(self) -> ModelSpec:
        """Sizes and every choice that the forward pass depends on."""
        return self._decoder.spec

    @property
    def dtype(self) -> str:
        """Format of the packed matrices."""
        return self._decoder.dtype

    @property
    def attention_precision(self) -> Precision | None:
        """What attention multiplies in, see load; None: as the cache holds keys and values."""
        return self._decoder.attention_precision

    def _attending_in(self, precision: Precision) -> Model:
        """The model itself, whose attention multiplies in this precision from now on."""
        self._decoder.attention_precision = precision
        if isinstance(self._source, partial):
            self._source = partial(self._source, attention_precision=precision)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        return self._decoder.nbytes

    def __repr__(self) -> str:
        s = self.config
        return (f"Model(model_type={s.model_type!r}, layers={s.n_layers}, hidden_size={s.hidden_size}, "
                f"{_heads(s)}vocab_size={s.vocab_size}, dtype={self.dtype!r})")

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None, *, dtype: str = "float32") -> ModelCache:
        """An empty cache for `batch` rows of up to max_seq_len tokens, by default min(the model's context, 4096),
        and any number where no layer has attention.

        Layers with a sliding window keep only what the window needs. dtype "float32", "bfloat16" or
        "int8", one scale a token and head.
        """
        return self._decoder.new_cache(batch, max_seq_len, dtype)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model, packed as it is, to a new folder: `load` maps that in a fraction of the time.

        What load maps are the bytes that the kernels read, on whatever x86 or Arm they run; a version of this library
        that lays them out otherwise refuses the folder. It must not be changed while a model that was loaded from it
        is in use. What does not come to its end leaves nothing.

        Raises:
            FileExistsError, OSError: the folder exists and is not empty, or cannot be written.
            ValueError: the model has parts that no file holds.
        """
        save_model(self, folder)

    def __copy__(self) -> Model:
        return Model(self._decoder, self.tokenizer, self.eos_token_ids, generation_config=self.generation_config,
                     source=self._source, info=self.info)

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        return self.__copy__()

    def __reduce__(self) -> Any:
        if self._source is None:
            raise TypeError("Model: a model that was not loaded from a path is not pickled; save() it and load() that "
                            "in the other process, or make it there")
        return self._source, ()

    def __call__(self, ids: ArrayLike, cache: ModelCache | None = None, *,
                 last_only: bool = False) -> NDArray[np.float32]:
        """Logits (batch, seq, vocab) of ids (batch, seq); with a cache they come after what it holds, and join it.

        The bits do not depend on how a text is cut into calls, nor on the other rows; models of rope types dynamic and
        longrope are told how long it will be by cache.expecting. last_only: those after the last
        token alone, (batch, 1, vocab), as for filling a cache. All tokens join the cache, or on any error none.

        Raises:
            IndexError: an id outside the vocabulary.
            TypeError, ValueError: ids that are not integers or not (batch, seq), or a cache without room for them.
            RuntimeError: another thread is using the cache.
        """
        tokens, cache = self._fed("model", ids, cache)
        (batch, seq), decoder = tokens.shape, self._decoder
        most = decoder.pass_tokens if last_only else decoder.result_tokens
        logits = np.empty((batch, min(seq, 1) if last_only else seq, self.config.vocab_size), np.float32)
        with all_or_nothing(cache, seq):
            for start in range(0, seq if batch else 0, most):
                chunk, wanted = slice(start, start + most), not last_only or start + most >= seq
                found, _ = decoder.forward(tokens[:, chunk], cache, logits=wanted, last_only=last_only)
                if wanted:
                    logits[:, slice(None) if last_only else chunk] = found
        return logits

    def _fed(self, function: str, ids: ArrayLike, cache: ModelCache | None) -> tuple[NDArray[np.int64], ModelCache]:
        """ids (batch, seq), and the cache or a new one, which has room for them."""
        tokens = checked_ids(function, ids, self.config.vocab_size, 2)
        batch, seq = tokens.shape
        if cache is None:
            return tokens, self.new_cache(max(batch, 1), max(seq, 1))
        self._check_cache(function, cache)
        if cache.batch != batch:
            raise ValueError(f"{function}: ids has {batch} rows, expected {cache.batch} as the cache")
        if cache.seq_len + seq > cache.max_seq_len:
            raise ValueError(f"{function}: {cache.seq_len} tokens in the cache and {seq} more exceed its max_seq_len "
                             f"{cache.max_seq_len}")
        return tokens, cache

    def _check_cache(self, function: str, cache: ModelCache) -> None:
        if not isinstance(cache, ModelCache):
            raise TypeError(f"{function}: cache is a {type(cache).__name__}, expected one from new_cache()")
        if cache.kinds != self._decoder.kinds:
            raise ValueError(f"{function}: cache is one of another model, whose layers differ; expected one from "
                             "new_cache()")

    def hidden(self, ids: ArrayLike, cache: ModelCache | None = None, *, layer: int = -1) -> NDArray[np.float32]:
        """Hidden states (batch, seq, hidden) of ids (batch, seq), in a cache or without, as a call of the model.

        Args:
            layer: -1, after the last layer and the last norm: what the logits are made of. From 0 on, what goes into
                that layer (0: the embeddings); -2: into the last layer. As transformers' hidden_states[layer].

        Raises:
            As a call of the model; IndexError if there is no such layer.

        >>> load().hidden([[1, 2, 3]]).shape
        (1, 3, 192)
        """
        return hidden_states(self, ids, cache, layer)

    def embed(self, texts: Any, *, pooling: Literal["mean", "last"] = "mean",
              normalize: bool = True) -> NDArray[np.float32]:
        """One vector a text, (n, hidden): the hidden states of its tokens, pooled.

        Args:
            texts: a text or a list of texts (special tokens are added), or token ids: (n,) ints, or a list of such.
            pooling: "mean" of all tokens, or the "last" one's.
            normalize: divide by the vector's length.

        A text's vector does not depend on the others.

        >>> model = load()
        >>> a, b, c = model.embed(["for i in range(3):", "for j in range(4):", "class A:"])
        >>> bool(a @ b > a @ c)
        True
        """
        return embedded(self, texts, pooling, normalize)

    def score(self, texts: Any) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """(ids, logprobs) of each text: its tokens (n,), and the natural logarithms of the probabilities (n - 1,) of
        every token but the first, given those before it: logprobs[i] is ids[i + 1]'s.

        texts: a text or a list of texts (special tokens are added), or token ids: (n,) ints, or a list of such. The
        logits of a whole text never stand in memory.

        >>> [(ids, logprobs)] = load().score("import os")
        >>> len(ids), len(logprobs)
        (10, 9)
        """
        return scored(self, texts)

    @overload
    def generate(self, prompt: str, max_new_tokens: int | None = ..., *, n: Literal[1] = ...,
                 logprobs: Literal[0] = ..., stream: Literal[False] = ..., details: Literal[False] = ...,
                 **options: Unpack[Wishes]) -> str: ...

    @overload
    def generate(self, prompt: list[str], max_new_tokens: int | None = ..., *, n: Literal[1] = ...,
                 logprobs: Literal[0] = ..., stream: Literal[False] = ..., details: Literal[False] = ...,
                 **options: Unpack[Wishes]) -> list[str]: ...

    @overload
    def generate(self, prompt: Any = ..., max_new_tokens: int | None = ..., *, stream: Literal[True], n: int = ...,
                 logprobs: int = ..., details: bool = ..., **options: Unpack[Wishes]) -> Stream: ...

    @overload
    def generate(self, prompt: Any = ..., max_new_tokens: int | None = ..., *, n: int = ..., logprobs: int = ...,
                 stream: bool = ..., details: bool = ..., **options: Unpack[Wishes]) -> Any: ...

    def generate(self, prompt: Any = None, max_new_tokens: int | None = 128, *, messages: Any = None, tools: Any = None,
                 temperature: float = _TEMPERATURE, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, repetition_penalty: float = _PENALTY,
                 sampling: Literal["model"] | None = None, seed: int | Sequence[int] | None = None, n: int = 1,
                 stop: str | Sequence[str] | None = None, cache: ModelCache | None = None, cache_dtype: str = "float32",
                 logprobs: int = 0, logits_processor: LogitsProcessor | None = None, special_tokens: bool = True,
                 stream: bool = False, details: bool = False) -> Any:
        """Continue one prompt or several, or answer in a conversation; the result holds only what is new.

        Args:
            prompt: a text or a list of texts, or token ids: (n,) ints, a list of such, an array (batch, n) of any
                library, or what a Hugging Face tokenizer returns.
            max_new_tokens: at most this many; an end-of-text token ends a row before, and is not part of its text.
                None: until then, or until the model's context or the cache is full.
            messages: instead of a prompt, a conversation [{"role": "user", "content": "..."}, ...] for the model's
                chat template, or several; tools: what it may call, as the template has it.
            temperature, top_k, top_p, min_p, repetition_penalty: see Sampler; by default the best token is taken.
            sampling: "model" takes those that are not given from the model's generation_config.json.
            seed: the same seed gives the same tokens; each row draws as if it were alone. A list: one for each prompt,
                or for each of its samples.
            n: samples of each prompt. The first draws as with n=1, the others from seeds that follow from the seed and
                the sample's number.
            stop: texts that end a row; they are not part of the result's text.
            cache: from new_cache(), one row for each prompt's sample. The prompt is what comes after the tokens that it
                holds, as in a call of the model; afterwards it holds the prompt and the new ids too. For messages the
                conversation is compared with `cache.ids`: what both begin with stays, the rest of the cache is
                forgotten, and only what is new is read. If the call is interrupted, it holds some beginning of that.
            cache_dtype: of the cache that is made if none is given.
            logprobs: return the log-probabilities of so many likely tokens at each step, as details.
            logits_processor: called for each row and step with all of its ids (m,) and the logits (vocab,) of the next
                token, a copy, after the repetition penalty and before the temperature; returns logits of that shape,
                -inf for what must not follow. It may raise StopIteration to end the row.
            special_tokens: whether special tokens are added to a text that is not the continuation of a cache's.
            stream: return a Stream instead, an iterator over pieces: of text, or of ids; (row, piece) for several rows.
            details: return Completions instead of texts or ids; in a stream, Completions of the pieces.

        Returns:
            str for a text or a conversation, (m,) int64 ids for ids; a list of those for several prompts or samples,
            a list of lists for several samples of several prompts. Rows of a stream count in that order.

        Raises:
            IndexError: an id outside the vocabulary.
            TypeError, ValueError: another wrong argument, an empty prompt, or a cache without room.

        >>> load().generate("import ", 4, stream=False) == "".join(load().generate("import ", 4, stream=True))
        True
        """
        if sampling not in (None, "model"):
            raise ValueError(f"generate: sampling is {sampling!r}, expected None or 'model'")
        sampler = sampler_of(self.generation_config if sampling else {}, temperature=temperature, top_k=top_k,
                             top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
        check_samples(n, sampler, logits_processor)
        prompts = self._prompts(prompt, messages, tools, cache, special_tokens, n)
        options = checked_options(
            self.config, self.tokenizer, self.eos_token_ids, prompts.rows, sampler, max_new_tokens=max_new_tokens,
            seed=seed, n=n, stop=stop, cache=cache, cache_dtype=cache_dtype, logprobs=logprobs,
            logits_processor=logits_processor, whole=prompts.whole, answers=prompts.answers)
        run = Generation(self._decoder, options, self.tokenizer)
        detailed = details or logprobs > 0
        if stream:
            return Stream(run, _pieces(run, prompts, detailed))
        for _ in run.steps():
            pass
        found: list[Any] = run.completions()
        if not detailed:
            found = [c.text if prompts.is_text else c.ids for c in found]
        if n > 1:
            found = [found[i : i + n] for i in range(0, len(found), n)]
        return found if prompts.several else found[0]

    def _prompts(self, prompt: Any, messages: Any, tools: Any, cache: ModelCache | None, special_tokens: bool,
                 n: int) -> Prompts:
        if (prompt is None) == (messages is None):
            given = "neither prompt nor" if prompt is None else "both prompt and"
            raise TypeError(f"generate: {given} messages given, expected one of them")
        if messages is None and tools is not None:
            raise TypeError("generate: tools are given without messages, whose template would name them")
        if cache is not None:
            self._check_cache("generate", cache)
            largest = max((int(ids.max()) for ids in cache.ids if ids.size), default=0)
            if largest >= self.config.vocab_size:
                raise ValueError(f"generate: cache holds the token {largest}, which is outside the vocabulary of "
                                 f"{self.config.vocab_size}; it is another model's")
        if messages is not None:
            found = conversations("generate", messages, tools, self.tokenizer, self.config.vocab_size)
        else:
            held = [] if cache is None or cache.batch % n else cache.lengths[::n].tolist()
            found = texts_or_ids("generate", prompt, self.tokenizer, self.config.vocab_size, special_tokens, held)
        for i, row in enumerate(found.rows):
            if len(row) == 0:
                raise ValueError(f"generate: prompt {i} is empty, expected at least one token")
        return found


def _heads(spec: ModelSpec) -> str:
    """Query and key/value heads of the first layer of attention, for repr."""
    first = next((m for layer in spec.layers for m in layer.mixers if isinstance(m, Attention)), None)
    return "" if first is None else f"heads={first.n_heads}/{first.n_kv_heads}, "


def _pieces(run: Generation, prompts: Prompts, detailed: bool) -> Iterator[Any]:
    several = prompts.several or len(run.rows) > 1
    for step in run.steps():
        for i, token, text in step:
            piece: Any = text if prompts.is_text else token
            if detailed:
                piece = run.piece(i, token, text)
            if piece is not None and piece != "":
                yield (i, piece) if several else piece

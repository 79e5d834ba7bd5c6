"""Text in and out: tokenizers, chat templates in their sandbox, stop strings, and streams that spell the same text."""
from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import BYTES, following, small, write, write_chain, write_json
from tokenizers import decoders, pre_tokenizers, processors, trainers

from forge_c.models import Model, load
from forge_c.models.tokenizer import ByteTokenizer, HuggingFaceTokenizer, TextStream
from forge_c.models.tokenizer_files import load_tokenizer

SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
            "pad_token": None, "model_max_length": 10 ** 30}
CONVERSATION = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "héllo \"you\""}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a byte-level BPE of 300 tokens that puts <s> before every text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["the cat sat on the mat, the cat sat"] * 20, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", SETTINGS)
    return folder


def hugging_face(trained: Path, **more: Any) -> HuggingFaceTokenizer:
    """The trained tokenizer with other settings."""
    with tempfile.TemporaryDirectory() as folder:
        copied(trained, Path(folder), **more)
        found = load_tokenizer(Path(folder))
    assert isinstance(found, HuggingFaceTokenizer)
    return found


def copied(trained: Path, folder: Path, **more: Any) -> Path:
    (folder / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    write_json(folder / "tokenizer_config.json", SETTINGS | more)
    return folder


# ---- bytes -----------------------------------------------------------------------------------------

def test_bytes_are_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé\n") == [0, 104, 0xC3, 0xA9, 10]
    assert tokenizer.encode("hi", special_tokens=False) == [104, 105]
    assert tokenizer.encode("") == [0] and tokenizer.encode("a\0b") == [0, 97, 98]
    assert tokenizer.decode([0, 104, 0xC3, 0xA9, 0]) == "hé" and tokenizer.decode([]) == ""
    assert tokenizer.decode([0xC3, 104, 0xFF]) == "\ufffdh\ufffd"


HALVES = ["\ud83d", "a\ud83d", "\udf89a", "\udf89\ud83c"]


@pytest.mark.parametrize("text", HALVES, ids=ascii)
def test_half_a_character_is_named(trained, speaker, text):
    at = next(i for i, c in enumerate(text) if c > "\ud7ff")
    problem = f"has {text[at]!r} at {at}, half of a surrogate pair; expected whole characters"
    for tokenizer in (ByteTokenizer(), hugging_face(trained)):
        with pytest.raises(ValueError) as caught:
            tokenizer.encode(text)
        assert str(caught.value) == f"encode: text {problem}" and caught.type is ValueError
        speaks = Model(speaker._decoder, tokenizer, speaker.eos_token_ids)
        for prompt in (text, ["a", text]):
            with pytest.raises(ValueError) as caught:
                speaks.generate(prompt, 1)
            assert str(caught.value) == f"generate: prompt {problem}"


@pytest.mark.parametrize("text", [5, None, b"a", ["a"]], ids=repr)
def test_only_a_text_is_encoded(trained, text):
    for tokenizer in (ByteTokenizer(), hugging_face(trained)):
        with pytest.raises(TypeError) as caught:
            tokenizer.encode(text)
        assert str(caught.value) == f"encode: text is {text!r}, expected a text"


class OnADevice:
    """As a tensor that is not in this memory, or needs a gradient."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("call detach() first")


@pytest.mark.parametrize(("ids", "kind", "problem"), [
    ([0, -1], ValueError, "ids[1] is -1, expected 0 to {most}"),
    ([2 ** 32], ValueError, "ids[0] is 4294967296, expected 0 to {most}"),
    ([2 ** 70], ValueError, f"ids[0] is {2 ** 70}, expected 0 to {{most}}"),
    ([1.0], TypeError, "ids[0] is 1.0, expected an integer"), (["a"], TypeError, "ids[0] is 'a', expected an integer"),
    ([None], TypeError, "ids[0] is None, expected an integer"),
    ([True], TypeError, "ids[0] is True, expected an integer"),
    (np.zeros((1, 2), int), ValueError, "ids has shape (1, 2), expected (n,)"),
    (np.array(5), ValueError, "ids has shape (), expected (n,)"),
    (np.array([0.5]), TypeError, "ids[0] is np.float64(0.5), expected an integer"),
    (np.array([2 ** 64 - 1], np.uint64), ValueError, "ids[0] is 18446744073709551615, expected 0 to {most}"),
    (OnADevice(), TypeError, "ids is a OnADevice that NumPy cannot read: call detach() first"),
], ids=lambda value: type(value).__name__ if isinstance(value, OnADevice) else repr(value))
def test_wrong_ids_are_named(trained, ids, kind, problem):
    for tokenizer, most in ((ByteTokenizer(), 255), (hugging_face(trained), 2 ** 32 - 1)):
        with pytest.raises(kind) as caught:
            tokenizer.decode(ids)
        assert str(caught.value) == "decode: " + problem.format(most=most)


def test_ids_may_be_an_array(trained):
    tokenizer = hugging_face(trained)
    ids = np.array(tokenizer.encode("the cat"), np.uint16)
    assert tokenizer.decode(ids) == "the cat" and ByteTokenizer().decode(np.array([104, 105], np.uint8)) == "hi"


def test_half_a_character_in_a_conversation_is_named(trained):
    tokenizer = hugging_face(trained, chat_template="{{ messages[0].content }}")
    for options, what in (({}, "encode: text"), ({"control_tokens": False}, "encode_chat: the prompt")):
        with pytest.raises(ValueError) as caught:
            tokenizer.encode_chat([{"role": "user", "content": "hi\ud83d"}], **options)
        assert str(caught.value) == f"{what} has '\\ud83d' at 2, half of a surrogate pair; expected whole characters"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.rest() == text
    assert all(piece in text and (not piece or "\ufffd" in text or "\ufffd" not in piece) for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_stream_to_their_decoding(data):
    """However broken the UTF-8 is."""
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(byte) for byte in data]
    assert "".join(pieces) + stream.rest() == ByteTokenizer().decode(data)


# ---- tokenizer.json --------------------------------------------------------------------------------

def test_text_round_trip(trained):
    tokenizer = hugging_face(trained)
    ids = tokenizer.encode("the cat sat, é日🎉!")
    assert ids[0] == 0 and tokenizer.encode("the cat sat, é日🎉!", special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "the cat sat, é日🎉!"
    assert tokenizer.decode([0, *ids[1:4], 1, 2]) == tokenizer.decode(ids[1:4])
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_second_bos_is_not_added(trained):
    tokenizer = hugging_face(trained)
    plain = tokenizer.encode("the cat")
    assert plain.count(0) == 1
    assert tokenizer.encode("<s>the cat") == plain
    assert hugging_face(trained, bos_token=None).encode("<s>the cat") == [0, *plain]
    assert hugging_face(trained, bos_token={"content": "<s>"}).encode("<s>the cat") == plain
    assert tokenizer.encode("<|user|>the cat") == [0, 2, *plain[1:]]


@pytest.mark.parametrize("text", ["the cat sat", "é日本🎉👩‍👩‍👧 naïve", " spaces  and\n\ttabs ", "\ufffd", "",
                                  "a\u0301"])
def test_a_stream_spells_the_text(trained, text):
    tokenizer = hugging_face(trained)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.rest() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert stream.rest() == ""


def test_a_model_with_its_tokenizer(trained, tmp_path):
    tokenizer = hugging_face(trained)
    ids = tokenizer.encode("the cat é日🎉")
    chain = following([*ids[1:], 1])
    folder = copied(trained, write_chain(tmp_path, chain, vocab=304, eos=1, tokenizer=None))
    model = load(folder)
    assert isinstance(model.tokenizer, HuggingFaceTokenizer)
    assert model.generate("the", 50) == " cat é日🎉"
    pieces = list(model.generate("the", 50, stream=True))
    assert "".join(pieces) == " cat é日🎉" and not any("\ufffd" in piece for piece in pieces)
    assert model.generate("the", 50, stop="日") == " cat é"
    assert model.generate("the", 50, stop=["at", "ca"]) == " ", "the first of two that one token completes"
    assert model.generate(ids[1:2], 50).tolist() == [*ids[2:], 1]


def test_a_tokenizer_larger_than_the_model_is_an_error_at_the_token(trained, tmp_path):
    model = load(copied(trained, write(tmp_path, small(vocab_size=100))))
    with pytest.raises(IndexError, match=r"generate: id \d+ at \[\d+\] is outside the vocabulary of 100"):
        model.generate("the cat")
    assert len(model.generate([1, 2], 3)) == 3


def test_which_tokenizer_a_folder_has(trained, tmp_path):
    assert isinstance(load_tokenizer(trained), HuggingFaceTokenizer)
    assert load_tokenizer(tmp_path) is None
    write_json(tmp_path / "tokenizer_config.json", SETTINGS)
    assert load_tokenizer(tmp_path) is None
    write_json(tmp_path / "tokenizer_config.json", BYTES)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    write_json(tmp_path / "tokenizer_config.json", [1])
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'tokenizer_config.json'}: expected an object"


@pytest.mark.parametrize("text", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe", b"[" * 100_000, b"null", b"5",
                                  b'{"model": {"type": "Evil"}}'], ids=repr)
def test_a_damaged_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")


def without_special_token(document: Any) -> None:
    del document["post_processor"]["special_tokens"]["<s>"]


def with_a_second_text(document: Any) -> None:
    document["post_processor"]["single"][1]["Sequence"]["id"] = "B"


def without_what_a_merge_makes(document: Any) -> None:
    del document["model"]["vocab"]["".join(document["model"]["merges"][-1]).replace(" ", "")]


@pytest.mark.parametrize("change", [without_special_token, with_a_second_text, without_what_a_merge_makes])
def test_a_panic_is_a_value_error(trained, tmp_path, change):
    """The library's own PanicException is no Exception: a server's guard would not hold it."""
    document = json.loads((trained / "tokenizer.json").read_text())
    change(document)
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path).encode("the cat")
    assert caught.type is ValueError and str(tmp_path / "tokenizer.json") in str(caught.value)


def test_a_panic_while_decoding_is_a_value_error(trained):
    class Backend:
        def decode(self, *_: Any, **__: Any) -> str:
            raise BaseException("out of range")

    tokenizer = load_tokenizer(trained)
    tokenizer.backend = Backend()
    with pytest.raises(ValueError) as caught:
        tokenizer.decode([1])
    assert str(caught.value) == f"decode: {trained / 'tokenizer.json'} cannot decode the ids: out of range"


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_an_interrupt_stays_one(trained, signal):
    class Backend:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise signal

    tokenizer = hugging_face(trained)
    tokenizer.backend = Backend()
    with pytest.raises(signal):
        tokenizer.encode("a")


def test_a_huge_tokenizer_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'tokenizer.json'}: 67108865 bytes, expected at most 67108864"


def test_a_missing_library_is_named(trained, monkeypatch, tmp_path):
    """Only where it is needed: ids go through a model without tokenizers, and a text without jinja2."""
    tokenizer = hugging_face(trained, chat_template="x")
    folder = copied(trained, write(tmp_path, small(vocab_size=304)))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    model = load(folder)
    assert model.generate([1, 2], 3).shape == (3,) and len(list(model.generate([1, 2], 3, stream=True))) == 3
    needs = "models: text needs the tokenizers library: pip install tokenizers"
    for use in (lambda: model.generate("the", 3), lambda: model.generate([1, 2], 3, stop="a"),
                lambda: model.tokenizer.decode([1]), lambda: model.tokenizer.apply_chat_template(CONVERSATION)):
        with pytest.raises(ImportError) as caught:
            use()
        assert str(caught.value) == needs
    with pytest.raises(ImportError) as caught:
        tokenizer.apply_chat_template([])
    assert str(caught.value) == "apply_chat_template needs jinja2: pip install jinja2"


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_a_tokenizer_of_another_format_is_named(tmp_path, name):
    (write(tmp_path, small()) / name).write_bytes(b"x")
    model = load(tmp_path)
    assert model.generate([1, 2], 3).shape == (3,)
    for use in (lambda: model.generate("a", 3), lambda: model.generate([1, 2], 3, stop="a")):
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value) == (
            f"models: {tmp_path} has {name}, and text needs tokenizer.json; get it from the model's page, or write it "
            "with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")


# ---- chat templates --------------------------------------------------------------------------------

CHAT = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'system' %}
[{{ message.content | trim }}]
    {% elif message['role'] == 'user' %}
{{ '<|user|>' + message['content'] + eos_token }}
    {% else %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
>{% endif %}"""


def rendered(trained: Path, template: str, messages: Any = CONVERSATION, **options: Any) -> str:
    return hugging_face(trained, chat_template=template).apply_chat_template(messages, **options)


def test_a_chat_template(trained):
    expected = '<s>\n[Be <brief> & kind.]\n<|user|>héllo "you"</s>\n'.replace("<s>\n", "<s>")
    assert rendered(trained, CHAT) == expected + ">"
    assert rendered(trained, CHAT, add_generation_prompt=False) == expected
    with pytest.raises(ValueError) as caught:
        rendered(trained, CHAT, [{"role": "x", "content": ""}])
    assert str(caught.value) == "apply_chat_template: unknown role x"


@pytest.mark.parametrize(("template", "expected"), [
    ("{{ messages | tojson }}", json.dumps(CONVERSATION, ensure_ascii=False)),
    ("{{ messages[1] | tojson(indent=2) }}", json.dumps(CONVERSATION[1], ensure_ascii=False, indent=2)),
    ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "system"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ("{{ strftime_now('%Y') | length }}", "4"), ("{{ bos_token }}|{{ pad_token }}|{{ eos_token }}", "<s>||</s>"),
    ("{{ tools is none }}{{ documents is none }}{{ missing }}", "TrueTrue"),
    ("{{ messages[0]['content'] }}", "Be <brief> & kind."),
    ("{% if true %}\n  x\n{% endif %}\ny", "  x\ny"),
    ("{{ messages | map(attribute='role') | join(',') }}", "system,user"),
], ids=repr)
def test_what_templates_use(trained, template, expected):
    assert rendered(trained, template) == expected


def test_variables_reach_the_template(trained):
    tokenizer = hugging_face(trained, chat_template="{{ tools[0].name }} {{ enable_thinking }}")
    assert tokenizer.apply_chat_template([], tools=[{"name": "f"}], enable_thinking=False) == "f False"


def test_where_a_template_comes_from(trained, tmp_path):
    folder = copied(trained, tmp_path)
    write_json(folder / "tokenizer_config.json", SETTINGS | {"chat_template": "from config"})
    assert load_tokenizer(folder).apply_chat_template([]) == "from config"
    write_json(folder / "tokenizer_config.json", SETTINGS | {"chat_template": [
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from list"}, 5]})
    assert load_tokenizer(folder).apply_chat_template([]) == "from list"
    (folder / "chat_template.jinja").write_text("from file é", encoding="utf-8")
    assert load_tokenizer(folder).apply_chat_template([]) == "from file é"


@pytest.mark.parametrize("template", [None, [], {}, [5], {"default": 5}, 5], ids=repr)
def test_no_template(trained, template):
    with pytest.raises(ValueError) as caught:
        hugging_face(trained, chat_template=template).apply_chat_template([])
    assert str(caught.value) == "apply_chat_template: the model has no chat template"


REFUSED = [
    "{{ ''.__class__.__mro__ }}", "{{ ().__class__.__base__.__subclasses__() }}", "{{ ''.__class__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__['os'] }}", "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__.os }}", "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__['sys'] }}", "{{ strftime_now.__globals__.sys.modules }}",
    "{{ strftime_now.__code__.co_code }}", "{{ messages.append({}) }}", "{{ messages.clear() }}",
    "{{ messages.pop() }}",
    "{{ messages.sort() }}", "{{ messages[0].update(role='x') }}", "{{ messages[0].pop('role') }}",
    "{{ messages[0].__setitem__('role', 'x') }}", "{{ messages[0].setdefault('x', 1) }}", "{{ messages[0].clear() }}",
    "{{ dict.__subclasses__() }}", "{{ dict.mro() }}", "{{ (1).__class__.__base__ }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(1).x.y }}",
    "{{ (''|attr('__class__')).__mro__ }}", "{{ ''['__class__']['__mro__'] }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% from 'os' import system %}", "{% extends 'x' %}",
    "{{ range(10 ** 9) }}", "{% for i in range(100001) %}{% endfor %}", "{{ config.items() }}",
    "{{ open('/etc/passwd') }}",
    "{{ __import__('os') }}", "{{ eval('1') }}", "{% debug %}", "{% do messages.append(1) %}",
]
BROKEN = [
    "{% for", "{{ }}", "{% endif %}", "{{ x() }}", "{{ {}.x.y }}", "{{ 1/0 }}", "{{ 1 % 0 }}", "{{ 'a'.encode('zz') }}",
    "{{ '{}'.format() }}", "{{ '{x}'.format() }}", "{{ '%d' % 'x' }}", "{{ [].index(1) }}", "{{ x | tojson }}",
    "{{ 'a' | nofilter }}", "{{ 'a' is notest }}", "{{ 'a' + 1 }}", "{{ raise_exception('no') }}",
    "{{ raise_exception() }}",
    "{{ 2 ** 100000 }}", "{{ 'x'.join([1]) }}", "{{ int }}{{ none.x.y }}", "{{ strftime_now(1) }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ '\\ud800' | tojson }}{{ ''.x() }}", "{{ [1, 2] | sum('x') }}", "{{ messages | groupby }}", "{{ 10.0 ** 400 }}",
]
SILENT = [
    "{{ ''.__class__ }}", "{{ messages.__class__ }}", "{{ messages[0].__class__ }}", "{{ lipsum.__globals__ }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}", "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ '' | attr('__class__') }}", "{{ ''['__class__'] }}", "{{ '%s' % ''.__class__ }}", "{{ none.__class__ }}",
    "{{ messages | map(attribute='__class__') | list }}", "{{ namespace(a=1).__dict__ }}", "{{ request }}{{ config }}",
    "{{ [''] | map('attr', '__class__') | list }}", "{{ messages | sort(attribute='__class__') | length }}",
    "{{ (messages | groupby('__class__') | list)[0].grouper }}", "{{ messages | sum(attribute='__len__', start='') }}",
]


@pytest.mark.parametrize("template", REFUSED, ids=repr)
def test_the_sandbox_holds(trained, template):
    messages = [dict(message) for message in CONVERSATION]
    with pytest.raises(ValueError) as caught:
        rendered(trained, template, messages)
    assert str(caught.value).startswith("apply_chat_template: ")
    assert messages == CONVERSATION


@pytest.mark.parametrize("template", SILENT, ids=repr)
def test_what_the_sandbox_hides_is_not_shown(trained, template):
    try:
        text = rendered(trained, template)
    except ValueError as error:
        assert str(error).startswith("apply_chat_template: ")
    else:
        assert not any(word in text for word in ("<", "class", "function", "module", "os", "0x", "__"))


@pytest.mark.parametrize("template", BROKEN, ids=repr)
def test_a_broken_template_is_a_value_error(trained, template):
    with pytest.raises(ValueError) as caught:
        rendered(trained, template)
    assert caught.type is ValueError and str(caught.value).startswith("apply_chat_template: ")


@pytest.mark.parametrize("template", [
    "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "{{ 'x' * 30000000 }}{{ 'y' * 30000000 }}"
    "{{ 'z' * 9000000 }}",
    "{% for i in range(99999) %}{{ messages[0].content * 200 }}{% endfor %}",
], ids=repr)
@pytest.mark.slow
def test_a_prompt_without_end_is_cut_off(trained, template):
    with pytest.raises(ValueError) as caught:
        rendered(trained, template)
    assert str(caught.value) == "apply_chat_template: the prompt exceeds 67108864 bytes"


def test_code_in_a_template_reaches_nothing(trained, tmp_path):
    trace = tmp_path / "executed"
    for start in ("cycler", "joiner", "namespace", "lipsum", "raise_exception", "strftime_now", "messages.append",
                  "self", "range", "dict", "''.join", "loop"):
        for path in (f"{start}.__init__.__globals__['__builtins__']", f"{start}.__globals__['__builtins__']",
                     f"({start} | attr('__globals__'))['__builtins__']", f"{start}.__self__.__class__"):
            with pytest.raises(ValueError):
                rendered(trained, "{{ " + f"{path}.open('{trace}', 'w').write('x')" + " }}")
    assert not trace.exists()


# ---- text from tokens ------------------------------------------------------------------------------

TEXT = "Hi, world!"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Model:
    """After "H" it says "i, world!" and ends."""
    return load(write_chain(tmp_path_factory.mktemp("chain"), following([*TEXT.encode(), 0]), eos=0))


def both(model: Model, prompt: Any, *arguments: Any, **options: Any) -> str:
    """The text, which the stream spells too, in pieces that are not empty."""
    text = model.generate(prompt, *arguments, **options)
    pieces = list(model.generate(prompt, *arguments, **options, stream=True))
    assert "".join(pieces) == text and all(pieces)
    return text


@pytest.mark.parametrize(("stop", "expected"), [
    (None, "i, world!"), ((), "i, world!"), ("?", "i, world!"), ("i", ""), (",", "i"), (", w", "i"), ("world!", "i, "),
    (["rl", "ld"], "i, wo"), (["ld", "rl"], "i, wo"), (["world", ","], "i"), (["orl", "worldwide"], "i, w"),
    (["worldwide", "orl"], "i, w"), ("d!?", "i, world!"), ("d! ", "i, world!"), ("!", "i, world"), ("Hi", "i, world!"),
    ("H", "i, world!"), ("i, world!", ""), (["xi", "ix", "i,x"], "i, world!"), (("o",), "i, w"), ("\0", "i, world!"),
], ids=repr)
def test_stop(speaker, stop, expected):
    assert both(speaker, "H", 50, stop=stop) == expected
    assert speaker.generate(["H", "w"], 50, stop=stop)[0] == expected


def test_what_may_become_a_stop_string_is_held_back(speaker):
    assert list(speaker.generate("H", 50, stream=True, stop="world?")) == ["i", ",", " ", "world!"]
    assert list(speaker.generate("H", 50, stream=True, stop=["wow", "orl!"])) == ["i", ",", " ", "w", "orld", "!"]
    assert list(speaker.generate("H", 6, stream=True, stop="world!")) == ["i", ",", " ", "wor"]


def test_ids_of_a_stopped_row(speaker):
    """Ids are all that was generated, the stop string's and the end of text included."""
    assert bytes(speaker.generate([72], 50, stop="wo").tolist()) == b"i, wo"
    assert bytes(speaker.generate([72], 50).tolist()) == b"i, world!\0"
    assert list(speaker.generate([72], 50, stream=True)) == [*b"i, world!\0"]
    assert [type(token) for token in speaker.generate([72], 2, stream=True)] == [int, int]


@pytest.mark.parametrize("count", range(12))
def test_max_new_tokens(speaker, count):
    assert both(speaker, "H", count) == "i, world!"[:count]
    assert len(speaker.generate([72], count)) == min(count, 10)


def test_several_rows_stream_with_their_numbers(speaker):
    found = list(speaker.generate(["H", "w", "!"], 50, stream=True))
    assert ["".join(piece for row, piece in found if row == i) for i in range(3)] == ["i, world!", "orld!", ""]
    assert speaker.generate(["H", "w", "!"], 50) == ["i, world!", "orld!", ""]
    ids = list(speaker.generate([[72], [119]], 3, stream=True))
    assert ids == [(0, 105), (1, 111), (0, 44), (1, 114), (0, 32), (1, 108)]
    assert list(speaker.generate(["w"], 2, stream=True)) == [(0, "o"), (0, "r")]


def test_a_stream_may_be_left(speaker):
    for piece in speaker.generate("H", 50, stream=True):
        assert piece == "i"
        break
    assert both(speaker, "H", 50) == "i, world!"


def test_characters_of_several_bytes(tmp_path):
    text = "Hé日🎉"
    model = load(write_chain(tmp_path, following([*text.encode(), 0]), eos=0))
    assert list(model.generate("H", 50, stream=True)) == ["é", "日", "🎉"]
    assert both(model, "H", 50, stop="日") == "é"
    assert both(model, "H", 50, stop="🎉") == "é日"
    cut = text.encode()[1:]
    for count in range(len(cut) + 1):
        assert both(model, "H", count) == cut[:count].decode(errors="replace")


@pytest.mark.parametrize("data", [b"a\xff\xfeb", b"a\xc3(b", b"a\xe6\x97b", b"a\xf0\x9f\x8e", b"\xa9\xc3",
                                  b"a\xef\xbf\xbdb"])
def test_bytes_that_are_no_text(tmp_path, data):
    model = load(write_chain(tmp_path, following([1, *data, 0]), eos=0))
    assert both(model, "\x01", 50) == data.decode(errors="replace")
    assert both(model, "\x01", 50, stop="b") == data.split(b"b")[0].decode(errors="replace")


def test_random_bytes_stream_to_the_same_text(tmp_path):
    model = load(write(tmp_path, small(vocab_size=256), tokenizer=BYTES))
    for seed in range(6):
        options = {"temperature": 3.0, "seed": seed, "stop": ["ab", "\ufffd\ufffd\ufffd\ufffdz"]}
        text = both(model, "x", 80, **options)
        ids = model.generate([0, ord("x")], 80, **options)
        assert text == ByteTokenizer().decode(ids.tolist()).split("ab")[0]
        assert len(text) > 10


def test_the_end_of_text(tmp_path):
    chain = following([*b"abc\n"])
    folder = write_chain(tmp_path, chain, eos=99)
    assert load(folder).generate("a", 9) == "b"
    write_json(folder / "generation_config.json", {"eos_token_id": [10, 98]})
    assert load(folder).generate("a", 9) == "" and load(folder).generate([97], 9).tolist() == [98]
    write_json(folder / "generation_config.json", {"eos_token_id": 10})
    assert load(folder).generate("a", 9) == "bc" and load(folder).generate([97], 9).tolist() == [98, 99, 10]
    write_json(folder / "generation_config.json", {"eos_token_id": 200})
    assert load(folder).generate("a", 6) == "bc\n\n\n\n"


def test_an_unfinished_character_at_the_end_of_text(tmp_path):
    model = load(write_chain(tmp_path, following([97, 98, 0xC3, 0]), eos=0))
    assert both(model, "a", 9) == "b\ufffd"

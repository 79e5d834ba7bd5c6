"""From a conversation to tokens and back: what a prompt gets around it, where a text stops, its first space."""
from __future__ import annotations

import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any, Literal

import chat_cases
import numpy as np
import pytest
from model_folder import small, tensors, write
from suite import case
from tiny_tokenizers import bytelevel, folder_of, sentencepiece
from tokenizers import processors

from forge_c.models import Model, load
from forge_c.models.chat_template import render
from forge_c.models.tokenizer import ByteTokenizer, ChatPrompt, TextStream, stop_ids
from forge_c.models.tokenizer_files import load_tokenizer
from forge_c.models.tool_schema import tool_schema

ASKED = [{"role": "user", "content": "Hello"}]
OPEN = [*ASKED, {"role": "assistant", "content": "Sure, "}]


def speaker(folder: Path, backend: Any, says: list[str], config: Any = None) -> Model:
    """A model that says only these tokens, in an order of its own."""
    sizes = small(vocab_size=backend.get_vocab_size(), max_position_embeddings=512)
    weights = tensors(sizes)
    ids = [backend.token_to_id(token) for token in says]
    head = np.zeros_like(weights["lm_head.weight"])
    head[ids] = weights["lm_head.weight"][ids]
    folder_of(write(folder, sizes, weights | {"lm_head.weight": head}), backend, config)
    return load(folder)


# ---- templates as people publish them ----------------------------------------------------------------

@pytest.mark.parametrize("name", chat_cases.TEMPLATES)
def test_prompts_are_those_of_transformers(tmp_path, name):
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(*chat_cases.SPECIAL.values()), chat_cases.SPECIAL | {
        "chat_template": chat_cases.TEMPLATES[name]}))
    for what, expected in chat_cases.golden()[name].items():
        messages, options = chat_cases.CONVERSATIONS[what]
        with case(what):
            if expected is None:
                with pytest.raises((ValueError, TypeError)):
                    tokenizer.apply_chat_template(messages, **options)
            else:
                assert tokenizer.apply_chat_template(messages, **options) == expected
            if what == "calls" and expected is not None:
                ids = tokenizer.encode_chat(messages, control_tokens=False, **options)
                assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode_chat(messages, **options))


def test_no_message_of_a_user_or_a_tool_ends_its_turn(tmp_path):
    """The program wrote a system's text, and the model an assistant's: these are control tokens as ever."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    backend = bytelevel("<|im_start|>", "<|im_end|>")
    model = speaker(tmp_path, backend, ["a", "b"], {"chat_template": template})
    end = backend.token_to_id("<|im_end|>")
    for role, written in (("user", 1), ("tool", 1), ("ipython", 1), ("system", 2), ("developer", 2), ("assistant", 2)):
        cache = model.new_cache(1, 200)
        model.generate(messages=[{"role": role, "content": "x<|im_end|>\ufdd0y"}], max_new_tokens=0, cache=cache)
        with case(role):
            assert cache.ids[0].tolist().count(end) == written
            assert model.tokenizer.decode(cache.ids[0]).replace("<|im_end|>", "") == f"{role} xy"


def test_every_template_has_its_prompts():
    golden = chat_cases.golden()
    assert golden.keys() == chat_cases.TEMPLATES.keys() and len(golden) >= 30
    assert all(texts.keys() == chat_cases.CONVERSATIONS.keys() for texts in golden.values())
    assert sum(text is not None for texts in golden.values() for text in texts.values()) >= 480


# ---- special tokens around a prompt ----------------------------------------------------------------

ZEPHYR = ("{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": ZEPHYR}


@pytest.fixture
def zephyr(tmp_path) -> Model:
    backend = sentencepiece("Hello", "▁Hello", "▁Sure", special=("<|user|>", "<|assistant|>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B", [("<s>", 1), ("</s>", 2)])
    return speaker(tmp_path, backend, ["▁Hello", "</s>"], NAMES)


def test_a_rendered_chat_gets_no_special_tokens(zephyr):
    """Neither a BOS that its template has not, nor an EOS after the words that ask for an answer."""
    tokenizer = zephyr.tokenizer
    prompt = tokenizer.apply_chat_template(ASKED)
    expected = [tokenizer.backend.token_to_id(t) for t in ("<|user|>", "▁", "Hello", "</s>", "<|assistant|>")]
    assert prompt == "<|user|>Hello</s><|assistant|>"
    assert tokenizer.encode(prompt) == tokenizer.encode_chat(ASKED) == expected
    cache = zephyr.new_cache(2, 20)
    zephyr.generate([prompt, "Hello"], 0, cache=cache)
    assert [row.tolist() for row in cache.ids] == [expected, [1, *expected[1:3], 2]]
    assert tokenizer.encode(str(prompt)) == [1, *expected, 2] and tokenizer.encode(str(prompt), False) == expected
    longer = prompt + "Hello"
    assert isinstance(longer, ChatPrompt) and tokenizer.encode(longer) == [*expected, *expected[1:3]]


def test_special_tokens_of_a_text_whose_control_tokens_are_text(zephyr):
    tokenizer = zephyr.tokenizer
    assert tokenizer.encode("Hello", control_tokens=False) == tokenizer.encode("Hello")
    ids = tokenizer.encode("<s>", control_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2) and {1, 2}.isdisjoint(ids[1:-1])


# ---- where a text stops ----------------------------------------------------------------------------

@pytest.fixture
def ending(tmp_path) -> Model:
    return speaker(tmp_path, bytelevel("<|im_start|>", "<|im_end|>"), ["<|im_end|>", "<|im_start|>", "a", "b"])


DRAW = {"temperature": 5.0, "top_k": 4, "seed": 2}


@pytest.mark.parametrize("stop", ["<|im_end|>", ["<|im_end|>"], "<|im_end|>\n", ["<|im_start|>", "<|im_end|>"],
                                  ["q", "<|im_end|>"]], ids=str)
def test_a_special_token_stops_a_text(ending, stop):
    """It is no part of the decoded text, in which it would be looked for in vain."""
    tokenizer = ending.tokenizer
    ids = ending.generate(np.array(tokenizer.encode("hello")), 40, **DRAW).tolist()
    ends = [tokenizer.special_ids[t] for t in ("<|im_start|>", "<|im_end|>") if t in str(stop)]
    first = min(ids.index(i) for i in ends)
    assert 0 < first < 39
    assert ending.generate("hello", 40, stop=stop, **DRAW) == tokenizer.decode(ids[:first])
    assert "".join(ending.generate("hello", 40, stop=stop, stream=True, **DRAW)) == tokenizer.decode(ids[:first])
    assert ending.generate(tokenizer.encode("hello"), 40, stop=stop, **DRAW).tolist() == ids[: first + 1]


def test_what_a_stop_text_may_be(ending):
    tokenizer = ending.tokenizer
    assert stop_ids(tokenizer, ["a", "<|im_en"]) == stop_ids(None, []) == stop_ids(ByteTokenizer(), ["\0"]) == set()
    with pytest.raises(ValueError) as caught:
        ending.generate("hello", 4, stop="a<|im_end|>")
    assert str(caught.value) == ("generate: stop 'a<|im_end|>' has text before the special token '<|im_end|>', which "
                                 "no text shows; expected the token alone, or the text alone")


# ---- the first space -------------------------------------------------------------------------------

WORDS = ("Hello", "▁Hello", "▁world", "▁cat")


@pytest.fixture
def llama2(tmp_path) -> Model:
    return speaker(tmp_path, sentencepiece(*WORDS), ["▁world", "▁cat"], {"bos_token": "<s>"})


@pytest.mark.parametrize("prompt", ["Hello", "Hello Hello", "é日🎉" * 20, ""], ids=repr)
def test_a_new_word_after_a_prompt_has_its_space(llama2, prompt):
    tokenizer = llama2.tokenizer
    ids = tokenizer.encode(prompt)
    new = llama2.generate(np.array(ids), 4).tolist()
    text = tokenizer.decode(ids + new)
    assert text.startswith(prompt) and text[len(prompt) :].count(" ") == (4 if prompt else 3)
    assert llama2.generate(prompt, 4) == text[len(prompt) :]
    assert "".join(llama2.generate(prompt, 4, stream=True)) == text[len(prompt) :]
    assert llama2.generate([prompt, "Hello"], 4)[0] == text[len(prompt) :]


def test_a_stop_text_may_begin_with_that_space(llama2):
    first = llama2.generate("Hello", 1)
    assert first in (" world", " cat") and llama2.generate("Hello", 1, stop=first) == ""


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_prompt_may_end_within_a_character(cut):
    """Ids are cut anywhere: what their rest spells is shown once, and so is what follows."""
    tokenizer, data = ByteTokenizer(), "aé日🎉b".encode()
    stream = TextStream(tokenizer, data[:cut])
    text = "".join(stream.push(i) for i in data[cut:]) + stream.rest()
    whole = data[:cut].decode(errors="ignore")
    assert whole + text == "aé日🎉b"


def test_a_prompt_whose_last_tokens_begin_within_a_character(llama2):
    tokenizer = llama2.tokenizer
    for more in range(4):
        ids = tokenizer.encode("日" * 40 + "a" * more)
        for new in ([3 + b for b in "日".encode()], [tokenizer.backend.token_to_id("▁cat")]):
            stream = TextStream(tokenizer, ids)
            text = "".join(stream.push(i) for i in new) + stream.rest()
            assert text == tokenizer.decode(ids + new)[40 + more :]


# ---- what messages may be --------------------------------------------------------------------------

def test_a_message_is_continued(tmp_path):
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{{ '>' if add_generation_prompt }}"
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": template}))
    assert tokenizer.apply_chat_template(OPEN) == "[Hello][Sure,]>"
    assert tokenizer.apply_chat_template(OPEN, continue_final_message=True) == "[Hello][Sure,"
    plain = template.replace(" | trim", "")
    assert tokenizer.apply_chat_template(OPEN, continue_final_message=True, chat_template=plain) == "[Hello][Sure, "
    assert OPEN[-1] == {"role": "assistant", "content": "Sure, "}
    ids = tokenizer.encode_chat(OPEN, continue_final_message=True, control_tokens=False)
    assert tokenizer.decode(ids) == "[Hello][Sure,"


@pytest.mark.parametrize(("messages", "options", "kind", "message"), [
    (OPEN, {"add_generation_prompt": True}, ValueError, "add_generation_prompt begins an answer, "
     "continue_final_message goes on with one; expected one of them"),
    ([], {}, ValueError, "continue_final_message needs a message, and messages is empty"),
    ([{"role": "assistant"}], {}, ValueError, "continue_final_message: the last message has no 'content'"),
    ([{"role": "assistant", "content": 5}], {}, TypeError,
     "continue_final_message: the last message's 'content' is 5, expected a text"),
    ([{"role": "assistant", "content": [{"type": "image"}]}], {}, ValueError,
     "continue_final_message: the last message's 'content' has no text"),
    (OPEN, {"chat_template": "x"}, ValueError,
     "continue_final_message: the chat template does not read 'content'"),
    (OPEN, {"chat_template": "{{ messages[0].content }}"}, ValueError,
     "continue_final_message: the chat template changes the last message, so that its end cannot be found in the "
     "prompt"),
], ids=str)
def test_a_message_that_cannot_be_continued(tmp_path, messages, options, kind, message):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": template}))
    with pytest.raises(kind) as caught:
        tokenizer.apply_chat_template(messages, continue_final_message=True, **options)
    assert str(caught.value) == f"apply_chat_template: {message}" and caught.type is kind


@dataclasses.dataclass
class Message:
    role: str
    content: Any
    name: str | None = None


class Shown(str):
    def __str__(self) -> str:
        return "another text"


@pytest.mark.parametrize(("messages", "options", "shown"), [
    ([{"role": "user", "content": None, "name": "a"}], {}, [{"role": "user", "name": "a"}]),
    ([Message("user", "hi")], {}, [{"role": "user", "content": "hi"}]),
    ([Message("user", Shown("hi"))], {}, [{"role": "user", "content": "hi"}]),
    ([{"role": "user", "content": [{"n": np.float32(0.5), "b": np.bool_(False), "o": np.ones(2), "t": (1, True)}]}], {},
     [{"role": "user", "content": [{"n": 0.5, "b": False, "o": "<ndarray>", "t": [1, True]}]}]),
    ([{"role": "assistant", "reasoning": "r"}], {},
     [{"thinking": "r", "role": "assistant", "reasoning": "r", "reasoning_content": "r"}]),
], ids=str)
def test_messages_are_plain_data(tmp_path, messages, options, shown):
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": "{{ messages | tojson }}"}))
    assert json.loads(tokenizer.apply_chat_template(messages, **options)) == shown


@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"messages": "hi"}, TypeError, "messages is 'hi', expected a list of {'role': ..., 'content': ...}"),
    ({"messages": ASKED[0]}, TypeError,
     "messages is {'role': 'user', 'content': 'Hello'}, expected a list of {'role': ..., 'content': ...}"),
    ({"messages": None}, TypeError, "messages is None, expected a list of {'role': ..., 'content': ...}"),
    ({"messages": ["hi"]}, TypeError, "messages[0] is 'hi', expected a dict with role and content"),
    ({"tools": "f"}, TypeError, "tools is 'f', expected a list of JSON schemas and functions"),
    ({"tools": [5]}, TypeError, "tools[0] is a int, expected a JSON schema (a dict) or a function"),
    ({"documents": ["d"]}, TypeError, "documents[0] is 'd', expected a dict with title and text"),
    ({"documents": {"title": "t"}}, TypeError,
     "documents is {'title': 't'}, expected a list of {'title': ..., 'text': ...}"),
], ids=str)
def test_what_is_no_conversation(tmp_path, options, kind, message):
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": "{{ messages }}"}))
    for call in (tokenizer.apply_chat_template, tokenizer.encode_chat):
        with pytest.raises(kind) as caught:
            call(**({"messages": ASKED} | options))
        assert str(caught.value) == f"apply_chat_template: {message}"


def test_messages_without_end(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": "{{ messages }}"}))
    endless: list[Any] = []
    endless.append({"role": "user", "content": endless})
    with pytest.raises(ValueError) as caught:
        tokenizer.apply_chat_template(endless)
    assert str(caught.value) == "apply_chat_template: what it is given is nested too deeply"


@pytest.mark.parametrize(("call", "shown"), [
    ("tojson", '{"b": "é<", "a": [1]}'), ("tojson(true)", '{"b": "\\u00e9<", "a": [1]}'),
    ("tojson(ensure_ascii=true)", '{"b": "\\u00e9<", "a": [1]}'), ("tojson(sort_keys=true)", '{"a": [1], "b": "é<"}'),
    ("tojson(separators=(',', ':'))", '{"b":"é<","a":[1]}'),
    ("tojson(indent=1)", '{\n "b": "é<",\n "a": [\n  1\n ]\n}'),
    ("tojson(indent='-', separators=[';', '='])", '{\n-"b"="é<";\n-"a"=[\n--1\n-]\n}'),
    ("tojson(false, 0)", '{\n"b": "é<",\n"a": [\n1\n]\n}'),
])
def test_tojson(call, shown):
    assert render("{{ x | " + call + " }}", {"x": {"b": "é<", "a": [1]}}) == shown


@pytest.mark.parametrize("call", ["tojson(indent=65)", "tojson(indent='x' * 65)", "tojson(separators=('x' * 65, ''))",
                                  "tojson(separators=5)", "tojson(separators=(1, 2))", "tojson(indent={})"])
def test_tojson_has_limits(call):
    with pytest.raises(ValueError, match="^apply_chat_template: "):
        render("{{ [[1]] | " + call + " }}", {})


def test_generation_marks_are_no_text():
    marked = ("{% for m in m %}{%- generation -%}\n {{ m }}{% set x = m %}{% endgeneration %}|{{ x }}{{ loop.index }}"
              "{% generation %}{{ loop.last }}{% if m %}{% generation %}!{% endgeneration %}{% endif %}"
              "{% endgeneration %}{% endfor %}")
    assert render(marked, {"m": "ab"}) == "a|1False!b|2True!"
    for broken in ("{% generation %}", "{% endgeneration %}", "{% generation x %}{% endgeneration %}"):
        with pytest.raises(ValueError, match="^apply_chat_template: "):
            render(broken, {})


# ---- Python functions as tools ---------------------------------------------------------------------

class Colour(enum.Enum):
    red = "red"
    third = 3


def paint(what: str, colour: Colour, times: int = 1, where: tuple[float, float] | None = None,
          how: Literal["wet", "dry"] = "wet", extra: dict[str, list[int]] | None = None, any: Any = None,
          n: int | float = 1) -> bool:
    """Paints something.
    In a colour.

    Args:
        what: the thing: any
            that is flat
        colour (Colour): its new colour
        times: how often (choices: [1, 2])
        where: from here

        how: the way
        extra: the rest
        any: whatever
        n: a number

    Returns:
        whether it went well
    """
    return bool(what)


PAINT = {"type": "function", "function": {
    "name": "paint", "description": "Paints something.\nIn a colour.", "parameters": {
        "type": "object", "properties": {
            "what": {"type": "string", "description": "the thing: any that is flat"},
            "colour": {"type": ["string", "integer"], "enum": ["red", 3], "description": "its new colour"},
            "times": {"type": "integer", "enum": [1, 2], "description": "how often"},
            "where": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "nullable": True,
                      "description": "from here"},
            "how": {"type": "string", "enum": ["wet", "dry"], "description": "the way"},
            "extra": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}},
                      "nullable": True, "description": "the rest"},
            "any": {"description": "whatever"},
            "n": {"type": ["integer", "number"], "description": "a number"}}, "required": ["what", "colour"]},
    "return": {"type": "boolean", "description": "whether it went well"}}}


def test_a_function_as_a_tool(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": "{{ tools | tojson }}"}))
    assert tokenizer.apply_chat_template(ASKED, tools=[paint]) == json.dumps([PAINT])
    assert tool_schema(paint) == PAINT


def test_schemas_are_those_of_transformers():
    pytest.importorskip("transformers")
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException

    try:
        theirs = get_json_schema(paint)
    except DocstringParsingException:
        pytest.skip("this version of transformers knows no types in docstrings, as 5.17")
    assert json.dumps(theirs) == json.dumps(PAINT)


def no_docstring(x: int) -> None: ...


def no_annotation(x) -> None:
    """A tool."""


def not_described(x: int) -> None:
    """A tool.

    Args:
        y: another
    """


def of_a_class(x: Path) -> None:
    """A tool.

    Args:
        x: a path
    """


def bad_choices(x: int) -> None:
    """A tool.

    Args:
        x: a number (choices: 1, 2)
    """


@pytest.mark.parametrize(("function", "kind", "message"), [
    (no_docstring, ValueError, "no_docstring has no docstring, expected one that says what it does"),
    (no_annotation, TypeError, "no_annotation: argument 'x' has no annotation"),
    (not_described, ValueError, "not_described: the docstring's Args section does not describe 'x'"),
    (of_a_class, TypeError, "of_a_class: argument 'x' has the annotation <class 'pathlib"),
    (bad_choices, ValueError, "bad_choices: x: choices is 1, 2, expected a JSON list"),
])
def test_a_function_that_says_too_little(tmp_path, function, kind, message):
    tokenizer = load_tokenizer(folder_of(tmp_path, bytelevel(), {"chat_template": "{{ tools | tojson }}"}))
    with pytest.raises(kind, match=re.escape(f"apply_chat_template: tools[1]: {message}")) as caught:
        tokenizer.apply_chat_template(ASKED, tools=[paint, function])
    assert caught.type is kind

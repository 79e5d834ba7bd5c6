"""Chat templates have limits of time and memory, and within them they say what they say in jinja2's own sandbox."""
from __future__ import annotations

import json
from typing import Any

import pytest
from child import run_script
from hostile_templates import HOSTILE
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pace import slowness

from forge_c.models import chat_budget
from forge_c.models.chat_template import render

pytestmark = pytest.mark.slow

# Templates that run until the clock stops them would take minutes: most are stopped after a fifth of a second.
CHILD = """
import re, sys, time
from child import limit_address_space
from hostile_templates import HOSTILE
from pace import slowness
import forge_c
from forge_c.models import chat_budget
from forge_c.models.chat_template import render
chat_budget.MAX_SECONDS = {seconds}
limit_address_space(3 << 30)
sys.unraisablehook = id  # Python 3.12 tells of generators that it closes where the stack ends: a hook in C is silent
for name in {names!r}:
    start = time.process_time()
    try:
        print(name, "rendered", len(render(HOSTILE[name], {{"messages": []}})))
    except ValueError as error:
        assert str(error).startswith("apply_chat_template: "), error
    seconds = time.process_time() - start
    if seconds > {seconds} + 1 and seconds > {seconds} + slowness():
        print(name, "took", seconds)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
if peak > 300e6:
    print({names!r}, "took", peak)
"""


@pytest.mark.parametrize("part", range(4))
def test_no_template_takes_long_or_much_memory(part):
    names = list(HOSTILE)[part::4]
    assert run_script(CHILD.format(names=names, seconds=0.2), timeout=200) == ""


@pytest.mark.parametrize(("template", "message"), [
    (HOSTILE["times"], "it makes a value of more than 33554432 bytes"),
    (HOSTILE["slices"], "it makes more than 134217728 bytes"),
    (HOSTILE["power"], "it makes an integer of more than 16384 bits"),
    (HOSTILE["percent width"], "a format has width 2000000000, expected at most 9999"),
    (HOSTILE["prompt of data"], "the prompt exceeds 67108864 bytes"),
    (HOSTILE["text"], "it has more than 262144 characters"), (HOSTILE["tokens"], "it has more than 20000 tokens"),
    (HOSTILE["trim"], "it searches 10000001 characters in 20000000"),
    (HOSTILE["wordcount"], "wordcount is for texts of at most 65536 bytes"),
])
def test_the_message_says_which_limit(monkeypatch, template, message):
    monkeypatch.setattr(chat_budget, "MAX_SECONDS", 60.0)
    with pytest.raises(ValueError) as caught:
        render(template, {})
    assert str(caught.value) == f"apply_chat_template: {message}"


def test_the_clock_is_named(monkeypatch):
    assert chat_budget.MAX_SECONDS == 2.0
    monkeypatch.setattr(chat_budget, "MAX_SECONDS", 0.1)
    with pytest.raises(ValueError) as caught:
        render(HOSTILE["loops"], {})
    assert str(caught.value) == "apply_chat_template: it takes more than 0.1 seconds"


# ---- what is within the limits ---------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": f"f{i}", "description": "says <\"hé\">", "parameters": {
    "type": "object", "properties": {"x": {"type": "string", "enum": ["a", "b"]}}, "required": ["x"]}}}
    for i in range(4)]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind.\n"}, {"role": "user", "content": " What is 2 + 2? \U0001f389"},
    {"role": "assistant", "content": "<think>\nfour\n</think>\n\n4", "tool_calls": [
        {"id": "1", "function": {"name": "f1", "arguments": {"x": "a", "n": 1.5, "l": [1, None, True]}}}]},
    {"role": "tool", "content": "ok", "name": "f1"}, {"role": "user", "content": [{"type": "text", "text": "And 3?"}]}]
TEMPLATES = {
    "turns": "{% for m in messages %}<|{{ m.role }}|>\n"
             "{{ m['content'] | trim if m.content is string else m.content[0].text"
             " }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "thinking": "{%- set ns = namespace(last=messages|length - 1, found=false) %}{%- for m in messages[::-1] %}"
                "{%- set at = (messages|length - 1) - loop.index0 %}{%- if not ns.found and m.role == 'user' %}"
                "{%- set ns.found = true %}{%- set ns.last = at %}{%- endif %}{%- endfor %}{%- for m in messages %}"
                "{%- if m.role == 'assistant' and '</think>' in m.content %}"
                "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
                "[{{ m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].strip() }}]{%- endif %}"
                ""
                "{{ loop.index0 > ns.last, loop.first, loop.last, loop.length, loop.previtem is defined }}"
                "{%- endfor %}",
    "tools": "{%- for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=4) }}{% if not loop.last %}, {% endif %}"
             "{%- endfor %}{%- for m in messages if m.tool_calls %}{%- for c in m.tool_calls %}{{ c.function.name }}("
             "{%- for k, v in c.function.arguments.items() %}{{ k }}={{ v if v is string else v | tojson }}"
             "{{ ', ' if not loop.last }}{% endfor %}){% endfor %}{% endfor %}",
    "macros": "{%- macro show(x, depth=0) %}{%- if x is mapping %}"
              "{%- for k, v in x | dictsort %}{{ '  ' * depth ~ k }}: "
              "{{ show(v, depth + 1) }}\n{%- endfor %}{%- elif x is iterable and x is not string %}"
              "{{ x | map('string') | join(', ') }}{%- else %}{{ x }}{%- endif %}{%- endmacro %}{{ show(tools[0]) }}",
    "filters": "{{ messages | map(attribute='role') | unique | sort | join(' | ') }}"
               "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
               "{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | list }}"
               "{{ messages | groupby('role') | map('first') | list }}{{ [3, 1, 2] | sort(reverse=true) }}"
               "{{ [1, 2, 3] | sum }}{{ [{'n': 1}, {'n': 2}] | sum(attribute='n') }}{{ [1, 2] | max }}"
               "{{ 'b a' | list }}"
               "{{ range(7) | batch(3, 0) | list }}{{ range(7) | slice(3) | map('list') | list }}{{ 'x' | center(9) }}|"
               "{{ 'a\nb' | indent(2, true) }}{{ 'abc' | replace('b', 'xx') }}{{ 'a b' | title }}{{ 1.256 | round(2) }}"
               "{{ '%s-%5.2f-%(x)s' | replace('%(x)s', '') | format('a', 1.5) }}{{ 'a<b' | escape }}{{ 'aBc' | upper }}"
               "{{ ['b', 'a'] | min }}{{ [1, 2] | last }}{{ 'abc' | reverse }}{{ 'a b c' | wordcount }}"
               "{{ none | d(1) }}"
               "{{ 'long text here' | truncate(8) }}{{ 'a b' | urlencode }}{{ '5' | int + 1 }}{{ [2, 1] | tojson }}",
    "operators": "{{ 7 // 2, 7 % 2, 2 ** 10, 7 / 2, -3, 'a' + 'b', [1] + [2], 'ab' * 3, '%03d|%-4s|%%' % (7, 'x') }}"
                 "{{ '%(a)s %(b)r' % {'a': 1, 'b': 'x'} }}{{ '{0:>5}|{x!r}|{1[k]}'.format('a', {'k': 1}, x='y') }}"
                 "{{ '{a}'.format_map({'a': 1}) }}{{ 1 ~ 'a' ~ none }}{{ 1 < 2 < 3, 1 in [1], 'a' not in 'abc' }}"
                 "{{ 'a,b,,c'.split(','), ' a b '.split(), 'a-b'.partition('-'), 'x'.join(['1', '2']), 'ab'.rjust(5) }}"
                 "{{ dict(a=1, b=2), dict([['k', 1]]), dict({'q': 1}, z=2), namespace(a=1).a, cycler(1, 2).next() }}"
                 "{% set a, (b, c) = 1, (2, 3) %}{{ a, b, c }}{{ 'abc'[1:], 'abc'[-1], [1, 2, 3][::2] }}",
    "blocks": "{% set x %}{% for i in range(3) %}{{ i }}{% if i == 1 %}{% continue %}{% endif %},{% endfor %}"
              "{% endset %}"
              "{{ x }}{% filter upper %}a{{ x }}{% endfilter %}{% macro m() %}({{ caller() }}){% endmacro %}"
              "{% call m() %}in{% endcall %}{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}"
              "{% endfor %}{% for i in [] %}{% else %}none{% endfor %}{% with y = 1 %}{{ y }}{% endwith %}"
              "{% block b %}block{% endblock %}{{ self.b() }}{% raw %}{{ raw }}{% endraw %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_the_plain_sandbox(name):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    variables = {"messages": MESSAGES, "tools": TOOLS, "add_generation_prompt": True, "eos_token": "</s>"}
    expected = plain.from_string(TEMPLATES[name]).render(**variables)
    assert render(TEMPLATES[name], variables) == expected != ""


def test_a_long_conversation_is_within_the_limits(monkeypatch):
    """2000 turns of 2000 characters: four million, about a million tokens."""
    monkeypatch.setattr(chat_budget, "MAX_SECONDS", chat_budget.MAX_SECONDS * slowness())
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} héllo " * 250} for i in range(2000)]
    text = render(TEMPLATES["turns"], {"messages": turns, "eos_token": "</s>"})
    assert text.count("</s>") == 2000 and len(text) > 4_000_000
    growing = ("{% set ns = namespace(kept=[]) %}{% for m in messages %}{% if m.role == 'user' %}"
               "{% set ns.kept = ns.kept + [m] %}{% endif %}{% endfor %}{{ ns.kept | length }}")
    assert render(growing, {"messages": turns[:1000]}) == "500"


def test_each_rendering_has_a_budget_of_its_own():
    for _ in range(6):
        assert render("{{ ('x' * 30000000) | length }}", {}) == "30000000"

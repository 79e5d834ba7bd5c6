"""Conversations, and chat templates for them: the constructions of those that people publish, in words of our own.

tools/make_golden.py renders each with transformers into tests/templates/prompts.json.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "templates"
GOLDEN = FOLDER / "prompts.json"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

# What each stands for. llama2: Mistral v0.1 and CodeLlama too. chatml: Qwen 1.5, SmolLM2, Hermes, Dolphin, InternLM2.
# mistral3: Nemo, Large. qwen25: Hermes 2 Pro and 3. qwen3: QwQ. xml_tools: Qwen3-Coder. zephyr: TinyLlama, StableLM.
# deepseek: V3, R1 and its distillations. command_tools: Command R. typescript: gpt-oss. content_lists: LFM2, Pixtral,
# Llama 4. odds: GLM-4, Hunyuan, Falcon 3, Nemotron. careless: what is published by accident.
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}

# ---- conversations ---------------------------------------------------------------------------------

_SYSTEM = {"role": "system", "content": " Be kind & <brief>. "}
_ASK = {"role": "user", "content": "Héllo \"you\"!\n  What is 2 + 2? 🎉 "}
_ANSWER = {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nIt is 4.\n"}
_AGAIN = {"role": "user", "content": "And 'twice'?"}
_CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "abcdef012", "type": "function", "function": {"name": "look_up", "arguments": {"what": "é", "n": 2}}}]}
_RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "abcdef012", "content": "18 °C"}
TOOLS = [{"type": "function", "function": {
    "name": "look_up", "description": "Looks up <a> thing.", "parameters": {"type": "object", "properties": {
        "what": {"type": "string", "description": "which \"thing\"", "enum": ["é", "b"]},
        "n": {"type": "integer", "default": 1}, "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}, "required": ["x"]}},
        "required": ["what"]}}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {
        "type": "object", "properties": {}, "required": []}}}]
_TURN = {"add_generation_prompt": True}
_LIST = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " see? "}]}

# name: (messages, options)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "question": ([_ASK], _TURN), "no prompt": ([_ASK], {"add_generation_prompt": False}),
    "system": ([_SYSTEM, _ASK], _TURN), "turns": ([_SYSTEM, _ASK, _ANSWER, _AGAIN], _TURN),
    "answered": ([_ASK, _ANSWER], {"add_generation_prompt": False}), "twice": ([_ASK, _ASK], _TURN),
    "continued": ([_ASK, _ANSWER], {"add_generation_prompt": False, "continue_final_message": True}),
    "tools": ([_SYSTEM, _ASK], _TURN | {"tools": TOOLS}), "no tools": ([_ASK], _TURN | {"tools": []}),
    "calls": ([_SYSTEM, _ASK, _CALL, _RESULT], _TURN | {"tools": TOOLS}),
    "called": ([_ASK, _CALL | {"content": "Well."}, _RESULT, _RESULT, _ANSWER, _AGAIN], _TURN | {"tools": TOOLS[:1]}),
    "built in": ([_ASK, _CALL, _RESULT | {"role": "ipython"}], _TURN | {
        "builtin_tools": ["look_up", "code_interpreter"], "tools_in_user_message": False}),
    "thinking off": ([_SYSTEM, _ASK, _ANSWER, _AGAIN], _TURN | {"enable_thinking": False, "thinking": True}),
    "reasoning": ([_ASK, {"role": "assistant", "content": "4", "reasoning": "two and two"}, _AGAIN], _TURN),
    "reasoned": ([_ASK, {"role": "assistant", "content": "4", "reasoning_content": "two and two"}],
                 {"add_generation_prompt": False}),
    "documents": ([_ASK], _TURN | {"documents": [{"title": "A", "text": "a\n"}, {"title": "B", "text": "b"}],
                                   "controls": {"citations": True, "length": "short"}}),
    "content": ([_LIST, {"role": "assistant", "content": ""}, _LIST | {"name": "Ann"}], _TURN),
    "switches": ([_SYSTEM | {"content": "/system_override Be kind. /no_think"}, _ASK], _TURN | {
        "xml_tools": TOOLS[:1], "python_tools": ["def f(): ..."], "date_string": "1 Jan", "reasoning_effort": "high",
        "eos_token": "<other>"}),
    "empty": ([{"role": "user", "content": ""}], _TURN),
}


def golden() -> dict[str, dict[str, str | None]]:
    """Text of each template and conversation by transformers; None where it raises an error."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))

"""A chat template, rendered in jinja2's immutable sandbox within a Budget of time and memory."""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial, wraps
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter, make_multi_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_environment

from forge_c.models.chat_budget import ITEM, Budget, OverBudget, joined_nbytes, width
from forge_c.models.chat_messages import Continued, plain, plain_documents, plain_messages, plain_tools
from forge_c.models.tokenizer import MAX_TEMPLATE

_MAX_TOKENS = 20_000  # of the template; the longest that people publish have 5000
_MAX_RENDERED = 64 << 20
_MAX_INDENT = 64
_MAX_COMPILED = 8
_SHORT = 1 << 16  # bytes, for filters that take long or much memory for each character

_TEXT_METHODS = frozenset("""capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix
    rfind rindex rpartition rstrip startswith strip swapcase title upper
    center expandtabs join ljust replace rjust rsplit split splitlines zfill""".split())
_SEARCHES = frozenset("lstrip rfind rindex rpartition rstrip strip".split())  # that take len(text) * len(argument)
_WHOLE = frozenset("batch groupby list max min slice sort unique".split())  # filters that make a list of what comes
_KEY_AT = {"groupby": 1, "max": 2, "min": 2, "sort": 3, "unique": 2}  # where `attribute` stands, which they compare
_ESCAPING = frozenset("e escape forceescape tojson urlencode".split())  # up to six bytes for one
_SLOW = frozenset("pprint striptags title urlize wordcount wordwrap xmlattr".split())


class _Counter(Extension):
    """Tokens of a template, so that compiling it takes a limited time too."""

    def filter_stream(self, stream: Any) -> Any:
        for count, token in enumerate(stream):
            if count == _MAX_TOKENS:
                raise OverBudget(f"it has more than {_MAX_TOKENS} tokens")
            self.environment.budget.tick()  # type: ignore[attr-defined]
            yield token


class _Generation(Extension):
    """{% generation %}: marks for training what the model wrote; here its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Compiler(CodeGenerator):
    """Code in which every block of statements ticks, and every value that an expression makes is paid for."""

    def _wrapped(self, function: str, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write(f"environment.budget.{function}(")
        visit(node, frame)
        self.write(")")

    def blockvisit(self, statements: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.budget.tick()")
        super().blockvisit(statements, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._wrapped("made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._wrapped("made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._wrapped("made", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._wrapped("made", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        """`== x` of a comparison."""
        self.write(f" {operators[node.op]} ")
        self._wrapped("ticked", self.visit, node.expr, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.budget.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:
        self.fail("autoescape is for HTML, not for chats", node.lineno)


class _Namespace(Namespace):
    """The one value that a template can change: printed, it would show itself, or grow without being made."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    """str.format that pays for each field."""

    def parse(self, format_string: str) -> Any:
        budget: Budget = self._env.budget  # type: ignore[attr-defined]
        for part in super().parse(format_string):
            budget.spend(ITEM)
            yield part

    def format_field(self, value: Any, format_spec: str) -> str:
        budget: Budget = self._env.budget  # type: ignore[attr-defined]
        budget.spend(ITEM * len(format_spec))
        budget.check_widths(re.findall(r"\d+", format_spec))
        return budget.text(super().format_field(budget.ticked(value), format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget: Budget = self._env.budget  # type: ignore[attr-defined]
        budget.weigh(value)
        return budget.made(super().convert_field(value, conversion))


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Compiler
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,
                         extensions=[loopcontrols, _Counter, _Generation])
        self.budget = Budget()
        self.finalize = self.budget.text
        self.concat = self.budget.joined  # type: ignore[assignment]
        self.globals |= {"dict": partial(_dict, self.budget), "namespace": _Namespace,
                         "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]
        self.filters |= {"join": _join, "sum": _sum, "tojson": _tojson}
        tables: tuple[dict[str, Any], ...] = self.filters, self.tests
        for table in tables:
            for name, function in table.items():
                table[name] = self._paid(name, function)

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that pays: what it takes is weighed, since it may be printed or compared."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            given = list(args[first:])
            self.budget.tick()
            if given and name in _WHOLE:
                given[0] = self.budget.listed(given[0])
            for value in (*given, *kwargs.values()):
                self.budget.weigh(value)
            self._check_filter(name, given, kwargs)
            result = function(*args[:first], *given, **kwargs)
            return result if given and result is given[0] else self.budget.made(result)

        return paid

    def _check_filter(self, name: str, given: list[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse or pay for what the arguments of a filter can make long."""
        budget = self.budget

        def argument(at: int, key: str, default: Any = None) -> Any:
            return given[at] if len(given) > at else kwargs.get(key, default)

        if name in _SLOW and budget.weigh(given[0]) > _SHORT:
            raise OverBudget(f"{name} is for texts of at most {_SHORT} bytes")
        if name in _ESCAPING:
            budget.check_size(6 * budget.weigh(given[0]))
        if name in _KEY_AT and argument(_KEY_AT[name], "attribute") is not None:
            key = make_multi_attrgetter(self, argument(_KEY_AT[name], "attribute"))
            budget.weigh_all(part for item in given[0] for part in key(item))
        if name == "center":
            budget.spend(4 * _size(argument(1, "width", 80)))
        elif name == "indent":
            text, margin = str(given[0]), argument(1, "width", 4)
            margin = len(margin) if isinstance(margin, str) else _size(margin)
            budget.spend(4 * len(text) + (text.count("\n") + 1) * (ITEM + 4 * margin))
        elif name == "replace":
            budget.check_replace(*(str(argument(at, key)) for at, key in enumerate(("s", "old", "new"))))
        elif name == "trim":
            budget.check_search(given[0], argument(1, "chars"))
        elif name == "format":
            budget.check_percent(str(given[0]), kwargs or tuple(given[1:]))
        elif name == "wordwrap":
            budget.spend(4 * len(given[0]) * (1 + len(argument(3, "wrapstring") or "\n")))
        elif name == "batch" and argument(2, "fill_with") is not None or name == "slice":
            budget.spend(ITEM * _size(argument(1, "linecount" if name == "batch" else "slices")))
        elif name == "round" and abs(argument(1, "precision", 0)) > 1000:
            raise OverBudget("round has a precision of more than 1000 digits")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.weigh(left), budget.weigh(right)
        if isinstance(left, str) and (operator == "%" or (operator == "+" and isinstance(right, str))):
            if operator == "+":
                budget.spend(joined_nbytes((left, right)))
            else:
                budget.check_percent(left, right)
            return super().call_binop(context, operator, left, right)
        if isinstance(left, bytes) or isinstance(right, bytes):
            raise SecurityError(f"{operator} of bytes")
        if operator == "**":
            budget.check_power(left, right)
        paid = operator == "*" and budget.paid_product(left, right)
        result = super().call_binop(context, operator, left, right)
        if paid:
            budget.weigh(result)
        return result if paid else budget.made(result)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.tick()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """The names are jinja2's, so that no keyword of a template meets them."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType | MethodType) and owner is not None:
            args = __self._checked_method(owner, __obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        is_lookup = isinstance(owner, Mapping) and __obj.__name__ == "get"
        return result if is_lookup else __self.budget.made(result)

    def _checked_method(self, owner: Any, method: Any, args: tuple[Any, ...],
                        kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments with which a method of a value may be called; those of a text may make a longer one."""
        name, budget = method.__name__, self.budget
        if isinstance(owner, str):
            if name not in _TEXT_METHODS:
                raise SecurityError(f"the method {name} of a text is not for templates")
            size = args[0] if args else kwargs.get("tabsize", kwargs.get("sep"))
            if name in ("center", "ljust", "rjust", "zfill"):
                budget.spend(4 * _size(size))
            elif name == "expandtabs":
                budget.spend(4 * (len(owner) + owner.count("\t") * _size(8 if size is None else size)))
            elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
                budget.check_replace(owner, args[0], args[1])
            elif name in ("split", "rsplit", "splitlines"):
                budget.check_search(owner, size if name == "rsplit" else None)
                known = isinstance(size, str) and name != "splitlines"
                budget.spend(ITEM * (owner.count(size) + 1) if known else ITEM // 2 * len(owner))
            elif name in _SEARCHES and args:
                budget.check_search(owner, args[0])
            elif name == "join" and args:
                pieces = budget.listed(args[0])
                budget.spend(budget.weigh_all(pieces) + 4 * len(owner) * len(pieces))
                return (pieces, *args[1:])
        elif isinstance(owner, int | float | bytes | bytearray | memoryview | type):
            raise SecurityError(f"the method {name} of {type(owner).__name__} is not for templates")
        return args

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        name = getattr(value, "__name__", None)
        if not isinstance(value, BuiltinMethodType | MethodType) or not isinstance(value.__self__, str):
            return None
        if name not in ("format", "format_map"):
            return None
        text = str(value.__self__)

        def formatted(*args: Any, **kwargs: Any) -> str:
            if name == "format_map":
                if len(args) != 1 or kwargs:
                    raise TypeError("format_map() takes one argument")
                return _Formatter(self).vformat(text, (), args[0])
            return _Formatter(self).vformat(text, args, kwargs)

        return formatted


@pass_environment
def _join(environment: _Sandbox, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    values = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return environment.budget.joined(values, environment.budget.text(d))


@pass_environment
def _sum(environment: _Sandbox, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    values = iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable)
    for value in values:
        start = environment.call_binop(None, "+", start, value)  # type: ignore[arg-type]
    return start


@pass_environment
def _tojson(environment: _Sandbox, value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """The order of the arguments is that of transformers, for which templates are written, not jinja2's."""
    budget = environment.budget
    if isinstance(indent, int | str) and (len(indent) if isinstance(indent, str) else indent) > _MAX_INDENT:
        raise OverBudget(f"tojson has indent {str(indent)[:80]!r}, expected at most {_MAX_INDENT}")
    if separators is not None and any(len(text) > _MAX_INDENT for text in separators):
        raise OverBudget(f"tojson has separators of more than {_MAX_INDENT} characters")
    encoder = json.JSONEncoder(ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators,
                               sort_keys=bool(sort_keys))
    if indent is None and separators is None:
        budget.spend(budget.weigh(value))
        return encoder.encode(value)
    # Piece by piece: a line is indented as often as it is nested, and a separator stands after every item.
    return budget.joined(encoder.iterencode(value))


def _dict(budget: Budget, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    """dict(...), pair by pair: integers can be chosen to have one hash, and then each takes longer than the last."""
    given = args[0] if args else ()
    found: dict[Any, Any] = {}
    for key, value in given.items() if isinstance(given, Mapping) else given:
        budget.spend(2 * ITEM)
        found[key] = value
    return found | kwargs


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 1000:
        raise OverBudget("strftime_now has a pattern of more than 1000 characters")
    if re.search(r"%[^%A-Za-z]*\d{3}", pattern):
        raise OverBudget("strftime_now has a width of more than 99")
    return datetime.now().strftime(pattern)


_compiled: dict[str, CodeType] = {}  # templates whose code is kept: that of a conversation is rendered every turn


def _size(value: Any) -> int:
    return value if isinstance(value, int) else 0


def render_chat(template: str, messages: Any, tools: Any, documents: Any, continued: bool | str,
                variables: Mapping[str, Any]) -> str:
    """The prompt of a conversation. `continued` names the field of the last message to end in; True is its content."""
    try:
        chat = plain_messages(messages)
        given = {**plain(variables), "tools": plain_tools(tools), "documents": plain_documents(documents)}
    except RecursionError:
        raise ValueError("apply_chat_template: what it is given is nested too deeply") from None
    if not continued:
        return render(template, given | {"messages": chat})
    last = Continued(chat, continued if isinstance(continued, str) else "content", template)
    return last.cut(render(template, given | {"messages": chat}))


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text. ValueError says which limit was passed, or what else is wrong with the template."""
    try:
        return _rendered(template, variables)
    except (OverBudget, TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError,
            TypeError, ValueError) as error:
        problem = str(error)
    # Raised here, where the traceback of that error, and every value in its frames, is gone.
    raise ValueError(f"apply_chat_template: {problem}")


def _rendered(template: str, variables: Mapping[str, Any]) -> str:
    if len(template) > MAX_TEMPLATE:
        raise OverBudget(f"it has more than {MAX_TEMPLATE} characters")
    sandbox = _Sandbox()
    found, characters, widest = [], 0, 1
    try:
        code = _compiled.get(template)
        if code is None:
            code = sandbox.compile(template)
            if len(_compiled) >= _MAX_COMPILED:
                _compiled.clear()
            _compiled[template] = code
        made = sandbox.template_class.from_code(sandbox, code, sandbox.make_globals(None))
        for piece in made.generate(**variables):
            sandbox.budget.tick()
            found.append(piece)
            characters, widest = characters + len(piece), max(widest, width(piece))
            if characters * widest > _MAX_RENDERED:
                raise OverBudget(f"the prompt exceeds {_MAX_RENDERED} bytes")
    finally:
        sandbox.budget.release()
    return "".join(found)

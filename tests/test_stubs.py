"""functional.pyi says what functional.pyx and its parts define: every name, argument, kind and default."""

from __future__ import annotations

import ast
import re
import textwrap
from inspect import Parameter
from pathlib import Path
from typing import NamedTuple

import pytest

import forge_c
from forge_c import functional

BORDER = Path(__file__).parents[1] / "forge_c"
STUB = ast.parse(Path(forge_c.__file__).with_name("functional.pyi").read_text())
KINDS = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class Argument(NamedTuple):
    name: str
    kind: str
    default: str | None  # as Python prints it, None where there is none


Signatures = dict[str, list[list[Argument]]]  # "name" or "Class.name" -> one for each overload


def arguments(node: ast.FunctionDef) -> list[Argument]:
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    filled = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = [*zip(positional, filled, [KINDS[0].name] * len(filled), strict=True),
             *zip(spec.kwonlyargs, spec.kw_defaults, [KINDS[1].name] * len(spec.kwonlyargs), strict=True)]
    return [Argument(a.arg, kind, None if default is None else repr(ast.literal_eval(default)))
            for a, default, kind in pairs if a.arg != "self"]


def members(node: ast.ClassDef) -> set[str]:
    """Attributes and properties."""
    fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return fields | {n.name for n in node.body if isinstance(n, ast.FunctionDef) and n.decorator_list}


def signatures(tree: ast.AST, prefix: str = "") -> Signatures:
    found: Signatures = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            found |= signatures(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not any(
                isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
            found.setdefault(prefix + node.name, []).append(arguments(node))
    return found


def without_types(parameter: str) -> str:
    """`cnp.ndarray table=None` and `cnp.ndarray table not None=None` -> `table=None`; `*` and `name: str` stay."""
    head, equals, default = parameter.replace(" not None", "").partition("=")
    return re.sub(r"^.*[\w\]]\s+(?=\w+(\s*:.*)?\s*$)", "", head.strip()) + equals + default


def as_python(text: str) -> ast.Module:
    """The head of every class and def of Cython's text, with the members that Python sees."""
    lines: list[str] = []
    heads = re.compile(r"^(?P<class>cdef class (?P<name>\w+).*:)$|^    cdef readonly .*?(?P<field>\w+)(?:  #.*)?$"
                       r"|^(?P<property>    @property)$"
                       r"|^(?P<indent>(    )?)def (?P<def>\w+)\((?P<args>(.|\n)*?)\)[^\n)]*:$",
                       re.M)
    for match in heads.finditer(text):
        if match["class"]:
            lines += [f"class {match['name']}:", "    pass"]
        elif match["field"]:
            lines.append(f"    {match['field']}: object")
        elif match["property"]:
            lines.append(match["property"])
        else:
            given = ", ".join(without_types(p) for p in match["args"].split(",") if p.strip())
            name = {"__cinit__": "__init__"}.get(match["def"], match["def"])
            lines.append(f"{match['indent']}def {name}({given}): ...")
    return ast.parse("\n".join(lines))


def border() -> ast.Module:
    text = (BORDER / "functional.pyx").read_text()
    parts = re.findall(r'^include "(.*)"$', text, re.M)
    assert len(parts) > 5
    return as_python("\n".join([text, *((BORDER / part).read_text() for part in parts)]))


DEFINED = border()


def public(found: Signatures) -> dict[str, list[list[Argument]]]:
    """What is for others: special methods but __init__ have fixed signatures."""
    return {name: heads for name, heads in found.items() if not re.search(r"\b__(?!init)", name)}


def test_the_stub_lists_what_is_defined():
    assert len(signatures(DEFINED)) > 30
    assert set(public(signatures(STUB))) == set(public(signatures(DEFINED)))


@pytest.mark.parametrize("name", sorted(public(signatures(DEFINED))))
def test_arguments_have_the_names_kinds_and_defaults_of_the_definition(name):
    """An overload may ask for an argument that has a default: that is how overloads differ."""
    (defined,) = signatures(DEFINED)[name]
    overloads = signatures(STUB)[name]
    for stub in overloads:
        assert [(a.name, a.kind) for a in stub] == [(a.name, a.kind) for a in defined]
        for said, is_so in zip(stub, defined, strict=True):
            assert said.default == is_so.default or len(overloads) > 1 and said.default is None, said.name


def classes(tree: ast.Module) -> dict[str, set[str]]:
    return {node.name: members(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def test_classes_have_the_attributes_and_properties_of_the_definition():
    assert sum(bool(found) for found in classes(DEFINED).values()) > 2
    assert classes(STUB) == classes(DEFINED)


def test_what_the_module_offers_is_in_the_stub():
    named = {n.target.id for n in STUB.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(functional.__all__) <= named | set(classes(STUB)) | set(signatures(STUB))
    assert all(hasattr(functional, name) for name in named | set(classes(STUB)))


def test_negative_control_heads_of_cython_are_read():
    tree = as_python(textwrap.dedent("""\
        cdef class A:
            cdef readonly str dtype
            cdef int hidden
            def __init__(self, fc.x y, list[int] z, ptrdiff_t p=0, bint on=False, *, double eps=1e-6,
                         o="a"):
                pass
            @property
            def size(self) -> int:
                return 1
        cdef int inner(int a):
            return a
        def f(int n, x: str = "b") -> None:
            pass
        """))
    positional, keyword = (kind.name for kind in KINDS)
    assert signatures(tree) == {
        "A.__init__": [[Argument("y", positional, None), Argument("z", positional, None),
                        Argument("p", positional, "0"), Argument("on", positional, "False"),
                        Argument("eps", keyword, "1e-06"), Argument("o", keyword, "'a'")]],
        "f": [[Argument("n", positional, None), Argument("x", positional, "'b'")]]}
    assert classes(tree) == {"A": {"dtype", "size"}}

"""What forge.h declares and what its mirror _c.pxd does, in the same words, so that the two can be compared."""

from __future__ import annotations

import re

Fields = list[tuple[str, str]]  # ("const float *", "cos"), ("ptrdiff_t [3]", "x_stride"), ...


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", re.sub(r"^ *#.*$", "", text, flags=re.M), flags=re.S)


def functions(text: str) -> dict[str, str]:
    """Name -> prototype."""
    spaced = re.sub(r" noexcept nogil|(?<=\()void(?=\))", "", without_comments(text))
    found = re.findall(r"^ *((?:const )?\w+ \*?)(fc_\w+)\((.*?)\)(?:;|$)", spaced, re.S | re.M)
    return {name: " ".join(f"{result}{name}({arguments})".split()) for result, name, arguments in found}


def structs(text: str) -> dict[str, Fields]:
    """Name -> fields in their order."""
    plain = without_comments(text)
    in_c = re.findall(r"typedef struct \{(.*?)\} (fc_\w+);", plain, re.S)
    in_cython = re.findall(r"ctypedef struct (fc_\w+):\n((?: {8}(?!pass).*\n)+)", plain)  # pass: opaque
    return {name: fields(body, plain) for body, name in in_c} | {name: fields(body, plain) for name, body in in_cython}


def fields(body: str, text: str) -> Fields:
    found: Fields = []
    for line in filter(None, map(str.strip, re.split(r"[;\n]", body))):
        kind, declarators = re.fullmatch(r"((?:const )?\w+) (.*)", line).groups()  # type: ignore[union-attr]
        for stars, name, c_name, sizes in re.findall(r'(\**)(\w+)(?: "(\w+)")?((?:\[\w+\])*)', declarators):
            sizes = re.sub(r"FC_\w+", lambda size: re.search(rf"{size[0]} = (\d+)", text)[1], sizes)  # type: ignore[index]
            found.append((f"{kind} {stars}{sizes}".strip(), c_name or name))
    return found


def constants(text: str) -> set[str]:
    """The names in all enums."""
    plain = without_comments(text)
    bodies = re.findall(r"enum \{(.*?)\}", plain, re.S) + re.findall(r"enum\b[ \w]*:\n((?: {8}.*\n)+)", plain)
    return {name for body in bodies for name in re.findall(r"FC_\w+", body)}

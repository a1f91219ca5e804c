"""What a plain YAML scalar means: the core schema of YAML 1.2, for reading and for writing.

PyYAML follows YAML 1.1, where ``1e-3`` is a string, ``on`` a bool, ``010`` eight and ``12:30`` seven hundred
and fifty. In the core schema they are a float, a string, ten and a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_PREFIX = "tag:yaml.org,2002:"
NULL, BOOL, INT, FLOAT, STR, MAP, SEQ = (
    _PREFIX + kind for kind in ("null", "bool", "int", "float", "str", "map", "seq")
)


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", text, flags=re.IGNORECASE))


# In the order in which they are tried: tag, pattern, the possible first characters, constructor.
SCALARS: tuple[tuple[str, re.Pattern[str], str, Callable[[str], object]], ...] = (
    (NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), "~nN", lambda _: None),
    (
        BOOL,
        re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
        "tTfF",
        lambda text: {"true": True, "false": False}[text.lower()],
    ),
    (INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789", _integer),
    (
        FLOAT,
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
        _float,
    ),
)


def resolve(text: str) -> str:
    """The tag of a plain scalar."""
    return next((tag for tag, pattern, _, _ in SCALARS if pattern.match(text)), STR)


def construct(tag: str, text: str) -> object:
    """The value of a scalar of one of the tags above.

    Raises:
        ValueError: the text is no scalar of that tag, or a number too long to read.
    """
    for known, pattern, _, make in SCALARS:
        if known == tag:
            if not pattern.match(text):
                raise ValueError(text)
            return make(text)
    return text

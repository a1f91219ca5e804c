"""Numbers as a run's files hold them, as a reader wants them, and as a page carries them."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress


def number(value: object) -> float:
    """A number of a JSON row; "nan" and "inf" are strings there, and null is not known, nan.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return math.nan
    if isinstance(value, (int, float, str)):
        with suppress(OverflowError):  # an integer beyond all floats
            return float(value)
    raise ValueError(f"expected a number, found {value!r}")


def step_number(value: object) -> int:
    """A step of a JSON row, which the page's script holds in 32 bits.

    Raises:
        ValueError: it is none.
    """
    if math.isfinite(found := number(value)) and 0 <= found < 1 << 31:
        return int(found)
    raise ValueError(f"expected a step, found {value!r}")


def finite(values: Iterable[float]) -> list[float]:
    """Those that are neither nan nor infinite."""
    return [value for value in values if math.isfinite(value)]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of ascending values, linear between neighbours (numpy's default); nan of none."""
    if not ordered:
        return math.nan
    place = percent / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    return low if low == high else low + (place - below) * (high - low)


def percentiles(values: Iterable[float], percents: Sequence[float]) -> tuple[float, ...]:
    """Percentiles of the finite ones among `values`."""
    ordered = sorted(finite(values))
    return tuple(percentile(ordered, percent) for percent in percents)


def short(value: float, digits: int = 4) -> str:
    """A number for people: 4 significant digits, thousands grouped, powers of ten where it is far from 1."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == 0 or 1e-3 <= size < 1e6:
        if size >= 10 ** (digits - 1):
            return f"{value:,.0f}"
        text = f"{value:#.{digits}g}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def share(value: float) -> str:
    """A fraction as per cent."""
    return "unknown" if math.isnan(value) else f"{value:.1%}" if 0 < value < 0.995 else f"{value:.0%}"


def visible(text: str) -> str:
    """The text with what can't be printed spelt out, save for line breaks: no terminal or page obeys it."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def written(value: object) -> str:
    """A value of a config as people write it in one: true, null, 1e-5, [a, b]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return str(value)


def plural(count: int, word: str) -> str:
    """`count` with its word: 1 step, 2,000 steps."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def packed(values: Iterable[float], kind: str = "d") -> dict[str, str]:
    """A typed array as plotly's figures carry it: little-endian bytes in base64.

    Args:
        values: numbers; nan is a gap.
        kind: "d" float64, "f" float32, "i" int32.
    """
    data = array(kind, values)
    if sys.byteorder == "big":
        data.byteswap()
    return {
        "dtype": {"d": "f8", "f": "f4", "i": "i4"}[kind],
        "bdata": base64.b64encode(data.tobytes()).decode("ascii"),
    }

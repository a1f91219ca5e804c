"""Values from the environment and from ``--set``, put over a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from distnorm.config.problems import Document, Finding, Mark
from distnorm.config.reading import parse
from distnorm.config.vocabulary import KeyPath, Vocabulary

PREFIX = "DISTNORM_"
_SEPARATOR = "__"


@dataclass(frozen=True, slots=True)
class _Override:
    mark: Mark
    path: KeyPath
    text: str
    is_variable: bool


def apply(
    document: Document, known: Vocabulary, environment: Mapping[str, str], assignments: Sequence[str]
) -> None:
    """Put the environment's values over a document, then the assignments' in their order.

    An override replaces what is at its path, a whole section too. Every wrong one is noted in the document.

    Args:
        document: changed in place.
        known: the keys there are.
        environment: ``DISTNORM_CLIP__MAX_NORM`` stands for ``clip.max_norm``.
        assignments: such as ``clip.max_norm=0.5``; the value is YAML.
    """
    variables = sorted(item for item in environment.items() if item[0].startswith(PREFIX))
    for order, (name, text) in enumerate(variables, start=1):
        mark = Mark(name, order=order)
        if _SEPARATOR in name:
            path = tuple(name[len(PREFIX) :].lower().split(_SEPARATOR))
            _put(document, known, _Override(mark, path, text, is_variable=True))
        else:
            _check_bystander(document, known, mark)
    for order, assignment in enumerate(assignments, start=len(variables) + 1):
        mark = Mark(f"--set {assignment}", order=order)
        key, equals, text = assignment.partition("=")
        if equals and key.strip():
            path = tuple(part.strip() for part in key.split("."))
            _put(document, known, _Override(mark, path, text, is_variable=False))
        else:
            document.refuse(mark, (), "expected a key's path and a value, such as clip.max_norm=0.5")


def _check_bystander(document: Document, known: Vocabulary, mark: Mark) -> None:
    """Refuse a variable that nearly is an override: ignoring it would silently change the run."""
    name = mark.file[len(PREFIX) :].lower()
    flat = {"_".join(path): path for path in known.paths()}
    sections = known.keys(())
    near = get_close_matches(name, flat, 1, 0.8)
    if near or name.split("_")[0] in sections:
        hint = f"; did you mean {_variable(flat[near[0]])}?" if near else ", such as DISTNORM_CLIP__MAX_NORM"
        message = f"expected {_SEPARATOR!r} between section and key{hint}"
        document.findings.append(Finding(mark, (), message))


def _put(document: Document, known: Vocabulary, override: _Override) -> None:
    for depth, name in enumerate(override.path):
        section = override.path[:depth]
        if name in known.keys(section):
            continue
        if section and not known.is_section(section):
            message = f"unknown key; {'.'.join(section)} holds a value, not a section"
            document.refuse(override.mark, override.path, message)
            return
        message, meant = known.unknown_key(section, name)
        if meant is not None:
            whole = (*meant, *override.path[depth + 1 :])
            meant = whole if known.at(whole) is not None else meant
            shown = _variable(meant) if override.is_variable else ".".join(meant)
            message = f"unknown key; did you mean {shown!r}?"
            document.doubtful.add(meant)
        document.refuse(override.mark, override.path, message)
        return
    value = parse(override.text, lambda line, column: override.mark, override.path)
    document.findings += value.findings
    document.doubtful |= value.doubtful
    if not value.findings and isinstance(document.data, dict):
        _assign(document, document.data, known, override, value)


def _assign(
    document: Document, data: dict[str, object], known: Vocabulary, override: _Override, value: Document
) -> None:
    *sections, last = override.path
    for depth, name in enumerate(sections, start=1):
        inner, above = data.setdefault(name, {}), override.path[:depth]
        if isinstance(inner, str) and known.kinds(above):
            # A policy's name alone stands for the mapping with this name.
            inner = data[name] = {"name": inner}
            document.values[above + ("name",)] = document.mark(above)  # noqa: RUF005  a star needs 3.11
        if not isinstance(inner, dict):
            return  # the section itself is wrong, which validation will say
        data = inner
    data[last] = value.data
    for places, new in ((document.keys, value.keys), (document.values, value.values)):
        for old in [path for path in places if path[: len(override.path)] == override.path]:
            del places[old]
        places.update(new)
        places[override.path] = override.mark


def _variable(path: KeyPath) -> str:
    return PREFIX + _SEPARATOR.join(path).upper()

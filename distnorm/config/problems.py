"""From what pydantic found to problems with positions, all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from distnorm.config.vocabulary import KeyPath, Vocabulary
from distnorm.errors import ConfigError, Problem

_MAX_DEPTH = 8

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Mark:
    """Where something was written; a later source has the higher order."""

    file: str
    line: int | None = None
    column: int | None = None
    order: int = 0


IN_CODE = Mark("<config>")
_DEFAULT = Mark("", order=-1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake, before it is put in order."""

    mark: Mark
    path: KeyPath
    message: str


@dataclass(slots=True)
class Document:
    """Plain data, where each part of it was written, and what was wrong with the writing.

    Args:
        root: the place of the document as a whole.
        data: mappings, lists and scalars.
        keys: the place of every key.
        values: the place of every key's value.
        findings: mistakes that don't depend on what the keys mean.
        doubtful: keys whose value isn't known; nothing is concluded from them.
    """

    root: Mark
    data: object = field(default_factory=dict)
    keys: dict[KeyPath, Mark] = field(default_factory=dict)
    values: dict[KeyPath, Mark] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    doubtful: set[KeyPath] = field(default_factory=set)

    def refuse(self, mark: Mark, path: KeyPath, message: str) -> None:
        """Note a mistake, and that the value at the path isn't known."""
        self.findings.append(Finding(mark, path, message))
        self.doubtful.add(path)

    def mark(self, path: KeyPath) -> Mark:
        """The place of a value, or of the nearest part around it that was written at all."""
        around = (path[:end] for end in range(len(path), 0, -1))
        return next((self.values[part] for part in around if part in self.values), self.root)

    def is_doubtful(self, path: KeyPath) -> bool:
        """Whether a mistake was found at the path, above it or below it."""
        return any(doubt[: len(path)] == path[: len(doubt)] for doubt in self.doubtful)


def given_in_code(source: Mapping[Any, Any] | BaseModel) -> Document:
    """The document of a mapping: its own plain copy, so that nothing given by the caller is changed."""
    document = Document(IN_CODE)
    document.data = _plain(source, document, ())
    return document


def check(model: type[Model], document: Document) -> Model:
    """The model that a document describes.

    Args:
        model: the pydantic model.
        document: its findings grow.

    Raises:
        ConfigError: with every problem that the document has.
    """
    known, result = vocabulary(model), None
    while result is None:
        try:
            result = model.model_validate(document.data, context=model)
            break
        except ValidationError as error:
            errors = error.errors(include_url=False)
        wrong = [entry for entry in errors if entry["type"] != "conflict"]
        if not wrong:
            _note_conflicts(document, known, errors)
            break
        # Conflicts between values are searched for only where each value is right alone: the wrong ones
        # are noted and taken out, and what is left is validated again.
        before = document.data
        for entry in sorted(wrong, key=_depends):
            out = _note_wrong(document, known, _path(entry["loc"]), entry)
            document.data = _without(document.data, out)
        if document.data == before:
            break
    raise_all(document.findings)
    assert result is not None
    return result


def raise_all(findings: Iterable[Finding]) -> None:
    """Raise what was found, in order of position; return where there is nothing.

    Raises:
        ConfigError: there is a finding.
    """
    ordered = sorted(findings, key=lambda f: (f.mark.order, f.mark.line or 0, f.mark.column or 0))
    problems = tuple(
        Problem(f.mark.file, f.mark.line, f.mark.column, ".".join(f.path).replace(".[", "["), f.message)
        for f in ordered
    )
    if problems:
        raise ConfigError("\n".join(map(str, problems)), problems)


@cache
def vocabulary(model: type[BaseModel]) -> Vocabulary:
    """The keys of a model."""
    return Vocabulary(model.model_json_schema)


def _depends(entry: Mapping[str, Any]) -> bool:
    """Whether the mistake may follow from another: a key is missing that was misspelt, or a list is empty
    whose items are wrong."""
    return entry["type"] in ("missing", "too_short")


def _path(loc: Iterable[str | int]) -> KeyPath:
    return tuple(f"[{part}]" if isinstance(part, int) else part for part in loc)


def _note_wrong(document: Document, known: Vocabulary, path: KeyPath, entry: Mapping[str, Any]) -> KeyPath:
    """Note one of pydantic's errors; the path of what has to be taken out."""
    written, found = known.plain(path), entry["input"]
    if entry["type"] == "extra_forbidden":
        message, meant = known.unknown_key(path[:-1], path[-1])
        document.refuse(document.keys.get(written, document.mark(written)), written, message)
        if meant is not None:
            document.doubtful.add(known.plain(meant))
        return written
    if entry["type"] == "missing":
        if not document.is_doubtful(written):
            document.refuse(document.mark(written[:-1]), written, known.missing(path))
        return written[:-1]
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found") and isinstance(found, Mapping):
        _note_wrong_kind(document, known, written, entry)
        return written
    if entry["type"] != "too_short" or not document.is_doubtful(written):
        document.refuse(document.mark(written), written, known.wrong_value(path, found))
    return written


def _note_wrong_kind(document: Document, known: Vocabulary, path: KeyPath, entry: Mapping[str, Any]) -> None:
    key = entry["ctx"]["discriminator"].strip("'")
    found = entry["input"]
    if key in found:
        # The kind alone may stand for the mapping.
        at = (*path, key) if (*path, key) in document.values else path
        document.refuse(document.mark(at), at, known.wrong_kind(path, found[key]))
        return
    # Its own key is known; every other may be of any kind.
    near = [name for name in found if name not in known.keys(path) and get_close_matches(name, [key], 1, 0.6)]
    if near:
        at = (*path, near[0])
        document.refuse(document.keys.get(at, document.mark(at)), at, f"unknown key; did you mean {key!r}?")
    else:
        # Where only overrides have made the mapping, it has no place, but they have.
        at = path if path in document.values else (*path, *list(found)[:1])
        document.refuse(document.mark(at), (*path, key), known.missing((*path, key)))


def _note_conflicts(document: Document, known: Vocabulary, errors: Sequence[Mapping[str, Any]]) -> None:
    for entry in errors:
        section = known.plain(_path(entry["loc"]))
        for conflict in entry["ctx"]["conflicts"]:
            paths = [section + tuple(key.split(".")) for key in conflict.keys]
            if any(document.is_doubtful(path) for path in paths):
                continue
            # The culprit is what was written last: an override before the file, and never a default.
            culprit = max(
                paths, key=lambda path: document.values[path].order if path in document.values else -1
            )
            document.findings.append(Finding(document.mark(culprit), culprit, conflict.message))


def _without(data: object, path: KeyPath) -> object:
    """A copy that lacks one key, or the list that the path goes into; what the caller gave stays as it is."""
    if not path:
        return {}
    name, *rest = path
    if not isinstance(data, Mapping) or name not in data:
        return data  # it has been taken out with what was around it
    if rest and not rest[0].startswith("["):
        return {**data, name: _without(data[name], tuple(rest))}
    return {key: value for key, value in data.items() if key != name}


def _plain(value: object, document: Document, path: KeyPath) -> object:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, (list, tuple)) and len(path) < _MAX_DEPTH:
        return [_plain(item, document, (*path, f"[{i}]")) for i, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    copy: dict[str, object] = {}
    for key, inner in value.items():
        below = (*path, str(key))
        if not isinstance(key, str):
            document.refuse(
                IN_CODE, below, f"expected a string as key, found {key!r} of type {type(key).__name__}"
            )
        elif len(below) > _MAX_DEPTH:
            document.refuse(IN_CODE, below, f"expected at most {_MAX_DEPTH} levels")
        else:
            document.values[below] = document.keys[below] = IN_CODE
            copy[key] = _plain(inner, document, below)
    return copy

"""YAML text to plain data with the position of every key and value."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike, fspath

import yaml

from distnorm.config import scalars
from distnorm.config.problems import Document, Mark
from distnorm.config.vocabulary import NO_VALUE, KeyPath

_MAX_BYTES = 1 << 18
_MAX_DEPTH = 32
_ALIAS = "alias"
_DROPPED = object()
_DATA_TAGS = (scalars.NULL, scalars.BOOL, scalars.INT, scalars.FLOAT, scalars.STR)

Place = Callable[[int, int], Mark]


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing: the scalars are YAML 1.2's, and no alias is followed."""

    _depth = 0

    def resolve(self, kind: type[yaml.Node], value: object, implicit: object) -> str:
        if kind is yaml.ScalarNode:
            is_plain = isinstance(implicit, tuple) and implicit[0]
            return scalars.resolve(str(value)) if is_plain else scalars.STR
        return scalars.MAP if kind is yaml.MappingNode else scalars.SEQ

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A followed alias can repeat a part of the document exponentially often, or put it inside itself.
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_ALIAS, "", event.start_mark, event.end_mark)
        if self._depth >= _MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"expected at most {_MAX_DEPTH} levels", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def read_file(source: str | PathLike[str]) -> Document:
    """The document of a file.

    Returns:
        The document; a file that can't be read, or isn't UTF-8, or isn't YAML has that finding and no data.
    """
    name = fspath(source)

    def place(line: int, column: int) -> Mark:
        return Mark(name, line, column)

    try:
        with open(source, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        document = Document(Mark(name))
        document.refuse(document.root, (), f"expected a readable YAML file, found: {reason}")
        return document
    if len(content) > _MAX_BYTES:
        document = Document(Mark(name))
        document.refuse(document.root, (), f"expected at most {_MAX_BYTES} bytes of YAML, found more")
        return document
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        document = Document(place(*_position(content[: error.start].decode("utf-8"))))
        document.refuse(document.root, (), f"expected UTF-8, found the byte 0x{content[error.start]:02x}")
        return document
    return parse(text, place)


def parse(text: str, place: Place, path: KeyPath = ()) -> Document:
    """The document of a text.

    Args:
        text: one YAML document.
        place: makes a mark from a line and a column, both counted from 1.
        path: the key that the text is the value of.

    Returns:
        The document; where the text isn't YAML at all it holds that finding and no data.
    """
    document = Document(place(1, 1))
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        at = _position(text[: error.position])
        document.refuse(
            place(*at), path, f"not valid YAML: found the character U+{ord(text[error.position]):04X}"
        )
        return document
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        document.refuse(place(mark.line + 1, mark.column + 1), path, f"not valid YAML: {reason}")
        return document
    except (ValueError, OverflowError) as error:
        # PyYAML lets an escape beyond Unicode, or a directive's endless version number, out as it is.
        mark = loader.get_mark()
        document.refuse(place(mark.line + 1, mark.column + 1), path, f"not valid YAML: {error}")
        return document
    finally:
        loader.dispose()
    if node is None:
        document.data = NO_VALUE
        return document
    document.root = place(node.start_mark.line + 1, node.start_mark.column + 1)
    value = _Walk(document, place).value(node, path)
    document.data = {} if value is _DROPPED else value
    return document


class _Walk:
    """From nodes to data, noting positions and mistakes in a document."""

    def __init__(self, document: Document, place: Place) -> None:
        self._document = document
        self._place = place

    def value(self, node: yaml.Node, path: KeyPath) -> object:
        mark = self._mark(node)
        if node.tag == _ALIAS:
            return self._drop(mark, path, "aliases are not followed; write the value out")
        if isinstance(node, yaml.MappingNode) and node.tag == scalars.MAP:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == scalars.SEQ:
            return self._sequence(node, path)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _DATA_TAGS:
            return self._drop(
                mark, path, f"the tag {_short(node.tag)} is not allowed; only plain data is read"
            )
        if node.tag == scalars.NULL and not node.value:
            return NO_VALUE
        try:
            return scalars.construct(node.tag, node.value)
        except ValueError:
            found = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
            return self._drop(mark, path, f"expected a value of type {_short(node.tag)}, found {found!r}")

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> object:
        items = []
        for i, item in enumerate(node.value):
            below = (*path, f"[{i}]")
            self._document.values[below] = self._mark(item)
            items.append(self.value(item, below))
        # Without one of its items the others would have wrong places.
        return _DROPPED if any(item is _DROPPED for item in items) else items

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        data: dict[str, object] = {}
        seen: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            mark, key = self._mark(key_node), key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != scalars.STR:
                shown = key if isinstance(key, str) and key else "something else"
                below = (*path, shown) if isinstance(key, str) and key else path
                self._drop(mark, below, f"expected a string as key, found {shown}")
                continue
            below = (*path, key)
            if key in seen:
                at = f"line {seen[key].line}, column {seen[key].column}"
                where = "" if seen[key].line is None else f"; first given at {at}"
                self._drop(mark, below, f"duplicate key{where}")
                continue
            seen[key] = mark
            if key == "<<":
                self._drop(mark, below, "merge keys are not followed; write the keys out")
                continue
            self._document.keys[below] = mark
            self._document.values[below] = self._mark(value_node)
            value = self.value(value_node, below)
            if value is not _DROPPED:
                data[key] = value
        return data

    def _drop(self, mark: Mark, path: KeyPath, message: str) -> object:
        self._document.refuse(mark, path, message)
        return _DROPPED

    def _mark(self, node: yaml.Node) -> Mark:
        return self._place(node.start_mark.line + 1, node.start_mark.column + 1)


def _position(before: str) -> tuple[int, int]:
    """Line and column, from 1, of the character after the text."""
    lines = before.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return len(lines), len(lines[-1]) + 1


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!", 1)

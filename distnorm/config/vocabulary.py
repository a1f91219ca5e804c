"""What may be written where, read from the JSON Schema, and how to say it to a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from distnorm.config.scalars import FLOAT, INT, resolve

KeyPath = tuple[str, ...]
JsonSchema = Mapping[str, Any]

_LONGEST = 60
_TYPES = {"number": "a number", "integer": "an integer", "boolean": "true or false", "string": "a string"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<"}


class NoValue:
    """Stands for a key with nothing after it, which is too easily left behind to mean null."""


NO_VALUE = NoValue()


class Vocabulary:
    """The keys of a configuration and what each may hold.

    Args:
        read_schema: gives a JSON Schema whose objects are all closed. It is called when something is asked:
            that takes longer than to read a configuration without a mistake.
    """

    def __init__(self, read_schema: Callable[[], JsonSchema]) -> None:
        self._read_schema = read_schema

    @cached_property
    def _schema(self) -> JsonSchema:
        return self._read_schema()

    def at(self, path: KeyPath) -> JsonSchema | None:
        """The schema of one key; None where there is no such key.

        Args:
            path: keys, and ``[0]`` for an item of a list. Where there are several kinds of mapping, each
                with a key of its own that tells which, a kind may stand before one of its keys: then only
                the keys of that kind are known, and else the keys of all.
        """
        node: JsonSchema | None = self._follow(self._schema)
        for name in path:
            node = None if node is None else self._below(node, name)
        return node

    def plain(self, path: KeyPath) -> KeyPath:
        """The path as it is written, without kinds in it."""
        node: JsonSchema | None = self._follow(self._schema)
        written: list[str] = []
        for name in path:
            if node is None or name not in self._kinds(node):
                written.append(name)
            node = None if node is None else self._below(node, name)
        return tuple(written)

    def kinds(self, path: KeyPath) -> list[str]:
        """The kinds of mapping that may be here, where there are several."""
        return list(self._kinds(self.at(path) or {}))

    def keys(self, path: KeyPath) -> list[str]:
        """The keys of one section; empty where the path names none."""
        return list(self._properties(self.at(path) or {}))

    def is_section(self, path: KeyPath) -> bool:
        """Whether the path names a mapping with keys of its own."""
        return (self.at(path) or {}).get("type") == "object" or bool(self.kinds(path))

    def paths(self, below: KeyPath = ()) -> Iterator[KeyPath]:
        """Every key, sections before what they hold."""
        for name in self.keys(below):
            yield (*below, name)
            yield from self.paths((*below, name))

    def nearest(self, section: KeyPath, name: str) -> KeyPath | None:
        """The key that a misspelt or misplaced one was meant for, where one is near enough."""
        name = name.strip().lower().replace("-", "_")
        siblings = self.keys(section)
        # The key of another kind of mapping is no help.
        others = reversed(list(self.paths())) if self.plain(section) == section else ()
        elsewhere = {path[-1]: path for path in others}
        if name in siblings:
            return (*section, name)
        if name in elsewhere:
            return elsewhere[name]
        if found := get_close_matches(name, siblings, 1, 0.6):
            return (*section, found[0])
        if found := get_close_matches(name, elsewhere, 1, 0.8):
            return elsewhere[found[0]]
        return None

    def unknown_key(self, section: KeyPath, name: str) -> tuple[str, KeyPath | None]:
        """The message about a key that does not exist, and the path of the one it was meant for."""
        dotted = tuple(name.split("."))
        if len(dotted) > 1 and self.at((*section, *dotted)) is not None:
            nested = ": {".join(dotted) + ": ..." + "}" * (len(dotted) - 1)
            return f"unknown key; a dotted key is not split, write {nested}", (*section, *dotted)
        meant = self.nearest(section, name)
        if meant is not None:
            shown = meant[-1] if meant[:-1] == section else ".".join(meant)
            return f"unknown key; did you mean {shown!r}?", meant
        keys = self.keys(section)
        return "unknown key; " + (
            f"expected one of {', '.join(keys)}" if keys else "this section has no keys"
        ), None

    def wrong_value(self, path: KeyPath, found: object) -> str:
        """The message about a value that its key can't hold."""
        return _message(self.at(path) or {}, found)

    def wrong_kind(self, path: KeyPath, found: object) -> str:
        """The message about a name that is none of the kinds of mapping here."""
        return _message({"enum": self.kinds(path)}, found)

    def missing(self, path: KeyPath) -> str:
        """The message about a key that is not there and has to be."""
        kinds = self.kinds(path[:-1])
        schema = {"enum": kinds} if kinds else self.at(path) or {}
        return f"expected {_expected(schema, None)}, found no such key"

    def _below(self, node: JsonSchema, name: str) -> JsonSchema | None:
        if name.startswith("["):
            items = (part["items"] for part in _alternatives(node) if "items" in part)
            below = next(items, None)
        else:
            below = self._properties(node).get(name) or self._kinds(node).get(name)
        return None if below is None else self._follow(below)

    def _properties(self, node: JsonSchema) -> JsonSchema:
        for part in _alternatives(node):  # a section that may be null, or a value that stands for it
            if "properties" in part:
                properties: JsonSchema = part["properties"]
                return properties
        kinds = [self._follow(kind)["properties"] for kind in self._kinds(node).values()]
        return {name: schema for properties in reversed(kinds) for name, schema in properties.items()}

    def _kinds(self, node: JsonSchema) -> JsonSchema:
        for part in _alternatives(node):
            if "discriminator" in part:
                mapping = part["discriminator"]["mapping"]
                # pydantic sorts the mapping; the order of the kinds is that of the list.
                references = {reference: kind for kind, reference in mapping.items()}
                return {references[one["$ref"]]: one for one in part["oneOf"]}
        return {}

    def _follow(self, node: JsonSchema) -> JsonSchema:
        reference = node.get("$ref")
        if reference is None:
            parts = [self._follow(part) for part in node.get("anyOf", ())]
            return {**node, "anyOf": parts} if parts else node
        target: JsonSchema = self._schema["$defs"][reference.rpartition("/")[2]]
        return target


def _message(schema: JsonSchema, found: object) -> str:
    shown = (
        "an empty list"
        if found in ([], ()) and any(part.get("minItems") for part in _alternatives(schema))
        else _shown(found)
    )
    return f"expected {_expected(schema, found)}, found {shown}{_hint(schema, found)}"


def _alternatives(schema: JsonSchema) -> list[JsonSchema]:
    return list(schema.get("anyOf", [schema]))


def _expected(schema: JsonSchema, found: object) -> str:
    parts = [_expected_one(part, found) for part in _alternatives(schema)]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _expected_one(schema: JsonSchema, found: object) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "null":
        return "null"
    if "discriminator" in schema:
        return f"a mapping with the key {schema['discriminator']['propertyName']}"
    if kind == "array":
        text = "a list that is not empty" if schema.get("minItems") else "a list"
        # A list is refused as a whole only where another kind of value could stand in its place.
        items = found if isinstance(found, (list, tuple)) else ()
        return f"{text}, each {_expected_one(schema['items'], found)}" if items else text
    if kind == "object":
        keys = list(schema.get("properties", ()))
        return f"a mapping with the keys {', '.join(keys)}" if keys else "a mapping, {} while it has no keys"
    text = _TYPES.get(str(kind), "another value")
    if schema.get("minLength") == 1:
        text += " that is not empty"
    if "examples" in schema:
        text += f" such as {' or '.join(map(str, schema['examples']))}"
    bounds = [f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    # The upper limits are far away: naming one helps only the person who passed it.
    if "maximum" in schema and isinstance(found, (int, float)) and not found <= schema["maximum"]:
        bounds.append(f"<= {schema['maximum']}")
    return " ".join([text, " and ".join(bounds)]) if bounds else text


def _shown(found: object) -> str:
    if found is NO_VALUE:
        return "no value"
    if found is None or isinstance(found, bool):
        return {None: "null", True: "true", False: "false"}[found]
    if isinstance(found, str):
        return f"the string {_shortened(repr(found))}"
    if isinstance(found, Mapping):
        return "a mapping" if found else "an empty mapping"
    if isinstance(found, (list, tuple)):
        return "a list"
    if isinstance(found, (int, float)):
        try:
            return _shortened(repr(found))
        except ValueError:
            return "a number of thousands of digits"
    return f"{_shortened(repr(found))} of type {type(found).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _hint(schema: JsonSchema, found: object) -> str:
    """What to write instead, where the value shows what was meant."""
    parts = _alternatives(schema)
    kinds = {part.get("type") for part in parts}
    nullable = "null" in kinds
    if found is NO_VALUE:
        return "; write {} for an empty section" if "object" in kinds else "; write null" if nullable else ""
    if isinstance(found, str):
        return _string_hint(parts, found.strip(), nullable)
    if isinstance(found, bool) or found is None:
        return ""
    if isinstance(found, float) and "integer" in kinds and found.is_integer():
        return f"; write {int(found)}"
    if isinstance(found, (int, float)) and "string" in kinds:
        return "; put it in quotes"
    return ""


def _string_hint(parts: list[JsonSchema], found: str, nullable: bool) -> str:
    if nullable and found.lower() in ("none", "null", "~"):
        return "; write null"
    for part in parts:
        near = get_close_matches(found.lower(), [str(value) for value in part.get("enum", ())], 1, 0.6)
        if near:
            return f"; did you mean {near[0]!r}?"
        kind = part.get("type")
        if kind == "boolean":
            word = {"true": "true", "yes": "true", "on": "true", "y": "true"}.get(found.lower())
            word = word or {"false": "false", "no": "false", "off": "false", "n": "false"}.get(found.lower())
            return f"; write {word}" if word else ""
        plain = found.replace("_", "")
        if kind in ("number", "integer") and resolve(plain) in ((INT, FLOAT) if kind == "number" else (INT,)):
            return f"; write the number {plain}"
        if any("const" in other for other in parts) and plain.lower().lstrip("+.") in ("inf", "infinity"):
            return "; write inf"
    return ""

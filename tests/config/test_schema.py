"""Writing, the JSON Schema, and the shipped files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distnorm.config import json_schema, load_config
from tests.config.files import load

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_infinity_is_written_and_read(file: Path) -> None:
    config = load_config({"norm": {"type": "inf"}, "clip": {"max_norm": math.inf}})
    assert "type: .inf" in config.to_yaml()
    assert load(file, config.to_yaml()) == config


def objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" and "properties" in schema else []
    return own + [found for item in schema.values() for found in objects(item)]


def test_the_schema_is_closed_and_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert len(objects(schema)) >= 9
    for found in objects(schema):
        assert found["additionalProperties"] is False
        assert found["description"]
        for name, key in found["properties"].items():
            assert key.get("description") or "$ref" in key, name


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    assert shipped == json_schema(), "run: python -m distnorm schema > configs/schema.json"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_name_the_schema(path: Path) -> None:
    load_config(path)
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first == "# yaml-language-server: $schema=schema.json"

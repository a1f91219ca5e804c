"""Plain data to YAML that every YAML parser reads alike."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from distnorm.config.scalars import SCALARS, STR


class _Dumper(yaml.SafeDumper):
    """Quotes every string that would be something else in YAML 1.1, 1.2 or both."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds U+0085 and its like inside single quotes; between double quotes they are escaped.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(STR, text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first, _ in SCALARS:
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def dump(data: Mapping[str, object]) -> str:
    """YAML in block style, keys in the order given, ending with a line break."""
    # A line is never folded: a reader that greps for a key finds its value.
    width = 1 << 30
    text = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    assert isinstance(text, str)
    return text

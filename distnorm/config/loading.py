"""From a file, a mapping or nothing to a validated `Config`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from distnorm.config import overrides as _overrides
from distnorm.config.models import Config
from distnorm.config.problems import IN_CODE, Document, check, given_in_code, vocabulary
from distnorm.config.reading import read_file


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The configuration from a source, the environment and assignments; each later one wins.

    Not collective. Scalars are those of YAML 1.2: ``1e-3`` is a number, ``on`` a string
    and ``010`` ten. An override replaces what is at its path, a whole section too.

    Args:
        source: a YAML file's path, a mapping, or None for the defaults. A `Config` is returned as it is, with
            the assignments applied where there are any; the environment is not read then.
        overrides: such as ``clip.max_norm=0.5``, the value in YAML. They come after environment variables
            such as ``DISTNORM_CLIP__MAX_NORM=0.5``. A ``DISTNORM_`` variable with ``__`` in its name must be
            a key; one without is ignored unless it looks like a key that misses its ``__``.

    Raises:
        ConfigError: with every problem there is, each with its place.

    Example:
        >>> load_config({"norm": {"type": "inf"}}, ["clip.max_norm=0.5"]).clip.max_norm
        0.5
    """
    if isinstance(source, Config) and not overrides:
        return source
    document = _document(source)
    environment = {} if isinstance(source, Config) else os.environ
    assignments = (overrides,) if isinstance(overrides, str) else overrides
    _overrides.apply(document, vocabulary(Config), environment, assignments)
    return check(Config, document)


def _document(source: object) -> Document:
    if source is None:
        return given_in_code({})
    if isinstance(source, (Mapping, Config)):
        return given_in_code(source)
    if isinstance(source, (str, os.PathLike)):
        return read_file(source)
    document = Document(IN_CODE)
    document.refuse(IN_CODE, (), f"expected a path, a mapping or a Config, found {type(source).__name__}")
    return document

"""Whatever is written: a configuration, or a ConfigError with places."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from distnorm.config import load_config
from distnorm.errors import ConfigError
from tests.config.files import EXAMPLES, load, only, problems


def configs() -> st.SearchStrategy[dict[str, Any]]:
    numbers = st.floats(min_value=0, allow_nan=False) | st.integers(0, 10**9)
    orders = st.floats(0, 10_000, exclude_min=True) | st.integers(1, 10_000) | st.just(math.inf)
    text = st.text(min_size=1, max_size=20) | st.sampled_from(
        [
            "1e-3",
            "010",
            "on",
            "no",
            "null",
            "~",
            "12:30",
            "inf",
            ".inf",
            "1_0",
            "=",
            "<<",
            "2026-11-23",
            "0o7",
            "- a",
            "é",
            "\x85",
            "a\nb\u2028",
            "\U0001f600",
        ]
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "norm": st.fixed_dictionaries({"type": orders}),
            "clip": st.fixed_dictionaries({"max_norm": numbers | st.none()}),
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "seed": st.integers(0, 2**63 - 1),
                    "output_dir": text,
                    "data": st.fixed_dictionaries({"path": text | st.none()}),
                    "optimizer": st.fixed_dictionaries({"lr": st.floats(0, 1e300), "fused": st.booleans()}),
                },
            ),
        },
    )


@EXAMPLES
@given(source=configs())
def test_what_is_written_reads_back_equal(file: Path, source: dict[str, Any]) -> None:
    config = load_config(source)
    text = config.to_yaml()
    assert load(file, text) == config
    # A parser of YAML 1.1 sees the same strings and numbers.
    assert yaml.safe_load(text) == config.model_dump()


LEAVES = [
    "norm.type",
    "clip.max_norm",
    "clip.nonfinite",
    "train.seed",
    "train.model.context",
    "train.optimizer.weight_decay",
    "train.parallel.sequence_parallel",
    "train.checkpoint.resume_from",
]


@EXAMPLES
@given(data=st.data())
def test_a_misspelt_key_is_a_config_error_at_its_place(file: Path, data: st.DataObject) -> None:
    *sections, name = data.draw(st.sampled_from(LEAVES)).split(".")
    at = data.draw(st.integers(0, len(name)))
    letters = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", max_size=2)
    wrong = name[:at] + data.draw(letters) + name[at + data.draw(st.integers(0, 1)) :]
    text = "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(sections))
    text += f"{'  ' * len(sections)}? {wrong!r}\n{'  ' * len(sections)}: 1\n"
    known = {key for leaf in LEAVES for key in leaf.split(".")}
    if wrong in known:
        return
    problem = only(problems(file, text))
    assert (problem.line, problem.column) == (len(sections) + 1, 2 * len(sections) + 3)
    assert problem.message.startswith("unknown key")


@EXAMPLES
@given(
    content=st.binary(max_size=200)
    | st.text("{}[]:,-?&*!|>'\"%@` \n\t#aclipnormtype01.<", max_size=60).map(str.encode)
)
def test_any_file_is_a_config_or_a_config_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        load_config(file)
    except ConfigError as error:
        assert error.problems
        assert len(str(error).splitlines()) == len(error.problems)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)


@EXAMPLES
@given(leaf=st.sampled_from([*LEAVES, "norm", "train", "train.model"]), value=VALUES)
def test_any_value_is_a_config_or_a_config_error(leaf: str, value: Any) -> None:
    source = value
    for name in reversed(leaf.split(".")):
        source = {name: source}
    try:
        load_config(source)
    except ConfigError as error:
        assert all(problem.path.startswith(leaf) for problem in error.problems)


@EXAMPLES
@given(
    assignment=st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(LEAVES), st.text(max_size=20))
)
def test_any_assignment_is_a_config_or_a_config_error(assignment: str) -> None:
    try:
        load_config({}, [assignment])
    except ConfigError as error:
        assert error.problems[0].file == f"--set {assignment}"

"""What is no configuration at all, and what would run code or grow without bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from distnorm.config import load_config
from distnorm.errors import ConfigError
from tests.config.files import load, only, places, problems


def test_every_other_form_of_a_wrong_number_of_digits(file: Path) -> None:
    digits = "9" * 5000
    assert "found '999" in only(problems(file, f"train: {{seed: {digits}}}")).message
    assert "found 1000" in only(problems(file, f"clip: {{max_norm: {'1' + '0' * 400}}}")).message
    assert "found -inf" in only(problems(file, "clip: {max_norm: -1e999}")).message


def test_duplicate_keys_give_both_places(file: Path) -> None:
    text = "clip:\n  max_norm: 1\n  nonfinite: skip\n  max_norm: 2\nclip: {}\n"
    first, second = problems(file, text)
    assert (first.line, first.column, first.path) == (4, 3, "clip.max_norm")
    assert first.message == "duplicate key; first given at line 2, column 3"
    assert (second.line, second.column, second.path) == (5, 1, "clip")
    assert second.message == "duplicate key; first given at line 1, column 1"


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("clip: {max_norm: 1\n", 2, 1, "while parsing a flow mapping"),
        ("clip:\n\tmax_norm: 1\n", 2, 1, "'\\t'"),
        ("clip: 'x\n", 2, 1, "quoted scalar"),
        ("clip: {}\n norm: {}\n", 2, 2, ""),
        ("a: b: c", 1, 5, "mapping values are not allowed here"),
        ("clip: {}\n---\nclip: {}\n", 2, 1, "expected a single document"),
        ("clip: *x", 1, 7, None),
        ('train: {output_dir: "\\UFFFFFFFF"}', 1, 24, ""),
        ("clip: \x07", 1, 7, "U+0007"),
        ("clip: {}\nnorm: \x00\n", 2, 7, "U+0000"),
        ("[" * 100, 1, 33, "at most 32 levels"),
        ("%YAML 9" + "9" * 5000 + "\n---\n", 1, None, ""),
    ],
)
def test_what_is_no_yaml_says_where(
    file: Path, text: str, line: int, column: int | None, message: str | None
) -> None:
    problem = only(problems(file, text))
    if message is None:
        assert "aliases" in problem.message
    else:
        assert problem.message.startswith("not valid YAML: ")
        assert message in problem.message
        assert problem.path == ""
    assert problem.line == line
    assert column in (None, problem.column)


def test_billions_of_laughs_are_refused_at_once(file: Path) -> None:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    found = problems(file, "\n".join(lines))
    assert sum("aliases" in problem.message for problem in found) == 19 * 9


def test_deep_nesting_is_refused_without_recursion(file: Path) -> None:
    assert "levels" in only(problems(file, "{a: " * 50_000)).message
    assert "levels" in only(problems(file, "- " * 50_000)).message


@pytest.mark.parametrize(
    ("content", "line", "column", "found"),
    [
        (b"clip: {}\nnorm: \xff\n", 2, 7, "0xff"),
        ("# \u00e4\n# \u00e4\u00e4".encode() + b"\xe4", 2, 5, "0xe4"),
        ("clip: {}".encode("utf-16"), 1, 1, "0xff"),
    ],
)
def test_what_is_not_utf_8_says_where(file: Path, content: bytes, line: int, column: int, found: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    problem = only(caught.value.problems)
    assert (problem.line, problem.column, problem.message) == (
        line,
        column,
        f"expected UTF-8, found the byte {found}",
    )


def test_columns_are_counted_in_characters(file: Path) -> None:
    text = "train: {output_dir: 'd\u00e9j\u00e0 \U0001f600', stps: 3}"
    assert places(problems(file, text)) == [(1, 31, "train.stps")]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_text("# " + "x" * (1 << 18))
    for source, reason in [
        (tmp_path / "none.yaml", "found: No such file or directory"),
        (tmp_path, "found: Is a directory"),
        (tmp_path / ("x" * 300), "found: File name too long"),
        (big, "expected at most 262144 bytes of YAML, found more"),
    ]:
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(source)
        problem = only(caught.value.problems)
        assert (problem.file, problem.line, problem.column) == (str(source), None, None)
    with pytest.raises(ConfigError, match="null byte"):
        load_config("a\0b")


@pytest.mark.parametrize("source", [3, ["a.yaml"], b"a.yaml", object()])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(
        ConfigError, match=f"expected a path, a mapping or a Config, found {type(source).__name__}"
    ):
        load_config(source)  # type: ignore[arg-type]


def test_a_problem_is_one_line_whatever_it_quotes(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, '"a\\nb\\e[31m": 1\nclip: {nonfinite: "c\\nd"}\n')
    assert len(str(caught.value).splitlines()) == 2
    assert "\x1b" not in str(caught.value)

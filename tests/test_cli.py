"""The command line: its surface, its exit codes, and what it does not import."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import distnorm
from distnorm import cli
from distnorm.config import Config, json_schema
from distnorm.errors import DisagreementError

ROOT = Path(__file__).resolve().parent.parent

FIVE = """\
norm:
  type: 0
clip:
  max_nrom: 1e-3
train:
  steps: "20"
  optimizer: {name: adam}
  parallel: {tp: 3}
"""


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.yaml"
    path.write_text("clip: {max_norm: 1e-3}\n")
    return str(path)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(FIVE)
    return str(path)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands for the modules that commands dispatch to; holds what they were called with."""
    calls: list[tuple[Any, ...]] = []

    def stand_in(name: str) -> None:
        def main(*arguments: Any) -> int:
            calls.append((name, *arguments))
            return 1

        package, _, last = name.rpartition(".")
        module = ModuleType(name)
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        # `from package import last` takes the attribute, where there is one, before the module.
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)

    trainer = ModuleType("distnorm.trainer")
    monkeypatch.setitem(sys.modules, "distnorm.trainer", trainer)
    for name in ("distnorm.trainer.run", "distnorm.trainer.verify", "distnorm.monitor.compare"):
        stand_in(name)
    return calls


def python(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def surface(parser: argparse.ArgumentParser) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: surface(inner) for name, inner in action.choices.items()}
        else:
            found["/".join(action.option_strings) or action.dest] = action.metavar
    return found


def test_the_surface_is_frozen() -> None:
    configured = {"-h/--help": None, "config": "CONFIG", "--set": "KEY=VALUE"}
    assert surface(cli.make_parser()) == {
        "-h/--help": None,
        "--version": None,
        "train": {**configured, "--resume": None, "--overwrite": None},
        "verify": {**configured, "--against": "CONFIG", "--json": "FILE", "--page": "FILE", "--trace": None},
        "validate": {"-h/--help": None, "configs": "CONFIG", "--set": "KEY=VALUE"},
        "plan": {**configured, "--world": "N", "--rank": "R", "--json": None},
        "schema": {"-h/--help": None},
        "doctor": {
            **configured,
            "--against": "CONFIG",
            "--env": None,
            "--json": "FILE",
            "--page": "FILE",
            "--trace": None,
        },
        "dump": {**configured, "-o/--output": "DIR"},
        "compare": {"-h/--help": None, "run_a": "RUN", "run_b": "RUN", "--rtol": "R"},
        "report": {"-h/--help": None, "runs": "RUN", "-o/--output": "FILE"},
        "watch": {"-h/--help": None, "runs": "RUN", "--host": "HOST", "--port": "N", "--terminal": None},
        "suggest-threshold": {"-h/--help": None, "run": "RUN"},
        "bench": {
            "-h/--help": None,
            "workloads": "WORKLOAD",
            "--device": "DEVICE",
            "--rounds": "N",
            "--json": "FILE",
            "--config": "CONFIG",
        },
    }


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("train",),
        ("verify",),
        ("validate",),
        ("plan",),
        ("schema",),
        ("compare",),
        ("report",),
        ("watch",),
        ("bench",),
    ],
)
def test_help_lists_every_option(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    known = surface(cli.make_parser())
    for name, metavar in (known[command[0]] if command else known).items():
        is_word = name.startswith("-") or isinstance(metavar, dict)
        assert all(part in text for part in (name.split("/") if is_word else [metavar])), name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["train"],
        ["train", "a", "b"],
        ["train", "a", "--resume", "--overwrite"],
        ["validate"],
        ["validate", "a", "--se", "x=1"],
        ["plan"],
        ["plan", "a", "--world", "0"],
        ["plan", "a", "--rank", "x"],
        ["schema", "x"],
        ["compare", "a"],
        ["compare", "a", "b", "--rtol", "x"],
        ["compare", "a", "b", "--rtol", "nan"],
        ["compare", "a", "b", "--rtol", "-1"],
        ["bench", "nothing"],
        ["bench", "--rounds", "0"],
        ["bench", "--device", "tpu"],
        ["report"],
        ["report", "-o", "page.html"],
        ["watch"],
        ["watch", "a", "--port", "x"],
        ["suggest-threshold", "a", "b"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"distnorm {distnorm.__version__}\n"


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_validate_right_and_wrong_files(good: str, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", good]) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    assert cli.main(["validate", bad, good]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{good}: ok\n"
    places = [":".join(line.removeprefix(bad).split(":")[:3]) for line in captured.err.splitlines()]
    assert places == [":2:9", ":4:3", ":6:10", ":7:21", ":8:18"]


def test_validate_with_overrides(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", good, "--set", "clip.max_norm=-1", "--set", "clip.max_norm=2"]) == 0
    assert cli.main(["validate", "--set", "clip.max_norm=-1", "--set", "a=1", good]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--set clip.max_norm=-1: clip.max_norm: expected a number >= 0, inf or null, found -1",
        "--set a=1: a: unknown key; expected one of norm, clip, monitor, train",
    ]


@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_wrong_config_is_one_line_a_problem(
    command: str, bad: str, called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, bad]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"distnorm: error: {bad}:") for line in lines)
    assert called == []


@pytest.mark.parametrize(("command", "module"), [("train", "run"), ("verify", "verify")])
def test_train_and_verify_get_the_config(command: str, module: str, good: str, called: list[Any]) -> None:
    assert cli.main([command, good, "--set", "train.steps=3"]) == 1
    ((name, config, *existing),) = called
    assert name == f"distnorm.trainer.{module}"
    assert existing == (["refuse"] if command == "train" else [None])  # or what it is compared with
    assert isinstance(config, Config)
    assert (config.clip.max_norm, config.train.steps) == (1e-3, 3)


def test_compare_gets_the_runs(called: list[Any]) -> None:
    assert cli.main(["compare", "a", "b"]) == 1
    assert cli.main(["compare", "a", "b", "--rtol", "1e-9"]) == 1
    assert called == [
        ("distnorm.monitor.compare", "a", "b", None),
        ("distnorm.monitor.compare", "a", "b", 1e-9),
    ]


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (DisagreementError("rank 1 differs"), 2, "distnorm: error: rank 1 differs\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    raised: BaseException,
    code: int,
    text: str,
    called: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(*_: Any) -> int:
        raise raised

    monkeypatch.setattr(sys.modules["distnorm.monitor.compare"], "main", main)
    assert cli.main(["compare", "a", "b"]) == code
    assert capsys.readouterr().err == text


def test_the_module_runs_and_exits_with_the_code(bad: str) -> None:
    done = python("-m", "distnorm", "validate", bad)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 5


@pytest.mark.parametrize(
    "arguments", [["validate", "FILE"], ["schema"], ["--version"], ["compare", "--help"]]
)
def test_commands_that_need_no_torch_import_none(arguments: list[str], good: str) -> None:
    arguments = [good if argument == "FILE" else argument for argument in arguments]
    done = python("-X", "importtime", "-m", "distnorm", *arguments)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "deepspeed", "hypothesis", "pytest"}

"""Building the compiled kernels: once a machine, never half, and never in the way of a norm."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distnorm
from distnorm.kernels import compiling, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")

ASK = """
import torch, distnorm
from distnorm.kernels import native
assert native.library.cache_info().currsize == 0, "built at import"
distnorm.load_config({})  # its variables are no misspelt keys
assert distnorm.get_total_norm([torch.tensor([3.0, 4.0])]) == 5.0
print("compiled" if native.library() else "eager")
"""


def ask(**environment: str) -> list[str]:
    """The lines that a new process prints."""
    process = start(**environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


def start(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ASK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def fake_compiler(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o700)
    return str(path)


def counting_compiler(folder: Path) -> tuple[str, Path]:
    """A compiler that works, and a file with a line for each of its runs."""
    runs = folder / "runs"
    return fake_compiler(folder / "cc", f'echo run >> {runs}\nexec {os.environ.get("CC", "cc")} "$@"'), runs


def test_it_is_compiled_once_and_kept(tmp_path):
    compiler, runs = counting_compiler(tmp_path)
    cache = tmp_path / "some" / "cache"
    for _ in range(2):
        assert ask(CC=compiler, DISTNORM_CACHE=str(cache)) == ["compiled"]
    assert runs.read_text() == "run\n"
    (kept,) = cache.iterdir()
    assert (kept.suffix, stat.S_IMODE(kept.stat().st_mode)) == (".so", 0o700)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DISTNORM_CACHE": "a"}, "a"),
        ({"XDG_CACHE_HOME": "b"}, "b/distnorm"),
        ({"HOME": "c"}, "c/.cache/distnorm"),
    ],
)
def test_where_it_is_kept(monkeypatch, tmp_path, environment, folder):
    for name in ("DISTNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    compiling.load(native._RECIPE)
    assert [path.suffix for path in (tmp_path / folder).iterdir()] == [".so"]


def test_its_name_tells_source_compiler_and_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "cache"))
    compiling.load(native._RECIPE)
    other = tmp_path / native._RECIPE.source.name
    other.write_bytes(native._RECIPE.source.read_bytes() + b"\n")
    compiling.load(replace(native._RECIPE, source=other))
    with monkeypatch.context() as context:
        context.setenv("CC", counting_compiler(tmp_path)[0])
        compiling.load(native._RECIPE)
    with monkeypatch.context() as context:
        context.setattr(compiling, "_cpu_features", lambda: "flags: fewer")
        compiling.load(native._RECIPE)
    compiling.load(native._RECIPE)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_processes_that_start_together(tmp_path):
    compiler, runs = counting_compiler(tmp_path)
    both = [start(CC=compiler, DISTNORM_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["compiled\n"] * 2
    assert runs.exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture
def answer(monkeypatch, tmp_path, caplog):
    """What the norm of 3 and 4 is computed by in this environment, and what was logged."""
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    caplog.set_level(logging.INFO, "distnorm")

    def ask_here() -> tuple[str, list[str]]:
        for _ in range(2):
            assert distnorm.get_total_norm([torch.tensor([3.0, 4.0])]) == 5.0
        assert {record.levelname for record in caplog.records} <= {"INFO"}
        return "compiled" if native.library() else "eager", caplog.messages

    yield ask_here
    native.library.cache_clear()


def test_a_compiler_that_does_not_know_this_cpu(monkeypatch, tmp_path, answer):
    body = f'case "$*" in *-march=native*) exit 1;; esac; exec {os.environ.get("CC", "cc")} "$@"'
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", body))
    assert answer() == ("compiled", [])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo no licence >&2; exit 1", "no licence"),
        ("exit 0", "failed"),
        (
            'for file; do case $file in *.so) echo "not a library" > "$file";; esac; done',
            "file too short",
        ),
    ],
)
def test_a_broken_compiler_leaves_torch_s_operators_and_says_so_once(
    monkeypatch, tmp_path, answer, body, said
):
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", body))
    by, (log,) = answer()
    assert by == "eager" and list((tmp_path / "cache").iterdir()) == []
    assert log.startswith("gradients on the CPU are read by torch's operators") and said in log


def test_no_compiler(monkeypatch, tmp_path, answer):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    by, (log,) = answer()
    assert by == "eager" and f"no compiler '{tmp_path}/none'" in log


def test_a_compiler_that_never_ends(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", "exec sleep 100"))
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(compiling.CompileError, match=r"took more than 0\.2 s"):
        compiling.load(native._RECIPE)
    assert time.monotonic() - began < 10


def test_it_can_be_switched_off(tmp_path):
    assert ask(DISTNORM_NATIVE="0", DISTNORM_CACHE=str(tmp_path / "cache")) == ["eager"]
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_can_not_be_written(monkeypatch, tmp_path, answer):
    """It is compiled for the process alone, and nothing of it stays."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert answer() == ("compiled", [])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_nowhere_to_write(monkeypatch, tmp_path, answer):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    by, (log,) = answer()
    assert by == "eager" and "file" in log


def put(path: Path, content: bytes, mode: int = 0o700) -> int:
    """Replace a file; the one that processes have loaded is left alone. Returns its inode."""
    other = path.with_suffix(".other")
    other.write_bytes(content)
    other.chmod(mode)
    other.replace(path)
    return path.stat().st_ino


def test_what_others_may_write_to_is_neither_loaded_nor_written(monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("DISTNORM_CACHE", str(cache))
    compiling.load(native._RECIPE)
    (kept,) = cache.iterdir()
    before = put(kept, kept.read_bytes(), 0o777)
    compiling.load(native._RECIPE)
    assert kept.stat().st_ino != before  # the directory is ours: compiled anew, and put in its place
    before = put(kept, b"another's")
    cache.chmod(0o777)
    assert compiling.load(native._RECIPE).distnorm_dtypes()
    assert kept.stat().st_ino == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path))
    compiling.load(native._RECIPE)
    (kept,) = tmp_path.glob("*.so")
    os.chown(kept, 12345, -1)
    before = kept.stat().st_ino
    compiling.load(native._RECIPE)
    assert kept.stat().st_ino != before


def test_a_file_that_is_cut_short_is_compiled_anew(tmp_path):
    assert ask(DISTNORM_CACHE=str(tmp_path)) == ["compiled"]
    (kept,) = tmp_path.glob("*.so")
    size = kept.stat().st_size
    put(kept, kept.read_bytes()[:100])
    assert ask(DISTNORM_CACHE=str(tmp_path)) == ["compiled"]
    assert kept.stat().st_size == size

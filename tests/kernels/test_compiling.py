"""Building the compiled kernels: once a machine, never half, and never in the way of a norm."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distnorm
from distnorm.kernels import child, compiling, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")

ASK = """
import torch, distnorm
from distnorm.kernels import native
assert native.library.cache_info().currsize == 0, "built at import"
distnorm.load_config({})  # its variables are no misspelt keys
assert distnorm.get_total_norm([torch.tensor([3.0, 4.0])]) == 5.0
print("compiled" if native.library() else "eager")
"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch, tmp_path_factory):
    """A compiler that doesn't optimise, which takes less time."""
    compiler = fake_compiler(
        tmp_path_factory.mktemp("hasty") / "cc", f'exec {os.environ.get("CC", "cc")} "$@" -O0'
    )
    monkeypatch.setenv("CC", compiler)


@pytest.fixture
def recipe(tmp_path_factory):
    """Of a file of one line, for what is the same for all sources."""
    source = tmp_path_factory.mktemp("source") / "native.c"
    source.write_text("int distnorm_dtypes(void) { return 15; }\n", encoding="utf-8")
    return replace(native._RECIPE, source=source)


def ask(**environment: str) -> list[str]:
    """The lines that a new process prints."""
    process = start(**environment)
    out, err = process.communicate(timeout=240)
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


@pytest.mark.slow
def test_it_is_compiled_once_and_kept(monkeypatch, tmp_path):
    compiler, runs = counting_compiler(tmp_path)
    cache = tmp_path / "some" / "cache"
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("DISTNORM_CACHE", str(cache))
    assert ask() == ["compiled"]
    assert compiling.load(native._RECIPE, compiles=False).distnorm_dtypes(), "in another process"
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
def test_where_it_is_kept(monkeypatch, tmp_path, environment, folder, recipe):
    for name in ("DISTNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    compiling.load(recipe)
    assert [path.suffix for path in (tmp_path / folder).iterdir()] == [".so"]


def test_its_name_tells_source_compiler_and_cpu(monkeypatch, tmp_path, recipe):
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "cache"))
    compiling.load(recipe)
    other = tmp_path / recipe.source.name
    other.write_bytes(recipe.source.read_bytes() + b"\n")
    compiling.load(replace(recipe, source=other))
    with monkeypatch.context() as context:
        context.setenv("CC", counting_compiler(tmp_path)[0])
        compiling.load(recipe)
    with monkeypatch.context() as context:
        context.setattr(compiling, "_cpu_features", lambda: "flags: fewer")
        compiling.load(recipe)
    compiling.load(recipe)
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.slow
def test_processes_that_start_together(tmp_path):
    compiler, runs = counting_compiler(tmp_path)
    both = [start(CC=compiler, DISTNORM_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    assert [process.communicate(timeout=240)[0] for process in both] == ["compiled\n"] * 2
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
        assert {record.levelname for record in caplog.records} <= {"WARNING"}
        return "compiled" if native.library() else "eager", caplog.messages

    yield ask_here
    native.library.cache_clear()


@pytest.mark.slow
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


def test_a_compiler_that_never_ends(monkeypatch, tmp_path, recipe):
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", "exec sleep 100"))
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(compiling.CompileError, match=r"took more than 0\.2 s"):
        compiling.load(recipe)
    assert time.monotonic() - began < 10


def test_it_can_be_switched_off(monkeypatch, tmp_path, answer):
    monkeypatch.setenv("DISTNORM_NATIVE", "0")
    assert answer() == ("eager", [])
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
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


def test_what_others_may_write_to_is_neither_loaded_nor_written(monkeypatch, tmp_path, recipe):
    cache = tmp_path / "cache"
    monkeypatch.setenv("DISTNORM_CACHE", str(cache))
    compiling.load(recipe)
    (kept,) = cache.iterdir()
    before = put(kept, kept.read_bytes(), 0o777)
    compiling.load(recipe)
    assert kept.stat().st_ino != before  # the directory is ours: compiled anew, and put in its place
    before = put(kept, b"another's")
    cache.chmod(0o777)
    assert compiling.load(recipe).distnorm_dtypes()
    assert kept.stat().st_ino == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_loaded(monkeypatch, tmp_path, recipe):
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path))
    compiling.load(recipe)
    (kept,) = tmp_path.glob("*.so")
    os.chown(kept, 12345, -1)
    before = kept.stat().st_ino
    compiling.load(recipe)
    assert kept.stat().st_ino != before


def test_a_file_that_is_cut_short_is_compiled_anew(monkeypatch, tmp_path, recipe):
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path))
    compiling.load(recipe)
    (kept,) = tmp_path.glob("*.so")
    size = kept.stat().st_size
    put(kept, kept.read_bytes()[:100])
    assert compiling.load(recipe).distnorm_dtypes() == 15
    assert kept.stat().st_size == size


# ---- a process that ends while the compiler runs

LOAD = """
import sys, threading, time
from distnorm.kernels import compiling, native, walking
compile = lambda: compiling.load_in_turn(walking._recipe(), compiling.ctypes.PyDLL)
threading.Thread(target=compile, daemon=True).start()
sys.stdin.readline()
"""
SLOW = """
echo temporary > $TMPDIR/cc.s
for file; do case $file in *.so) echo half > "$file";; esac; done
sleep 300 & echo $! >> {pids}; echo $$ >> {pids}
wait
"""


def eventually(holds: Callable[[], bool], within: float = 10) -> bool:
    """By default within ten seconds, in which the kernel ends a process that has a signal to end."""
    until = time.monotonic() + within
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("end", ["by itself", signal.SIGTERM, signal.SIGKILL], ids=str)
def test_neither_a_compiler_nor_its_files_outlive_the_process(tmp_path, end):
    pids, cache = tmp_path / "pids", tmp_path / "cache"
    compiler = fake_compiler(tmp_path / "c++", SLOW.format(pids=pids))
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD],
        stdin=subprocess.PIPE,
        env={**os.environ, "CXX": compiler, "DISTNORM_CACHE": str(cache), "TMPDIR": str(tmp_path)},
    )
    assert eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2, within=120)
    began = [int(pid) for pid in pids.read_text().split()]
    assert all(map(runs, began))
    assert any((folder / "cc.s").exists() for folder in cache.iterdir())
    if end == "by itself":
        process.communicate(b"\n", timeout=30)
        assert [path.name for path in cache.iterdir()] == ["walk.lock"], (
            "removed before the process has ended"
        )
    else:
        process.send_signal(end)
        process.communicate(timeout=30)
    assert eventually(lambda: not any(map(runs, began)))
    assert eventually(lambda: [path.name for path in cache.iterdir()] == ["walk.lock"])
    assert {path.name for path in tmp_path.iterdir()} == {"pids", "cache", "c++"}


def test_nothing_is_begun_in_a_process_that_ends(monkeypatch, tmp_path, recipe):
    monkeypatch.setattr(child, "_ending", [os.getpid()])
    monkeypatch.setenv("DISTNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(compiling.CompileError, match="the process is ending"):
        compiling.load(recipe)
    assert list((tmp_path / "cache").iterdir()) == []


FORK = """
import os, sys
from pathlib import Path
from threading import Thread
from distnorm.kernels import child
with child.scratch() as folder:
    def run():
        command = ["sh", "-c", f"echo > {folder}/began; while [ ! -e {folder}/go ]; do sleep 0.05; done"]
        ended.append(child.run(command, folder, 60))
    ended = []
    thread = Thread(target=run)
    thread.start()
    while not (folder / "began").exists(): pass
    if not os.fork():
        sys.exit()  # which calls what is registered for the end
    assert os.wait()[1] == 0
    (folder / "go").touch()
    thread.join()
    print(ended)
"""


@pytest.mark.slow
def test_a_fork_that_ends_leaves_the_compiler_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.stdout == "[(0, '')]\n", done.stderr


def test_a_lock_is_no_link_to_another_s_file(monkeypatch, tmp_path, recipe):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("DISTNORM_CACHE", str(cache))
    lock = cache / f"{recipe.source.stem}.lock"
    lock.symlink_to(precious)
    compiling.load_in_turn(recipe, compiling.ctypes.CDLL)
    assert precious.read_text() == "kept" and lock.is_symlink()
    lock.unlink()
    lock.write_text("nothing is written to it")
    compiling.load_in_turn(recipe, compiling.ctypes.CDLL)
    assert lock.read_text() == "nothing is written to it"


def test_no_lock_is_made_where_others_can_write(monkeypatch, tmp_path, recipe):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("DISTNORM_CACHE", str(cache))
    assert compiling.load_in_turn(recipe, compiling.ctypes.CDLL).distnorm_dtypes()
    assert list(cache.iterdir()) == []

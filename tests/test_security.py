"""What others may have planted: in the cache, a config, a run's folder. SECURITY.md says what is promised."""

from __future__ import annotations

import ast
import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from distnorm import ConfigError, RunError, load_config
from distnorm.kernels import compiling, native

ROOT = Path(__file__).parent.parent
SOMEBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play two users")


@pytest.fixture
def recipe(tmp_path: Path) -> compiling.Recipe:
    """Of a file that compiles quickly."""
    source = tmp_path / "native.c"
    source.write_text("int answer(void) { return 42; }")
    return compiling.Recipe(source, "CC", "cc", ("-shared", "-fPIC"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "above" / "cache"
    monkeypatch.setenv("DISTNORM_CACHE", str(folder))
    return folder


@as_root
def test_a_link_planted_in_anothers_cache_is_not_followed(monkeypatch, recipe, cache):
    precious = cache.parent.parent / "precious"
    precious.write_text("kept")
    cache.mkdir(parents=True)
    os.chown(cache, SOMEBODY, SOMEBODY)
    (cache / "native.lock").symlink_to(precious)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(compiling.CompileError):
        compiling.load_in_turn(recipe, ctypes.CDLL)
    assert precious.read_text() == "kept"
    assert [path.name for path in cache.iterdir()] == ["native.lock"]


@as_root
def test_a_lock_that_another_may_hold_is_not_waited_for(recipe, cache):
    cache.mkdir(parents=True, mode=0o700)
    (cache / "native.lock").write_text("")
    os.chown(cache / "native.lock", SOMEBODY, SOMEBODY)
    with pytest.raises(PermissionError, match="another user's"):
        compiling._lock_of(recipe)


def test_a_pipe_in_the_lock_s_place_stops_nobody(recipe, cache):
    cache.mkdir(parents=True, mode=0o700)
    os.mkfifo(cache / "native.lock")
    os.close(compiling._lock_of(recipe))


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
@pytest.mark.parametrize("open_to_all", ["the cache", "what is above", "a link's end"])
def test_a_cache_that_others_can_write_is_refused(monkeypatch, caplog, recipe, cache, open_to_all):
    compiling._warn.cache_clear()
    cache.mkdir(parents=True, mode=0o700)
    if open_to_all == "a link's end":
        link = cache.parent.parent / "link"
        link.symlink_to(cache)
        monkeypatch.setenv("DISTNORM_CACHE", str(link))
    (cache if open_to_all == "the cache" else cache.parent).chmod(0o777)
    for _ in range(2):
        assert compiling.load(recipe).answer() == 42  # for this process alone
    assert list(cache.iterdir()) == []
    (message,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert str(cache) in message and "neither loaded from there nor kept" in message


def test_links_in_a_circle_leave_every_process_to_compile_for_itself(recipe, cache):
    cache.parent.mkdir()
    cache.symlink_to(cache)
    with suppress(OSError, compiling.CompileError):  # no compiler
        assert compiling.load(recipe).answer() == 42


def test_a_folder_that_all_share_but_for_others_entries_is_no_danger(recipe, cache):
    cache.mkdir(parents=True, mode=0o700)
    cache.parent.chmod(0o1777)  # as /tmp
    os.close(compiling._lock_of(recipe))


BOMB = "!!python/object/apply:os.mkdir [{mark}]"
# Thirty lines that mean a thousand million keys.
LAUGHS = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 31))


def test_a_config_runs_no_code(tmp_path):
    mark = tmp_path / "exploded"
    config = tmp_path / "config.yaml"
    for text in (f"clip: {BOMB}", f"clip: {{{{max_norm: {BOMB}}}}}"):
        config.write_text(text.format(mark=mark))
        with pytest.raises(ConfigError):
            load_config(config)
    assert not mark.exists()


@pytest.mark.slow
def test_the_config_in_a_run_s_folder_runs_no_code(tmp_path):
    from distnorm.trainer import rundir

    mark = tmp_path / "exploded"
    for text in (BOMB.format(mark=mark), "[" * 5000, LAUGHS):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RunError, match="expected a run's config"):
            rundir._find_start(load_config({"train": {"output_dir": str(tmp_path)}}), "refuse")
    assert not mark.exists()


# ---- how the code is written


DANGEROUS = re.compile(r"\bshell\b|os\.(system|popen)|\beval\(|\bexec\(|yaml\.(unsafe_)?load|torch\.load")


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Of calls in files that have such a word: where each is, what is called, and its keywords."""
    for folder in ("distnorm", "benchmarks", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            if not DANGEROUS.search(text := file.read_text(encoding="utf-8")):
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call):
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords


def test_no_shell_no_yaml_objects_no_pickled_tensors():
    bad = []
    for where, called, keywords in calls():
        if keywords.get("shell", "False") != "False":
            bad.append(f"{where}: shell")
        if called in ("os.system", "os.popen", "eval", "exec", "yaml.load", "yaml.unsafe_load"):
            bad.append(f"{where}: {called}")
        if called == "torch.load" and keywords.get("weights_only") != "True":
            bad.append(f"{where}: torch.load without weights_only=True")
    assert bad == []


def test_every_exemption_from_bandit_s_rules_is_explained():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "S" in settings["select"]
    explained = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    exempt = [(".", rule) for rule in settings["ignore"]]
    exempt += [(file, rule) for file, rules in settings["per-file-ignores"].items() for rule in rules]
    for file, rule in exempt:
        if re.fullmatch(r"S\d*", rule):
            assert re.search(rf"`{re.escape(file)}`.*`{rule}`", explained), (file, rule)
    for file in (ROOT / "distnorm").rglob("*.py"):
        assert not re.search(r"noqa: S|nosec", file.read_text(encoding="utf-8")), file

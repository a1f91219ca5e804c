"""What rows and files say of a run beside its norms: learning rate, time, commit."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distnorm
from distnorm.monitor.report.runs import read_runs
from distnorm.monitor.report.summary import origin
from distnorm.monitor.sinks.starts import commit_of


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_attach_notes_the_rate_that_a_step_is_made_with(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0}, "monitor": {"dir": str(tmp_path)}})
    began = time.time()
    for step in range(3):
        model(torch.ones(2, 3)).sum().backward()
        handle.note(loss=2.0 + step)
        optimizer.step()
        schedule.step()
    handle.clipper.flush()
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["learning_rate"] for row in rows] == [0.5, 0.25, 0.125]
    assert [row["loss"] for row in rows] == [2.0, 3.0, 4.0], "noting the rate leaves the loss"
    assert all(began - 1 <= row["time"] <= time.time() + 1 for row in rows)


def test_a_rate_that_is_a_tensor_is_read_in_host_memory_only(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), capturable=False, foreach=False)
    handle = distnorm.attach(model, optimizer, {"monitor": {"dir": str(tmp_path)}})
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert handle.clipper.flush()["learning_rate"] == 0.25  # type: ignore[index]


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e@e", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_what_git_says(tmp_path: Path) -> None:
    """Of a branch, in a subfolder, of a worktree, with packed references, and of no branch."""
    repository, worktree = tmp_path / "a", tmp_path / "b"
    inner = repository / "inner"
    inner.mkdir(parents=True)
    assert commit_of(tmp_path) is None
    git(repository, "init")
    assert commit_of(inner) is None, "no commit yet"
    git(repository, "commit", "--allow-empty", "-m", "one")
    assert commit_of(inner) == git(repository, "rev-parse", "HEAD")
    git(repository, "worktree", "add", "-b", "other", str(worktree))
    git(worktree, "commit", "--allow-empty", "-m", "two")
    assert commit_of(worktree) == git(worktree, "rev-parse", "HEAD") != commit_of(repository)
    git(repository, "pack-refs", "--all")
    assert commit_of(worktree) == git(worktree, "rev-parse", "HEAD") != commit_of(repository)
    git(worktree, "checkout", "--detach", "main")
    assert commit_of(worktree) == git(repository, "rev-parse", "main")


def test_every_start_is_kept_and_a_new_run_begins_anew(tmp_path: Path) -> None:
    from tests.monitor.feeding import monitored, step_row

    for done, last in ((0, 3), (3, 4), (0, 1)):
        monitor, _ = monitored({}, tmp_path)
        monitor.load_state_dict({**monitor.state_dict(), "step": done})
        for step in range(done + 1, last + 1):
            monitor.step(step_row(step))
        monitor.close()
        starts = lines(tmp_path / "starts.jsonl")
        assert [start["step"] for start in starts] == ([0, 3] if done else [0])
    (run,) = read_runs([tmp_path])
    (line,) = origin(run)
    assert line.startswith("started ") and f"commit {starts[0]['commit']}" in line and "python 3." in line

"""starts.jsonl: when a run was started and resumed, and with what code."""

from __future__ import annotations

import json
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distnorm.monitor.records import STARTS_FILE


def write_start(folder: Path, last_kept: int) -> None:
    """Add a line to a run's starts.jsonl, of a run that begins or goes on; step 0 begins the file anew.

    The commit is that of the repository around the working directory. It is read from its files, so no
    process is started beside a training; whether files were changed since the commit is not known.

    Args:
        folder: the run's.
        last_kept: the step after which it goes on.

    Raises:
        OSError: it can't be written.
    """
    versions = {"python": sys.version.split()[0]}
    for name in ("distnorm", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    row = {
        "step": last_kept,
        "time": round(time.time(), 3),
        "commit": commit_of(Path.cwd()),
        "versions": versions,
    }
    with (folder / STARTS_FILE).open("a" if last_kept else "w", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out in the git repository around a folder; None where there is none."""
    try:
        place = next((each / ".git" for each in (folder, *folder.parents) if (each / ".git").exists()), None)
        if place is None:
            return None
        if place.is_file():  # of a worktree or a submodule: it names the folder
            place = place.parent / place.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
        shared = place / "commondir"
        common = place / shared.read_text(encoding="utf-8").strip() if shared.is_file() else place
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return _checked(head)
        name = head.removeprefix("ref: ")
        for file in (place / name, common / name):
            if file.is_file():
                return _checked(file.read_text(encoding="utf-8").strip())
        packed = common / "packed-refs"
        lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
        return next((_checked(line.split(" ")[0]) for line in lines if line.endswith(f" {name}")), None)
    except (OSError, UnicodeDecodeError):
        return None


def _checked(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None

"""The run's folder: whether a run may use it, and where the run goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from distnorm import Config, RunError
from distnorm.trainer.world import World

CONFIG_FILE = "config.yaml"
"""The resolved config's name in the run's folder."""

_CONFIG_DRAFT = CONFIG_FILE + ".partial"

STARTS_FILE = "starts.jsonl"
"""When and with what code the run was started."""

CHECKPOINTS_FOLDER = "checkpoints"
"""Checkpoints are the folders `step-N` in this one."""

CHECKPOINT_FILES = (".metadata", "trainer.pt")
"""What every finished checkpoint has."""

# These say how long, from where and how it is watched, not what: a run with others is still the same run.
_OTHER_WAYS_TO_ONE_RUN = ("train.steps", "train.timeout", "train.checkpoint.", "monitor")

_SHOWN_DIFFERENCES = 3

Existing = Literal["refuse", "resume", "overwrite"]
"""What to do with a run that is in the folder already."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins.

    Args:
        checkpoint: a checkpoint's folder, or `None` for step 0.
        sets_aside: whether an earlier run's rows are in the folder, which this one would write over.
        is_new: whether no run was in the folder.
    """

    checkpoint: Path | None
    sets_aside: bool = False
    is_new: bool = False


def find_start(config: Config, world: World, existing: Existing = "refuse") -> Start:
    """Decide on rank 0 how the run begins, and change nothing. Collective.

    A run folder's own newest checkpoint comes before `train.checkpoint.resume_from`, so that a run that was
    resumed from elsewhere and then interrupted goes on; but not before one that it names in the same folder.
    Workers that torchrun has restarted go on with their own run, whatever `existing` says.

    Raises:
        RunError: the folder holds another run or something else; or this one, and nobody said what to do with
            it; or there is no such checkpoint.
    """
    where = f"train.output_dir {config.train.output_dir}"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        existing = "resume"
    start = world.together(where, lambda: _find_start(config, existing) if world.rank == 0 else Start(None))
    return world.gather(start)[0]


def _find_start(config: Config, existing: Existing) -> Start:
    folder = Path(config.train.output_dir)
    rows = _check_folder(folder, config, existing)
    is_new = not (folder / CONFIG_FILE).exists()
    named = config.train.checkpoint.resume_from
    if existing == "overwrite":
        given = None if named is None else _named_checkpoint(Path(named))
        if given is not None and folder.resolve() in given.resolve().parents:
            raise RunError(f"--overwrite would remove {given}, which train.checkpoint.resume_from names")
        return Start(given, rows or newest_checkpoint(folder) is not None, is_new)
    own = newest_checkpoint(folder)
    given = None if named is None else _named_checkpoint(Path(named))
    in_own_folder = given is not None and folder.resolve() in given.resolve().parents
    if rows and existing == "refuse" and not in_own_folder:
        last = f"its newest checkpoint, {own.name}" if own else "the start, since it has no checkpoint"
        raise RunError(
            f"train.output_dir: {folder} holds a run of this config already. --resume goes on from {last}; "
            "--overwrite starts anew; both keep the rows that are there. Or choose another output_dir"
        )
    start = given if own is None or in_own_folder else own
    return Start(start, rows and start is None, is_new)


def set_aside(config: Config, start: Start) -> Path | None:
    """Move the rows and the config of an earlier run into `earlier-N`, and remove its checkpoints.

    Returns:
        That folder; `None` where nothing had to be moved.
    """
    folder = Path(config.train.output_dir)
    if not start.sets_aside:
        return None
    number = 1
    while (earlier := folder / f"earlier-{number}").exists():
        number += 1
    # First: rows without a checkpoint begin anew, but a checkpoint without its rows would be gone on from.
    with suppress(FileNotFoundError):
        shutil.rmtree(folder / CHECKPOINTS_FOLDER)
    earlier.mkdir()
    for path in folder.glob("*.jsonl"):
        path.replace(earlier / path.name)
    shutil.copy(folder / CONFIG_FILE, earlier)  # which also says that the folder is a run's
    return earlier


@contextmanager
def claim(config: Config, start: Start) -> Iterator[None]:
    """Make the run's folder, and let no other job claim it within the `with`.

    Two jobs may have looked at a folder before either wrote there. So it is locked where the file system can;
    the lock ends with the process.

    Raises:
        RunError: another job was faster, or trains there now.
    """
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _is_locked(descriptor):
            raise _taken(folder, "trains there now")
        if start.is_new and (folder / CONFIG_FILE).exists():
            raise _taken(folder, "began a run there as this one did")
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Lock a file for this process; says whether no other has it."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock

        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system, or a file system, without locks
        return True
    return True


def _taken(folder: Path, what: str) -> RunError:
    return RunError(
        f"train.output_dir: expected {folder} for this job alone, found another that {what}. When that has "
        "ended, --resume goes on from its newest checkpoint, and --overwrite starts anew; both keep the rows "
        "that are there. Or choose another output_dir"
    )


def write_config(config: Config) -> None:
    """Make the run's folder and write the resolved config into it."""
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / _CONFIG_DRAFT
    draft.write_text(config.to_yaml(), encoding="utf-8")
    os.replace(draft, folder / CONFIG_FILE)  # a process that is killed leaves the file before, or this one


def newest_checkpoint(folder: Path) -> Path | None:
    """The finished checkpoint of the latest step in a run's folder."""
    found = [(step, path) for step, path in _checkpoints(folder) if _is_complete(path)]
    return max(found)[1] if found else None


def _named_checkpoint(path: Path) -> Path:
    if _is_complete(path):
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise RunError(
            f"train.checkpoint.resume_from: expected a checkpoint's folder, or a run's folder with one in "
            f"{CHECKPOINTS_FOLDER}/, found neither in {path}"
        )
    return newest


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in (folder / CHECKPOINTS_FOLDER).glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            yield int(number), path


def _is_complete(path: Path) -> bool:
    return all((path / name).is_file() for name in CHECKPOINT_FILES)


def _check_folder(folder: Path, config: Config, existing: Existing) -> bool:
    """Refuse a folder that this run would overwrite something in; says whether a run's rows are there."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise RunError(f"train.output_dir: expected a folder, found a file, {folder}")
    written = folder / CONFIG_FILE
    if not written.exists():
        if any(path.name != _CONFIG_DRAFT for path in folder.iterdir()):
            raise RunError(
                f"train.output_dir: expected a new or empty folder, or a run's with its {CONFIG_FILE}, "
                f"found other files in {folder}"
            )
        return False
    # A run that ended before its first step has a line in starts.jsonl, and no rows.
    rows = any(path.stat().st_size for path in folder.glob("*.jsonl") if path.name != STARTS_FILE)
    if existing == "overwrite":
        return rows
    differences = list(_differences(_read_yaml(written), yaml.safe_load(config.to_yaml())))
    if differences:
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        raise RunError(
            f"train.output_dir: expected {folder} to be new or a run of this config, found a run of another: "
            f"{shown}{f'; and {more} more' if more > 0 else ''}; choose another output_dir, or "
            "--overwrite, which keeps the rows that are there"
        )
    return rows


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        # An alias repeats a part: n short lines may mean 2^n keys. What distnorm writes has none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("an alias")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RunError(f"train.output_dir: expected a run's config in {path}, found {error}") from error
    return content if isinstance(content, dict) else {}


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    there, here = dict(_flat(found)), dict(_flat(expected))
    for key in dict.fromkeys([*here, *there]):
        if key.startswith(_OTHER_WAYS_TO_ONE_RUN):
            continue
        if there.get(key, _ABSENT) != here.get(key, _ABSENT):
            yield f"{key} is {here.get(key, _ABSENT)!s} here and {there.get(key, _ABSENT)!s} there"


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_ABSENT = "absent"

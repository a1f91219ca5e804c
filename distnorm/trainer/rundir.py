"""The run's folder: whether a run may use it, and where the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distnorm import Config, RunError
from distnorm.trainer.world import World

CONFIG_FILE = "config.yaml"
"""The resolved config's name in the run's folder."""

CHECKPOINTS_FOLDER = "checkpoints"
"""Checkpoints are the folders `step-N` in this one."""

CHECKPOINT_FILES = (".metadata", "trainer.pt")
"""What every finished checkpoint has."""

# These say how long, from where and how it is watched, not what: a run with others is still the same run.
_OTHER_WAYS_TO_ONE_RUN = ("train.steps", "train.checkpoint.", "monitor")

_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: a checkpoint's folder, or `None` for step 0."""

    checkpoint: Path | None


def find_start(config: Config, world: World) -> Start:
    """Decide on rank 0 how the run begins, and change nothing. Collective.

    A run folder's own newest checkpoint comes before `train.checkpoint.resume_from`, so that a run that was
    resumed from elsewhere and then interrupted goes on; but not before one that it names in the same folder.

    Raises:
        RunError: the folder holds another run or something else, or there is no such checkpoint.
    """
    where = f"train.output_dir {config.train.output_dir}"
    start = world.together(where, lambda: _find_start(config) if world.rank == 0 else Start(None))
    return world.gather(start)[0]


def _find_start(config: Config) -> Start:
    folder = Path(config.train.output_dir)
    _check_folder(folder, config)
    own = newest_checkpoint(folder)
    named = config.train.checkpoint.resume_from
    if named is None:
        return Start(own)
    given = _named_checkpoint(Path(named))
    in_own_folder = folder.resolve() in given.resolve().parents
    return Start(given if own is None or in_own_folder else own)


def write_config(config: Config) -> None:
    """Make the run's folder and write the resolved config into it."""
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")


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


def _check_folder(folder: Path, config: Config) -> None:
    """Refuse a folder that this run would overwrite something in."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"train.output_dir: expected a folder, found a file, {folder}")
    written = folder / CONFIG_FILE
    if not written.exists():
        if any(folder.iterdir()):
            raise RunError(
                f"train.output_dir: expected a new or empty folder, or a run's with its {CONFIG_FILE}, "
                f"found other files in {folder}"
            )
        return
    differences = list(_differences(_read_yaml(written), yaml.safe_load(config.to_yaml())))
    if differences:
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        raise RunError(
            f"train.output_dir: expected {folder} to be new or a run of this config, found a run of another: "
            f"{shown}{f'; and {more} more' if more > 0 else ''}; choose another output_dir"
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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

"""A run's folder as the report reads it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from distnorm.errors import RunError
from distnorm.monitor.records import ALERTS_FILE, LAYERS_FILE, NOTES_FILE, STARTS_FILE
from distnorm.monitor.report.doctor_page import FILE as DOCTOR_FILE
from distnorm.monitor.report.doctor_page import DoctorPage, read_doctor
from distnorm.monitor.report.layers import LayerGrid, read_layers
from distnorm.monitor.report.numbers import number, plural, step_number
from distnorm.monitor.report.row_reader import UnreadableLines, leads_out, open_own, read_rows
from distnorm.monitor.report.steps import Steps, read_steps

_CONFIG_FILE = "config.yaml"
_FILES = (LAYERS_FILE, ALERTS_FILE, STARTS_FILE, NOTES_FILE, DOCTOR_FILE, _CONFIG_FILE)
_MAX_CELLS = 240_000  # of the grids of all runs together: a megabyte and a quarter of the page


@dataclass(frozen=True, slots=True)
class AlertRow:
    """One line of alerts.jsonl."""

    step: int
    kind: str
    layer: str
    ranks: str
    value: float
    bound: float
    message: str


@dataclass(frozen=True, slots=True)
class Start:
    """One line of starts.jsonl: when the run was started or resumed, after which step, and with what code."""

    time: float
    step: int
    commit: str
    versions: str


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run's folder holds; what is missing is empty."""

    name: str
    folder: Path
    steps: Steps
    layers: LayerGrid
    alerts: tuple[AlertRow, ...]
    has_alerts: bool
    config: str
    notes: tuple[str, ...]
    starts: tuple[Start, ...] = ()
    remarks: str = ""
    doctor: DoctorPage | None = None

    @property
    def alerts_in_words(self) -> str:
        """How many alerts there were."""
        if not self.has_alerts:
            return f"no {ALERTS_FILE}"
        return plural(len(self.alerts), "alert") if self.alerts else "no alerts"


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in `paths`, each a folder or its metrics file; names are the shortest that tell them apart.

    Raises:
        RunError: a run has no metrics.
    """
    names = run_names([Path(path) for path in paths])
    cells = _MAX_CELLS // len(paths)
    return [_read_run(Path(path), name, cells) for path, name in zip(paths, names, strict=True)]


def _read_run(path: Path, name: str, max_cells: int) -> Run:
    folder = path if path.is_dir() else path.parent
    return gather_run(folder, name, read_steps(path), read_layers(folder / LAYERS_FILE, max_cells))


def gather_run(folder: Path, name: str, steps: Steps, layers: LayerGrid) -> Run:
    """A run of these steps and layers, with all else that its folder holds."""
    file = folder / ALERTS_FILE
    has_alerts = file.is_file() and not leads_out(file)
    alerts, notes = _read_alerts(file) if has_alerts else ((), ())
    links = [name for name in _FILES if leads_out(folder / name)]
    doctor, of_doctor = read_doctor(folder)
    return Run(
        name=name,
        folder=folder,
        steps=steps,
        layers=layers,
        alerts=alerts,
        has_alerts=has_alerts,
        config=_text(folder / _CONFIG_FILE),
        notes=(
            *(f"{name} is a link out of the run's folder, and is left out" for name in links),
            *steps.notes,
            *layers.notes,
            *notes,
            *of_doctor,
        ),
        starts=_read_starts(folder / STARTS_FILE),
        remarks=_text(folder / NOTES_FILE),
        doctor=doctor,
    )


def _read_alerts(file: Path) -> tuple[tuple[AlertRow, ...], tuple[str, ...]]:
    broken = UnreadableLines(file.name)
    alerts = []
    for rows in read_rows(file, broken):
        for line, row in rows:
            try:
                alerts.append(
                    AlertRow(
                        step=step_number(row["step"]),
                        kind=str(row["kind"]),
                        layer=str(row.get("layer") or ""),
                        ranks=", ".join(str(rank) for rank in row.get("ranks") or ()),
                        value=number(row.get("value")),
                        bound=number(row.get("bound")),
                        message=str(row.get("message") or ""),
                    )
                )
            except (KeyError, ValueError, TypeError):
                broken.add(line)
    return tuple(alerts), (str(broken),) if broken.count else ()


def _read_starts(file: Path) -> tuple[Start, ...]:
    found = []
    is_there = file.is_file() and not leads_out(file)
    for rows in read_rows(file, UnreadableLines(file.name)) if is_there else ():
        for _, row in rows:
            with suppress(KeyError, ValueError, TypeError, OverflowError, OSError, AttributeError):
                time = number(row["time"])
                datetime.fromtimestamp(time, timezone.utc)
                versions = row.get("versions") or {}
                text = ", ".join(f"{name} {version}" for name, version in versions.items())
                found.append(Start(time, int(row.get("step", 0)), str(row.get("commit") or ""), text))
    return tuple(found)


def _text(file: Path) -> str:
    if not file.is_file() or leads_out(file):
        return ""
    try:
        with open_own(file) as opened:
            return opened.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError as error:
        raise RunError(f"expected a run's {file.name}, found {error}") from error


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes; a run that is given twice gets a number."""
    parts = [(path if path.is_dir() else path.parent).resolve().parts for path in paths]
    names: list[str] = []
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({place})" for place, name in enumerate(names, 1)]

"""What a doctor's report in a run's folder says, as the page shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distnorm.monitor.report.numbers import number, plural, short
from distnorm.monitor.report.row_reader import leads_out
from distnorm.monitor.report.tables import Table

FILE = "doctor.json"
_HEADS = ("parameter", "difference", "allowed", "cosine", "scale", "what explains it")


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with parameters of its own: right, wrong, or unproved, as its gradients are zero."""

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class DoctorPage:
    """The doctor's report of a run.

    Args:
        headline: one sentence.
        cause: what explains what is wrong; empty where nothing is.
        layers: in the order of the forward.
        wrong: the parameters with which something is wrong.
    """

    headline: str
    cause: str
    layers: Sequence[Layer]
    wrong: Table


def read_doctor(folder: Path) -> tuple[DoctorPage | None, tuple[str, ...]]:
    """The report in a folder, as `DoctorReport.to_json` wrote it; and what to say where it can't be read."""
    file = folder / FILE
    if not file.is_file() or leads_out(file):
        return None, ()
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return _page(facts), ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, (f"{FILE} is no report of distnorm doctor, and is left out",)


def _page(facts: Mapping[str, Any]) -> DoctorPage:
    parameters = facts["parameters"]
    states: dict[str, str] = {}
    wrong = []
    for parameter in parameters:
        name, explanations = str(parameter["name"]), parameter["explanations"]
        layer = name.rpartition(".")[0] or name
        state = "wrong" if explanations else "unproved" if parameter["is_dead"] else "right"
        order = ("right", "unproved", "wrong")
        states[layer] = max(state, states.get(layer, "right"), key=order.index)
        if explanations:
            numbers = (parameter[key] for key in ("difference", "tolerance", "cosine", "scale"))
            said = "; ".join(_said(one) for one in explanations)
            wrong.append((name, *("" if n is None else short(number(n)) for n in numbers), said))
    count, ranks = len(parameters), plural(int(facts["ranks"]), "rank")
    if wrong:
        head = f"{len(wrong)} of {plural(count, 'gradient')} on {ranks} are wrong."
    elif facts["ok"] is True:
        head = f"All {plural(count, 'gradient')} on {ranks} are those of one process."
    else:
        head = f"{plural(count, 'gradient')} on {ranks}: none was found wrong, and not every one is proved."
    cause = facts["cause"]
    said = "" if cause is None else f"{cause['where']}: {_said(cause['explanation'])}"
    return DoctorPage(head, said, [Layer(*pair) for pair in states.items()], Table(_HEADS, wrong))


def _said(explanation: Mapping[str, Any]) -> str:
    ranks = ", ".join(str(rank) for rank in explanation["ranks"])
    return f"{explanation['mistake']}: {explanation['text']}" + (f" (ranks {ranks})" if ranks else "")

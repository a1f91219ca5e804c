"""What a doctor's report in a run's folder says, as the page shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from distnorm.monitor.report.numbers import number, plural, short
from distnorm.monitor.report.row_reader import leads_out
from distnorm.monitor.report.tables import Table

FILE = "doctor.json"
_HEADS = ("parameter", "what explains it", "difference", "allowed", "cosine", "scale")
_STATES = ("right", "unproved", "wrong")
_MOST_LAYERS = 40  # of more, neighbours that are alike are shown as one


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with parameters of its own, or neighbours that are alike.

    Args:
        name: of the module; of neighbours, the first's.
        state: "right", "wrong", or "unproved", as its gradients are zero.
        last: the last neighbour's name; empty for a single module.
        count: how many modules these are.
    """

    name: str
    state: str
    last: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class DoctorPage:
    """The doctor's report of a run.

    Args:
        state: as a layer's, of the whole model.
        headline: one sentence.
        cause: what explains what is wrong; empty where nothing is.
        remarks: where the passes part, what proves nothing, and what wasn't compared.
        layers: in the order of the forward.
        wrong: the parameters with which something is wrong.
    """

    state: str
    headline: str
    cause: str
    remarks: Sequence[str]
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
    states: dict[str, str] = {}
    for parameter in facts["parameters"]:
        name = str(parameter["name"])
        layer, state = name.rpartition(".")[0] or name, _state(parameter)
        states[layer] = max(state, states.get(layer, "right"), key=_STATES.index)
    rows = list(_wrong_rows(facts["parameters"]))
    count, ranks = len(facts["parameters"]), plural(int(facts["ranks"]), "rank")
    if rows:
        of = f"{len(rows)} of {plural(count, 'gradient')} on {ranks}"
        state, head = "wrong", f"{of} {'is' if len(rows) == 1 else 'are'} wrong."
    elif facts["ok"] is True:
        state, head = "right", f"All {plural(count, 'gradient')} on {ranks} are those of one process."
    else:
        state = "unproved"
        head = f"{plural(count, 'gradient')} on {ranks}: none was found wrong, and not every one is proved."
    cause = facts["cause"]
    said = "" if cause is None else f"{cause['where']}: {_said(cause['explanation'])}"
    layers = [Layer(*pair) for pair in states.items()]
    return DoctorPage(state, head, said, _remarks(facts), _together(layers), Table(_HEADS, rows))


def _state(parameter: Mapping[str, Any]) -> str:
    return "wrong" if parameter["explanations"] else "unproved" if parameter["is_dead"] else "right"


def _wrong_rows(parameters: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    before = ""
    for parameter in parameters:
        if _state(parameter) != "wrong":
            continue
        numbers = (parameter[key] for key in ("difference", "tolerance", "cosine", "scale"))
        said = "; ".join(_said(one) for one in parameter["explanations"])
        shown = ("" if n is None else short(number(n)) for n in numbers)
        yield (str(parameter["name"]), "the same" if said == before else said, *shown)
        before = said


def _remarks(facts: Mapping[str, Any]) -> list[str]:
    found = []
    for name in ("forward", "backward"):
        if parting := facts.get(name):
            found.append(f"In the {name} the two part {parting['place']}.")
    dead = [str(parameter["name"]) for parameter in facts["parameters"] if _state(parameter) == "unproved"]
    if dead:
        named = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        found.append(f"Zero or absent on both sides, which proves nothing: {named}.")
    return [*found, *map(str, facts.get("notes") or ())]


def _together(layers: Sequence[Layer]) -> list[Layer]:
    """The layers of a small model; of a larger one, runs of layers in one state are one."""
    if len(layers) <= _MOST_LAYERS:
        return list(layers)
    found = []
    for state, group in groupby(layers, key=lambda layer: layer.state):
        same = list(group)
        if state == "wrong" or len(same) < 3:
            found += same
        else:
            found.append(Layer(same[0].name, state, same[-1].name, len(same)))
    return found


def _said(explanation: Mapping[str, Any]) -> str:
    ranks = ", ".join(str(rank) for rank in explanation["ranks"])
    return f"{explanation['mistake']}: {explanation['text']}" + (f" (ranks {ranks})" if ranks else "")

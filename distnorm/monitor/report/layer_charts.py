"""The charts of a run's layers: a heat map over the steps, each layer's spread, and one that is picked."""

from __future__ import annotations

import math

from distnorm.monitor.report.charts import Chart, shown
from distnorm.monitor.report.layers import LayerGrid
from distnorm.monitor.report.numbers import finite, number, packed, plural, short
from distnorm.monitor.report.tables import Table, span

_COLUMNS_OF_TABLE = 8
_LAST = {"rms": "rms", "max": "max", "zero_fraction": "zero share", "grad_to_weight": "norm / weight's"}
_LAST_IF_MEASURED = {
    "weight_norm": "weight norm",
    "cos_weight": "cos(gradient, weight)",
    "update_norm": "update norm",
    "update_to_weight": "update / weight",
    "cos_update": "cos(gradient, update)",
    "spectral_norm": "spectral norm",
    "stable_rank": "stable rank",
}


def layer_charts(layers: LayerGrid) -> list[Chart]:
    """Heat map, picked layer and spread; one notice where the run has no layer rows."""
    if not layers.layers:
        says = "This run has no layer rows (monitor.every is null, or layers.jsonl is missing)."
        return [Chart("Layers", says, kind="heat")]
    positive = [cell for layer in layers.layers for cell in layer.cells if not math.isnan(cell)]
    if not positive:
        says = (
            f"{plural(layers.rows, 'row')} of {plural(len(layers.layers), 'layer')}, and no norm above zero."
        )
        return [Chart("Layers", says, table=_spread_table(layers), kind="heat")]
    return [_heat(layers, positive), _picked(layers), _spread(layers)]


def _heat(layers: LayerGrid, positive: list[float]) -> Chart:
    z = [packed((math.log10(cell) for cell in layer.cells), "f") for layer in layers.layers]
    trace = {
        "z": z,
        "names": [shown(layer.name) for layer in layers.layers],
        "bins": [span(*ends) for ends in layers.bins],
        "end": layers.bins[-1][1],
        "starts": packed((first for first, _ in layers.bins), "i"),
        "zeros": [[row, column] for row, layer in enumerate(layers.layers) for column in layer.zeros],
        "broken": [[row, column] for row, layer in enumerate(layers.layers) for column in layer.broken],
    }
    per_bin = -(-layers.steps // len(layers.bins))
    says = [
        f"{plural(len(layers.layers), 'row')} from the model's first layer (top) to its last, "
        f"{plural(layers.steps, 'monitored step')}. The colour is the norm, logarithmic, "
        f"from {short(min(positive))} to {short(max(positive))}."
    ]
    if per_bin > 1:
        says.append(
            f"Each cell is the geometric mean of up to {plural(per_bin, 'monitored step')}, zeros left out."
        )
    if layers.merged > 1:
        says.append(f"Up to {layers.merged} neighbouring layers share a row.")
    return Chart("Layers over steps", " ".join(says), table=_heat_table(layers), kind="heat", layers=trace)


def _heat_table(layers: LayerGrid) -> Table:
    step = -(-len(layers.bins) // _COLUMNS_OF_TABLE)
    starts = range(0, len(layers.bins), step)
    heads = ["layer"]
    for start in starts:
        last = layers.bins[min(start + step, len(layers.bins)) - 1]
        heads.append(span(layers.bins[start][0], last[1]))
    rows = []
    for layer in layers.layers:
        row = [layer.name]
        for start in starts:
            sound = finite(layer.cells[start : start + step])
            inside = range(start, start + step)
            text = short(math.exp(sum(map(math.log, sound)) / len(sound)), 3) if sound else "0"
            if any(column in inside for column in layer.broken):
                text = "not finite" if not sound else text + " *"
            row.append(text)
        rows.append(row)
    note = "Geometric means of the norms by steps; * : some are not finite."
    return Table(heads, rows, note)


def _picked(layers: LayerGrid) -> Chart:
    says = (
        "The norm of the chosen layer, over the band that 90% of all layers lie in. "
        "Choose with the list (arrow keys work), or by a click on the heat map, whose table has its numbers."
    )
    return Chart("One layer", says, kind="picked", layers={})


def _spread(layers: LayerGrid) -> Chart:
    trace = {
        "names": [shown(layer.name) for layer in layers.layers],
        "spread": [packed(layer.spread) for layer in layers.layers],
    }
    says = (
        f"Each layer's norms over {plural(layers.steps, 'monitored step')}: the line from the 5th to the "
        "95th percentile, the box the middle half, the mark in it the median."
    )
    return Chart("Spread of each layer", says, table=_spread_table(layers), kind="spread", layers=trace)


def _spread_table(layers: LayerGrid) -> Table:
    heads = ("layer", "lowest", "5%", "25%", "median", "75%", "95%", "highest")
    shown_of = {**_LAST, **{key: head for key, head in _LAST_IF_MEASURED.items() if _any_has(layers, key)}}
    keys, last = tuple(shown_of), tuple(f"last {head}" for head in shown_of.values())
    rows = []
    for layer in layers.layers:
        row = [layer.name, *(short(value, 3) for value in layer.spread)]
        for key in keys:
            try:
                value = number(layer.last.get(key))
            except ValueError:
                value = math.nan
            row.append("-" if math.isnan(value) else short(value, 3))
        rows.append(row)
    return Table(heads + last, rows, "Percentiles of the finite norms.")


def _any_has(layers: LayerGrid, key: str) -> bool:
    return any(layer.last.get(key) is not None for layer in layers.layers)

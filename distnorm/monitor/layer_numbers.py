"""From the sums of a snapshot to the numbers of its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distnorm.monitor.records import LayerRow
from distnorm.payload.products import Products
from distnorm.payload.slices import Slices


def derived(grad: Tensor, weight: Tensor, products: Products) -> dict[str, list[float | None]]:
    """Norms, ratios and cosines of layers, by the fields of `LayerRow`; `None` where there is none.

    Args:
        grad, weight: [n] the squared 2-norms of gradients and weights.
        products: [n] each.
    """
    found = {"weight_norm": weight.sqrt()}
    if products.grad_weight is not None:
        cosine = products.grad_weight / (grad.sqrt() * weight.sqrt())
        found |= {"cos_weight": cosine, "radial_share": cosine.square()}
    if products.update is not None and products.grad_update is not None:
        norm = products.update.sqrt()
        found["update_norm"] = norm
        found["update_to_weight"] = torch.where(weight == 0, torch.nan, norm / weight.sqrt())
        found["cos_update"] = products.grad_update / (grad.sqrt() * norm)
    return {name: [known(value) for value in values.tolist()] for name, values in found.items()}


def of_model(grad: Tensor, weight: Tensor, products: Products) -> dict[str, float | None]:
    """The same of all parameters together, of [parameters] each."""
    sums = {name: getattr(products, name) for name in Products.__slots__}
    whole = Products(**{name: None if of is None else of.sum().view(1) for name, of in sums.items()})
    return {name: of[0] for name, of in derived(grad.sum().view(1), weight.sum().view(1), whole).items()}


def of_matrices(
    norms: Mapping[int, float], weight: Tensor, members: Sequence[tuple[int, int]], layers: int
) -> dict[str, list[float | None]]:
    """The spectral norms and stable ranks of layers, by the fields of `LayerRow`.

    Args:
        norms: spectral norms, by the places of parameters.
        weight: [parameters] the squared 2-norms of their weights.
        members: (parameter, layer) by their places.
        layers: how many there are.
    """
    largest: list[float | None] = [None] * layers
    smallest: list[float | None] = [None] * layers
    squares = weight.tolist()
    for parameter, layer in members:
        if (norm := norms.get(parameter)) is not None:
            rank = squares[parameter] / norm**2
            largest[layer] = max(largest[layer] or 0.0, norm)
            smallest[layer] = min(smallest[layer] or math.inf, rank)
    return {"spectral_norm": largest, "stable_rank": smallest}


def slice_rows(slices: Slices, products: Products, loss_scale: float) -> list[LayerRow]:
    """The rows of slices, of which neither largest elements nor zeros are measured."""
    grad, weight = products.grad, products.weight
    assert grad is not None and weight is not None
    norms = (grad.sqrt() / loss_scale).tolist()
    ratios = torch.where(weight == 0, torch.nan, (grad / weight).sqrt() / loss_scale).tolist()
    more = derived(grad, weight, products)
    return [
        LayerRow(
            name,
            norms[i],
            norms[i] / math.sqrt(max(slices.numels[i], 1)),
            None,
            None,
            known(ratios[i]),
            **{key: values[i] for key, values in more.items()},
            of=slices.of[i],
        )
        for i, name in enumerate(slices.names)
    ]


def known(value: float) -> float | None:
    """The number; `None` where it is NaN: of nothing, or of what wasn't finite."""
    return None if math.isnan(value) else value

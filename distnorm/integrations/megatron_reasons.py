"""What is wrong with a parameter of Megatron's, and with which of its attributes."""

from __future__ import annotations

from torch import Tensor

from distnorm.sources.megatron import Axes, Claims, Held

Reason = str | None
"""The attribute and the fact that it doesn't fit; `None` where nothing is known to be wrong."""

_ROWS, _COLUMNS = ("output_size", "num_embeddings"), ("input_size", "embedding_dim")


def against_module(each: Held) -> Reason:
    """What the module that has the parameter says of its whole shape, where it says so."""
    claims, shape, owner = each.claims, tuple(each.parameter.shape), each.owner
    if each.is_cut and not each.dim < len(shape):
        return f"partition_dim={claims.partition_dim}, and {len(shape)} dims"
    sizes = tuple(_first(owner, names) for names in (_ROWS, _COLUMNS))
    if len(shape) == 2 and each.axis.size > 1 and all(isinstance(size, int) for size in sizes):
        parts = each.axis.size
        whole = {0: (shape[0] * parts, shape[1]), 1: (shape[0], shape[1] * parts)}
        fits = [dim for dim in whole if whole[dim] == sizes]
        if fits and not each.is_cut:
            return f"no tensor_model_parallel=True, and a part of a module of {sizes}"
        if fits and each.dim not in fits:
            return f"partition_dim={claims.partition_dim}, and a module of {sizes}, cut along {fits[0]}"
        if not fits and each.is_cut and shape == sizes:
            return f"tensor_model_parallel=True, and all of a module of {sizes} on this rank"
    if not each.is_cut:
        return None
    mode = getattr(owner, "parallel_mode", "")  # TransformerEngine's
    dim = {"column": 0, "row": 1}.get(str(mode))
    if len(shape) == 2 and dim is not None and dim != each.dim:
        return f"partition_dim={claims.partition_dim}, and parallel_mode={mode!r}, which cuts along {dim}"
    if mode is None and not each.is_expert and hasattr(owner, "in_features"):
        return "tensor_model_parallel=True, and a module whose parallel_mode is None"
    return None


def of_values(each: Held, unlike: bool, unlike_tp: bool, axes: Axes) -> Reason:
    """Why what claims to be one parameter has several values.

    Args:
        each: the parameter.
        unlike: whether ranks that claim to hold the same have other values.
        unlike_tp: whether its tensor-parallel ranks have.
        axes: along which parameters differ.
    """
    if unlike and each.is_expert and each.claims.allreduce and axes.ep.size > 1:
        return f"no allreduce=False, and other values on each of {list(axes.ep.members)}"
    if unlike_tp and not each.is_cut:
        return f"no tensor_model_parallel=True, and other values on each of {list(each.axis.members)}"
    return None  # the plan says of replicas that they have drifted apart


def of_gradients(each: Held, axes: Axes) -> str:
    """Why the gradient of what claims to be one parameter differs between its tensor-parallel ranks."""
    weight, members = getattr(each.owner, "weight", None), list(each.axis.members)
    if each.is_expert and each.claims.allreduce and axes.ep.size > 1:
        return f"no allreduce=False, and other gradients on each of {list(axes.ep.members)}"
    if isinstance(weight, Tensor) and weight is not each.parameter and each.parameter.ndim == 1:
        of_weight = Claims.of(weight)
        is_cut = of_weight.tensor_model_parallel and of_weight.partition_dim == 0
        if is_cut and weight.shape[0] == each.parameter.shape[0]:
            return (
                f"no tensor_model_parallel=True, as its module's weight has, and other gradients"
                f" on each of {members}"
            )
    if each.claims.sequence_parallel:
        return f"sequence_parallel=True, and a gradient that was never summed over {members}"
    return (
        f"no sequence_parallel=True, and a gradient that was never summed over {members}; or no "
        "tensor_model_parallel=True, if it is a piece"
    )


def _first(owner: object, names: tuple[str, ...]) -> object:
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), None)

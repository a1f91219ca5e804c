"""Which rows of the batch each side was given, by digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from distnorm.verification.doctor.tracing import tensors_in
from distnorm.verification.pieces import digest, local_of


def row_digests(args: Any, kwargs: Any) -> list[str]:
    """For each row of what a model is given ``shape:digest``, of all tensors of data that have as many rows.

    Activations of a pipeline's stage before, which require gradients, are no data. Tokens are the same in
    any integer dtype.
    """
    given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim]
    if not given or any(tensor.requires_grad for tensor in given):
        return []
    found = [local_of(tensor) for tensor in given]
    rows = found[0].shape[0]
    together = [tensor for tensor in found if tensor.shape[0] == rows]
    shape = "".join(str(tuple(tensor.shape[1:])) for tensor in together)
    together = [tensor if _is_inexact(tensor) else tensor.long() for tensor in together]
    return [f"{shape}:" + "".join(digest(tensor[i])[:16] for tensor in together) for i in range(rows)]


def batch_fault(by_rank: Sequence[Sequence[str]], reference: Sequence[str]) -> str | None:
    """Say how the ranks' rows together differ from the reference's; `None` where they are the same batch.

    Ranks that hold the same rows (tensor parallel ones) count as one. Rows of another shape, which context
    parallelism cuts or which come with a mask on one side only, can't be compared: the gradients tell.

    Args:
        by_rank: digests of the rows that each rank's model was given; none on later pipeline stages.
        reference: those of the reference.
    """
    if not any(by_rank) or not reference:
        return None
    once = {tuple(rows): None for rows in by_rank if rows}
    found, expected = Counter(row for rows in once for row in rows), Counter(reference)
    if found == expected or not _shapes(found) & _shapes(expected):
        return None
    missing, extra = expected - found, found - expected
    doubled = any(row in expected for row in extra)
    return (
        f"expected the reference's {expected.total()} rows, found {found.total()}: {missing.total()} of the "
        f"reference's are missing and {extra.total()} are {'given twice or ' if doubled else ''}not its own"
    )


def _shapes(rows: Iterable[str]) -> set[str]:
    return {row.partition(":")[0] for row in rows}


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()

"""Clipping each parameter by the history of its own norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distnorm.errors import DistnormError
from distnorm.policies.decision import EPS, Decision, handle_nonfinite, is_finite, of_each
from distnorm.policies.policy import Policy, StepStatistics, count, number, scalar


class AdaGc(Policy):
    """Scale every parameter's gradient by ``h = min(1, lambda * gamma / norm(g))``, gamma being its history:

    ``gamma <- beta gamma + (1 - beta) h norm(g)``, of norms after clipping

    In the first `warmup` finite steps all are scaled by one ``h = min(1, c / (N + 1e-6))`` of the total norm,
    and gamma is the smallest clipped norm of these.

    A norm of 0 is that of a parameter without a gradient, such as an expert without tokens, and leaves gamma
    alone: a gamma of 0 would keep the gradient at 0 for ever. A parameter whose first gradient comes after
    warm-up isn't clipped then, and its norm starts gamma. All comes from norms rounded to fp32, so that
    the coefficients are the same bits on every topology. The threshold reported is c in warm-up, then inf.

    The defaults are those of the paper. Its authors' code has ``lambda: 1.04``, ``beta: 0.99``,
    ``warmup: 101``, ``eps: 1.0e-8``, and takes gamma from norms before clipping in warm-up
    (``warmup_gamma: unclipped``); it differs from this where a gradient is 0, which lowers gamma there.

    Args:
        nonfinite: see `handle_nonfinite`. A total norm that is not finite changes no gamma, and does not
            count as a warm-up step.
        lambda_: how far above its history a norm may be.
        beta: the decay of gamma.
        warmup: how many steps are clipped by the total norm first.
        warmup_max_norm: c.
        eps: added to a norm by which a coefficient is divided, and where it is not 0, in warm-up in place of
            1e-6.
        warmup_gamma: whether gamma is the smallest ``"clipped"`` or ``"unclipped"`` norm of warm-up.

    Reference: Wang et al., "AdaGC: improving training stability for large language model pretraining",
        arXiv 2502.11034; the code is `ClipGradByAdaptiveNorm` of PaddlePaddle's trainers.
    """

    name = "adagc"
    reads = "parameters"

    def __init__(
        self,
        max_norm: float = math.inf,
        nonfinite: str = "propagate",
        *,
        lambda_: float = 1.05,
        beta: float = 0.98,
        warmup: int = 100,
        warmup_max_norm: float = 1.0,
        eps: float = 0.0,
        warmup_gamma: str = "clipped",
    ) -> None:
        super().__init__(max_norm, nonfinite)
        self._eps, self._takes_unclipped = eps, warmup_gamma == "unclipped"
        self._lambda, self._beta = lambda_, beta
        self._warmup, self._c = warmup, warmup_max_norm
        self._names: tuple[str, ...] | None = None
        self._loaded: dict[str, float] | None = None
        self._keep({"steps": scalar(0), "gamma": torch.empty(0, dtype=torch.float64, device="cpu")})

    def decide(self, step: StepStatistics) -> Decision:
        norms = step.parameter_norms
        assert norms is not None
        state = self._state_at(step.total_norm)
        gamma, is_warmup, counts = state["gamma"], state["steps"] < self._warmup, is_finite(step.history_norm)
        assert gamma.shape == norms.shape, "bind() comes before decide()"
        together = (self._c / (step.history_norm + (self._eps or EPS))).clamp(max=1.0)
        bound = gamma * self._lambda
        apart = torch.where(norms <= bound, 1.0, bound / (norms + self._eps))
        each = torch.where(is_warmup, together, apart)
        clipped = torch.where(is_warmup, norms * together, norms.minimum(bound))
        later = torch.where(gamma == math.inf, clipped, torch.lerp(gamma, clipped, 1 - self._beta))
        first = norms if self._takes_unclipped else clipped
        new = torch.where(is_warmup, torch.minimum(gamma, first), later)
        gamma.copy_(torch.where((clipped > 0) & counts, new, gamma))
        state["steps"].add_(counts)
        threshold = torch.full_like(step.total_norm, math.inf).masked_fill(is_warmup, self._c)
        return handle_nonfinite(of_each(each, threshold), step.total_norm, self._nonfinite)

    def bind(self, names: Sequence[str]) -> None:
        """Say which parameters there are. What is known of those that have been bound before stays."""
        gamma = self._loaded
        if gamma is None:
            gamma = self._by_name() if self._names is not None else {}
        else:
            _check_names(gamma, names)
        values = [gamma.get(name, math.inf) for name in names]
        self._keep({"gamma": torch.tensor(values, dtype=torch.float64, device="cpu")})
        self._names, self._loaded = tuple(names), None

    def take_over(self, other: Policy) -> None:
        assert isinstance(other, AdaGc)
        super().take_over(other)
        self._names, self._loaded = other._names, other._loaded

    def _by_name(self) -> dict[str, float]:
        assert self._names is not None
        return dict(zip(self._names, self._state["gamma"].tolist(), strict=True))

    def _saved(self) -> dict[str, Any]:
        gamma = self._loaded
        if gamma is None:
            gamma = self._by_name() if self._names is not None else {}
        plain = {name: None if math.isinf(value) else value for name, value in gamma.items()}
        return {"steps": int(self._state["steps"].item()), "gamma": plain}

    def _load(self, state: Mapping[str, Any]) -> None:
        steps = count(state["steps"])
        gamma = {
            str(name): math.inf if value is None else number(value) for name, value in state["gamma"].items()
        }
        if any(value <= 0 for value in gamma.values()):
            raise ValueError(gamma)
        if self._names is not None:
            _check_names(gamma, self._names)
        self._keep({"steps": scalar(steps)})
        self._loaded = gamma
        if self._names is not None:
            self.bind(self._names)


def _check_names(found: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuse a state of other parameters."""
    missing = [name for name in names if name not in found]
    unknown = sorted(set(found) - set(names))
    if missing or unknown:
        what = [f"none for {_few(missing)}"] if missing else []
        what += [f"one for {_few(unknown)}, which this model lacks"] if unknown else []
        raise DistnormError(
            f"expected in the state of policy adagc a gamma for each parameter, found {' and '.join(what)}"
        )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

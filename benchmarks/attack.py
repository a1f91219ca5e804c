"""Random attack on the fast path: `python benchmarks/attack.py --cases 10000 --seed 0`.

A case is a step whose gradients somebody has meddled with since the last one: replaced, freed, resized,
expanded, given strides or another dtype at the same address, shared, made of a subclass, and so on (see
attack_changes.py). Clippers live through many cases, with good steps between, so that gradients are found by
address when the next change comes. Ranks, topologies, policies and ways of finding alternate.

Every step is worked out by attack_oracle.py from copies of all memory that were taken before the call: the
norm in fp64 over what all ranks hold together, and every byte of every storage afterwards, each element
multiplied once and nothing else changed. A step may be refused only where it can't be measured, by a
DistnormError on all ranks, with all memory as it was; and the next good step must be right. Anything else is
printed with the campaign that shows it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import distnorm
from benchmarks.attack_changes import CHANGES, CHECKED, Scene
from benchmarks.attack_models import BACKWARD, build, run_backward
from benchmarks.attack_oracle import Picture, Rules, Truth, agree, gather
from distnorm.kernels import walking
from distnorm.measure.fast_path import FastPath, FoundGradients
from distnorm.measure.overlap import Overlap
from distnorm.testing import RankError, RankPool

PER_CAMPAIGN = 100
PLACES = [
    *(("plain", n) for n in (1, 1, 2, 4)),
    *(("ddp", n) for n in (1, 2, 4)),
    *(("fsdp2", n) for n in (1, 2, 4)),
    *(("fsdp2 x tp", n) for n in (2, 4, 4)),
]
WAYS = ("walker", "walker", "attributes", "no compiled code")


@dataclass(frozen=True)
class Campaign:
    """What a group of ranks goes through. Everything else follows from the seed.

    Args:
        seed: of all choices.
        topology: ``plain``, ``ddp``, ``fsdp2`` or ``fsdp2 x tp``.
        world: number of ranks.
        way: of finding gradients.
        overlap: whether they are read during backward.
        cases: how many.
    """

    seed: str
    topology: str
    world: int
    way: str
    overlap: bool
    cases: int


def campaigns(cases: int, seed: int) -> list[Campaign]:
    """As many as the cases need, each of other kinds than the one before."""
    found = []
    for n in range(-(-cases // PER_CAMPAIGN)):
        dice = random.Random(f"{seed}:{n}")
        topology, world = PLACES[n % len(PLACES)]
        way, overlap = dice.choice(WAYS), dice.random() < 0.3
        found.append(
            Campaign(
                f"{seed}:{n}", topology, world, way, overlap, min(PER_CAMPAIGN, cases - n * PER_CAMPAIGN)
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Attack the fast path.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one campaign, to see it again")
    asked = parser.parse_args()
    walking._load(compiles=True)
    began, total, wrong = time.perf_counter(), Counter[str](), 0
    for n, campaign in enumerate(campaigns(asked.cases, asked.seed)):
        if asked.only in (None, n):
            told, findings = run(campaign)
            total.update(told)
            for finding in findings:
                wrong += 1
                print(f"campaign {n} {asdict(campaign)}: {finding}", flush=True)
            if n % 10 == 9:
                print(
                    f"{total['cases']} cases, {time.perf_counter() - began:.0f} s, wrong {wrong}", flush=True
                )
    kinds = {name: total.pop(name, 0) for name in CHANGES}
    print("changes:", ", ".join(f"{name} {count}" for name, count in kinds.items()))
    print(", ".join(f"{name} {count}" for name, count in sorted(total.items())))
    print(f"seed {asked.seed}, {time.perf_counter() - began:.0f} s, wrong {wrong}")
    return 1 if wrong or not total["meddled steps on the fast path"] else 0


def run(campaign: Campaign, ranks: Callable[..., list[Any]] | None = None) -> tuple[Counter[str], list[str]]:
    """Run a campaign, and return what was counted and what was wrong."""
    start = ranks or RankPool().run
    try:
        told = start(campaign.world, attack, campaign, timeout=600, collective_timeout=120)
    except RankError as error:
        return Counter(), [str(error)]
    return told[0][0], [f"rank {rank}: {finding}" for rank, (_, all_) in enumerate(told) for finding in all_]


# ---- what runs on every rank


class Attack:
    """One rank's part in a campaign."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.dice = campaign, random.Random(campaign.seed)
        self.found: list[str] = []
        self.counts: Counter[str] = Counter()
        self.on_fast_path, self.now = False, "none"
        self._count_fast_path()
        self.model = build(campaign.topology, self.dice)
        self.scene: Scene = self.model.scene
        self.callers = self._callers()

    def _count_fast_path(self) -> None:
        read, take = FastPath.read, Overlap.take

        def counted(path: FastPath, holders: Any) -> FoundGradients | None:
            found = read(path, holders)
            self.on_fast_path |= found is not None
            return found

        def taken(overlap: Overlap, gradients: Any) -> Any:
            found = take(overlap, gradients)
            self.counts["taken during backward"] += found is not None
            return found

        FastPath.read, Overlap.take = counted, taken  # type: ignore[method-assign]
        if self.campaign.way == "attributes":
            walking.library = lambda count: None  # type: ignore[assignment]

    def _callers(self) -> list[tuple[str, Rules, Callable[[], Any]]]:
        dice, pattern = self.dice, self.model.pattern
        callers: list[tuple[str, Rules, Callable[[], Any]]] = []
        for n in range(dice.choice((1, 2))):
            policies = ["constant", "constant", "constant", "per_tensor", "groups"]
            policy = dice.choice([*policies, "value"] if self.campaign.world == 1 else policies)
            rules = Rules(
                policy,
                dice.choice((0.5, 1.0, 20.0)),
                dice.choice((2.0, 2.0, 2.0, 1.0, math.inf, 3.0)),
                dice.choice(("raise", "propagate", "propagate", "skip", "zero")),
                pattern,
            )
            overlap = self.campaign.overlap and not n and policy != "value"
            clip = {"max_norm": rules.max_norm, "nonfinite": rules.nonfinite, "overlap": overlap}
            if policy == "groups":
                clip["groups"] = [{"name": "g", "params": [pattern], "max_norm": 2 * rules.max_norm}]
            elif policy != "constant":
                clip["policy"] = policy
            target = dice.choice((self.model.module, self.model.named))
            clipper = distnorm.GradClipper(target, {"norm": {"type": rules.order}, "clip": clip})
            ways = [("clip", clipper.clip), ("clip", clipper.clip), ("clip", clipper.clip)]
            callers += [(how, rules, call) for how, call in ways]
            callers.append((dice.choice(("decide", "measure")), rules, clipper.clip))
            how = callers[-1][0]
            callers[-1] = (how, rules, getattr(clipper, how))
        target, raises = dice.choice((self.model.module, self.model.named)), dice.random() < 0.3
        rules = Rules("constant", 0.7, 2.0, "raise" if raises else "propagate", pattern)
        callers.append(("function", rules, lambda: distnorm.clip_grad_norm_(target, 0.7, 2.0, raises)))
        return callers

    # ---- steps

    def run(self) -> None:
        self.renew(allow_backward=True)
        for _ in range(self.campaign.cases):
            for _ in range(self.dice.choice((0, 1, 1, 1, 2))):
                if not self.step("a good step", may_refuse=False):
                    return
            if not self.case():
                return
        self.step("a good step", may_refuse=False)

    def case(self) -> bool:
        dice, scene = self.dice, self.scene
        self.renew(allow_backward=True)
        may_refuse, names = False, []
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            name, own = dice.choice(list(CHANGES)), random.Random(dice.random())
            result = CHANGES[name](scene, own.randrange(len(scene.pieces)), own)
            may_refuse |= result not in (CHECKED, None)
            names.append(name)
            self.counts[name] += 1
        self.counts["cases"] += 1
        chosen = dice.choice(self.callers)
        return self.step(" + ".join(names), may_refuse=may_refuse, chosen=chosen)

    def renew(self, *, allow_backward: bool) -> None:
        """Gradients as a training loop leaves them."""
        dice, scene = self.dice, self.scene
        scene.guards.clear()
        scene.gone.clear()
        while scene.frozen:
            scene.frozen.pop().requires_grad_(True)
        scene.scale = 10 ** dice.uniform(-1.5, 1.5)
        how = dice.choice((BACKWARD, "in place", "new", "new", "flat"))
        if self.campaign.overlap and dice.random() < 0.7:
            how = BACKWARD
        for piece in scene.pieces:
            piece.complete = None
        if how == BACKWARD:
            run_backward(self.model, dice)
        self.model.by_hand(how, dice)

    def step(self, name: str, *, may_refuse: bool, chosen: Any = None) -> bool:
        """Make a step and judge it; whether all ranks found it right."""
        if chosen is None:
            self.renew(allow_backward=True)
            chosen = self.dice.choice(self.callers)
        how, rules, call = chosen
        picture = Picture(self.scene.pieces, self.scene.guards)
        truth = agree(picture, bool(self.found), may_refuse)
        if truth.trouble:
            return False
        self.on_fast_path, error, result = False, None, None
        try:
            result = call()
        except distnorm.DistnormError as caught:
            error = caught
        except Exception as caught:
            self.found.append(f"{name}, {how}: untyped {''.join(traceback.format_exception(caught)[-3:])}")
            error = caught
        self.now = f"{name}, {how}, {rules}: {error!r}"
        refused = gather([float(error is not None)])
        self._count(name, refused.sum())
        problem = self._judge(how, rules, truth, picture, refused[:, 0].tolist(), result, error)
        if problem is not None:
            self.found.append(f"{name}, {how}, {rules}: {problem}")
        return True

    def _count(self, name: str, refused: float) -> None:
        self.counts["steps"] += 1
        self.counts["steps on the fast path"] += self.on_fast_path
        self.counts["meddled steps on the fast path"] += self.on_fast_path and name != "a good step"
        self.counts["refused steps"] += refused > 0

    def _judge(
        self,
        how: str,
        rules: Rules,
        truth: Truth,
        picture: Picture,
        refused: Sequence[float],
        result: Any,
        error: Exception | None,
    ) -> str | None:
        names = [piece.name for piece in self.scene.pieces]
        norm = truth.norm(rules.order)
        # Neither the maximum norm, which replicas don't share, nor `value`, which needs none, compares them;
        # and a norm that is not finite says that something is wrong already.
        is_compared = math.isfinite(rules.order) and rules.policy != "value" and math.isfinite(norm)
        known = truth.must_refuse or (truth.differs and is_compared)
        must = known or (rules.nonfinite == "raise" and not math.isfinite(norm))
        many = rules.policy in ("per_tensor", "groups")
        may = truth.may_refuse or truth.shares_oddly or (many and truth.shares) or rules.policy == "value"
        may |= truth.must_refuse and not math.isfinite(norm)
        if any(refused) and not all(refused):
            return f"refused by ranks {refused} alone: {error}"
        if any(refused):
            if not (must or may):
                return f"refused a step of norm {norm}: {error!r}"
            return picture.problem(None)
        if known or (must and not may):
            return f"measured what can't be, as {result}"
        found = float(result if how == "function" else result.total_norm)
        is_known = rules.policy != "value" and not truth.is_unequal
        if is_known and not _same(found, norm, how == "function"):
            return f"expected the norm {norm}, found {found}"
        if truth.is_unequal:
            return None
        change = rules.change(truth, names)
        return picture.problem(change if how in ("clip", "function") else None)


def _same(found: float, expected: float, is_single: bool) -> bool:
    if math.isnan(expected):
        return math.isnan(found)
    if math.isinf(expected):
        return found == expected
    return math.isclose(found, expected, rel_tol=1e-7 if is_single else 1e-11)


def attack(campaign: Campaign) -> tuple[Counter[str], list[str]]:
    """A campaign, on this rank."""
    logging.getLogger("distnorm").setLevel(logging.ERROR)  # steps without any gradient are warned of
    warnings.simplefilter("ignore")
    if campaign.way == "no compiled code":
        os.environ["DISTNORM_NATIVE"] = "0"
    one = Attack(campaign)
    try:
        one.run()
    except Exception as error:
        raise RuntimeError(f"{error}, in the step after {one.now}") from error
    return one.counts, one.found


if __name__ == "__main__":
    sys.exit(main())

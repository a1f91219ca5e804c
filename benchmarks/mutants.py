"""Each collective of seven models, spoilt in turn: what the doctor finds, names, and calls the right mistake.

    PYTHONPATH=. python benchmarks/mutants.py            # all of it; writes benchmarks/DATE-mutants.md
    PYTHONPATH=. python benchmarks/mutants.py --only TP  # one model, printed
    PYTHONPATH=. python benchmarks/mutants.py --clean    # unspoilt models alone; writes DATE-mutants-clean.md

A mutant whose gradients are those of the unspoilt run, bit for bit, is equivalent, and is not counted. It is
found where the report isn't "right". It is named rightly where the cause's first parameter, or the module
boundary at which the runs part, belongs to the module (or FSDP unit, or DDP bucket) that the collective
serves, or to the module next to it; of a message between stages, to the layer at either end. The mistake is
right where it is one of `EXPECTED`: a reduction moved to another axis is also called rightly "not reduced",
over its own axis.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.mutants_models import MODELS, examined
from benchmarks.mutants_sites import FACTOR, Mutation, Site, Sites
from distnorm import DoctorReport
from distnorm.verification.doctor.mistakes import Mistake as M

_REDUCES = ("all_reduce", "ddp_bucket", "reduce_scatter_single")
EXPECTED: dict[str, dict[str, tuple[M, ...]]] = {
    "drop": {
        **{kind: (M.UNREDUCED,) for kind in _REDUCES},
        "all_gather_single": (M.UNGATHERED,),
        "all_to_all_single": (M.UNGATHERED,),
        "irecv": (M.ZERO,),
    },
    "double": {**{kind: (M.SCALED,) for kind in _REDUCES}, "all_to_all_single": (M.UNGATHERED,)},
    "scale": {kind: (M.SCALED,) for kind in (*_REDUCES, "all_gather_single", "all_to_all_single", "irecv")},
    "move": {
        "all_reduce": (M.WRONG_AXIS, M.UNREDUCED),
        "reduce_scatter_single": (M.WRONG_AXIS, M.UNREDUCED),
        "all_gather_single": (M.UNGATHERED, M.WRONG_AXIS),
    },
}


@dataclass(frozen=True)
class Outcome:
    """What the doctor made of one mutant."""

    model: str
    mutation: Mutation
    is_equivalent: bool
    found: bool
    named: bool
    mistake: bool
    said: str


def body(model: str, seed: int, dtype: str, mutations: list[Mutation]) -> tuple[list[Site], list[Any]]:
    """On every rank: the sites of an unspoilt run, then every mutant."""
    torch.set_num_threads(1)
    report, clean, digest = examined(model, seed, dtype, partial(_sites, None))
    outcomes: list[Any] = [(str(report) if not report.ok else "", digest)]
    for mutation in mutations:
        spoilt, _, other = examined(model, seed, dtype, partial(_sites, mutation))
        outcomes.append((spoilt if torch.distributed.get_rank() == 0 else None, other == digest))
    return clean.found, outcomes


def _sites(mutation: Mutation | None, axes: Any, stage: int) -> Sites:
    return Sites(axes, stage, mutation)


def mutations_of(model: str, sites: list[Site], most: int | None = None) -> list[Mutation]:
    """The mutants of a model: every site in every way that is one."""
    found = []
    axes = {site.axis: site.size for site in sites}
    for site in sites:
        for how, kinds in EXPECTED.items():
            if site.what not in kinds or "int" in site.dtype:
                continue
            others = [a for a, size in axes.items() if a != site.axis and size == site.size]
            if how == "move" and (not others or MODELS[model].parallel is None or "PP" in model):
                continue
            found.append(Mutation(site, how))
    return found if most is None else found[:: max(1, len(found) // most)][:most]


def judged(model: str, mutation: Mutation, report: DoctorReport, is_equivalent: bool) -> Outcome:
    """Whether a report says what was spoilt."""
    cause = report.cause
    if cause is None:
        return Outcome(model, mutation, is_equivalent, not report.ok, False, False, str(report))
    wanted = EXPECTED[mutation.how][mutation.site.what]
    said = f"{cause.where}: {cause.explanation.mistake.value}: {cause.explanation.text}"
    return Outcome(
        model,
        mutation,
        is_equivalent,
        True,
        _named(mutation.site, report),
        cause.explanation.mistake in wanted,
        said,
    )


def _named(site: Site, report: DoctorReport) -> bool:
    assert report.cause is not None
    parting = report.forward or report.backward
    if parting is not None and report.cause.where == parting.place:
        places = [parting.boundary.module, *([] if parting.after is None else [parting.after])]
    else:
        places = [name.rpartition(".")[0] for name in report.cause.parameters[:1]]
    return any(_serves(site, place) for place in places)


def _serves(site: Site, module: str) -> bool:
    if site.what == "irecv":  # between the two stages
        return module.startswith(("blocks.0", "blocks.1"))
    if site.is_unit:
        return module.startswith(site.where + ".") if site.where else not module.startswith("blocks.")
    if site.phase == "gradient":
        return module in {name.rpartition(".")[0] for name in site.where.split(",")}
    parent = module.rpartition(".")[0]
    return site.where in (module, parent) or site.where.rpartition(".")[0] == module != ""


def run_model(
    ranks: Callable[..., list[Any]],
    model: str,
    seed: int = 0,
    dtype: str = "float32",
    most: int | None = None,
    at_once: int = 12,
) -> list[Outcome]:
    """All mutants of a model, some in one run of its ranks."""
    size = MODELS[model].ranks
    results = ranks(size, body, model, seed, dtype, [], timeout=300.0)
    assert results[0][1][0][0] == "", results[0][1][0][0]
    by_stage = {site.stage: found for found, _ in reversed(results) for site in found}
    sites = [site for stage in sorted(by_stage) for site in by_stage[stage]]
    mutations = mutations_of(model, sites, most)
    outcomes = []
    for at in range(0, len(mutations), at_once):
        some = mutations[at : at + at_once]
        results = ranks(size, body, model, seed, dtype, some, timeout=600.0)
        for i, mutation in enumerate(some, 1):
            same = all(done[i][1] for _, done in results)
            outcomes.append(judged(model, mutation, results[0][1][i][0], same))
    return outcomes


def table(outcomes: list[Outcome]) -> list[str]:
    """The report's table: a row a model."""
    lines = ["| model | mutants | equivalent | found | named | mistake |", "|---|---|---|---|---|---|"]
    for name in [*dict.fromkeys(o.model for o in outcomes), "all"]:
        theirs = [o for o in outcomes if name in (o.model, "all")]
        real = [o for o in theirs if not o.is_equivalent]
        rates = [sum(getattr(o, what) for o in real) for what in ("found", "named", "mistake")]
        shown = " | ".join(f"{n} ({100 * n / max(1, len(real)):.0f} %)" for n in rates)
        lines.append(f"| {name} | {len(real)} | {len(theirs) - len(real)} | {shown} |")
    return lines


def misses(outcomes: list[Outcome]) -> list[str]:
    """Every mutant of which something wasn't said."""
    lines = []
    for o in outcomes:
        if not o.is_equivalent and not (o.found and o.named and o.mistake):
            site, missed = o.mutation.site, [w for w in ("found", "named", "mistake") if not getattr(o, w)]
            lines.append(
                f"- {o.model}: {o.mutation.how} {site.what} {site.number} ({site.phase}, {site.axis}, of "
                f"{'unit ' if site.is_unit else ''}'{site.where}'): not {', '.join(missed)}; said: {o.said}"
            )
    return lines


def clean(model: str, seeds: list[int], dtype: str) -> list[str]:
    """On every rank: what is found on unspoilt models, which should be nothing."""
    torch.set_num_threads(1)
    reports = [(seed, examined(model, seed, dtype, partial(_sites, None))[0]) for seed in seeds]
    return [f"{model} {dtype} seed {seed}: {report}" for seed, report in reports if not report.ok]


def margins(model: str, seeds: list[int], dtype: str) -> tuple[list[str], float]:
    """On every rank: as `clean`, and the largest share of the tolerance that any gradient used."""
    torch.set_num_threads(1)
    found, largest = [], 0.0
    for seed in seeds:
        report = examined(model, seed, dtype, partial(_sites, None))[0]
        shares = [v.difference / v.tolerance for v in report.verdicts if v.difference and v.tolerance]
        largest = max([largest, *shares])
        if not report.ok:
            found.append(f"{model} {dtype} seed {seed}: {report}")
    return found, largest


def clean_report(ranks: Callable[..., list[Any]], names: list[str], count: int) -> tuple[str, int]:
    """Examine unspoilt models, all seeds of one in the same process group; the page, and false findings."""
    lines = [
        f"# Unspoilt models, {time.strftime('%Y-%m-%d')}",
        "",
        f"`PYTHONPATH=. python benchmarks/mutants.py --clean --seeds {count}` on {platform.machine()}, torch "
        f"{torch.__version__}, gloo, `trace=True`. The share is that of the gradient that used most of it.",
        "",
        "| model | dtype | seeds | false findings | largest share of the tolerance |",
        "|---|---|---|---|---|",
    ]
    false: list[str] = []
    for name in names:
        for dtype in ("float32", "bfloat16"):
            found, share = ranks(
                MODELS[name].ranks, margins, name, list(range(count)), dtype, timeout=1500.0
            )[0]
            lines.append(f"| {name} | {dtype} | {count} | {len(found)} | {share:.2f} |")
            print(lines[-1], flush=True)
            false += found
    return "\n".join([*lines, *(["", *(f"- {text}" for text in false)] if false else [])]) + "\n", len(false)


def main() -> None:
    """Run, and write or print the report."""
    from distnorm.testing import RankPool, preload

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--most", type=int, help="mutants of each model at most")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the unspoilt runs")
    parser.add_argument("--clean", action="store_true", help="unspoilt models alone")
    options = parser.parse_args()
    preload("benchmarks.mutants")
    ranks, began = RankPool(max_ranks=4).run, time.perf_counter()
    names = [options.only] if options.only else list(MODELS)
    if options.clean:
        page, _ = clean_report(ranks, names, options.seeds)
        print(page)
        if options.only is None:
            _write("mutants-clean", page)
        return
    outcomes = [o for name in names for o in run_model(ranks, name, most=options.most)]
    false: list[str] = []
    for name in names:
        for dtype in ("float32", "bfloat16"):
            seeds = list(range(options.seeds))
            if seeds:
                false += ranks(MODELS[name].ranks, clean, name, seeds, dtype, timeout=900.0)[0]
    kinds = Counter((o.mutation.how, o.mutation.site.what) for o in outcomes)
    lines = [
        f"# Mutants, {time.strftime('%Y-%m-%d')}",
        "",
        f"`PYTHONPATH=. python benchmarks/mutants.py` on {platform.machine()}, torch {torch.__version__}, "
        f"gloo; {time.perf_counter() - began:.0f} s. `scale` is by {FACTOR:g}.",
        "",
        *table(outcomes),
        "",
        "Mutants by kind: "
        + ", ".join(f"{how} {what} {n}" for (how, what), n in sorted(kinds.items()))
        + ".",
        "",
        f"Unspoilt, {options.seeds} seeds of each in float32 and bfloat16: {len(false)} false findings.",
        *(f"- {text}" for text in false),
        "",
        "## Misses",
        "",
        *misses(outcomes),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.only is None and options.most is None:
        _write("mutants", text)


def _write(what: str, text: str) -> None:
    Path(__file__).with_name(f"{time.strftime('%Y-%m-%d')}-{what}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

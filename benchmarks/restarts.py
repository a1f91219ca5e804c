"""Kill a training run at random moments, start it again, and compare its rows with an undisturbed run's.

    PYTHONPATH=. python benchmarks/restarts.py              # 200 kills; writes benchmarks/DATE-restarts.md
    PYTHONPATH=. python benchmarks/restarts.py --kills 10   # fewer, printed

The reference trainer runs with a tiny model and a checkpoint every second step. In each round `kill -9` ends
one rank or all, at a moment drawn at random, also during start, save and load. Ranks left alone must end by
themselves, within their timeout and what it takes to ask who is there. Then the run goes on with `--resume`;
after a few kills in the same folder it goes on in another, from the newest checkpoint, with another number of
ranks and another topology. Ranks are forked from a process that has imported torch; `--torchrun` adds runs of
`launch/torchrun.sh` with MAX_RESTARTS, whose agent starts them again.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.forked import Ended
from benchmarks.restarts_run import (
    ANSWER,
    EVERY,
    KEYS,
    ROOT,
    STEPS,
    TIMEOUT,
    TOLERANCE,
    TOPOLOGIES,
    Tally,
    by_torchrun,
    doing,
    launch,
    newest,
    rows,
)

_PER_STORY = 10  # kills of one run
_PER_FOLDER = 3  # kills, after which another topology goes on
_LAST = 900.0  # seconds for a run that nobody kills
_WARM = 0.9  # of the kills come within the time that such a run took before


class Story:
    """One run from its first step to its last, by way of kills.

    Args:
        place: for its files.
        expected: rows of the undisturbed run.
        tally: what is seen goes there.
        dice: what is drawn from.
    """

    def __init__(
        self, place: Path, expected: dict[int, dict[str, Any]], tally: Tally, dice: random.Random
    ) -> None:
        self._place, self._expected, self._tally, self._dice = place, expected, tally, dice
        self._found: dict[int, dict[str, Any]] = {}
        self._folder, self._more, self._chapter = place / "0", (), 0

    def tell(self, kills: int, until: float) -> None:
        """Kill so often, or until a time, then let it end, and compare."""
        topology = self._draw()
        for number in range(kills):
            if self._killed(topology, number) or time.monotonic() > until:
                break
            if (number + 1) % _PER_FOLDER == 0 and newest(self._folder):
                topology = self._move()
        ended = launch(topology, self._folder, self._place / "out", *self._more).finish(
            time.monotonic() + _LAST
        )
        self._tally.starts += 1
        if any(one.code != 0 for one in ended.values()):
            said = "; ".join(one.said[-300:] for one in ended.values())
            self._tally.wrong.append(
                f"the last start ended with {[one.code for one in ended.values()]}: {said}"
            )
        self._keep()
        self._tally.runs += 1
        self._compare()

    def _draw(self) -> str:
        topology = self._dice.choice(list(TOPOLOGIES))
        self._tally.topologies[topology] += 1
        return topology

    def _move(self) -> str:
        """Go on in another folder, with another topology."""
        self._keep()
        self._chapter += 1
        self._more = (f"train.checkpoint.resume_from={self._folder}",)
        self._folder = self._place / str(self._chapter)
        return self._draw()

    def _killed(self, topology: str, number: int) -> bool:
        """Start, and kill at a random moment. Says whether the run had come to its end before."""
        before = newest(self._folder)
        ranks = launch(topology, self._folder, self._place / "out", *self._more)
        self._tally.starts += 1
        moment = ranks.began + self._tally.typical * self._dice.random() / _WARM
        while time.monotonic() < moment and not ranks.ended:
            ranks.look()
            time.sleep(0.001)
        if ranks.ended:
            ended = ranks.finish(time.monotonic() + 60)
            self._tally.typical = max(one.at for one in ended.values()) - ranks.began
            if any(one.code for one in ended.values()):
                self._tally.wrong.append(
                    f"ended before it was killed: {[e.said[-300:] for e in ended.values()]}"
                )
            return True
        self._tally.kills[doing(self._folder)] += 1
        whole = self._dice.random() < 0.5 or len(ranks.processes) == 1
        victims = list(ranks.processes) if whole else [self._dice.choice(list(ranks.processes))]
        ranks.look()
        for rank in victims:
            ranks.kill(rank, signal.SIGKILL)
        killed, starved = time.monotonic(), dict(ranks.starved)
        ended = ranks.finish(killed + 2 * TIMEOUT + 60)
        for rank, one in ended.items():
            if rank not in victims:
                self._left_alone(one, one.at - killed, one.starved - starved.get(rank, 0.0))
        self._tally.alone += not whole
        if newest(self._folder) < before:
            self._tally.wrong.append(f"checkpoint {before} was there, and {newest(self._folder)} is now")
        return False

    def _left_alone(self, one: Ended, took: float, starved: float) -> None:
        """Check how a rank ended after another was killed, but for the time in which it waited for a core."""
        if took > self._tally.slowest:
            self._tally.slowest, self._tally.starved = took, starved
        self._tally.awake = max(self._tally.awake, took - starved)
        if "Traceback" in one.said:
            self._tally.unnamed += 1
        if took - starved > TIMEOUT + ANSWER or one.code is None:
            self._tally.wrong.append(
                f"a rank ended {took:.0f} s after another was killed, {starved:.0f} s of which it waited for "
                f"a core: {one.said[-300:]}"
            )

    def _keep(self) -> None:
        done = newest(self._folder) if self._folder.exists() else 0
        self._found |= {
            step: row for step, row in rows(self._folder).items() if step <= done or done == STEPS
        }

    def _compare(self) -> None:
        if list(self._found) != list(self._expected):
            self._tally.wrong.append(f"steps {list(self._found)}")
            return
        for step, row in self._found.items():
            for key in KEYS:
                found, expected = float(row[key] or 0.0), float(self._expected[step][key] or 0.0)
                far = abs(found - expected) / max(abs(expected), 1e-30) if found != expected else 0.0
                self._tally.largest = max(self._tally.largest, far)
                if not math.isclose(found, expected, rel_tol=TOLERANCE):
                    self._tally.wrong.append(f"step {step}: {key} {found}, expected {expected}")


def report(tally: Tally, seconds: float, seed: int) -> str:
    """The dated page."""
    kills = ", ".join(f"{count} during {what}" for what, count in tally.kills.most_common()) or "none"
    topologies = ", ".join(f"{name} ({count})" for name, count in sorted(tally.topologies.items()))
    lines = [
        f"# Restarts, {date.today()}\n",
        f"`{' '.join(['PYTHONPATH=. python', *sys.argv])}`, seed {seed}, on {platform.machine()}",
        f"({os.cpu_count()} CPU cores, shared with much else), Python {platform.python_version()}, torch",
        f"{torch.__version__}, gloo; {seconds / 60:.0f} minutes.\n",
        f"The reference trainer: {STEPS} steps of a tiny model in float64, policy zclip, a checkpoint every",
        f"{EVERY} steps, `train.timeout` {TIMEOUT} s.\n",
        f"- **{sum(tally.kills.values())} kills** (`kill -9`): {kills}; {tally.starts} starts, {tally.runs}",
        "  runs brought to their end.",
        f"- Topologies, and how often a run began or went on with each: {topologies}.",
        f"- {tally.agents} runs were torchrun's, with `--max-restarts 4` and 3 kills of a rank each.",
        f"- {tally.alone} kills took one rank of several; the last of the others ended by itself at most",
        f"  {tally.slowest:.1f} s later, {tally.starved:.1f} s of which it had work and waited for a core;",
        f"  without such waits at most {tally.awake:.1f} s later. {tally.unnamed} of the others ended in a",
        "  traceback.",
        f"- Rows: {', '.join(KEYS)} of all steps equal the undisturbed run's within {TOLERANCE:g}; the",
        f"  largest relative difference is {tally.largest:.1e}.\n",
        "What must not be (another trace, a checkpoint that was lost, a start that failed, a rank that waits",
        f"beyond its timeout and {ANSWER} s, but for the time in which it waited for a core):\n",
        *([f"- {one}" for one in tally.wrong] or ["Nothing."]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="at most; the report says how many it were"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--torchrun", type=int, default=0, help="further runs under torchrun, of 3 kills each"
    )
    parser.add_argument("--write", action="store_true", help="write the report with fewer kills too")
    asked = parser.parse_args()
    dice, tally, began = random.Random(asked.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="restarts-") as name:
        place = Path(name)
        ended = launch("1", place / "whole", place / "out").finish(began + _LAST)
        tally.typical = ended[0].at - began
        expected = rows(place / "whole")
        assert list(expected) == list(range(1, STEPS + 1)), "the undisturbed run"
        story, until = 0, began + 60 * asked.minutes
        while sum(tally.kills.values()) < asked.kills and time.monotonic() < until:
            (here := place / f"story{story}").mkdir()
            Story(here, expected, tally, dice).tell(
                min(_PER_STORY, asked.kills - sum(tally.kills.values())), until
            )
            story += 1
            print(f"{sum(tally.kills.values())} kills, {tally.wrong or 'nothing wrong'}", flush=True)
            _write(tally, began, asked)
        for number in range(asked.torchrun):
            (place / f"agent{number}").mkdir()
            by_torchrun(place / f"agent{number}", expected, tally, dice)
            _write(tally, began, asked)
    print(report(tally, time.monotonic() - began, asked.seed))


def _write(tally: Tally, began: float, asked: argparse.Namespace) -> None:
    """Write the report as far as it is, so that a run which is ended leaves one."""
    if asked.write or asked.kills >= 200:
        page = ROOT / "benchmarks" / f"{date.today()}-restarts.md"
        page.write_text(report(tally, time.monotonic() - began, asked.seed))


if __name__ == "__main__":
    main()

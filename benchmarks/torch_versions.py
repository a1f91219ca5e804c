"""The quick form of the tests on several versions of Python and torch, and the table of docs/versions.md.

    PYTHONPATH=. python benchmarks/torch_versions.py --folder ~/versions 3.10:2.6.0 3.13:2.14.1

Makes an environment for each pair in the folder, or uses the one that an earlier call left there, and runs
the tests in it. Each `python3.X` must be on the PATH; builds of torch that bring CUDA along take gigabytes,
and CUDA is not used. Results are kept in the folder: `--only-write` writes the table of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from distnorm.monitor.sinks.starts import commit_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
PINNED = ("torch", "triton")  # by launch/constraints.txt, for the one torch that the set-up installs


def environment(folder: Path, python: str, torch: str) -> Path:
    """The interpreter of an environment that has this torch and what the quick form of the tests needs."""
    venv = folder / f"python{python}-torch{torch}"
    interpreter, stamp = venv / "bin" / "python", venv / "installed"
    if stamp.exists():
        return interpreter
    found = shutil.which(f"python{python}")
    if found is None:
        raise SystemExit(f"expected python{python} on the PATH, found none")
    subprocess.run([found, "-m", "venv", "--clear", venv], check=True)
    kept = [
        line
        for line in (ROOT / "launch" / "constraints.txt").read_text("utf-8").splitlines()
        if line.split("==")[0] not in PINNED
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        print(f"torch=={torch}", *kept, sep="\n", file=constraints, flush=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--no-input", "--constraint", constraints.name]
        subprocess.run([*pip, f"torch=={torch}"], check=True)
        subprocess.run([*pip, "--editable", f"{ROOT}[dev]"], check=True)
    stamp.touch()
    return interpreter


def tested(interpreter: Path, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What the quick form of the tests gives there."""
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    command = [interpreter, "-m", "pytest", "-q", "--form", "quick", f"--junitxml={report}", *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(interpreter.parents[1])}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, cwd=ROOT, env=settings, check=False)
    versions = subprocess.run(
        [interpreter, "-c", "import platform, torch; print(platform.python_version(), torch.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    )
    python, torch = versions.stdout.split()
    commit = commit_of(ROOT) or "unknown"
    return {
        "python": python,
        "torch": torch,
        "commit": commit[:7],
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began),
        "exit": done.returncode,
        **_outcomes(report),
    }


def _outcomes(report: Path) -> dict[str, Any]:
    passed, failed, skipped = 0, [], Counter()
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # pytest's own file
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}: {bad.get('message', '')[:200]}")
        elif (skip := case.find("skipped")) is not None:
            skipped[skip.get("message", "")] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": sorted(failed), "skipped": dict(skipped)}


HEAD = """# Versions

distnorm needs Python 3.10 or newer and torch 2.6 or newer. This is what the quick form of the tests gave on
the CPU: all of them but those of DeepSpeed's engines, of the trainers' frameworks and of the report in a
browser. `benchmarks/torch_versions.py` makes the environments, runs the tests and writes this page.

| Python | torch | passed | failed | skipped | date | commit |
|---|---|---|---|---|---|---|
"""


def page(results: list[dict[str, Any]]) -> str:
    """The text of docs/versions.md."""
    lines = [HEAD]
    for one in results:
        counts = f"{one['passed']} | {len(one['failed'])} | {sum(one['skipped'].values())}"
        lines.append(f"| {one['python']} | {one['torch']} | {counts} | {one['date']} | {one['commit']} |\n")
    reasons: dict[str, list[str]] = {}
    for one in results:
        for reason, count in one["skipped"].items():
            reasons.setdefault(reason, []).append(f"{one['torch']} on {one['python']} ({count})")
    lines.append("\n## Why tests were skipped\n\n")
    lines += [f"- {reason}: {', '.join(where)}\n" for reason, where in sorted(reasons.items())]
    failures = [(one, failure) for one in results for failure in one["failed"]]
    if failures:
        lines.append("\n## What failed\n\n")
        lines += [f"- torch {one['torch']} on Python {one['python']}: `{text}`\n" for one, text in failures]
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", help="versions of Python and torch, such as 3.10:2.6.0")
    parser.add_argument("--folder", type=Path, required=True, help="where environments and results are kept")
    parser.add_argument(
        "--only-write", action="store_true", help="write the page from the results that are there"
    )
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest")
    arguments = parser.parse_args()
    for pair in () if arguments.only_write else arguments.pairs:
        python, torch = pair.split(":")
        interpreter = environment(arguments.folder, python, torch)
        found = tested(interpreter, arguments.folder, arguments.pytest or ["-n", "auto"])
        print(json.dumps(found), flush=True)
        (arguments.folder / f"{python}-{torch}.json").write_text(json.dumps(found), "utf-8")
    results = [json.loads(file.read_text("utf-8")) for file in arguments.folder.glob("*.json")]
    results.sort(key=lambda one: [int(part) for part in one["torch"].split("+")[0].split(".")])
    PAGE.write_text(page(results), encoding="utf-8")
    return int(any(one["failed"] for one in results))


if __name__ == "__main__":
    sys.exit(main())

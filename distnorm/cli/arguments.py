"""The arguments of each command; torch is not imported to read them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from distnorm.bench import ROUNDS, WORKLOADS
from distnorm.cli import commands

Add = Callable[[str, Callable[..., int], str], argparse.ArgumentParser]


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="distnorm",
        description="The exact norm of the gradient of the whole model, on any topology.",
        epilog="A key of CONFIG is also set by the environment: DISTNORM_CLIP__MAX_NORM=0.5 is "
        "clip.max_norm. --set comes after it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    added = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        one = added.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(command=command)
        return one

    _add_training(add)
    _add_checks(add)
    _add_reading_of_runs(add)
    plan = add(
        "plan", commands.plan, "show what planning gives and costs a rank of a large world, without the ranks"
    )
    _describe_plan(plan)
    _describe_bench(
        add("bench", commands.bench, "time gradient-norm functions, and the machine's limit, side by side")
    )
    return parser


def _add_training(add: Add) -> None:
    train = add("train", commands.train, "run the reference trainer, under torchrun or as one process")
    _describe_config(train)
    existing = train.add_mutually_exclusive_group()
    for name, text in (
        ("resume", "go on from the newest checkpoint of the run in train.output_dir, or begin where none is"),
        (
            "overwrite",
            "begin anew, though a run is in train.output_dir; its rows are kept in earlier-N there",
        ),
    ):
        existing.add_argument(
            f"--{name}", dest="existing", action="store_const", const=name, default="refuse", help=text
        )


def _add_checks(add: Add) -> None:
    doctor = add("doctor", commands.doctor, "compare a step's gradients with one process's, and explain")
    dump = add("dump", commands.dump, "write a step's gradients and weights, as a later doctor's reference")
    _describe_config(dump)
    _describe_doctor(doctor, dump)
    verify = add("verify", commands.verify, "prove a training step's norm, and its gradients too, on request")
    _describe_config(verify)
    _describe_reference(verify)
    validate = add(
        "validate", commands.validate, "check configurations and list every mistake with its place"
    )
    validate.add_argument("configs", metavar="CONFIG", nargs="+", help="a YAML file")
    _describe_set(validate)
    add("schema", commands.schema, "print the JSON Schema of a configuration")


def _add_reading_of_runs(add: Add) -> None:
    _describe_compare(
        add("compare", commands.compare, "find the first step at which the norms of two runs part")
    )
    report = add("report", commands.report, "write one HTML page about runs: norms, clipping, layers, alerts")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    report.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page's file")
    _describe_watch(
        add("watch", commands.watch, "follow runs while they train: a page on this machine, or the terminal")
    )
    suggest = add(
        "suggest-threshold", commands.suggest, "list percentiles of a run's norms with their clip rates"
    )
    suggest.add_argument("run", metavar="RUN", help="a run's folder")


def _describe_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file")
    _describe_set(command)


def _describe_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key, such as clip.max_norm=0.5 (repeatable)",
    )


def _describe_watch(watch: argparse.ArgumentParser) -> None:
    watch.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    watch.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address (default: 127.0.0.1)")
    watch.add_argument(
        "--port", type=int, default=8765, metavar="N", help="port (default: 8765); 0: a free one"
    )
    watch.add_argument("--terminal", action="store_true", help="draw in this terminal; needs rich")


def _describe_plan(plan: argparse.ArgumentParser) -> None:
    _describe_config(plan)
    plan.add_argument(
        "--world",
        type=_positive,
        metavar="N",
        help="number of ranks; dp_shard or dp_replicate is changed to fit. By default CONFIG's own",
    )
    plan.add_argument("--rank", type=int, default=0, metavar="R", help="which rank is shown (default: 0)")
    plan.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")


def _describe_compare(compare: argparse.ArgumentParser) -> None:
    for run in ("run_a", "run_b"):
        compare.add_argument(run, metavar="RUN", help="a run's folder")
    compare.add_argument(
        "--rtol", type=_tolerance, metavar="R", help="largest relative difference; 1 is returned beyond it"
    )


def _describe_doctor(doctor: argparse.ArgumentParser, dump: argparse.ArgumentParser) -> None:
    dump.add_argument("-o", "--output", metavar="DIR", required=True, help="the dump's folder, a new one")
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file")
    _describe_set(doctor)
    _describe_reference(doctor)
    doctor.add_argument("--env", action="store_true", help="print what is in use, and what could be faster")


def _describe_reference(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--against", metavar="CONFIG", help="the YAML file of a single process, or the folder of a dump"
    )
    command.add_argument("--trace", action="store_true", help="find the module at which the runs part")
    command.add_argument(
        "--json",
        dest="json_file",
        metavar="FILE",
        help="where the report is written; in a run's folder as "
        "doctor.json it becomes part of `distnorm report RUN`",
    )
    command.add_argument("--page", dest="page_file", metavar="FILE", help="where its page is written, HTML")


def _describe_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "workloads",
        metavar="WORKLOAD",
        nargs="*",
        type=_workload,
        help=f"one of {', '.join(WORKLOADS)}; by default CONFIG's, or else all that fit the ranks",
    )
    bench.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        metavar="DEVICE",
        help="auto, cpu or cuda",
    )
    bench.add_argument(
        "--rounds", type=_positive, default=ROUNDS, metavar="N", help="times of each contender"
    )
    bench.add_argument("--json", dest="json_file", metavar="FILE", help="where all samples are written")
    bench.add_argument("--config", metavar="CONFIG", help="a YAML file whose topology is timed")


class _Version(argparse.Action):
    """Prints the version; the package is asked for it only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(
            option_strings,
            dest=argparse.SUPPRESS,
            nargs=0,
            default=argparse.SUPPRESS,
            help="print the version",
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from distnorm import __version__

        print(f"distnorm {__version__}")
        parser.exit()


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, found {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text}")
    return value


def _workload(text: str) -> str:
    if text not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(WORKLOADS)}, found {text}")
    return text


_positive.__name__ = "number"
_tolerance.__name__ = "number"  # argparse names the type by it: "invalid number value"

"""The command line: each command imports what it needs, and nothing that it doesn't."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from distnorm.bench import ROUNDS, WORKLOADS
from distnorm.errors import ConfigError, DistnormError

_BAD_INPUT = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Under torchrun every rank calls it; `train`, `verify` and `bench` are collective, the others are not.

    Args:
        argv: the arguments after the program's name; the process's own by default.

    Returns:
        The exit code: 0; 1 where `verify`, `compare` or `bench` found a difference; 2 for bad input,
        explained on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--version``, with 2 for wrong arguments.
    """
    arguments = vars(make_parser().parse_args(argv))
    command: Callable[..., int] = arguments.pop("command")
    try:
        return command(**arguments)
    except DistnormError as error:
        # One write, so that the lines of several ranks don't mix.
        sys.stderr.write("".join(f"distnorm: error: {line}\n" for line in str(error).splitlines()))
        return _BAD_INPUT
    except KeyboardInterrupt:
        return _INTERRUPTED


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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    train = add("train", _train, "run the reference trainer, under torchrun or as one process")
    verify = add("verify", _verify, "prove the norm of one training step against an independent one")
    validate = add("validate", _validate, "check configurations and list every mistake with its place")
    add("schema", _schema, "print the JSON Schema of a configuration")
    compare = add("compare", _compare, "find the first step at which the norms of two runs part")
    report = add("report", _report, "write one HTML page about runs: norms, clipping, layers, alerts")
    _describe_watch(
        add("watch", _watch, "follow runs while they train: a page on this machine, or the terminal")
    )
    suggest = add("suggest-threshold", _suggest, "list percentiles of a run's norms with their clip rates")
    plan = add("plan", _plan, "show what planning gives and costs a rank of a large world, without the ranks")
    _describe_plan(plan)
    _describe_bench(
        add("bench", _bench, "time gradient-norm functions, and the machine's limit, side by side")
    )
    for parser_of_one in (train, verify, plan):
        parser_of_one.add_argument("config", metavar="CONFIG", help="a YAML file")
    validate.add_argument("configs", metavar="CONFIG", nargs="+", help="a YAML file")
    for configured in (train, verify, validate, plan):
        configured.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="override one key, such as clip.max_norm=0.5 (repeatable)",
        )
    _describe_compare(compare)
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    report.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page's file")
    suggest.add_argument("run", metavar="RUN", help="a run's folder")
    return parser


def _describe_compare(compare: argparse.ArgumentParser) -> None:
    for run in ("run_a", "run_b"):
        compare.add_argument(run, metavar="RUN", help="a run's folder")
    compare.add_argument(
        "--rtol", type=_tolerance, metavar="R", help="largest relative difference; 1 is returned beyond it"
    )


def _describe_watch(watch: argparse.ArgumentParser) -> None:
    watch.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    watch.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address (default: 127.0.0.1)")
    watch.add_argument(
        "--port", type=int, default=8765, metavar="N", help="port (default: 8765); 0: a free one"
    )
    watch.add_argument("--terminal", action="store_true", help="draw in this terminal; needs rich")


def _describe_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--world",
        type=_positive,
        metavar="N",
        help="number of ranks; dp_shard or dp_replicate is changed to fit. By default CONFIG's own",
    )
    plan.add_argument("--rank", type=int, default=0, metavar="R", help="which rank is shown (default: 0)")
    plan.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")


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


def _validate(configs: Sequence[str], overrides: Sequence[str]) -> int:
    from distnorm.config import load_config

    code = 0
    for config in configs:
        try:
            load_config(config, overrides)
        except ConfigError as error:
            print(error, file=sys.stderr)
            code = _BAD_INPUT
        else:
            print(f"{config}: ok")
    return code


def _schema() -> int:
    from distnorm.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _train(config: str, overrides: Sequence[str]) -> int:
    from distnorm.config import load_config

    loaded = load_config(config, overrides)
    from distnorm.trainer import run

    return run.main(loaded)


def _verify(config: str, overrides: Sequence[str]) -> int:
    from distnorm.config import load_config

    loaded = load_config(config, overrides)
    from distnorm.trainer import verify

    return verify.main(loaded)


def _plan(config: str, overrides: Sequence[str], world: int | None, rank: int, as_json: bool) -> int:
    from distnorm.config import load_config
    from distnorm.config.scaling import degrees_of, scaled_to

    loaded = load_config(config, overrides)
    loaded = loaded if world is None else scaled_to(loaded, world)
    ranks = math.prod(degrees_of(loaded).values())
    if not 0 <= rank < ranks:
        raise ConfigError(f"--rank: expected 0 to {ranks - 1}, found {rank}")
    from distnorm.trainer import dry_run
    from distnorm.verification import preview

    return preview.main(loaded, rank, as_json, dry_run.model_of, dry_run.partial_bytes)


def _compare(run_a: str, run_b: str, rtol: float | None) -> int:
    from distnorm.monitor import compare

    return compare.main(run_a, run_b, rtol)


def _report(runs: Sequence[str], output: str) -> int:
    from distnorm.monitor.report import command

    return command.main(runs, output)


def _watch(runs: Sequence[str], **options: Any) -> int:
    from distnorm.monitor.watch import command

    return command.main(runs, **options)


def _suggest(run: str) -> int:
    from distnorm.monitor.report import thresholds

    return thresholds.main(run)


def _bench(workloads: Sequence[str], **options: Any) -> int:
    from distnorm.bench import run

    return run.main(workloads, **options)

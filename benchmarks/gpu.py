"""What the library does on one GPU, checked and measured, in under 8 minutes on an H100; writes a report.

    PYTHONPATH=. python benchmarks/gpu.py [--only PART ...] [--rounds 15] [--budget 460]
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/gpu.py --dry

The report is benchmarks/DATE-DEVICE.md. A part that fails is reported, the others still run, and the exit
status is 1. `--dry` needs no GPU: the same functions run at small sizes in Triton's interpreter, results are
checked, and nothing is measured or written.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

if "--dry" in sys.argv:  # read when they are imported
    os.environ |= {"TRITON_INTERPRET": "1", "DISTNORM_NATIVE": "0"}

import torch
from gpu_contenders import MAX_NORM, contenders
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import distnorm
from distnorm import kernels
from distnorm.kernels import Kernel, eager, gpu

ROOT = Path(__file__).parents[1]
ONE, MIXED, COUNT, WIDTH = 1_536_066_816, 225_181_696, 500, 512
PUBLISHED = {
    "one bf16 tensor of 1,536,066,816 elements": "7.32 ms by NeMo Automodel #3685, 7.89 by TransformerEngine",
    "500 bf16 matrices of 225,181,696 elements": "3.73 ms",
}
GIGABYTES = (1, 2, 5, 10, 20)
WAITS = ("Synchronize", "cudaMemcpyDtoH")
ON_GPU = "on_the_gpu or 3000 or without_the_kernels or never_waits or a_graph or capturing"
LIBRARIES = ("torch", "triton", "transformer_engine", "apex", "deepspeed", "megatron-core")


@dataclass
class Session:
    """What a run has to work with, and what it has found.

    Args:
        device: the GPU; the CPU in a dry run.
        dry: whether sizes are small, and times nobody's business.
        rounds: how often each call is timed.
        deadline: when no other part begins, by `time.monotonic`.
    """

    device: torch.device
    dry: bool
    rounds: int
    deadline: float
    lines: list[str] = field(default_factory=list)
    read: float = 0.0  # bytes/s

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def timed(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """The median in ms of the device's time, by events; of what is called `before` nothing counts."""
        times = []
        for i in range(1 if self.dry else 3 + self.rounds):
            before()
            if self.dry:
                call()
                return 0.0
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:  # what comes before warms up
                times.append(start.elapsed_time(end))
        return median(times)


def in_fp64(tensors: Sequence[Tensor]) -> float:
    """The norm by torch, without any of our code."""
    parts = [part for tensor in tensors for part in tensor.reshape(-1).split(1 << 26)]
    return float(torch.stack([part.double().square().sum() for part in parts]).sum().sqrt())


def check_norm(found: object, exact: float, bound: float = 2**-22) -> None:
    if not abs(float(found) - exact) <= bound * exact:  # type: ignore[arg-type]
        raise AssertionError(f"expected a norm of {exact:.9g}, found {float(found):.9g}")  # type: ignore[arg-type]


# ---- the parts


def tests(session: Session) -> None:
    """The tests that take a GPU, in a process of their own; in a dry run a few that take none."""
    chosen = ["tests/kernels/test_triton.py", "-k", ON_GPU]
    if session.dry:
        chosen = ["tests/kernels/triton_cases.py", "-k", "test_nothing or launched_on_no_element"]
    run(session, [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen])


def run(session: Session, command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=session.left(),
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    session.say(said[-1] if said else "no output")
    if done.returncode:
        raise AssertionError("\n".join(said[-40:]))


def bandwidth(session: Session) -> None:
    """What this device can read: the best of two plain sums by torch over 4 GiB of fp32."""
    large = torch.ones(1000 if session.dry else 1 << 30, device=session.device)
    least = min(session.timed(large.sum), session.timed(lambda: torch.linalg.vector_norm(large)))
    if float(large.double().sum()) != large.numel():
        raise AssertionError("a sum of ones is wrong")
    if not session.dry:
        session.read = large.nbytes / least * 1e3
        gigabytes = session.read / 1e9
        session.say(f"reads {gigabytes:.0f} GB/s: the faster of torch.sum and vector_norm, 4 GiB of fp32")
    else:
        session.say("a sum of ones is their number")


def published(session: Session) -> None:
    """The two published workloads, beside the other libraries."""
    one = [5000] if session.dry else [ONE]
    rows = [1 + i % 16 for i in range(COUNT - 1)]
    if session.dry:
        mixed = [(rows[i], 8) for i in range(20)]
    else:
        scale = MIXED // WIDTH // (sum(rows) + 8)
        rows = [row * scale for row in rows]
        rows.append(MIXED // WIDTH - sum(rows))
        mixed = [(row, WIDTH) for row in rows]
        assert sum(row * width for row, width in mixed) == MIXED and len(mixed) == COUNT
    for shapes, (title, theirs) in zip(([one], mixed), PUBLISHED.items(), strict=True):
        session.say(f"\n{title}; published: {theirs}\n" if not session.dry else f"{title}, small")
        race(session, [torch.randn(shape, device=session.device).bfloat16() for shape in shapes])


def race(session: Session, gradients: list[Tensor]) -> None:
    parameters = [nn.Parameter(torch.empty_like(gradient), requires_grad=True) for gradient in gradients]
    kept = [gradient.clone() for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    exact = in_fp64(kept)
    coefficient = torch.tensor(MAX_NORM / (exact + 1e-6), dtype=torch.float32, device=session.device)
    if not session.dry:
        session.say("| | ms |\n|---|---|")
    for name, make in contenders(parameters).items():
        torch._foreach_copy_(gradients, kept)
        try:
            clip = make()
            check_norm(clip(), exact, 2**-22 if name == "distnorm" else 2**-7)
        except Exception as error:
            if name in ("distnorm", "torch, foreach"):
                raise
            session.say(f"| {name} | not run: {str(error).splitlines()[0][:90]} |")
            continue
        if name == "distnorm":
            for pair in zip(gradients, kept, strict=True):
                for part, old in zip(*(tensor.view(-1).split(1 << 26) for tensor in pair), strict=True):
                    wanted = old.float() * coefficient
                    torch.testing.assert_close(part.float(), wanted, rtol=2**-8, atol=0)
        least = session.timed(clip, lambda: torch._foreach_copy_(gradients, kept))
        session.say(f"{name}: correct" if session.dry else f"| {name} | {least:.3f} |")


def sizes(session: Session) -> None:
    """The norm of one bf16 tensor of 1 to 20 GB, as a share of what the device can read."""
    if not session.dry:
        session.say("| GB | ms | GB/s | share of the read bandwidth |\n|---|---|---|---|")
    for gigabytes in GIGABYTES:
        count = 3000 * gigabytes if session.dry else gigabytes * 10**9 // 2
        tensor = torch.empty(count, dtype=torch.bfloat16, device=session.device).normal_()
        check_norm(distnorm.get_total_norm([tensor]), in_fp64([tensor]))
        least = session.timed(lambda t=tensor: distnorm.get_total_norm([t]))
        if not session.dry:
            speed = tensor.nbytes / least * 1e3
            share = f"{speed / session.read:.0%}" if session.read else "not known: no bandwidth"
            session.say(f"| {gigabytes} | {least:.3f} | {speed / 1e9:.0f} | {share} |")
        del tensor
    if session.dry:
        session.say("norms of 3,000 to 60,000 elements: correct")


def many(session: Session) -> None:
    """3,000 tensors of one dtype: each kernel's time, its launches, and whether the host waits."""
    count = 12 if session.dry else 3000
    tensors = [torch.randn(1 + i % 17, 64, device=session.device) for i in range(count)]
    coefs = torch.full((count,), 0.999, dtype=torch.float64, device=session.device)
    rows = coefs[:1].expand(sum(map(len, tensors)))
    no = torch.tensor(False, device=session.device)
    clipper = with_gradients(tensors)
    clipper.clip()  # plans
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "norm": (lambda: kernels.measure(tensors, Kernel.SQUARES), 2),
        "statistics of each tensor": (lambda: kernels.summaries(tensors, Kernel.SQUARES), 2),
        "samples of replicas": (lambda: kernels.samples_of(tensors), 1),
        "squares of rows": (lambda: kernels.row_squares(tensors), 1),
        "one coefficient": (lambda: kernels.scale_(tensors, coefs[0]), 1),
        "a coefficient each": (lambda: kernels.scale_each_(tensors, coefs), 1),
        "a coefficient a row": (lambda: kernels.scale_rows_(tensors, rows), 2),  # and a copy of `rows`
        "a bound": (lambda: kernels.clamp_(tensors, 3.0), 1),
        "a step of GradClipper": (clipper.clip, 40),  # results are 0-d tensors, by torch's operators
        "zeros": (lambda: kernels.zero_unless_(tensors, no), 1),
    }
    squares = float(kernels.measure(tensors, Kernel.SQUARES)[0][0])
    check_norm(squares**0.5, in_fp64(tensors))
    summaries = kernels.summaries(tensors, Kernel.SQUARES)
    check_norm(float(summaries[:, 0].sum()) ** 0.5, in_fp64(tensors))
    peers = [tensor.clone() for tensor in tensors]
    eager.scale_each_(peers, coefs)
    kernels.scale_each_(tensors, coefs)
    if not all(map(torch.equal, tensors, peers)):
        raise AssertionError("coefficients of single tensors: not the bits of torch's operators")
    if not session.dry:
        session.say("| | ms on the device | ms of the host | launches | waits |\n|---|---|---|---|---|")
    wrong = []
    for name, (call, most) in calls.items():
        least = session.timed(call)
        launches, waits = counted(call, dry=session.dry)
        if session.dry:
            session.say(f"{name}: launches: {launches}")
        else:
            session.say(f"| {name} | {least:.3f} | {on_host(call):.3f} | {launches} | {waits} |")
        if not 0 < launches <= most or waits:
            wrong.append(f"{name}: expected {most} launches, no wait; found {launches}, {waits}")
    if any(tensor.any() for tensor in tensors):
        wrong.append("expected zeros")
    if wrong:
        raise AssertionError("; ".join(wrong))


def with_gradients(gradients: Sequence[Tensor]) -> distnorm.GradClipper:
    parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return distnorm.GradClipper(parameters, {"clip": {"max_norm": 1e6}})


def on_host(call: Callable[[], object], rounds: int = 15) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return median(times)


def counted(call: Callable[[], object], *, dry: bool) -> tuple[int, int]:
    """Launches, and calls by which the host waits, by torch's profiler; in a dry run Triton's launches."""
    if dry:
        return by_hooks(call), 0
    (launches, waits), (_, own) = profiled(call), profiled(lambda: None)
    return launches, waits - own  # it waits itself when it ends


def profiled(call: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
    events = seen.events()
    on_device = [e.name.lower() for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(not name.startswith(("memcpy", "memset")) for name in on_device)
    return launches, sum(any(wait in event.name for wait in WAITS) for event in events)


def by_hooks(call: Callable[[], object]) -> int:
    from distnorm.kernels import gpu_clip_code, gpu_code, gpu_statistics_code, gpu_taken_code

    launched: list[object] = []
    modules = (gpu_code, gpu_clip_code, gpu_statistics_code, gpu_taken_code)
    every = [one for module in modules for one in vars(module).values()]
    hooked = {id(one): one for one in every if hasattr(one, "pre_run_hooks")}.values()
    for kernel in hooked:
        kernel.pre_run_hooks.append(lambda *_, **__: launched.append(None))
    call()
    for kernel in hooked:
        kernel.pre_run_hooks.clear()
    return len(launched)


def trained(session: Session) -> tuple[nn.Module, torch.optim.Optimizer, distnorm.GradClipper]:
    torch.manual_seed(0)
    count = 3 if session.dry else 288
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count))).to(session.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, capturable=not session.dry)
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 0.01, "nonfinite": "propagate"}})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, optimizer, clipper


def fill(model: nn.Module, step: int) -> None:
    for i, parameter in enumerate(model.parameters()):
        values = torch.linspace(-step, i + 1, parameter.numel(), device=parameter.device)
        parameter.grad.copy_(values.view_as(parameter))  # type: ignore[union-attr]


def graph(session: Session) -> None:
    """A CUDA graph of a clip and the optimizer's step: its replays are the eager steps, bit for bit."""
    captured, plain = trained(session), trained(session)

    def step(of: tuple[nn.Module, torch.optim.Optimizer, distnorm.GradClipper]) -> Tensor:
        result = of[2].clip()
        of[1].step()
        return result.total_norm

    found: list[Tensor] = []
    if session.dry:
        fill(captured[0], 1), fill(plain[0], 1)
        step(captured), step(plain)

        def replay() -> None:
            found[:] = [step(captured)]
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for one in (captured, plain):
                fill(one[0], 1)
                step(one)
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            found.append(step(captured))
        replay = recorded.replay
    for number in (2, 3, 4):
        fill(captured[0], number), fill(plain[0], number)
        replay()
        if not torch.equal(found[0], step(plain)):
            raise AssertionError("the norm of a replay is not that of the eager step")
    if not all(map(torch.equal, captured[0].parameters(), plain[0].parameters())):
        raise AssertionError("parameters after replays are not those after eager steps")
    session.say("steps are equal, bit for bit" if session.dry else "replays equal eager steps, bit for bit")


def overlap(session: Session) -> None:
    """What is left of a clip after backward, with `clip.overlap` and without; norms have the same bits."""
    count, width = (2, 48) if session.dry else (32, 8192)
    found = {}
    if not session.dry:
        session.say("| clip.overlap | ms of backward | ms of clip after it | its launches | its waits |")
        session.say("|---|---|---|---|---|")
    for is_on in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False, device=session.device) for _ in range(count)]
        model, rows = nn.Sequential(*layers).bfloat16(), torch.randn(16, width, device=session.device)
        rows = rows.bfloat16()
        clip = {"max_norm": 1e6, "nonfinite": "skip", "overlap": is_on}
        clipper = distnorm.GradClipper(model, {"clip": clip})

        def backward(model: nn.Module = model, rows: Tensor = rows) -> None:
            model.zero_grad()
            model(rows).float().square().sum().backward()

        for _ in range(3):  # reads with care, finds the addresses, and then as it goes on
            backward()
            found[is_on] = clipper.clip().total_norm
        backward()
        launches, waits = counted(clipper.clip, dry=session.dry)
        if not session.dry:
            times = f"{session.timed(backward):.3f} | {session.timed(clipper.clip, backward):.3f}"
            session.say(f"| {is_on} | {times} | {launches} | {waits} |")
        if launches != 3 + is_on or waits:
            raise AssertionError(f"expected {3 + is_on} launches, no wait; found {launches}, {waits}")
        del model, layers, clipper
    if not torch.equal(found[True], found[False]):
        raise AssertionError(f"expected the same bits, found {found}")
    session.say("the norms have the same bits")


def sanitizer(session: Session) -> None:
    """compute-sanitizer on a few of the tests, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or session.dry:
        session.say("not run: " + ("a dry run" if session.dry else "there is no compute-sanitizer"))
        return
    chosen = ["tests/kernels/triton_statistics.py", "-k", "rows or summaries_of_every"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen]
    run(session, [tool, "--error-exitcode", "9", "--target-processes", "all", *command])


PARTS: dict[str, Callable[[Session], None]] = {
    one.__name__: one for one in (bandwidth, published, sizes, many, overlap, graph, tests, sanitizer)
}


# ---- the run


def in_the_interpreter() -> None:
    """Let the CPU's memory count as a GPU's, and small gradients as large ones."""
    gpu.usable = lambda device: True
    kernels.LEAST = 1


def heading(session: Session) -> list[str]:
    properties = torch.cuda.get_device_properties(session.device)
    versions = [f"python {platform.python_version()}", f"distnorm {distnorm.__version__}"]
    for library in LIBRARIES:
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{library}: not installed")
    return [
        f"# {properties.name}",
        "",
        f"- Date: {datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='minutes')}",
        f"- Hardware: one {properties.name}, {properties.total_memory / 2**30:.0f} GiB; "
        f"CUDA {torch.version.cuda}",
        f"- Versions: {', '.join(versions)}",
        f"- Command: `python {' '.join(sys.argv)}`",
        f"- Times are medians of {session.rounds} rounds, by CUDA events, after 3 rounds that warm up; "
        "gradients are restored before each round.",
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure the library on one GPU.")
    parser.add_argument("--dry", action="store_true", help="at small sizes in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=460.0, help="seconds after which no part begins")
    asked = parser.parse_args()
    if not asked.dry and not torch.cuda.is_available():
        print("no GPU: nothing is measured, and no report is written; --dry checks the script without one")
        return 2
    device = torch.device("cpu") if asked.dry else torch.device("cuda", 0)
    session = Session(device, asked.dry, asked.rounds, time.monotonic() + asked.budget)
    if asked.dry:
        print("no GPU: nothing is measured")
        in_the_interpreter()
    failed = []
    for name in asked.only:
        part = PARTS[name]
        session.say(f"\n## {name}\n\n{part.__doc__}\n")
        if time.monotonic() > session.deadline:
            session.say("not run: the time is over")
            failed.append(name)
            continue
        try:
            part(session)
        except Exception as error:  # one part must not cost the others
            session.say(f"\nFAILED: {type(error).__name__}: {error}")
            traceback.print_exc()
            failed.append(name)
    session.say(f"\nfailed: {', '.join(failed) or 'nothing'}")
    if not asked.dry:
        name = torch.cuda.get_device_name(device)
        short = re.search(r"[A-Za-z]+\d+\w*", name)
        slug = (short[0] if short else name.replace(" ", "-")).lower()
        path = ROOT / "benchmarks" / f"{datetime.date.today().isoformat()}-{slug}.md"
        path.write_text("\n".join([*heading(session), *session.lines, ""]), encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

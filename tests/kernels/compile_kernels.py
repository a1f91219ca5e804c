"""Compile every kernel of Triton for a GPU that needn't be there, and look at what came out.

`python compile_kernels.py 90` does it for every dtype, `python compile_kernels.py 80 one` for one.
`test_triton.py` runs it in a process of its own, without the interpreter.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction

from distnorm.kernels import Kernel, gpu, gpu_clip_code, gpu_code, gpu_taken_code, sampling
from distnorm.kernels import gpu_statistics_code as statistics

TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
WIDEST = dict(zip(gpu_code.DTYPES, ("v4.b32", "v2.b64", "v4.b32", "v4.b32"), strict=True))
ROWS, FP64, INT = "*i64", "*fp64", "i32"
FIRST = gpu_code.DTYPES[0]
if "one" in sys.argv:
    WIDEST = {FIRST: WIDEST[FIRST]}
compiled: set[JITFunction] = set()


def ptx(function: JITFunction, **arguments: Any) -> str:
    signature = {name: a if isinstance(a, str) else "constexpr" for name, a in arguments.items()}
    constants = {(i,): a for i, a in enumerate(arguments.values()) if not isinstance(a, str)}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(signature.values())
        if a[0] == "*" and a != "*u8"
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled.add(function)
    text: str = compile(source, target=TARGET).asm["ptx"]
    assert ".ftz" not in text, "a subnormal is no zero"
    assert "atom" not in text and "red.global" not in text, "no order of additions but the written one"
    return text


def of_dtype(function: JITFunction, dtype: Any, **arguments: Any) -> str:
    return ptx(function, rows=ROWS, first=INT, **arguments, DTYPE=dtype, BLOCK=gpu.BLOCK)


def summary(function: JITFunction, kernel: int, **arguments: Any) -> str:
    return ptx(function, **arguments, KERNEL=kernel, BLOCK=gpu.BLOCK)


for kernel in map(int, Kernel):
    runs = {"parts": FP64, "runs": ROWS, "out": FP64, "before": "i64"}
    ptx(gpu_code.totals, **runs, HAS_BEFORE=True, KERNEL=kernel, BLOCK=gpu.BLOCK)
    summary(statistics.summary_totals, kernel, parts=FP64, total=INT, runs=ROWS, out=FP64)
ptx(statistics.row_totals, cut=ROWS, out=FP64, BLOCK=gpu.BLOCK)
begin = {"fp64": INT, "bf16": INT, "fp16": INT}
signs = sampling._SIGNS - (1 << 64)
ptx(statistics.samples, rows=ROWS, runs=ROWS, **begin, out=FP64, SIGNS=signs)
for dtype, widest in WIDEST.items():
    # How elements are read, and what is done with them, do not depend on each other: no need of all pairs.
    statistics_of_dtype = [int(k) for k in Kernel if dtype is FIRST or k is Kernel.SQUARES]
    reading = [
        ptx(gpu_code.partials, rows=ROWS, first=INT, out=FP64, DTYPE=dtype, KERNEL=k, BLOCK=gpu.BLOCK)
        for k in statistics_of_dtype
    ]
    reading += [
        summary(statistics.summary_parts, k, rows=ROWS, first=INT, total=INT, out=FP64, DTYPE=dtype)
        for k in statistics_of_dtype
    ]
    records = {"parts": FP64, "prints": ROWS}
    of_dtype(gpu_taken_code.compare, dtype, runs=ROWS, prints=ROWS, changed=ROWS, step=INT, most=INT)
    for kernel in statistics_of_dtype:
        options = {"DTYPE": dtype, "KERNEL": kernel, "BLOCK": gpu.BLOCK}
        reading.append(ptx(gpu_taken_code.take, rows=ROWS, first=INT, **records, step=INT, **options))
        records_of = {"out": FP64, **records, "changed": ROWS, "step": INT}
        reading.append(
            ptx(gpu_taken_code.partials_unless_taken, rows=ROWS, first=INT, **records_of, **options)
        )
    rows = {"table": ROWS, "first": INT}
    reading.append(ptx(statistics.row_squares, **rows, out=FP64, DTYPE=dtype, BLOCK=gpu.BLOCK))
    changing = [
        of_dtype(gpu_code.scale, dtype, coef=FP64),
        of_dtype(gpu_code.scale_each, dtype, coefs=FP64),
        of_dtype(gpu_code.clamp, dtype, high=INT, low=INT),
        ptx(statistics.scale_rows, **rows, coefs=FP64, DTYPE=dtype, BLOCK=gpu.BLOCK),
    ]
    results = {"reduced": FP64, "terms": FP64, "values": FP64, "flags": "*i1"}
    modes = range(4) if dtype is FIRST else range(1, 2)  # the dtype changes nothing of what they decide
    for mode, (replicas, clips) in product(modes, ((False, True), (True, False))):
        options = {"NONFINITE": mode, "ROOT": True, "HAS_REPLICAS": replicas, "MAY_CLIP": clips}
        clip = of_dtype(gpu_clip_code.clip, dtype, **results, **options, MAY_SCALE=True)
        assert "sqrt.rn.f64" in clip and ("div.rn.f64" in clip) == clips
        changing += [clip] if clips else []
    zeroing = of_dtype(gpu_code.zero_unless, dtype, keep="*u8")
    assert all("ld.global." + widest in text for text in reading + changing), "16 bytes at once"
    assert all("st.global." + widest in text for text in [*changing, zeroing])

for module in (gpu_code, gpu_clip_code, gpu_taken_code, statistics):
    kernels = [value for name, value in vars(module).items() if isinstance(value, JITFunction)]
    inner = ("_", "scale_chunk", "measure_chunk")  # what only other kernels call
    left = [k for k in kernels if k not in compiled and not k.__name__.startswith(inner)]
    assert not left, f"not compiled: {left}"

"""The library that wheels bring: the same bits on every kind of CPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from distnorm.kernels import native

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "distnorm" / "kernels" / "native.c"
DRIVER = Path(__file__).with_name("variants_driver.c")
CC = os.environ.get("CC") or "cc"
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"

pytestmark = pytest.mark.skipif(shutil.which(CC.split()[0]) is None, reason="there is no C compiler here")
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="there are variants for x86-64 alone")


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """hatch_build.py, as hatchling loads it, but quick to compile, and without hatchling."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(native._RECIPE.flags) == {*module.FLAGS, "-shared"}
    monkeypatch.setattr(module, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in module.FLAGS))
    return module


def drive(folder: Path, compiler: str, *flags: str, emulator: tuple[str, ...] = ()) -> str:
    built = folder / f"{compiler}{len(flags)}"
    options = ("-std=gnu11", "-O1", "-ffp-contract=off", "-pthread", "-w", *flags)
    command = [*compiler.split(), *options, "-o", str(built), str(SOURCE), str(DRIVER)]
    subprocess.run(command, check=True)
    return subprocess.run([*emulator, str(built)], check=True, capture_output=True, text=True).stdout


@on_x86
@pytest.mark.slow
def test_every_variant_gives_the_same_bits(hook, monkeypatch, tmp_path):
    """The library is found, and the variant chosen, as in a wheel."""
    able = torch.backends.cpu.get_cpu_capability()
    allowed = ("", "AVX2", "AVX512")[: 3 if able == "AVX512" else 2]
    variants = {name: flags for name, flags in hook.VARIANTS["x86_64"].items() if name.upper() in allowed}
    if able not in ("AVX2", "AVX512"):
        pytest.skip(f"this CPU has one variant: {able}")
    hook.build(SOURCE, tmp_path / "libnative.so", variants)
    monkeypatch.setattr(native, "_IN_WHEEL", tmp_path / "libnative.so")
    monkeypatch.setenv("CC", "false")  # so nothing else can be loaded
    dice = torch.Generator().manual_seed(1)
    values = torch.randn(70_001, generator=dice, dtype=torch.float64) * 100
    found: dict[str, Any] = {}
    for capability in ("DEFAULT", "AVX2", "AVX512")[: len(variants)]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        native.library.cache_clear()
        compiled = native.library()
        assert compiled is not None
        assert (torch.float16 in compiled.code) == (capability != "DEFAULT")
        found[capability] = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tensors = [part.to(dtype).clone() for part in values.split([33, 967, 69_001])]
            table = native.AddressTable.of(tensors)
            numbers = [native.statistic(table, kernel).hex() for kernel in native.Kernel]
            numbers += [native.summaries(table, kernel).numpy().tobytes() for kernel in native.Kernel]
            native.scale_(table, 0.37)
            numbers += [native.fingerprints(table).tolist(), native.samples(table, 0x5555).numpy().tobytes()]
            found[capability].append(numbers)
    native.library.cache_clear()
    assert all(numbers == found["DEFAULT"] for numbers in found.values())


@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None, reason=f"needs {CROSS} and {EMULATOR}"
)
@on_x86
def test_aarch64_gives_the_same_bits_in_emulation(tmp_path):
    there = drive(tmp_path, CROSS, "-static", emulator=(EMULATOR,))
    here = drive(tmp_path, CC, "-mavx2", "-mfma", "-mf16c")
    assert here.startswith("dtypes 15\n") and len(here.splitlines()) == 1 + 8 * 7
    assert there == here


def test_a_library_of_another_machine_is_passed_over(monkeypatch, tmp_path):
    other = tmp_path / "libnative.so"
    other.write_bytes(b"\x7fELF of another kind")
    monkeypatch.setattr(native, "_IN_WHEEL", other)
    assert native._load()[1] == ""


def test_the_library_s_name_is_no_module_s(hook):
    """Python would import it in the module's place."""
    assert not native._IN_WHEEL.with_suffix(".py").exists()
    assert f'"distnorm/kernels/{native._IN_WHEEL.name}"' in (ROOT / "hatch_build.py").read_text()

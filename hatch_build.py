"""Compiles distnorm/kernels/native.c into a wheel; hatchling calls it.

One library, which needs the C library alone, holds the functions for several kinds of CPU; native.py chooses
among them. Where there is no C compiler, or no Linux, the wheel is pure; then native.c is compiled at its
first use, or not at all. Editable installs are left as they are. launch/release.sh sets:

    CC                        the compiler, with arguments (default: cc)
    DISTNORM_WHEEL_PLATFORM   the wheel's platform (default: this machine's); if set, a compiler must be there
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-pthread")
# What torch requires of a CPU that it calls by the name; the first is for all.
VARIANTS = {
    "x86_64": {
        "": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
    },
    "aarch64": {"": ()},
}


class NativeHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled library to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say for which platform the wheel is."""
        asked = os.environ.get("DISTNORM_WHEEL_PLATFORM")
        platform = asked or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        variants = next((v for name, v in VARIANTS.items() if platform.endswith(name)), None)
        if version == "editable" or "linux" not in platform or variants is None:
            return
        self.folder = tempfile.TemporaryDirectory()
        library = Path(self.folder.name, "libnative.so")
        try:
            build(Path(self.root, "distnorm", "kernels", "native.c"), library, variants)
        except (OSError, subprocess.CalledProcessError) as error:
            if asked:
                raise
            self.app.display_warning(f"no compiled kernels in this wheel: {error}")
            return
        build_data["force_include"][str(library)] = "distnorm/kernels/libnative.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"


def build(source: Path, library: Path, variants: dict[str, tuple[str, ...]]) -> None:
    """Compile the file once for each kind of CPU, and link them."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    objects = []
    for variant, flags in variants.items():
        objects.append(str(library.with_name(f"native{variant}.o")))
        named = [f"-DVARIANT={variant}"] if variant else []
        subprocess.run([*compiler, *FLAGS, *flags, *named, "-c", str(source), "-o", objects[-1]], check=True)
    subprocess.run([*compiler, "-shared", "-pthread", "-s", "-o", str(library), *objects], check=True)

"""The recipes of docs/recipes.md, each in its trainer, on the CPU: prints a table of what came out.

    PYTHONPATH=. python benchmarks/recipes.py --folder ~/recipes [verl veomni ...]

Makes an environment for each trainer in the folder, or uses the one that an earlier call left there. It lends
it the torch, and whatever else, of the Python that runs this file, and installs the trainer without its
dependencies, then those that its imports miss. Trainers pin other versions than those that are lent, so a run
says that the recipe holds, not that the trainer supports that torch.
benchmarks/recipes_runs.py says what is run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "verl": (
        2,
        "verl==0.9.1 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 tensordict==0.15.3 "
        "pyvers==0.2.3 orjson==3.13.0 cloudpickle==3.1.3 importlib-metadata==8.7.0 "
        "codetiming==1.4.0 hydra-core==1.3.8 pylatexenc==2.11 zipp==4.1.2",
    ),
    "openrlhf": (
        2,
        "openrlhf==0.11.2 bitsandbytes==0.50.2 jsonlines==4.0.0 kernels==0.17.2 loralib==0.1.2 "
        "optree==0.20.0 pylatexenc==2.11 pynvml==13.0.1 transformers-stream-generator==0.0.5",
    ),
    "torchtune": (
        2,
        "torchtune==0.6.1 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 blobfile==3.3.0 "
        "kagglehub==1.0.3 lxml==6.1.3 pycryptodomex==3.24.2 sentencepiece==0.2.3 tiktoken==0.14.0 "
        "torchao==0.16.0",
    ),
    "axolotl": (
        1,
        "axolotl==0.19.0 addict==2.4.0 art==6.5 axolotl-contribs-lgpl==0.0.7 "
        "axolotl-contribs-mit==0.0.6 evaluate==0.4.6 fire==0.7.1 hf-transfer==0.1.9 "
        "immutabledict==4.3.1 kernels==0.17.2 langdetect==1.0.9 numba==0.68.1 llvmlite==0.50.0 "
        "optimum==2.3.0 posthog==7.91.1 python-dotenv==1.2.4 schedulefree==1.4.1 trackio==0.43.0 "
        "trl==1.9.0",
    ),
    "veomni": (
        2,
        "veomni==0.1.12 blobfile==3.3.0 datasets==2.21.0 tiktoken==0.14.0 timm==1.0.31 "
        "tokenizers==0.22.2 transformers==5.9.0",
    ),
    "composer": (
        1,
        "mosaicml==0.32.1 backoff==2.2.1 coolname==5.0.0 gql==4.4.0 graphql-core==3.3.2 "
        "importlib-metadata==8.7.0 mosaicml-cli==0.8.3 tabulate==0.10.0 torch-optimizer==0.3.0 "
        "torchvision==0.28.0 zipp==4.1.2 tenacity==9.2.1 websockets==15.0.1 py-cpuinfo==9.0.0 "
        "ruamel.yaml==0.19.1 questionary==2.1.1 prompt_toolkit==3.0.53 wcwidth==0.9.4 "
        "validators==0.36.0",
    ),
}
"""For each trainer: the number of ranks, the package, and what else its imports need that is not lent."""


def environment(folder: Path, name: str) -> Path:
    """The interpreter of the trainer's environment."""
    made = folder / name
    interpreter, stamp = made / "bin" / "python", made / "installed"
    if not stamp.exists():
        venv.create(made, with_pip=True, clear=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps"]
        subprocess.run([*pip, *PACKAGES[name][1].split()], check=True)
        (site,) = made.glob("lib/python*/site-packages")
        # The environment's own packages come first. distnorm is the checkout's, by PYTHONPATH.
        (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        stamp.touch()
    return interpreter


def result(folder: Path, name: str) -> dict[str, Any] | str:
    """What the trainer's run found, or how it ended without."""
    interpreter, found, log = environment(folder, name), folder / f"{name}.json", folder / f"{name}.log"
    found.unlink(missing_ok=True)
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    settings |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PACKAGES[name][0])]
    command = [interpreter, "-W", "ignore", *(launch if name != "axolotl" else [])]
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            [*command, ROOT / "benchmarks" / "recipes_runs.py", name, found],
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            check=False,
            timeout=900,
        )
    return json.loads(found.read_text("utf-8")) if found.exists() else f"no result: see {log}"


def row(name: str, found: dict[str, Any] | str) -> str:
    package = PACKAGES[name][1].split()[0].replace("==", " ")
    if isinstance(found, str):
        return f"| {package} | {found} | | | | |"
    apart = abs(found["norm"] / found["exact"] - 1)
    verdict = "passed" if max(apart, found["error"], abs(found["after"] - 1)) < 1e-5 else "FAILED"
    norms = f"{found['norm']:.7g} | {found['exact']:.7g} | {apart:.1e}"
    return f"| {package} | {found['ranks']} | {norms} | {found['after']:.7f} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="holds the environments and the logs")
    parser.add_argument("trainers", nargs="*", help=f"of {', '.join(PACKAGES)} (default: all)")
    given = parser.parse_args()
    print("| trainer | ranks | norm reported | in fp64 | relative difference | norm after | |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in given.trainers or PACKAGES:
        rows.append(row(name, result(given.folder.resolve(), name)))
        print(rows[-1], flush=True)
    sys.exit(any("passed" not in line for line in rows))


if __name__ == "__main__":
    main()

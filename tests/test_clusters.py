"""The files for clusters: what they run is what the scripts and the command line take."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distnorm.cli import make_parser

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def test_kubernetes_runs_commands_that_exist():
    found = kubernetes()
    job = found["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]
    for command in (found["TrainJob"]["spec"]["trainer"]["command"], job):
        assert command[:3] == ["python", "-m", "distnorm.launch"]
        from torch.distributed.run import parse_args

        arguments = parse_args(command[3:])
        assert arguments.module and arguments.training_script == "distnorm"
        asked = make_parser().parse_args(arguments.training_script_args)
        assert (asked.config, asked.existing) == ("/config/config.yaml", "resume")


def test_the_job_s_numbers_and_names_agree():
    found = kubernetes()
    spec, service = found["Job"]["spec"], found["Service"]
    pod = spec["template"]["spec"]
    command = " ".join(pod["containers"][0]["command"])
    assert f"--nnodes={spec['completions']} " in command and spec["completions"] == spec["parallelism"]
    name, port = found["Job"]["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:{port}" in command
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}


def help_of_torchrun() -> str:
    command = [str(LAUNCH / "torchrun.sh"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["skypilot.yaml", "slurm.sbatch"])
def test_what_is_exported_is_what_torchrun_sh_reads(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    exported = re.findall(r"\b([A-Z_]+)=", " ".join(re.findall(r"^ *export (.*)$", text, re.M)))
    assert {"NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "RDZV_ID"} <= set(exported)
    known = help_of_torchrun()
    assert [variable for variable in exported if variable not in known] == []
    (line,) = re.findall(r"\./launch/torchrun\.sh (train .*--resume)", text)
    arguments = shlex.split(line.replace('"$@"', '"$CONFIG"'))
    assert make_parser().parse_args(arguments).existing == "resume"


def test_clusters_md_names_every_file():
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    for name in ("torchrun.sh", "slurm.sbatch", "kubernetes.yaml", "skypilot.yaml", "ray_train.py"):
        assert f"`launch/{name}`" in text


# The first job that Slurm runs: the commands that it brings are stood in for.
SLURM = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode9\\n"; else echo "scontrol $*" >> $SAID; fi',
    "scancel": 'echo "scancel $*" >> $SAID; kill -TERM $(cat $STEP)',
    "srun": 'echo "srun $* $NNODES $NPROC_PER_NODE $RDZV_ENDPOINT $RDZV_ID" >> $SAID; echo $$ > $STEP; '
    "exec sleep 30",
}


def test_a_slurm_job_near_its_limit_is_stopped_and_requeued(tmp_path):
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    said, step = tmp_path / "said", tmp_path / "step"
    environment = {
        **{"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7,9]"},
        **{"SLURM_GPUS_ON_NODE": "8", "SAID": str(said), "STEP": str(step)},
        "PATH": f"{tmp_path}:/usr/bin:/bin",
    }
    script = f"""
        bash {LAUNCH / "slurm.sbatch"} x.yaml --set train.steps=9 & job=$!
        until [ -s {step} ]; do sleep 0.02; done
        kill -USR1 $job; wait $job"""
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=20, check=False)
    assert done.returncode == 128 + 15
    assert said.read_text().splitlines() == [
        "srun --kill-on-bad-exit=1 ./launch/torchrun.sh train x.yaml --set train.steps=9 --resume "
        "2 8 node7:20041 41.0",
        "scancel --signal=TERM 41.0",
        "scontrol requeue 41",
    ]

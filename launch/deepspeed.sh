#!/usr/bin/env bash
# Run distnorm, or a script, on DeepSpeed's own launcher.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./launch/deepspeed.sh train|verify CONFIG [--set a.b=VALUE]...
       ./launch/deepspeed.sh SCRIPT.py [ARGUMENT]...

Runs distnorm's command, or the script, by the `deepspeed` launcher: on this machine, or, started once, on every node of
a hostfile, which it reaches by ssh. (Configs with backend deepspeed run under ./launch/torchrun.sh as well.)

arguments:
    train|verify CONFIG   a distnorm command; the degrees in CONFIG must multiply to the number of processes
    SCRIPT.py             a script of yours, found from the current folder

environment:
    NPROC_PER_NODE    processes on each node (default: one for each accelerator; needed where there is none)
    HOSTFILE          file with lines "node0 slots=8" (default: this machine alone)
    MASTER_ADDR       address of the first node, by which the others find it (default: DeepSpeed's)
    MASTER_PORT       port there (default: any free one on one machine, 29500 with a hostfile)
    DS_ACCELERATOR    cpu, cuda, ... (default: what DeepSpeed finds)
    OMP_NUM_THREADS   threads of each process (default: 1)
    PYTHON            interpreter that has DeepSpeed (default: .venv/bin/python of this repository, else python3)

examples:
    NPROC_PER_NODE=2 ./launch/deepspeed.sh train configs/zero2.yaml --set clip.max_norm=1.0
    HOSTFILE=hosts MASTER_ADDR=node0 ./launch/deepspeed.sh train configs/zero3.yaml
HELP
}

case "${1:-}" in
-h | --help)
    usage
    exit
    ;;
"")
    usage >&2
    exit 2
    ;;
esac

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="${PYTHON:-$([[ -x "$ROOT/.venv/bin/python" ]] && echo "$ROOT/.venv/bin/python" || echo python3)}"

if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
    echo "deepspeed.sh: $PYTHON has no DeepSpeed; install it with:" >&2
    echo "    $PYTHON -m pip install setuptools wheel" >&2
    echo "    DS_BUILD_OPS=0 $PYTHON -m pip install --no-build-isolation deepspeed" >&2
    exit 1
fi

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

launcher=(--no_local_rank)
if [[ -n "${HOSTFILE:-}" ]]; then
    launcher+=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
else
    launcher+=(--hostfile /dev/null --master_port "${MASTER_PORT:-$(free_port)}") # not DeepSpeed's own /job/hostfile
fi
if [[ -n "${MASTER_ADDR:-}" ]]; then launcher+=(--master_addr "$MASTER_ADDR"); fi
if [[ -n "${NPROC_PER_NODE:-}" ]]; then launcher+=(--num_gpus "$NPROC_PER_NODE"); fi

if [[ "$1" == *.py ]]; then
    program=("$@")
else
    program=(--module distnorm "$@")
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m deepspeed.launcher.runner "${launcher[@]}" "${program[@]}"

#!/usr/bin/env bash
# Set up .venv, and train a small transformer on 4 ranks, FSDP2 x TP, its gradient clipped by the exact norm.
set -euo pipefail

case "${1:-}" in
-h | --help)
    cat <<'HELP'
usage: ./launch/quickstart.sh [--set a.b=VALUE]...

Makes .venv where there is none, then runs on 4 processes of this machine:
    NPROC_PER_NODE=4 ./launch/torchrun.sh train configs/quickstart.yaml --overwrite [--set a.b=VALUE]...
It prints the path of the metrics, one JSON object a step, and three commands to try next.

    ./launch/quickstart.sh --set train.steps=100 --set train.output_dir=runs/longer

environment:
    PYTHON            interpreter that .venv is made with (default: python3)
    OMP_NUM_THREADS   threads of each process (default: 1)
HELP
    exit
    ;;
esac

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up

cd "$ROOT"
PYTHON="$VENV_PYTHON" NPROC_PER_NODE=4 ./launch/torchrun.sh train configs/quickstart.yaml --overwrite "$@"

run=runs/quickstart
given=""
for argument in "$@"; do
    if [[ "$argument" == train.output_dir=* ]]; then run="${argument#train.output_dir=}"; fi
    given+=" $(printf %q "$argument")"
done
cat <<NEXT

Next, three commands to try:
    .venv/bin/distnorm report $(printf %q "$run") -o report.html    # then open report.html
    NPROC_PER_NODE=4 ./launch/torchrun.sh verify configs/quickstart.yaml$given
    .venv/bin/distnorm train configs/quickstart.yaml --overwrite$given \\
        --set train.parallel.dp_shard=1 --set train.parallel.tp=1 --set train.output_dir=runs/one-process &&
        .venv/bin/distnorm compare $(printf %q "$run") runs/one-process --rtol 1e-3
NEXT

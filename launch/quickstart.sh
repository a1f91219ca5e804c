#!/usr/bin/env bash
# Set up .venv, and train a small transformer on 4 ranks, FSDP2 x TP, its gradient clipped by the exact norm.
set -euo pipefail

case "${1:-}" in
-h | --help)
    cat <<'HELP'
usage: ./launch/quickstart.sh [--set a.b=VALUE]...

Makes .venv where there is none, then runs on 4 processes of this machine:
    torchrun --nproc-per-node 4 -m distnorm train configs/quickstart.yaml [--set a.b=VALUE]...
The last line is the path of the metrics, one JSON object a step.

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
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV_PYTHON" -m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node 4 \
    -m distnorm train configs/quickstart.yaml "$@"

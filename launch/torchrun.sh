#!/usr/bin/env bash
# Run distnorm, or a script, on the processes of one or several nodes.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./launch/torchrun.sh train|verify CONFIG [--set a.b=VALUE]...
       ./launch/torchrun.sh SCRIPT.py [ARGUMENT]...

Runs distnorm's command, or the script, on NNODES x NPROC_PER_NODE processes. Run the same line once on every node,
in any order; the nodes meet at RDZV_ENDPOINT (torchrun's c10d rendezvous), which numbers them.

arguments:
    train|verify CONFIG   a distnorm command; the degrees in CONFIG must multiply to the number of processes
    SCRIPT.py             a script of yours, found from the current folder

environment:
    NNODES            number of nodes, or MIN:MAX, between which it may change (default: 1)
    NPROC_PER_NODE    processes on each node (default: gpu, one for each GPU; needed where there is none)
    RDZV_ENDPOINT     HOST[:PORT] of one of the nodes, the same on all; needed with more than one node
                      (default: MASTER_ADDR:MASTER_PORT where MASTER_ADDR is set; port 29400)
    RDZV_ID           name of the run, the same on all nodes (default: distnorm)
    RDZV_TIMEOUT      seconds that a node waits for the endpoint, and for the other nodes (default: 600)
    LOCAL_ADDR        this node's address, by which the others reach it (default: its host name's)
    MAX_RESTARTS      how often all processes are started again after one has failed; a run with train.checkpoint.every
                      then goes on from its newest checkpoint (default: 0)
    OMP_NUM_THREADS   threads of each process (default: 1)
    PYTHON            interpreter (default: .venv/bin/python of this repository, else python3)
Others pass through: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface, DISTNORM_A__B sets a key.

examples:
    NPROC_PER_NODE=4 ./launch/torchrun.sh verify configs/fsdp2_tp2.yaml
    NNODES=2 RDZV_ENDPOINT=node0:29400 ./launch/torchrun.sh train CONFIG     # on both nodes
    srun --ntasks-per-node 1 ./launch/torchrun.sh train CONFIG               # with NNODES and RDZV_ENDPOINT exported
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
NNODES="${NNODES:-1}"
ENDPOINT="${RDZV_ENDPOINT:-${MASTER_ADDR:+$MASTER_ADDR:${MASTER_PORT:-29400}}}"

if [[ ! "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "torchrun.sh: NNODES must be a positive number, or two as MIN:MAX; it is '$NNODES'" >&2
    exit 2
fi
if [[ -z "$ENDPOINT" ]]; then
    if ((${NNODES#*:} > 1)); then
        echo "torchrun.sh: $NNODES nodes need RDZV_ENDPOINT=HOST[:PORT], the same on all of them" >&2
        exit 2
    fi
    ENDPOINT=localhost:0 # any free port: runs on one machine don't meet each other
fi

rendezvous="join_timeout=${RDZV_TIMEOUT:-600},read_timeout=${RDZV_TIMEOUT:-600}"
address=()
if [[ -n "${LOCAL_ADDR:-}" ]]; then
    address=(--local-addr "$LOCAL_ADDR")
    # torch asks the host name whether the endpoint is here, which knows nothing of this address.
    rendezvous+=",is_host=$([[ "${ENDPOINT%:*}" == "$LOCAL_ADDR" ]] && echo true || echo false)"
fi

if [[ "$1" == *.py ]]; then
    program=("$@")
else
    program=(-m distnorm "$@")
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m distnorm.launch \
    --nnodes "$NNODES" \
    --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$ENDPOINT" \
    --rdzv-id "${RDZV_ID:-distnorm}" \
    --rdzv-conf "$rendezvous" "${address[@]}" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    "${program[@]}"

#!/usr/bin/env bash
# launch/slurm.sbatch on a Slurm of two nodes that are both this machine: a job trains, is requeued, and resumes; then it comes
# near its time limit. Needs root and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge), and leaves nothing running.
# It adds two names to /etc/hosts for as long as it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work="$(mktemp -d)"
host="$(hostname -s)"
export SLURM_CONF="$work/slurm.conf"
export PYTHON="${PYTHON:-$PWD/.venv/bin/python}" NPROC_PER_NODE=1

say() { echo "try_slurm: $*" >&2; }

finish() {
    if [[ -n "${job:-}" ]]; then scancel "$job" || true; fi
    sleep 1
    local file pid
    for file in "$work"/*.pid; do
        pid="$(cat "$file")"
        kill "$pid" 2>/dev/null || continue
        timeout 20 tail --pid="$pid" -f /dev/null || true # they still write as they end
    done
    sed -i '/ distnorm-a distnorm-b$/d' /etc/hosts
    rm -rf "$work"
}
trap finish EXIT

wait_for() { # what, seconds, command...
    local what="$1" until=$((SECONDS + $2))
    shift 2
    until "$@"; do
        if ((SECONDS > until)); then
            say "waited in vain: $what"
            cat "$work/log"
            exit 1
        fi
        sleep 1
    done
    say "$what"
}

echo "127.0.0.1 distnorm-a distnorm-b" >>/etc/hosts
install -d -o munge -m 700 "$work/munge"
chmod 755 "$work"
head -c 1024 /dev/urandom >"$work/munge/key"
chown munge "$work/munge/key"
chmod 400 "$work/munge/key"
runuser -u munge -- munged --force --key-file "$work/munge/key" --socket "$work/munge/socket" \
    --pid-file "$work/munge/pid" --log-file "$work/munge/log" --seed-file "$work/munge/seed"
ln -s munge/pid "$work/munge.pid"
cat >"$SLURM_CONF" <<CONF
ClusterName=distnorm
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/%n
SlurmctldPidFile=$work/ctld.pid
SlurmdPidFile=$work/%n.pid
SlurmctldLogFile=$work/ctld.log
SlurmdLogFile=$work/%n.log
SwitchType=switch/none
MpiDefault=none
NodeName=distnorm-a NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=$(nproc) State=UNKNOWN
NodeName=distnorm-b NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=distnorm-a,distnorm-b Default=YES State=UP
CONF
mkdir "$work/state" "$work/distnorm-a" "$work/distnorm-b"
slurmctld
slurmd -N distnorm-a
slurmd -N distnorm-b
wait_for "two nodes are there" 60 bash -c 'sinfo -h -t idle -o %D | grep -qx 2'

job="$(sbatch --parsable --output "$work/log" launch/slurm.sbatch configs/tp2.yaml --set "train.output_dir=$work/run" \
    --set train.steps=100000 --set train.checkpoint.every=1000 \
    --set 'train.model={dim: 32, layers: 2, heads: 4, context: 16, tie_embeddings: true}')"
wait_for "job $job trains" 300 grep -q "^step  *20/" "$work/log"
scontrol requeue "$job"
is_pending() { [[ "$(squeue -h -j "$job" -o %t)" == PD ]]; }
wait_for "it was requeued" 120 is_pending
compgen -G "$work/run/checkpoints/step-*" >/dev/null
scontrol update JobId="$job" StartTime=now
wait_for "it goes on" 300 grep -q "going on after step" "$work/log"
steps="$(wc -l <"$work/run/metrics.jsonl")"
more() { (($(wc -l <"$work/run/metrics.jsonl") > steps + 20)); }
wait_for "it trains on" 300 more
scancel --signal=USR1 --batch "$job" # as Slurm does 120 s before the time limit
wait_for "it was requeued near its limit" 120 is_pending
grep -E "going on after|stopped by a signal" "$work/log"

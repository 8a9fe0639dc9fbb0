#!/usr/bin/env bash
# Llama-2-7B on one or several nodes: the same command on every node, once each. docs/multinode.md tells more.
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/pretrain_7b.sh --data.train /data/corpus-train ...
#
#   NNODES         number of nodes (1)
#   NODE_RANK      which of them this is, from 0 (needed from two nodes on; SLURM_NODEID if Slurm says)
#   MASTER_ADDR    address of node 0 as the others reach it (needed from two nodes on)
#   MASTER_PORT    a free port there (29500)
#   GPUS_PER_NODE  ranks on every node (8)
#
# Everything else goes to `engine train` and overrides configs/llama-2-7b.toml. --dry-run shows commands and run only.
# SIGUSR1, SIGTERM, Ctrl-C or SIGHUP to this script, from its first line on, reaches every rank here: the run is saved, and
# the script ends with 75. A second signal, later, ends the ranks at once. A SIGHUP that nohup ignores stays ignored.
stop='' launcher='' signals=0 passed_on=0
noted() { # name of the signal
    stop=$1 signals=$((signals + 1))
    [[ -z $launcher ]] || tell_ranks
}
for name in USR1 TERM INT HUP; do
    # shellcheck disable=SC2064  # the name is meant as it is now
    trap "noted $name" "$name"
done
set -euo pipefail

# Tells every rank once, those that torchrun has still to start as well; in a process that stays as long as torchrun does.
tell_ranks() {
    passed_on=$signals
    (
        trap '' USR1 TERM INT HUP
        told=' '
        while kill -0 "$launcher" 2>/dev/null; do
            for rank in $(cat "/proc/$launcher/task/"*/children 2>/dev/null || true); do
                [[ $told == *" $rank "* ]] || kill -s "$stop" "$rank" 2>/dev/null || true
                told+="$rank "
            done
            sleep 0.2
        done
    ) &
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

number() { # name, value, least
    if [[ ! $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
        fail "$1=$2 is not a whole number of at least $3"
    fi
}

# No subshell or program before the ranks: a signal to the whole process group would end it, and this script with it.
here=${BASH_SOURCE[0]}
[[ $here == */* ]] || here=./$here
here=${here%/*}
[[ $here == /* ]] || here=$PWD/$here
dry_run=false
run_dir=runs/llama-2-7b
overrides=()
while (($#)); do
    case $1 in
        --dry-run) dry_run=true ;;
        --run.dir=*) run_dir=${1#*=} ;;
        --run.dir)
            (($# > 1)) || fail "--run.dir needs a folder"
            run_dir=$2
            shift
            ;;
        *) overrides+=("$1") ;;
    esac
    shift
done

nnodes=${NNODES:-1}
gpus_per_node=${GPUS_PER_NODE:-8}
master_port=${MASTER_PORT:-29500}
number NNODES "$nnodes" 1
number GPUS_PER_NODE "$gpus_per_node" 1
number MASTER_PORT "$master_port" 1
if ((nnodes > 1)); then
    node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
    master_addr=${MASTER_ADDR:-}
    [[ -n $node_rank ]] || fail "NNODES=$nnodes, but NODE_RANK is not set: 0 on the first node, 1 on the next, ..."
    [[ -n $master_addr ]] || fail "NNODES=$nnodes, but MASTER_ADDR is not set: the address of node 0, on every node"
else
    node_rank=${NODE_RANK:-0}
    master_addr=${MASTER_ADDR:-127.0.0.1}
fi
number NODE_RANK "$node_rank" 0
((10#$node_rank < nnodes)) || fail "NODE_RANK=$node_rank with NNODES=$nnodes: the nodes are 0 to $((nnodes - 1))"

# data = 0: whatever number of replicas the nodes make room for. cuda: a node without its GPUs says so, and the job ends,
# instead of training 7B on its CPU.
train=(train --config "$here/configs/llama-2-7b.toml" --parallel.data 0 --train.device cuda)
train+=("${overrides[@]}" --run.dir "$run_dir")
launch=(torchrun --nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "$gpus_per_node")
launch+=(--master-addr "$master_addr" --master-port "$master_port" -m engine)

if $dry_run; then
    check=(python -m engine "${train[@]}" --dry-run --world-size "$((nnodes * gpus_per_node))")
    printf '%q ' "${launch[@]}" "${train[@]}"
    printf '\n\n'
    exec "${check[@]}"
fi

# torchrun kills its ranks 30 s after it passed a SIGTERM on: too early for a long step and a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ENGINE_EXIT_CODE_FILE=$(mktemp) || [[ -n $stop ]] || exit 1 # a signal to the whole group ends it as well
export ENGINE_EXIT_CODE_FILE
trap 'rm -f "$ENGINE_EXIT_CODE_FILE"' EXIT

nothing_to_save() {
    printf 'stopped on SIG%s before the ranks had started: nothing to save yet; the same command goes on\n' "$stop" >&2
    exit 75
}

# How the last start ended must not be taken for how this one does. Every node removes it: none begins before all have.
rm -f "$run_dir/exit.json" || [[ -n $stop ]] || exit 1
((nnodes > 1)) || [[ -z $stop ]] || nothing_to_save # of several nodes the others would wait for this one

# Signals stay blocked in torchrun, which would end or stop the ranks in its own way where Slurm or a terminal sends them to
# every process, and in ranks until they listen, a few seconds later: what comes before is kept for them.
block='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
os.execvp(sys.argv[1], sys.argv[1:])'
python -c "$block" "${launch[@]}" "${train[@]}" &
launcher=$!

((passed_on == signals)) || tell_ranks

while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true # also returns when a signal has come
done
code=0
wait "$launcher" || code=$?

# torchrun says 1 whatever its ranks say; the run folder says 75 when all was saved on a signal, or nothing was to be.
if ((code != 0)) && grep -qs '"code": 75' "$run_dir/exit.json"; then
    code=75
elif [[ -n $stop ]] && ((code == 128 + $(kill -l "$stop"))); then
    nothing_to_save # it came while the launcher was not there yet
elif ((code != 0 && signals > 1)) && ! grep -qs '"code": [0-9]' "$run_dir/exit.json"; then # the second one ended the ranks
    code=$((128 + $(kill -l "$stop")))
fi
# What no scheduler should try again: a fault of the configuration, which the rank that found it leaves there, and of a run
# that had begun in exit.json, for the other nodes.
if ((code == 1)) && { [[ $(<"${ENGINE_EXIT_CODE_FILE:-/dev/null}") == 2 ]] || grep -qs '"code": 2,' "$run_dir/exit.json"; }; then
    code=2
fi
exit "$code"

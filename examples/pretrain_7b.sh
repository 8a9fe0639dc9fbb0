#!/usr/bin/env bash
# Llama-2-7B on one or several nodes: run the same command once on every node. See docs/multinode.md.
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/pretrain_7b.sh --data.train /data/corpus-train ...
#
#   NNODES         number of nodes (1)
#   NODE_RANK      index of this node, from 0 (required for two or more nodes; default: SLURM_NODEID)
#   MASTER_ADDR    address of node 0 as seen by the others (required for two or more nodes)
#   MASTER_PORT    a free port on node 0 (29500)
#   GPUS_PER_NODE  ranks on every node (8)
#
# All options go to `engine train` and override configs/llama-2-7b.toml. --dry-run only prints the command and the run.
# SIGUSR1, SIGTERM, Ctrl-C or SIGHUP to this script, from its first line on, is forwarded to every rank of the node: the
# run is saved, and the script exits with 75. A second signal ends the ranks immediately. nohup's ignored SIGHUP stays so.
stop='' launcher='' signals=0 passed_on=0
on_signal() { # name of the signal
    stop=$1 signals=$((signals + 1))
    [[ -z $launcher ]] || forward_to_ranks
}
for name in USR1 TERM INT HUP; do
    # shellcheck disable=SC2064  # expand the name now
    trap "on_signal $name" "$name"
done
set -euo pipefail

# Forwards the signal once to every rank, also to ranks that torchrun starts later, from a process that lives as long as it.
forward_to_ranks() {
    passed_on=$signals
    (
        trap '' USR1 TERM INT HUP
        signalled=' '
        while kill -0 "$launcher" 2>/dev/null; do
            for rank in $(cat "/proc/$launcher/task/"*/children 2>/dev/null || true); do
                [[ $signalled == *" $rank "* ]] || kill -s "$stop" "$rank" 2>/dev/null || true
                signalled+="$rank "
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

# Start no subshell or program before the ranks: a signal to the process group would end it, and with it this script.
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

# data 0: as many replicas as the ranks allow. cuda: a node without GPUs is an error instead of training 7B on its CPU.
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

# By default torchrun kills its ranks 30 s after a SIGTERM: too early for a long step and a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ENGINE_EXIT_CODE_FILE=$(mktemp) || [[ -n $stop ]] || exit 1 # a signal to the process group also ends mktemp
export ENGINE_EXIT_CODE_FILE
trap 'rm -f "$ENGINE_EXIT_CODE_FILE"' EXIT

nothing_to_save() {
    printf 'stopped by SIG%s before the ranks had started: nothing to save yet; the same command resumes\n' "$stop" >&2
    exit 75
}

# The result of an earlier start must not be taken for this one's. Every node removes it before the ranks start.
rm -f "$run_dir/exit.json" || [[ -n $stop ]] || exit 1
((nnodes > 1)) || [[ -z $stop ]] || nothing_to_save # with several nodes the others would wait for this one

# Signals are blocked in torchrun, which would end the ranks itself if Slurm or a terminal signals every process, and in
# the ranks until they install handlers a few seconds later: signals that arrive earlier stay pending.
block='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
os.execvp(sys.argv[1], sys.argv[1:])'
python -c "$block" "${launch[@]}" "${train[@]}" &
launcher=$!

((passed_on == signals)) || forward_to_ranks

while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true # also returns when a signal arrives
done
code=0
wait "$launcher" || code=$?

# torchrun exits with 1 for any failure of a rank; exit.json has 75 if the run was saved on a signal or needed no saving.
if ((code != 0)) && grep -qs '"code": 75' "$run_dir/exit.json"; then
    code=75
elif [[ -n $stop ]] && ((code == 128 + $(kill -l "$stop"))); then
    nothing_to_save # the signal came before the launcher started
elif ((code != 0 && signals > 1)) && ! grep -qs '"code": [0-9]' "$run_dir/exit.json"; then # the second signal ended the ranks
    code=$((128 + $(kill -l "$stop")))
fi
# No scheduler should retry a config error. The rank that found it writes 2 to ENGINE_EXIT_CODE_FILE; a run that had started
# also to exit.json, for the other nodes.
if ((code == 1)) && { [[ $(<"${ENGINE_EXIT_CODE_FILE:-/dev/null}") == 2 ]] || grep -qs '"code": 2,' "$run_dir/exit.json"; }; then
    code=2
fi
exit "$code"

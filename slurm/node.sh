#!/usr/bin/env bash
# One node's part of a job: the launcher of its ranks, and the truth about how they ended.
#   node.sh ENTRY [ARGUMENT ...]        ENTRY: a script, or -m MODULE
# Its exit code is 0 where all ranks of the node ended as they meant to (the batch script reads from
# their reports how that was): any other makes srun end the job on all nodes.
set -euo pipefail

eval "python=($COMA_PYTHON_COMMAND)"
ranks=$COMA_RANKS_PER_NODE node=$SLURM_NODEID
failed=$COMA_DS_RANK_REPORTS/failed
entry=("$@")

case $COMA_LAUNCHER in
torchrun)
    launcher=(-m coma_ds.torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$node"
        --nproc-per-node "$ranks" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
        --shutdown-timeout 5)
    ;;
deepspeed)
    launcher=(-m deepspeed.launcher.runner --hostfile "$COMA_DS_CONTROL/hostfile" --no_ssh
        --node_rank "$node" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
        --log_level error)
    if [[ ${entry[0]} == -m ]]; then entry=(--module "${entry[@]:1}"); fi
    ;;
esac

# Launchers die of USR1 and end their ranks at TERM, and SLURM sends both to every process of the
# step, TERM even twice.  They and all below them have both blocked; a file tells the ranks.
shield='
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.execvp(sys.executable, [sys.executable, "-P", *sys.argv[1:]])'

# Builtins only: at TERM every other program of the step ends.
signals=0 pid='' doomed=''
# shellcheck disable=SC2317  # called by the traps
on_signal() {
    signals=$((signals + 1))
    # srun ends this node because of another one, or this is an evaluation: nothing is to be saved
    if [[ -e $failed || -n ${COMA_NOTHING_TO_SAVE:-} ]]; then
        doomed=yes
        # the batch script may not have heard the signal
        if [[ ! -e $failed ]]; then { : >"$COMA_DS_CONTROL/stop"; } 2>/dev/null || true; fi
        if [[ -n $pid ]]; then end_tree "$pid"; fi
        return 0
    fi
    local newest='' first
    while read -r first _; do newest=$first; done <"$COMA_DS_CONTROL/starts"
    if [[ $newest == "${SLURM_RESTART_COUNT:-0}" ]]; then
        { : >"$COMA_DS_CONTROL/stop"; } 2>/dev/null || true # a full disk: the script's timer ends them
    fi
}
# shellcheck disable=SC2317
end_tree() { # PID: it and all below it, by SIGKILL
    local child children=()
    if [[ -r /proc/$1/task/$1/children ]]; then
        read -r -a children <"/proc/$1/task/$1/children" || true
    fi
    for child in "${children[@]}"; do end_tree "$child"; done
    kill -KILL "$1" 2>/dev/null || true
}
trap on_signal USR1
trap 'trap "" TERM USR1; on_signal' TERM

"${python[@]}" -c "$shield" "${launcher[@]}" "${entry[@]}" </dev/null &
pid=$!
if [[ -n $doomed ]]; then end_tree "$pid"; fi # a signal was quicker
while :; do
    count=$signals launched=0
    wait "$pid" || launched=$?
    if ((count == signals)) && ! kill -0 "$pid" 2>/dev/null; then break; fi
done

# The launcher's own code is not the truth: deepspeed's is 0 when a signal ended a rank, torchrun's
# is 1 whatever a rank's was.
code=0
"${python[@]}" -m coma_ds.rank_report "$COMA_DS_RANK_REPORTS" $((node * ranks)) "$ranks" \
    >/dev/null || code=$?
case $code in
0 | 85 | 86 | 87) exit 0 ;;
esac
echo "${SLURMD_NODENAME:-$(hostname)} ended with $code, its launcher with $launched" >>"$failed"
exit "$code"

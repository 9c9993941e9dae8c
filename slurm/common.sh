# shellcheck shell=bash
# What every job of this folder does; sourced by its batch scripts, which then call one of
#   launch_train DEFAULT_RECIPE [RECIPE] [KEY=VALUE ...]
#   launch_evaluate RUN [OPTION ...]
# Run outside a job, a batch script submits itself, with the options of slurm/site.env.
set -euo pipefail

say() { printf 'job: %s\n' "$*" >&2; }
fail() {
    if [[ ${early:-} == term ]]; then heed_early; fi # it ended what failed
    say "error: $*"
    exit 2
}

root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
cd "$root"
if [[ -f slurm/site.env ]]; then
    set -a
    # shellcheck source=/dev/null
    source slurm/site.env
    set +a
fi

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    # shellcheck disable=SC2086  # options, split into words
    exec sbatch ${COMA_SBATCH:-} "$0" "$@"
fi

# ---- a start and its end in SLURM

restarts=${SLURM_RESTART_COUNT:-0}
# One task of an array may have the number of the whole: requeue would then take all of them.
job_id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
export COMA_MAX_RESTARTS=${COMA_MAX_RESTARTS:-20}

requeue() { # REASON
    if ((restarts >= COMA_MAX_RESTARTS)); then
        say "not started again: $restarts restarts are the limit (COMA_MAX_RESTARTS)"
        return 1
    fi
    say "requeued, restart $((restarts + 1)) of at most $COMA_MAX_RESTARTS: $1"
    trap '' TERM USR1
    scontrol requeue "$job_id" || {
        say 'not started again: SLURM refused the requeue'
        return 1
    }
}

heed_early() { # the batch script's traps heard a signal before anything was begun
    case ${early:-} in
    usr1) if requeue 'SLURM warns of the end before anything was begun'; then exit 0; else exit 85; fi ;;
    term)
        say 'ended by SLURM before anything was begun'
        exit 143
        ;;
    esac
}

# ---- settings: slurm/site.env.example says what they are

export COMA_LAUNCHER=${COMA_LAUNCHER:-torchrun}
case $COMA_LAUNCHER in
torchrun | deepspeed) ;;
*) fail "COMA_LAUNCHER is '$COMA_LAUNCHER': expected torchrun or deepspeed" ;;
esac

for name in COMA_RANKS_PER_NODE COMA_MAX_RESTARTS COMA_DS_LEAD_SECONDS COMA_MASTER_PORT \
    COMA_PREFLIGHT_SECONDS COMA_ROOM_SECONDS; do
    if [[ -n ${!name:-} && ! ${!name} =~ ^(0|[1-9][0-9]{0,6})$ ]]; then
        fail "$name is '${!name}': expected a whole number below ten million"
    fi
done
for name in COMA_RANKS_PER_NODE COMA_DS_LEAD_SECONDS COMA_MASTER_PORT COMA_PREFLIGHT_SECONDS; do
    if [[ ${!name:-1} == 0 ]]; then fail "$name is 0: expected 1 or more"; fi
done
if ((${COMA_MASTER_PORT:-1} > 65535)); then
    fail "COMA_MASTER_PORT is '$COMA_MASTER_PORT': expected 65535 or less"
fi
if ((${COMA_RANKS_PER_NODE:-1} > 1024)); then
    fail "COMA_RANKS_PER_NODE is '$COMA_RANKS_PER_NODE': expected 1024 or less"
fi
if [[ ! ${COMA_PREFLIGHT:-1} =~ ^[01]$ ]]; then
    fail "COMA_PREFLIGHT is '$COMA_PREFLIGHT': expected 1, or 0 to leave it out"
fi
if [[ ! ${COMA_MIN_FREE_GIB:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    fail "COMA_MIN_FREE_GIB is '$COMA_MIN_FREE_GIB': expected a number of GiB"
fi
if [[ -n ${COMA_VENV:-} && -z ${COMA_CONTAINER:-} && ${COMA_SRUN:-} != *--container-image* && ! -x $COMA_VENV/bin/python ]]; then
    fail "COMA_VENV is '$COMA_VENV': there is no bin/python in it"
fi

if [[ -n ${COMA_MODULES:-} ]]; then
    set +u # the module function of many sites reads what is not set
    # shellcheck source=/dev/null
    type module >/dev/null 2>&1 || source /etc/profile
    type module >/dev/null 2>&1 || fail "COMA_MODULES is '$COMA_MODULES': this node has no command 'module'"
    # shellcheck disable=SC2086
    module load $COMA_MODULES || fail "COMA_MODULES is '$COMA_MODULES': it cannot be loaded"
    set -u
fi
if [[ -z ${COMA_PYTHON:-} ]]; then
    COMA_PYTHON=python3
    for place in "${COMA_VENV:-}" .venv; do
        if [[ -n $place && -x $place/bin/python ]]; then
            COMA_PYTHON=$place/bin/python
            break
        fi
    done
fi
if [[ $COMA_PYTHON == */* && $COMA_PYTHON != /* ]]; then COMA_PYTHON=$root/$COMA_PYTHON; fi
# what starts Python: a container's command, split into words, then the program
read -r -a python <<<"${COMA_CONTAINER:-}"
python+=("$COMA_PYTHON" -P)
COMA_PYTHON_COMMAND=$(printf '%q ' "${python[@]}")
# the batch script's own calls: it runs outside of a container that srun would start
here=("${python[@]}")
if [[ ${COMA_SRUN:-} == *--container-image* ]]; then
    # shellcheck disable=SC2206  # options, split into words
    here=(srun --nodes=1 --ntasks=1 --overlap --quiet --mpi=none ${COMA_SRUN} "${python[@]}")
fi
# as -P, for all that is started below: else `-m` would look into the current folder first
export COMA_PYTHON_COMMAND PYTHONSAFEPATH=1

nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
export COMA_RANKS_PER_NODE=${COMA_RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
if ((gpus == 0)) && ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} / COMA_RANKS_PER_NODE > 0 ?
    ${SLURM_CPUS_ON_NODE:-1} / COMA_RANKS_PER_NODE : 1))}

mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export COMA_NODE_NAMES="${names[*]}"
export MASTER_ADDR=${COMA_MASTER_ADDR:-${names[0]}}
# below the range from which kernels give ports away; another one at each start
export MASTER_PORT=${COMA_MASTER_PORT:-$((10000 + (SLURM_JOB_ID * 31 + restarts) % 20000))}
# since SLURM 22.05 srun does not take this from the job any more
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

export COMA_SHARED=${COMA_SHARED:-$root/runs}
export COMA_DS_CONTROL=$COMA_SHARED/jobs/$SLURM_JOB_NAME-$SLURM_JOB_ID
export COMA_DS_LEAD_SECONDS=${COMA_DS_LEAD_SECONDS:-300}
export COMA_DS_RANK_REPORTS=$COMA_DS_CONTROL/ranks/$restarts
COMA_ROOM_SECONDS=${COMA_ROOM_SECONDS:-300}

# ---- the job's folder

# A folder of that name is another cluster's, or of a time before its numbers began again.
if ((restarts == 0)) && [[ -e $COMA_DS_CONTROL ]]; then
    mv "$COMA_DS_CONTROL" "$COMA_DS_CONTROL.$(date +%Y%m%d-%H%M%S)"
fi
lacks=''
has_room() { # makes the folder
    lacks=$(LC_ALL=C mkdir -p "$COMA_DS_RANK_REPORTS" "$COMA_DS_CONTROL/flight" 2>&1) || return 1
    lacks='No space left on device'
    { printf '%65536s' '' >"$COMA_DS_CONTROL/.room"; } 2>/dev/null || return 1
    rm -f "$COMA_DS_CONTROL/.room"
}
waited=0
heed_early
while ! has_room; do
    if [[ $lacks != *'No space'* && $lacks != *quota* ]]; then
        fail "$COMA_DS_CONTROL cannot be made (${lacks##*: }): COMA_SHARED must be a folder on all nodes"
    fi
    if ((waited >= COMA_ROOM_SECONDS)); then
        fail "$COMA_DS_CONTROL has no room, as $(uname -n) sees it: make some (COMA_SHARED)"
    fi
    if ((waited == 0)); then say "waits for room at $COMA_DS_CONTROL, $COMA_ROOM_SECONDS s at most"; fi
    sleep 5
    heed_early
    waited=$((waited + 5))
done
rm -f "$COMA_DS_CONTROL/stop" "$COMA_DS_RANK_REPORTS"/*

published() { # the last published step, 0 without one
    local step=0
    if [[ -f $COMA_DS_CONTROL/published ]]; then read -r step <"$COMA_DS_CONTROL/published" || true; fi
    printf '%d' "${step:-0}"
}
before=$(published)
# one line a start: its restart count, and the step that was published before it
printf '%s %s %s %s\n' "$restarts" "$before" "$(date +%FT%T)" "$SLURM_JOB_NODELIST" \
    >>"$COMA_DS_CONTROL/starts"

is_newest() { # false on a lost node, when the job runs elsewhere by now
    local newest='' first
    while read -r first _; do newest=$first; done <"$COMA_DS_CONTROL/starts"
    [[ $newest == "$restarts" ]]
}

# False when SLURM has requeued the job already, and this script lives on a node that it lost.
is_ours() {
    local said
    said=$(scontrol show job "$job_id" --oneliner) || return 0
    [[ $said == *" JobState=RUNNING "* || $said == *" JobState=COMPLETING "* ]] &&
        [[ $said == *" Restarts=$restarts "* ]]
}

# On a hang NCCL's flight recorder leaves what every rank was doing.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE=$COMA_DS_CONTROL/flight/rank-
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$TORCH_FR_DUMP_TEMP_FILE # its older name
# Operations that DeepSpeed compiles are kept for each environment: one cache for several is
# built again at every change.
if [[ -z ${TORCH_EXTENSIONS_DIR:-} ]]; then
    environment=$(printf '%s' "$COMA_PYTHON_COMMAND" | cksum)
    export TORCH_EXTENSIONS_DIR=$COMA_SHARED/torch_extensions/${environment%% *}
fi

# The code that runs is the package that Python finds, which may stand elsewhere.
find_package() {
    local find='import importlib.util as u, sys
found = u.find_spec("coma_ds")
print(*found.submodule_search_locations) if found else sys.exit(1)'
    package=$("${here[@]}" -c "$find") || fail "Python does not find coma_ds: install it" \
        "there (pip install -e .), or give another one (COMA_PYTHON, COMA_VENV," \
        "COMA_CONTAINER): $COMA_PYTHON_COMMAND"
    if [[ ! $package -ef coma_ds ]]; then
        say "the code that runs is that of $package, not of $root"
    fi
}

record() { # what this job is made of
    rm -f "$COMA_DS_CONTROL/diff.patch"
    if git -C "$package" ls-files --error-unmatch train.py >/dev/null 2>&1; then
        git -C "$package" rev-parse HEAD >"$COMA_DS_CONTROL/commit.txt"
        git -C "$package/.." diff HEAD >"$COMA_DS_CONTROL/diff.patch" || true
        local file
        while IFS= read -r -d '' file; do # what git does not know yet
            git -C "$package/.." diff --no-index -- /dev/null "$file" \
                >>"$COMA_DS_CONTROL/diff.patch" || true
        done < <(git -C "$package/.." ls-files --others --exclude-standard -z -- \
            coma_ds kernels ds_configs slurm)
    else
        echo "no git at $package" >"$COMA_DS_CONTROL/commit.txt"
    fi
    scontrol show job "$job_id" >"$COMA_DS_CONTROL/job.txt" || true
    local name value target=$COMA_DS_CONTROL/environment.txt
    (umask 077 && : >"$target")
    while IFS='=' read -r -d '' name value; do
        case ${name^^} in
        *KEY* | *TOKEN* | *SECRET* | *PASS* | *_PWD | *CREDENTIAL* | *AUTH* | *JWT* | *_PAT | *COOKIE*)
            printf '%s=***\n' "$name"
            ;;
        *) printf '%s=%q\n' "$name" "$value" ;;
        esac
    done < <(env -0) | sed -E 's#(://)[^/@]*@#\1***@#g' | sort >"$target"
}

# ---- signals: USR1 comes before the end of the time, TERM with scancel and pre-emption
# TERM comes to every process of this script, twice with pre-emption: no other program may be
# needed to write the file, and none that is run from there on may die of it.

signals=0 stopping='' ended='' timer='' nothing_to_save=''

ask_to_stop() {
    is_newest || return 0
    # on a full disk it is empty, which will do
    { printf '%(%FT%T)T\n' -1 >"$COMA_DS_CONTROL/stop"; } 2>/dev/null || true
    if [[ -n $stopping ]]; then return 0; fi # alone it gives what was before the trap, and ends all
    stopping=$1
    local what='asked the ranks to save and stop (after the step or evaluation they are in)'
    if [[ ! -e $COMA_DS_CONTROL/stop ]]; then
        what="the ranks do not hear of it ($COMA_DS_CONTROL/stop cannot be written) and are ended"
    fi
    if [[ -n $nothing_to_save ]]; then what='the evaluation is ended'; fi
    say "$1: $what"
}
seconds_left() {
    local end
    end=$(scontrol show job "$job_id" --oneliner | sed -nE 's/.* EndTime=([0-9T:-]+).*/\1/p')
    [[ -n $end ]] && echo $(($(date -d "$end" +%s) - $(date +%s)))
}
on_usr1() {
    signals=$((signals + 1))
    ask_to_stop 'SLURM warns of the end (time limit or pre-emption)'
    if [[ -n $nothing_to_save ]]; then
        if [[ -z $timer ]]; then end_step || true; fi
        timer=none
    elif [[ -z $timer ]]; then
        local lead=$COMA_DS_LEAD_SECONDS left
        left=$(seconds_left) && ((left < lead)) && lead=$left
        # after the ranks' own timer (30 s before the end), in time for a requeue
        hard_timer $((lead > 60 ? lead - 20 : lead * 2 / 3)) &
        timer=$!
    fi
}
on_term() {
    trap '' TERM USR1
    signals=$((signals + 1))
    ended=yes
    ask_to_stop 'SLURM ends this job (scancel, pre-emption, or a node that is lost)'
}
hard_timer() { # a subshell: end the step, whatever hangs
    trap - USR1 TERM
    sleep "$1" &
    # shellcheck disable=SC2064
    trap "kill $! 2>/dev/null; exit" TERM
    wait $!
    say "the ranks did not stop within $1 s: they are ended"
    { : >"$COMA_DS_RANK_REPORTS/timed-out"; } 2>/dev/null || true
    end_step || true
}
end_step() {
    local step
    squeue --noheader --steps --jobs "$SLURM_JOB_ID" --format '%i' |
        while read -r step; do
            case $step in *.[0-9]*) scancel --signal=KILL "$step" || true ;; esac
        done
}
trap on_usr1 USR1
trap on_term TERM
if [[ -n ${early:-} ]]; then "on_$early"; fi

# All cores of the node's part of the job are for all its ranks, where SLURM binds at all.
binding=()
if scontrol show config | grep -Eq '^TaskPlugin .*(affinity|cgroup)'; then binding=(--cpu-bind=none); fi

run_step() { # srun in the background, so that signals are heard; its exit code
    local pid code count
    # shellcheck disable=SC2086  # options, split into words
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=120 \
        --export=ALL --mpi=none "${binding[@]}" ${COMA_SRUN:-} "$@" </dev/null &
    pid=$!
    while :; do # a signal ends a wait, also one that a trap has heard before: only the last tells
        count=$signals code=0
        wait "$pid" || code=$?
        if ((count == signals)) && ! kill -0 "$pid" 2>/dev/null; then break; fi
    done
    return "$code"
}

# ---- the end of a start

# Starts in a row, this one included, in which no step was published.
idle_starts() {
    local count=0 start
    while read -r start _; do
        if grep -qxs "$start" "$COMA_DS_CONTROL/gained"; then break; fi
        count=$((count + 1))
    done < <(tac "$COMA_DS_CONTROL/starts")
    echo "$count"
}

finish() { # CODE MESSAGE: what the ranks' end means for the job
    local code=$1 message=$2 idle
    if [[ -n $timer && $timer != none ]] && ! kill "$timer" 2>/dev/null && [[ -z $ended ]]; then
        message='' # the timer has ended the ranks, and itself (TERM ends it before that)
    fi
    if ! is_newest; then
        say 'this job runs elsewhere by now: this start of it ends'
        exit 0
    fi
    if [[ -z $ended ]] && ! is_ours; then
        say 'SLURM has taken this job from this node: this start of it ends'
        exit 0
    fi
    idle=$(idle_starts)
    case $code in
    0)
        say 'finished'
        exit 0
        ;;
    # not finished: what depends on this job must not start
    86)
        say 'a newer start owns the run: this one ends'
        exit 86
        ;;
    87)
        say 'held by the switch control/stop of the run: remove it and submit again to go on'
        exit 87
        ;;
    esac
    # a signal to the steps alone ends an evaluation too
    if [[ -n $nothing_to_save && -e $COMA_DS_CONTROL/stop ]]; then stopping=${stopping:-yes}; fi
    # what a rank said is lost above what launchers and srun say of a fault
    # (an evaluation that is asked to stop is killed by this script, which is no fault)
    if [[ -e $COMA_DS_RANK_REPORTS/timed-out ]]; then message=''; fi
    if [[ -n $message && $code != 85 && ! (-n $nothing_to_save && -n $stopping) ]]; then printf '\n%s\n' "$message" >&2; fi
    if [[ -n $ended ]]; then # requeued by SLURM itself, where it is
        say "ended by SLURM${nothing_to_save:- at step $(published)}"
        exit 143
    fi
    if [[ -n $stopping && $code != 2 ]]; then code=85; fi # ended in the end, as it was asked to
    case $code in
    2) exit 2 ;;
    85)
        if ((idle < 3)); then
            requeue "stopped${nothing_to_save:- at step $(published)}" && exit 0
        else
            say "not started again: $idle starts were stopped before anything was gained"
        fi
        ;;
    *)
        if ((idle == 0)); then
            requeue "a fault after step $(published) was published" && exit 0
        else
            say "not started again: no step was published since step $before"
        fi
        ;;
    esac
    exit "$code"
}

# ---- the two kinds of jobs

preflight() { # ARGUMENTS: what to look at
    if [[ -n $stopping ]]; then finish 85 ''; fi # heard before any rank was there
    if [[ ${COMA_PREFLIGHT:-1} == 0 ]]; then return; fi
    local code=0
    run_step --job-name=preflight --time=2 \
        "${python[@]}" -m coma_ds.commands.main preflight "$@" || code=$?
    if [[ -n $stopping ]]; then finish 85 ''; fi
    if ((code)); then
        say "error: preflight failed, nothing was started${COMA_SRUN:+ (options of srun: $COMA_SRUN)}"
        exit 2
    fi
}

launch() { # ENTRY ARGUMENTS: the same on every node
    local code=0 message=''
    printf '%s slots='"$COMA_RANKS_PER_NODE"'\n' "${names[@]}" >"$COMA_DS_CONTROL/hostfile" ||
        fail "$COMA_DS_CONTROL cannot be written"
    run_step --job-name=ranks bash slurm/node.sh "$@" || true
    message=$("${here[@]}" -m coma_ds.rank_report "$COMA_DS_RANK_REPORTS" \
        0 $((nodes * COMA_RANKS_PER_NODE)) "$COMA_RANKS_PER_NODE" "${names[@]}") || code=$?
    finish "$code" "$message"
}

begin() {
    local left task=${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID of array $SLURM_ARRAY_JOB_ID)}
    say "$SLURM_JOB_NAME $SLURM_JOB_ID$task, restart $restarts: $nodes node(s) $SLURM_JOB_NODELIST," \
        "$COMA_RANKS_PER_NODE rank(s) each, $COMA_LAUNCHER; $COMA_DS_CONTROL"
    left=$(seconds_left) || left=''
    if [[ -n $left ]] && ((left <= COMA_DS_LEAD_SECONDS)); then
        say "warning: $left s are left, and the warning of the end comes $COMA_DS_LEAD_SECONDS s" \
            "before it, so at once: give more --time, or a shorter lead (--signal=B:USR1@60 and" \
            "COMA_DS_LEAD_SECONDS=60)"
    fi
    find_package
    record || say 'warning: what this job is made of is not written down as a whole'
}

take_recipe() { # NAME: into recipe, of launch_train
    if [[ -n $recipe ]]; then fail "'$1': one recipe is expected, and there is '$recipe'"; fi
    if [[ -z $1 ]]; then fail '--recipe: the name of a recipe is expected'; fi
    recipe=$1
}

launch_train() { # DEFAULT_RECIPE [RECIPE] [KEY=VALUE ...]
    local recipe='' word words=() overrides=() default=$1
    shift
    set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-}}"
    while (($#)); do
        word=$1
        shift
        case $word in
        --recipe)
            take_recipe "${1:-}"
            shift
            ;;
        --recipe=*) take_recipe "${word#--recipe=}" ;;
        --dry-run | --verify-gradients) words+=("$word") ;;
        -*) fail "'$word': a training takes --recipe NAME, --dry-run and --verify-gradients" ;;
        *=*) overrides+=("$word") words+=("$word") ;;
        *) take_recipe "$word" ;;
        esac
    done
    recipe=${recipe:-$default}
    begin
    "${here[@]}" -m coma_ds.commands.main config --recipe "$recipe" "${overrides[@]}" \
        >"$COMA_DS_CONTROL/config.yaml" || exit 2
    preflight --recipe "$recipe" "${overrides[@]}"
    launch "$package/train.py" --recipe "$recipe" "${words[@]}"
}

launch_evaluate() { # RUN [OPTION ...]
    if [[ -z ${1:-} ]]; then fail 'evaluate: name the folder of a run'; fi
    set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-}}"
    nothing_to_save=' before its end'
    export COMA_NOTHING_TO_SAVE=1
    begin
    preflight --evaluate "$@"
    launch -m coma_ds.commands.main evaluate "$@"
}

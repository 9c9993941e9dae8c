#!/usr/bin/env bash
#SBATCH --job-name=pipeline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=5
#SBATCH --output=%x-%j.log
# Submit compress, then match from it, then evaluate; each starts when the one before has succeeded.
#   slurm/pipeline.sh [SBATCH_OPTION ...] [NAME] [output=FOLDER] [KEY=VALUE ...]
# NAME stands for the recipes NAME-compress and NAME-match (default: demo), FOLDER (default: the
# shared folder, then NAME) gets compress/ and match/.  compress:KEY=VALUE and match:KEY=VALUE are
# for one stage.  A SBATCH_OPTION with a value is one word: --time=60, not --time 60.
set -euo pipefail
if [[ ! -f ${BASH_SOURCE[0]%/*}/common.sh ]]; then # a batch script runs from a copy
    cd "${SLURM_SUBMIT_DIR:?}"
else
    cd "${BASH_SOURCE[0]%/*}/.."
fi
if [[ -f slurm/site.env ]]; then
    set -a
    # shellcheck source=/dev/null
    source slurm/site.env
    set +a
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

options=() name='' folder='' compress=() match=() before='' hint=''
for word in "$@"; do
    case $word in
    -*) options+=("$word") ;;
    output=) fail "'$word': name the folder of both stages" ;;
    output=*) folder=${word#output=} ;;
    compress:output=* | match:output=*) fail "'$word': output=FOLDER is that of both stages" ;;
    init_from=* | match:init_from=*)
        fail "'$word': match goes on from this compress (compress:init_from=RUN is possible)"
        ;;
    compress:*=*) compress+=("${word#compress:}") ;;
    match:*=*) match+=("${word#match:}") ;;
    evaluate:*) fail "'$word': the evaluation takes no words here" ;;
    compress:* | match:*) fail "'$word': expected ${word%%:*}:KEY=VALUE" ;;
    *=*) compress+=("$word") match+=("$word") ;;
    *)
        if [[ -n $name ]]; then
            fail "'$word': one name of recipes is expected, and there is '$name'${hint:+ ($hint)}"
        fi
        name=$word
        if [[ $before == --* && $before != *=* ]]; then
            hint="as a value of $before it would be one word with it, $before=$word"
        fi
        ;;
    esac
    before=$word
done
name=${name:-demo}
folder=${folder:-${COMA_SHARED:-$PWD/runs}/$name}

# A wrong word for a later stage is told now, where this machine has the Python of the jobs.
python=${COMA_PYTHON:-${COMA_VENV:+$COMA_VENV/bin/python}}
if [[ -z $python && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
python=${python:-python3}
if [[ -z ${COMA_CONTAINER:-} ]] && "$python" -P -c 'import coma_ds, pydantic, yaml' 2>/dev/null; then
    settle() { # as in a job, where checkpoints are published in any case
        COMA_DS_CONTROL=. "$python" -P -m coma_ds.commands.main config --recipe "$@" >/dev/null && return
        if [[ -n $hint ]] && ! "$python" -P -m coma_ds.commands.main config --recipe "$1" \
            >/dev/null 2>&1; then
            echo "'$name' is taken for the NAME of recipes: $hint" >&2
        fi
        exit 2
    }
    settle "$name-compress" "output=$folder/compress" "${compress[@]}"
    settle "$name-match" "output=$folder/match" "init_from=$folder/compress" "${match[@]}"
else
    why="$python has no coma_ds"
    if ! command -v "$python" >/dev/null; then why="there is no $python"; fi
    if [[ -n ${COMA_CONTAINER:-} ]]; then why="the jobs run in a container"; fi
    echo "words are not checked here: $why" >&2
fi

submit() { # DEPENDENCY SCRIPT ARGUMENTS: the number of the job
    local after=() number
    if [[ -n $1 ]]; then after=("--dependency=afterok:$1" --kill-on-invalid-dep=yes); fi
    # shellcheck disable=SC2086  # options, split into words
    number=$(sbatch --parsable ${COMA_SBATCH:-} "${options[@]}" "${after[@]}" "${@:2}") || return
    echo "${number%%;*}"
}

first=$(submit '' slurm/compress.sh "$name-compress" "output=$folder/compress" "${compress[@]}")
echo "compress $first -> $folder/compress"
second=$(submit "$first" slurm/match.sh "$name-match" "output=$folder/match" \
    "init_from=$folder/compress" "${match[@]}")
echo "match    $second, after $first -> $folder/match"
third=$(submit "$second" slurm/evaluate.sh "$folder/match")
echo "evaluate $third, after $second -> $folder/match/results.json"

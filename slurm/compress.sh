#!/usr/bin/env bash
#SBATCH --job-name=compress
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#   sbatch slurm/compress.sh [RECIPE] [KEY=VALUE ...]        from the root of the repository
early=''  # a signal before slurm/common.sh can hear it
trap 'early=usr1' USR1
trap 'early=term' TERM
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f slurm/common.sh ]] || { echo 'error: submit from the root of the repository' >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source slurm/common.sh

launch_train demo-compress "$@"

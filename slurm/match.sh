#!/usr/bin/env bash
#SBATCH --job-name=match
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#   sbatch slurm/match.sh [RECIPE] [KEY=VALUE ...]        from the root of the repository
set -euo pipefail
# shellcheck source=slurm/common.sh
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"

launch_train demo-match "$@"

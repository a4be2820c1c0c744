#!/usr/bin/env bash
# A run of dpojax on a Slurm cluster, one process a GPU; docs/gpu.md tells how to use it.
#
#   sbatch --nodes=2 scripts/slurm.sh --config=dpo --workdir=s3://BUCKET/runs/dpo [--config.key=value ...]
#   COMMAND=dpojax.ppo sbatch scripts/slurm.sh --config=ppo --workdir=...
#
#SBATCH --job-name=dpojax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM, to this script alone, two minutes before the time is over: the run saves its step and ends.
#SBATCH --signal=B:TERM@120
set -euo pipefail

# jax reads the coordinator, the number of processes and each one's GPU from Slurm's variables. --kill-on-bad-exit:
# where one process cannot even start, none of the others waits for it.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m "${COMMAND:-dpojax.train}" "$@" \
  --config.parallel.coordinator=auto &
run=$!

stopped=
trap 'stopped=yes; kill -TERM "$run"' TERM
status=0
wait "$run" || status=$?
if [ -n "$stopped" ]; then
  # The trap has ended the first wait, not the run.
  status=0
  wait "$run" || status=$?
  # The same command continues from the step that was saved.
  if [ "$status" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"

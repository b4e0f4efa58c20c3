#!/usr/bin/env bash
# Several processes on the CPUs of one machine, with the training options as arguments.
#   launch/several-cpus.sh --data novel.txt
#   PROCESSES=4 RESTARTS=3 launch/several-cpus.sh --data novel.txt
# Edit nothing, or set: PROCESSES, by which batch_size must divide; RESTARTS, how often a run of which a process died is
# started anew without a question. (Not by `accelerate launch --cpu`: it starts one process, whatever --num_processes.)
set -euo pipefail

# Every attempt meets in a store of its own: in a shared one it finds the addresses of processes that are dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export ACCELERATE_USE_CPU=true

# exec: a signal to this script is a signal to torchrun, which passes it on to the processes.
exec torchrun --standalone --nproc-per-node="${PROCESSES:-2}" --max-restarts="${RESTARTS:-0}" train/main.py "$@"

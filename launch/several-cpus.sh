#!/usr/bin/env bash
# Several processes on the CPUs of one machine, with the training options as arguments.
#   launch/several-cpus.sh --data novel.txt
#   PROCESSES=4 RESTARTS=3 launch/several-cpus.sh --data novel.txt
# Edit nothing, or set: PROCESSES, which must divide batch_size; RESTARTS, how often a run is restarted after a process
# died. (Not `accelerate launch --cpu`: it starts one process, whatever --num_processes.)
set -euo pipefail

# A new rendezvous store for every attempt: a shared one holds the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export ACCELERATE_USE_CPU=true

# exec: torchrun receives signals to this script, and forwards them to the processes.
exec torchrun --standalone --nproc-per-node="${PROCESSES:-2}" --max-restarts="${RESTARTS:-0}" train/main.py "$@"

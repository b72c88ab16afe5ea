#!/bin/bash
# Fine-tunes on the nodes of a SLURM job, and goes on in a new job when the time is up. From the repository's folder,
# which all nodes must see, as they must OUT:
#
#     sbatch --nodes=4 --time=12:00:00 tools/slurm.sh finetune_hf_trainer_nlvr2.py OUT --bf16 --batch_size 64
#
#SBATCH --job-name=phi3v
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# To this shell alone, which passes it on, 300 s before the time is up: a step and a checkpoint must fit into that.
#SBATCH --signal=B:USR1@300
# Also after a node has failed.
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append

program=${1:?usage: sbatch tools/slurm.sh SCRIPT OUTPUT_DIR FLAG…} output_dir=${2:?OUTPUT_DIR is missing}
shift 2
export PATH="$PWD/.venv/bin:$PATH" # where `make install` puts everything

# The first node's torchrun is where the others meet. Jobs that share a node get ports of their own.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# A torchrun a node. No shell stands before it: SLURM signals every process, and a shell would end at that.
# When one torchrun fails, SLURM ends the others, which otherwise could wait for as long as --ddp_timeout.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:$port" --rdzv_id="$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGUSR1 --shutdown-timeout=240 \
    "$program" --output_dir "$output_dir" --save_steps 200 --save_total_limit 2 --resume_from_checkpoint auto "$@" &
step=$!

stopped=
trap 'stopped=1; kill -USR1 "$step"' USR1
wait "$step"
status=$?
if [ "$stopped" ]; then # the signal has ended the waiting, and not yet the training
    wait "$step"
    status=$?
fi

# torchrun ends with 1 whether training was stopped (status 75) or has failed: only what was stopped is started again.
if [ "$stopped" ] && [ ! -f "$output_dir/finished.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

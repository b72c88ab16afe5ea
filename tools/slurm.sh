#!/bin/bash
# Fine-tunes on the nodes of a SLURM job, and resumes in a new job when the time limit is reached. Start it in the
# repository's folder; all nodes must see this folder and OUT:
#
#     sbatch --nodes=4 --time=12:00:00 tools/slurm.sh finetune_hf_trainer_nlvr2.py OUT --bf16 --batch_size 64
#
#SBATCH --job-name=phi3v
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# SLURM sends SIGUSR1 to this shell alone, 300 s before the time limit. This must be enough for a step and a checkpoint.
#SBATCH --signal=B:USR1@300
# SLURM also starts the job again after a node has failed.
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append

program=${1:?usage: sbatch tools/slurm.sh SCRIPT OUTPUT_DIR FLAG…} output_dir=${2:?OUTPUT_DIR is missing}
shift 2
export PATH="$PWD/.venv/bin:$PATH" # `make install` installs everything there

# All torchruns connect to the one on the first node. The port depends on the job, since jobs can share a node.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# srun starts one torchrun per node, without a shell around it: SLURM signals every process, and the signal would end
# the shell. When one torchrun fails, SLURM ends the others, which otherwise could wait as long as --ddp_timeout.
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
if [ "$stopped" ]; then # the signal ended the first wait, but not yet the training
    wait "$step"
    status=$?
fi

# torchrun ends with status 1 both if training was stopped (status 75) and if it failed. Only a stopped job is requeued.
if [ "$stopped" ] && [ ! -f "$output_dir/finished.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

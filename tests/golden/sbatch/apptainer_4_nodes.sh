#!/bin/bash
# Written by mixtral-recipes. Submitted with: sbatch --requeue --parsable <this file>
#SBATCH --account=research
#SBATCH --comment='two words'
#SBATCH --exclusive
#SBATCH --export=HOME,USER,LOGNAME,SHELL,LANG,PATH,LD_LIBRARY_PATH,MODULEPATH,MODULESHOME,LMOD_CMD,LMOD_DIR,SLURM_CONF
#SBATCH --gpus-per-node=8
#SBATCH --job-name=tune
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=END
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/jobs/tune/sbatch_%j.out
#SBATCH --partition=batch
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --time=08:00:00

set -u -o pipefail
umask 077                      # logs and job files are for their owner
export SLURM_EXPORT_ENV=ALL    # steps get this script's environment
job_dir=/shared/jobs/tune
mkdir -p "$job_dir/attempts"
number=0                       # counted in the job folder: a resumed run is a new Slurm job in the same folder
while ! mkdir "$job_dir/attempts/$number" 2> /dev/null; do number=$((number + 1)); done
attempt="$job_dir/attempts/$number"
stopping=
trap 'stopping=1' TERM         # scancel, preemption or the time limit; the steps get the signal too

record() {  # outcome, exit code, whether the job ended with it: one line of the job's own history
    local event job
    event=$(printf '"attempt": %d, "outcome": "%s", "exit_code": %d, "final": %s' "$number" "$1" "$2" "$3")
    job=$(printf '"job_id": "%s", "nodes": "%s", "time": %d' "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" "$(date +%s)")
    echo "{$event, $job}" >> "$job_dir/attempts.jsonl"
}
count() {  # outcome: how often it was recorded
    grep -c "\"outcome\": \"$1\"" "$job_dir/attempts.jsonl"
}
ranks() {  # extended regular expression: how many ranks of this attempt recorded such an exit code
    cat "$attempt"/rank-*.json 2> /dev/null | grep -cE "\"exit_code\": $1,"
}
signalled() {  # SIGTERM came before any rank could save or report; torchrun then fails with 1 or 143
    if [ -n "$stopping" ] || [ "$code" -eq 143 ]; then return 0; fi
    [ "$(ranks '[0-9]+')" -eq "$(ranks '(0|75)')" ] \
        && grep -qs 'SignalException: .*got signal: 15' "$attempt"/node-*.log
}
finish() {  # outcome, exit code
    record "$1" "$2" true
    rm -f "$job_dir/secrets.env"
    exit "$2"
}
cancelled() {  # by `runs cancel`, or by scancel: Slurm is ending the job, but not for its time, a preemption or a node
    local state
    state=$(squeue -h -j "$SLURM_JOB_ID" -O State:20,Reason:40,PreemptTime:30,RestartCnt:10 | xargs)
    [ -e "$job_dir/cancelled" ] || [ "$state" = "COMPLETING None N/A ${SLURM_RESTART_COUNT:-0}" ]
}
again() {  # outcome, exit code: back into the queue, unless someone cancelled the job
    if cancelled; then finish cancelled "$2"; fi
    if [ "$(count started)" -gt 100 ]; then finish failed "$2"; fi
    record "$1" "$2" false
    # A lost node's job is in the queue already, which Slurm calls an error.
    scontrol requeue "$SLURM_JOB_ID" || squeue -h -j "$SLURM_JOB_ID" -o %T | grep -qE 'PENDING|COMPLETING' \
        || echo "this cluster refuses to requeue job $SLURM_JOB_ID; submit it again" >&2
    exit "$2"
}

record started 0 false

# Environment
export PYTHONUNBUFFERED=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=115
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank\${rank}]:"
export MIXTRAL_RECIPES_ATTEMPT_DIR="$attempt"
export MIXTRAL_RECIPES_UMASK=0022
[ -d /sys/class/infiniband ] || export NCCL_IB_DISABLE=1
if [ -e "$job_dir/secrets.env" ]; then  # mode 0600: HF_TOKEN WANDB_API_KEY
    # shellcheck source=/dev/null
    . "$job_dir/secrets.env"
fi
(umask 0022; mkdir -p /shared/runs) || finish failed 1
export PYTHONPATH="$job_dir/code${PYTHONPATH:+:$PYTHONPATH}"

# Processes: one torchrun per node, 8 rank(s) each
port=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
endpoint="$(hostname):$port"
threads=$((SLURM_CPUS_ON_NODE / 8))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
srun --nodes=4 --ntasks-per-node=1 --wait=120 --kill-on-bad-exit=0 \
    --output="$attempt/node-%n.log" \
    --chdir="$job_dir/code" \
    apptainer exec --nv --bind /shared/jobs/tune:/shared/jobs/tune --bind /shared/runs:/shared/runs --bind /data --pwd "$job_dir/code" /images/mixtral.sif \
    env PYTHONUNBUFFERED="$PYTHONUNBUFFERED" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" TORCH_NCCL_AVOID_RECORD_STREAMS="$TORCH_NCCL_AVOID_RECORD_STREAMS" OMP_NUM_THREADS="$OMP_NUM_THREADS" \
    python -m torch.distributed.run \
    --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$endpoint" \
    --rdzv-id="$SLURM_JOB_ID.$number" --log-dir="$attempt/torchrun" --tee=3 \
    -m mixtral_recipes.executors.rank /shared/jobs/tune/configs/recipe.json
code=$?

# Outcome: preempted and lost jobs run again, failed ones 0 time(s)
if [ -e "$attempt/preempted" ]; then again preempted 75; fi
if [ "$code" -eq 0 ] || [ "$(ranks 0)" -eq 32 ]; then finish succeeded 0; fi  # SIGTERM after all was done
if signalled; then again stopped "$code"; fi
if ! timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks-per-node=1 --output=/dev/null true; then
    again node_lost "$code"
fi
if [ "$(count failed)" -lt 0 ]; then again failed "$code"; fi
finish failed "$code"

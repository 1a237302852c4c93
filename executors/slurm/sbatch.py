"""The sbatch script of a job, from the header to the decision whether to run again.

One script serves venv, pyxis and apptainer; it is plain bash, passes shellcheck, and holds no secrets. Standard library
only. How a job ends is appended to ``<job folder>/attempts.jsonl``, which answers ``runs status`` without Slurm.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import LaunchError, in_short
from mixtral_recipes.executors.names import check_name, check_path, check_variable, quote
from mixtral_recipes.executors.slurm.profile import Cluster

#: What a job inherits from the shell that submits it. Everything else stays behind, secrets above all: Slurm writes the
#: inherited environment to its state folder.
INHERITED = "HOME,USER,LOGNAME,SHELL,LANG,PATH,LD_LIBRARY_PATH,MODULEPATH,MODULESHOME,LMOD_CMD,LMOD_DIR,SLURM_CONF"

#: Only where there are GPUs. Source: PyTorch's docs (less memory with overlapped collectives).
GPU_ENV = {"TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}

SCRIPT = """\
#!/bin/bash
# Written by mixtral-recipes. Submitted with: sbatch --requeue --parsable <this file>
{header}

set -u -o pipefail
umask 077                      # logs and job files are for their owner
export SLURM_EXPORT_ENV=ALL    # steps get this script's environment
job_dir={job_dir}
mkdir -p "$job_dir/attempts"
number=0                       # counted in the job folder: a resumed run is a new Slurm job in the same folder
while ! mkdir "$job_dir/attempts/$number" 2> /dev/null; do number=$((number + 1)); done
attempt="$job_dir/attempts/$number"
stopping=
trap 'stopping=1' TERM         # scancel, preemption or the time limit; the steps get the signal too

record() {{  # outcome, exit code, whether the job ended with it: one line of the job's own history
    local event job
    event=$(printf '"attempt": %d, "outcome": "%s", "exit_code": %d, "final": %s' "$number" "$1" "$2" "$3")
    job=$(printf '"job_id": "%s", "nodes": "%s", "time": %d' "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" "$(date +%s)")
    echo "{{$event, $job}}" >> "$job_dir/attempts.jsonl"
}}
count() {{  # outcome: how often it was recorded
    grep -c "\\"outcome\\": \\"$1\\"" "$job_dir/attempts.jsonl"
}}
ranks() {{  # extended regular expression: how many ranks of this attempt recorded such an exit code
    cat "$attempt"/rank-*.json 2> /dev/null | grep -cE "\\"exit_code\\": $1,"
}}
signalled() {{  # SIGTERM came before any rank could save or report; torchrun then fails with 1 or 143
    if [ -n "$stopping" ] || [ "$code" -eq 143 ]; then return 0; fi
    [ "$(ranks '[0-9]+')" -eq "$(ranks '(0|75)')" ] \\
        && grep -qs 'SignalException: .*got signal: 15' "$attempt"/node-*.log
}}
finish() {{  # outcome, exit code
    record "$1" "$2" true
    rm -f "$job_dir/secrets.env"
    exit "$2"
}}
cancelled() {{  # by `runs cancel`, or by scancel: Slurm is ending the job, but not for its time, a preemption or a node
    local state
    state=$(squeue -h -j "$SLURM_JOB_ID" -O State:20,Reason:40,PreemptTime:30,RestartCnt:10 | xargs)
    [ -e "$job_dir/cancelled" ] || [ "$state" = "COMPLETING None N/A ${{SLURM_RESTART_COUNT:-0}}" ]
}}
again() {{  # outcome, exit code: back into the queue, unless someone cancelled the job
    if cancelled; then finish cancelled "$2"; fi
    if [ "$(count started)" -gt {attempts} ]; then finish failed "$2"; fi
    record "$1" "$2" false
    # A lost node's job is in the queue already, which Slurm calls an error.
    scontrol requeue "$SLURM_JOB_ID" || squeue -h -j "$SLURM_JOB_ID" -o %T | grep -qE 'PENDING|COMPLETING' \\
        || echo "this cluster refuses to requeue job $SLURM_JOB_ID; submit it again" >&2
    exit "$2"
}}

record started 0 false

# Environment
{environment}

# Processes: one torchrun per node, {nproc} rank(s) each
{rendezvous}
{threads}
srun {srun_flags} \\
    {command}
code=$?

# Outcome: preempted and lost jobs run again, failed ones {retries} time(s)
if [ -e "$attempt/preempted" ]; then again preempted 75; fi
if [ "$code" -eq 0 ] || [ "$(ranks 0)" -eq {world_size} ]; then finish succeeded 0; fi  # SIGTERM after all was done
if signalled; then again stopped "$code"; fi
{node_check}
if [ "$(count failed)" -lt {retries} ]; then again failed "$code"; fi
finish failed "$code"
"""

# A node that lost its slurmd cannot start even `true`; that is not a failure of the job.
NODE_CHECK = """\
if ! timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks-per-node=1 --output=/dev/null true; then
    again node_lost "$code"
fi"""

# The batch script runs on the job's first node, which also serves the rendezvous. The port is the job's own: below the
# ephemeral range, derived from the job id, and moved on if something listens there.
RENDEZVOUS = """\
port=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
endpoint="$(hostname):$port\""""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the script needs beyond the cluster: sizes, folders and the Python arguments of a rank."""

    name: str
    job_dir: str  # on the cluster
    nodes: int
    nproc_per_node: int
    arguments: tuple[str, ...]  # after `torchrun ...`: ("-m", module, file)
    torchrun: bool = True  # False: ``arguments`` go to one plain python
    umask: int = 0o022  # of the user who submitted; the run's own files are written with it
    folders: tuple[str, ...] = ()  # further folders containers must see


def render(job: Job, cluster: Cluster) -> str:
    """The complete script.

    Raises:
        LaunchError: a name or folder that must not reach a shell.
    """
    check_name(job.name, "job name")
    check_path(job.job_dir, "job folder")
    return SCRIPT.format(
        header="\n".join(header(job, cluster)),
        job_dir=quote(job.job_dir),
        environment="\n".join(environment(job, cluster)),
        nproc=job.nproc_per_node,
        rendezvous=rendezvous(job),
        threads=threads(job.nproc_per_node),
        srun_flags=" \\\n    ".join(srun_flags(job, cluster)),
        command=command(job, cluster),
        world_size=job.nodes * job.nproc_per_node,
        retries=cluster.retries,
        attempts=cluster.max_preemptions + cluster.retries,
        node_check=NODE_CHECK
        if job.nodes > 1
        else ": # one node: if it is lost, so is this script, and Slurm requeues",
    )


def header(job: Job, cluster: Cluster) -> list[str]:
    """#SBATCH lines, sorted; values were checked by Cluster and are quoted."""
    options: dict[str, Any] = {
        "job-name": job.name,
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "time": cluster.time,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "gres": cluster.gres,
        "cpus-per-task": cluster.cpus_per_node,
        "mem": cluster.mem,
        "exclusive": cluster.exclusive,
        "signal": f"TERM@{cluster.grace_s}" if cluster.grace_s else None,
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "open-mode": "append",
        "output": f"{job.job_dir}/sbatch_%j.out",
        "export": INHERITED,
        **cluster.sbatch,
    }
    lines = []
    for key, value in sorted(options.items()):
        if value is True:
            lines.append(f"#SBATCH --{key}")
        elif value is not None and value is not False:
            text = str(value).replace("\\", "\\\\")  # sbatch takes one for an escape, between quotes too
            lines.append(f"#SBATCH --{key}={quote(text)}")
    return lines


def _variables(cluster: Cluster) -> dict[str, Any]:
    return {
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(cluster.grace_s - 5, 30)),
        **(GPU_ENV if cluster.has_gpus else {}),
        **cluster.env,
    }


def environment(job: Job, cluster: Cluster) -> list[str]:
    """Modules, variables, secrets and the virtual environment, in this order."""
    lines = []
    if cluster.modules:
        lines += ["# shellcheck source=/dev/null", "command -v module > /dev/null || . /etc/profile"]
        lines += [f"module load {quote(module)}" for module in cluster.modules]
    lines += [f"export {key}={quote(value)}" for key, value in _variables(cluster).items()]
    # torchrun's own prefix has the local rank, which is the same on every node
    lines.append('export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank\\${rank}]:"')
    lines += ['export MIXTRAL_RECIPES_ATTEMPT_DIR="$attempt"', f"export MIXTRAL_RECIPES_UMASK={job.umask:04o}"]
    if cluster.has_gpus and job.nodes > 1 and "NCCL_IB_DISABLE" not in cluster.env:
        lines.append("[ -d /sys/class/infiniband ] || export NCCL_IB_DISABLE=1")
    if cluster.secrets or cluster.env_file:
        passed = [*cluster.secrets, *(["env_file"] if cluster.env_file else [])]
        lines += [
            'if [ -e "$job_dir/secrets.env" ]; then  # mode 0600: ' + " ".join(passed),
            "    # shellcheck source=/dev/null",
            '    . "$job_dir/secrets.env"',
            "fi",
        ]
    if cluster.mode == "venv":
        activate = quote(f"{cluster.venv}/bin/activate")
        lines += ["# shellcheck source=/dev/null", f". {activate} || finish failed 1"]
    elif job.folders:  # a container is not started where a mount's source is missing
        lines.append(f"(umask {job.umask:04o}; mkdir -p {' '.join(map(quote, job.folders))}) || finish failed 1")
    lines.append('export PYTHONPATH="$job_dir/code${PYTHONPATH:+:$PYTHONPATH}"')
    return lines


def rendezvous(job: Job) -> str:
    """Lines that choose where the ranks of a job meet."""
    if not job.torchrun:
        return ": # one process, which meets nobody"
    return RENDEZVOUS if job.nodes > 1 else 'endpoint="localhost:0"  # one node: torchrun picks a free port'


def threads(nproc_per_node: int) -> str:
    """OMP_NUM_THREADS: the node's allocated cores divided among its ranks, at least 1, unless it is set already."""
    return f"""\
threads=$((SLURM_CPUS_ON_NODE / {nproc_per_node}))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}}\""""


def srun_flags(job: Job, cluster: Cluster) -> list[str]:
    """Flags of the one srun that starts all nodes.

    A node that ends first gives the others ``grace_s`` to end by themselves: they may be writing the same checkpoint.
    """
    flags = [
        f"--nodes={job.nodes} --ntasks-per-node=1 --wait={max(cluster.grace_s, 1)} --kill-on-bad-exit=0",
        '--output="$attempt/node-%n.log"',
    ]
    if cluster.cpus_per_node:
        flags.append(f"--cpus-per-task={cluster.cpus_per_node}")
    if cluster.mpi:
        flags.append(quote(f"--mpi={cluster.mpi}"))
    if cluster.mode == "pyxis":
        flags += [
            quote(f"--container-image={cluster.container_image}"),
            quote(f"--container-mounts={','.join(_mounts(job, cluster))}"),
            '--container-workdir="$job_dir/code"',
        ]
    else:
        flags.append('--chdir="$job_dir/code"')
    return flags + [quote(flag) for flag in cluster.srun_args]


def _mounts(job: Job, cluster: Cluster) -> list[str]:
    """What a container sees, as ``SOURCE:TARGET``: the job's own folders, and the profile's ``mounts``.

    Raises:
        LaunchError: one of the job's folders has a comma, at which pyxis and Apptainer would split it.
    """
    for folder in (job.job_dir, *job.folders):
        if "," in folder:
            raise LaunchError(
                f"folder {folder!r} contains a comma, so a container cannot mount it; use another folder."
            )
    return [*(f"{folder}:{folder}" for folder in (job.job_dir, *job.folders)), *cluster.mounts]


def command(job: Job, cluster: Cluster) -> str:
    """What srun starts on every node."""
    arguments = " ".join(quote(argument) for argument in job.arguments)
    lines = [
        "python -m torch.distributed.run",
        f'--nnodes={job.nodes} --nproc-per-node={job.nproc_per_node} --rdzv-backend=c10d --rdzv-endpoint="$endpoint"',
        '--rdzv-id="$SLURM_JOB_ID.$number" --log-dir="$attempt/torchrun" --tee=3',
        arguments,
    ]
    if not job.torchrun:
        lines = [f"python {arguments}"]
    if cluster.mode != "venv":  # a variable that the image sets would win over the job's
        names = dict.fromkeys([*_variables(cluster), "OMP_NUM_THREADS"])
        lines.insert(0, "env " + " ".join(f'{name}="${name}"' for name in names))
    if cluster.mode == "apptainer":
        nvidia = " --nv" if cluster.has_gpus else ""
        bound = " ".join(f"--bind {quote(mount)}" for mount in _mounts(job, cluster))
        lines.insert(0, f'apptainer exec{nvidia} {bound} --pwd "$job_dir/code" {quote(cluster.container_image)}')
    return " \\\n    ".join(lines)


def secrets_file(names: Iterable[str], env_file: str | None = None) -> str:
    """The text of secrets.env: one quoted export for each variable that is named and set here, or stands in a file.

    Args:
        names: Variables of this process's environment.
        env_file: A file of ``NAME=VALUE`` lines; values are taken as they are, a pair of quotes around one is dropped.

    Raises:
        LaunchError: the file cannot be read, can be read by others, or has another kind of line.
    """
    values = _from_file(Path(env_file)) if env_file else {}
    values |= {name: os.environ[name] for name in names if os.environ.get(name)}
    return "".join(f"export {name}={quote(value)}\n" for name, value in values.items())


def _from_file(path: Path) -> dict[str, str]:
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"env_file {path} cannot be read ({in_short(error)}).") from error
    if mode & 0o077:
        raise LaunchError(f"env_file {path} can be read by others (mode {mode & 0o777:04o}); run: chmod 600 {path}")
    values = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ").lstrip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or "\0" in value:
            raise LaunchError(f"env_file {path}, line {number}: not NAME=VALUE.")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        values[check_variable(name.rstrip())] = value[1:-1] if quoted else value
    return values

"""Checks of this machine and of a cluster, each with a way to fix what it finds."""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from mixtral_recipes.executors import probes
from mixtral_recipes.executors.probes import Answer
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.executors.slurm import status as slurm_status
from mixtral_recipes.executors.slurm.profile import Cluster
from mixtral_recipes.system.home import home, jobs_home
from mixtral_recipes.system.machine import COMPILER, gpu_count, no_compiler, package_version

_SLURM_TOOLS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_ROOM_GIB = 10
_MAKE_WRITABLE = 'mkdir -p "$0" && [ -w "$0" ]'
_VERSION = """\
[ -e "$0" ] || { echo "not there" >&2; exit 1; }
. "$0" && python -c 'import importlib.metadata as m; print(m.version("mixtral-recipes"))'"""

# What `doctor` imports, in two processes side by side: torch with what is built on it, and nemo_run, which does with
# and without torch, without. Megatron is imported as our own code does it (see `cpu/lazy_compile.py`).
_ON_TORCH = {
    "torch": "import torch",
    "CUDA": (
        "import torch\n"
        "from mixtral_recipes.system.machine import gpu_count\n"
        "n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
        "if gpu_count() and not n:\n    torch.cuda.init()\n"  # says why not
        "answer = f'{n} x {torch.cuda.get_device_name(0)}' if n else ''"
    ),
    "NCCL": "import torch\nanswer = '.'.join(map(str, torch.cuda.nccl.version()))",
    "megatron-core": (
        "from mixtral_recipes.cpu.lazy_compile import compiling_later\n"
        "with compiling_later():\n    import megatron.core"
    ),
    "Transformer Engine": "import transformer_engine.pytorch as _, transformer_engine as te\nanswer = te.__version__",
    # What a Mixtral 8x7B on this machine's GPU would be computed by, and why not by something better.
    "kernels": (
        "import json, torch\n"
        "if torch.cuda.is_available():\n"
        "    from mixtral_recipes.models.config import MixtralConfig8x7B\n"
        "    from mixtral_recipes.models.kernels import in_use\n"
        "    found = in_use(MixtralConfig8x7B(), length=4096, packed=False)\n"
        "    answer = json.dumps([str(found), found.notes])"
    ),
}
_ALONE = {"nemo_run": "import sys\nsys.modules['torch'] = None\nimport nemo_run"}


@dataclasses.dataclass
class Check:
    """One finding. ``verdict``: good, note (works, or is not needed here), bad (fix it first)."""

    name: str
    verdict: str
    finding: str
    mend: str = ""


def check_machine(*, insist_on_slurm: bool = False) -> list[Check]:
    """Everything ``doctor`` looks at."""
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        asked = beside.submit(_imports)
        others = [
            *_slurm(insist_on_slurm), *_containers(), _folder("job folder", jobs_home()), _room(home()),
        ]  # fmt: skip
        answers = asked.result()
    return [
        _python(), _package("torch", answers), _cuda(answers.get("CUDA")), _nccl(answers.get("NCCL")),
        _package("megatron-core", answers), _transformer_engine(answers.get("Transformer Engine")),
        *_kernels(answers.get("kernels")), *_compiler(answers.get("CUDA")), _package("nemo_run", answers), *others,
    ]  # fmt: skip


def _imports() -> dict[str, Answer]:
    """Which of the installed packages can be imported; packages that are not installed are skipped."""
    needs = {"CUDA": "torch", "NCCL": "torch", "kernels": "megatron-core"}
    needs |= {"Transformer Engine": "transformer-engine-torch"}
    groups = [
        {name: code for name, code in group.items() if package_version(needs.get(name, name))}
        for group in (_ON_TORCH, _ALONE)
    ]
    answers = probes.ask([group for group in groups if group])
    if "nemo_run" in answers and not answers["nemo_run"].good:  # it may have missed torch
        answers |= probes.ask([{"nemo_run": "import nemo_run"}])
    return answers


def check_cluster(site: Cluster) -> list[Check]:
    """Everything ``clusters check`` looks at; the settings themselves were checked when the profile was read."""
    ssh = site.login
    answer = slurm_status.slurm(["sinfo", "--noheader", "--format=%R|%a|%D|%l"], ssh)
    if answer.returncode != 0:
        here = "run this on a login node, or set ssh = 'user@host' in the profile"
        mend = f"try `{login.by_hand(ssh, 'bash -lc sinfo')}`" if ssh else here
        return [Check("Slurm", "bad", slurm_status.one_line(answer.stderr) or "no answer", mend)]
    partitions = {line.split("|")[0]: line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 3}
    found = [Check("Slurm", "good", f"answers, {len(partitions)} partition(s)")]
    if site.partition and site.partition not in partitions:
        found.append(Check("partition", "bad", f"no {site.partition!r}", f"use one of {', '.join(partitions)}"))
    elif site.partition:
        _, up, nodes, limit = partitions[site.partition]
        found.append(Check("partition", "good" if up == "up" else "bad", f"{up}, {nodes} node(s), time limit {limit}"))
    accounting = slurm_status.slurm(["sacct", "--noheader", "--jobs=1"], ssh)
    found.append(
        Check("accounting", "good", "sacct answers")
        if accounting.returncode == 0
        else Check("accounting", "note", "no sacct; states come from squeue and the job's own history")
    )
    found += [_runtime(site, ssh), *_image(site, ssh)]
    if ssh:
        done = slurm_status.slurm(["bash", "-c", _MAKE_WRITABLE, str(site.job_dir)], ssh)
        good = done.returncode == 0
        finding = "writable" if good else slurm_status.one_line(done.stderr) or "not writable"
        found.append(Check("job folder", "good" if good else "bad", f"{site.job_dir}: {finding}"))
    else:
        found.append(_folder("job folder", jobs_home()))
    return found


def _runtime(site: Cluster, ssh: str) -> Check:
    """Whether the way Python starts on a node is there, as far as the login node can tell."""
    if site.mode == "venv":
        done = slurm_status.slurm(["bash", "-c", _VERSION, f"{site.venv}/bin/activate"], ssh)
        if done.returncode != 0:
            mend = "create it on a file system that all nodes see, and install mixtral-recipes in it"
            return Check("venv", "bad", f"{site.venv}: {slurm_status.one_line(done.stderr)}", mend)
        there, here = done.stdout.strip(), package_version("mixtral-recipes")
        if there == here:
            return Check("venv", "good", f"{site.venv}, mixtral-recipes {there}")
        finding = f"{site.venv} has mixtral-recipes {there}, but this machine has {here}"
        return Check("venv", "note", finding, "install the same release in both")
    if site.mode == "pyxis":
        done = slurm_status.slurm(["srun", "--help"], ssh)
        if "--container-image" in done.stdout:
            return Check("pyxis", "good", "srun knows --container-image")
        return Check(
            "pyxis",
            "bad",
            "srun has no --container-image",
            "use mode = 'apptainer' or a venv, or ask the administrators for pyxis",
        )
    done = slurm_status.slurm(["apptainer", "--version"], ssh)
    if done.returncode == 0:
        return Check("apptainer", "good", done.stdout.strip())
    return Check(
        "apptainer",
        "note",
        "not on the login node, but the compute nodes may have it",
        "if they do not, load it with modules",
    )


def _image(site: Cluster, ssh: str) -> list[Check]:
    """Whether an image that is a file is there."""
    image = site.container_image or ""
    if not image.startswith("/"):
        return []
    there = slurm_status.slurm(["test", "-e", image], ssh).returncode == 0
    return [
        Check("image", "good", image)
        if there
        else Check("image", "bad", f"no such file: {image}", "put the image there")
    ]


def _python() -> Check:
    """Always good: an older one could not have imported this."""
    return Check("Python", "good", f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}")


def _package(name: str, answers: Mapping[str, Answer]) -> Check:
    version = package_version(name)
    if version is None:
        return Check(name, "bad", "not installed", f"pip install {name}")
    if answers[name].good:
        return Check(name, "good", version)
    mend = f"pip install --force-reinstall {name}=={version}"
    return Check(name, "bad", f"{version} is installed but cannot be imported: {answers[name].text}", mend)


def _cuda(answer: Answer | None) -> Check:
    if answer and answer.good and answer.text:
        return Check("CUDA", "good", answer.text)
    if count := gpu_count():
        why = answer.text.partition(". ")[0] if answer else ""
        mend = "install a torch built for the CUDA version that `nvidia-smi` shows, or a newer driver"
        return Check("CUDA", "bad", f"{count} GPU(s) found, but torch cannot use them{why and f': {why}'}", mend)
    return Check("CUDA", "note", "no GPU; recipes run on the CPU, which is enough for mixtral_tiny")


def _nccl(answer: Answer | None) -> Check:
    if answer and answer.good:
        return Check("NCCL", "good", answer.text)
    return Check("NCCL", "note", "this torch has no NCCL; gloo is used")


def _transformer_engine(answer: Answer | None) -> Check:
    parts = [name for name in ("transformer-engine", "transformer-engine-torch") if package_version(name)]
    libraries = [name for name in ("transformer-engine-cu12", "transformer-engine-cu13") if package_version(name)]
    if not parts and not libraries:
        return Check(
            "Transformer Engine",
            "note",
            "not installed; needed for FP8 and for speed on GPUs",
            "in a checkout run scripts/install_te.sh .venv, else pip install --no-build-isolation "
            "'mixtral-recipes[gpu]'",
        )
    if "transformer-engine-torch" not in parts:
        return Check(
            "Transformer Engine", "bad", f"half installed: {', '.join(parts + libraries)} without its torch extension; "
            "megatron-core cannot be imported then",
            "pip install --no-build-isolation 'transformer-engine[pytorch]', or uninstall it",
        )  # fmt: skip
    assert answer is not None
    if answer.good:
        return Check("Transformer Engine", "good", answer.text)
    mend = "reinstall it for this torch and CUDA"
    return Check("Transformer Engine", "bad", f"installed but cannot be imported: {answer.text}", mend)


def _kernels(answer: Answer | None) -> list[Check]:
    """Whose layers, which attention, which cuDNN; nothing without a GPU."""
    if answer is None or (answer.good and not answer.text):
        return []
    if not answer.good:
        return [Check("kernels", "bad", answer.text, "fix what is BAD above, or set NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2")]
    found, notes = json.loads(answer.text)
    return [Check("kernels", "note" if notes else "good", found, " ".join(notes))]


def _compiler(cuda: Answer | None) -> list[Check]:
    """What Triton and torch.compile build the callers of their kernels with; nothing without a GPU."""
    if cuda is None or not (cuda.good and cuda.text):
        return []
    missing = no_compiler()
    if missing is None:
        return [Check("C compiler", "good", "found, with Python's headers")]
    verdict = "bad" if package_version("transformer-engine-torch") else "note"  # PyTorch's own layers need none
    return [Check("C compiler", verdict, f"{missing}: fused kernels and QLoRA's kernels cannot be compiled", COMPILER)]


def _slurm(insist: bool) -> list[Check]:
    missing = [tool for tool in _SLURM_TOOLS if not shutil.which(tool)]
    if len(missing) == len(_SLURM_TOOLS):
        mend = "work on a login node, or set ssh = 'user@host' in a cluster profile"
        return [Check("Slurm", "bad" if insist else "note", "no Slurm commands here", mend)]
    if missing:
        return [Check("Slurm", "bad", f"missing: {', '.join(missing)}", "install the rest of Slurm's client commands")]
    if slurm_status.slurm(["scontrol", "ping"]).returncode != 0:
        verdict = "bad" if insist else "note"
        return [
            Check(
                "Slurm",
                verdict,
                "its commands are installed, but its controller does not answer",
                "see `scontrol ping`",
            )
        ]
    return [Check("Slurm", "good", slurm_status.slurm(["sinfo", "--version"]).stdout.strip())]


def _containers() -> list[Check]:
    if not shutil.which("srun"):
        return []
    pyxis = "--container-image" in slurm_status.slurm(["srun", "--help"]).stdout
    apptainer = shutil.which("apptainer")  # jobs start it by this name, which SingularityCE does not install
    have = [name for name, there in (("pyxis", pyxis), (f"apptainer ({apptainer})", apptainer)) if there]
    return [
        Check(
            "containers",
            "good" if have else "note",
            ", ".join(have) or "neither pyxis nor apptainer; venv mode needs neither",
        )
    ]


def _folder(name: str, path: Path) -> Check:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(
            name, "bad", f"{existing} is not writable", "set MIXTRAL_RECIPES_HOME to a folder that you can write to"
        )
    kind = _file_system(existing)
    if shutil.which("sbatch") and kind in ("tmpfs", "overlay", "ext4", "xfs", "btrfs"):
        mend = "on a cluster, set MIXTRAL_RECIPES_HOME to a folder that all nodes see"
        return Check(name, "note", f"{path} is on {kind}, a local file system", mend)
    return Check(name, "good", f"{path} on {kind}")


def _file_system(path: Path) -> str:
    """Type of the file system a path is on, from /proc/mounts; the longest mount point that holds it."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind = line.split(" ")[:3]
        if path.is_relative_to(point) and len(point) > len(best[0]):
            best = (point, kind)
    return best[1]


def _room(path: Path) -> Check:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**30
    finding = f"{free:.0f} GiB free at {existing}"
    if free >= _ROOM_GIB:
        return Check("disk room", "good", finding)
    return Check("disk room", "bad", finding, f"free at least {_ROOM_GIB} GiB, or set MIXTRAL_RECIPES_HOME elsewhere")

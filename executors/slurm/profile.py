"""Cluster profiles: what one site needs, written once in clusters.toml. Loads nothing heavy."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

from mixtral_recipes.errors import LaunchError, nearest
from mixtral_recipes.executors.names import check_env, check_name, check_no_password, check_path, check_variable
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.system.schema import Count, typed
from mixtral_recipes.system.toml_files import read_table

MODES = ("venv", "pyxis", "apptainer")
_SLURM_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:+@=%/\[\]-]{0,255}")
#: Features with their operators: ``h100&ib``, ``[rack1|rack2]``, ``(a|b)&c``, ``[a*2&b*4]``. Values are always quoted.
_CONSTRAINT = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:+@=%/&|*()\[\]-]{0,255}")
#: ``gpu:h100:8``, ``gres/gpu:a100:2(S:0-1),lscratch:100``
_GRES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:+@=%/()-]{0,255}")
_COUNTS = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*:)?\d+(,([A-Za-z][A-Za-z0-9_.-]*:)?\d+)*")  # 8, h100:8, a100:4,h100:4
_TIME = re.compile(r"\d{1,9}(-\d{1,2}(:\d{1,2}){0,2}|:\d{1,2}(:\d{1,2})?)?|UNLIMITED|INFINITE", re.IGNORECASE)
_MEMORY = re.compile(r"\d+([KMGTP]I?B?)?", re.IGNORECASE)
_FLAG = re.compile(r"[a-z][a-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: What the script relies on: where it writes, who may read its environment, how it is stopped and comes back.
_OWN_LINES = (
    "array", "chdir", "clusters", "container", "dependency", "error", "export", "export-file", "get-user-env", "gid",
    "help", "input", "job-name", "kill-on-invalid-dep", "no-kill", "no-requeue", "nodes", "ntasks", "ntasks-per-node",
    "open-mode", "output", "parsable", "propagate", "requeue", "signal", "test-only", "uid", "usage", "version", "wait",
    "wrap",
)  # fmt: skip
#: What the script says to srun, and what would make srun run something else.
_OWN_FLAGS = (
    "chdir", "container-workdir", "error", "export", "export-file", "help", "input", "jobid", "kill-on-bad-exit",
    "multi-prog", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "pty", "test-only", "usage", "version",
    "wait",
)  # fmt: skip
_OWN_SHORT_FLAGS = "DKNVWehinou"
#: Header lines that ask for GPUs, each in its way.
_GPU_LINES = ("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Everything about a Slurm site that is not about one job.

    ``mode`` decides how Python starts on a node: ``venv`` activates a virtual environment that all nodes see, ``pyxis``
    passes ``container_image`` to srun, ``apptainer`` runs it with ``apptainer exec``.
    """

    name: str = ""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str = "04:00:00"
    gpus_per_node: int | str | None = None  # how GPUs are asked for: a number, or Slurm's TYPE:NUMBER; 0 is no line
    gres: str | None = None  # how, in another way: "gpu:h100:8"
    gpus: bool | None = None  # whether there are any; None: where the recipe needs them, or anything asks for them
    cpus_per_node: Count | None = None
    mem: str | None = None
    exclusive: bool = False
    mode: str = ""
    venv: str | None = None
    container_image: str | None = None
    mounts: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    env: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ("HF_TOKEN", "WANDB_API_KEY")  # names; passed if set where the job is submitted
    env_file: str | None = None  # a file of mode 0600 with NAME=VALUE lines, passed as the secrets are
    mpi: str | None = None
    sbatch: dict[str, str | int | bool] = dataclasses.field(default_factory=dict)  # more lines: {"mail-type": "END"}
    srun_args: tuple[str, ...] = ()
    grace_s: Count = 120  # SIGTERM this long before the time limit; the time a checkpoint may take
    retries: Count = 0  # restarts after a failure; preemptions and lost nodes are not counted
    max_preemptions: Count = 100
    ssh: str | None = None  # user@host of the login node, when Slurm's commands are not on this machine
    ssh_key: str | None = None
    job_dir: str | None = None  # folder on the cluster for job files; required with ssh

    def __post_init__(self) -> None:
        for field in ("account", "partition", "qos", "reservation", "mpi"):
            self._match(field, _SLURM_WORD, "use letters, digits and '_ . , : + @ = % / [ ] -'")
        self._match("constraint", _CONSTRAINT, "use features, and Slurm's '& | , * ( ) [ ]' between them")
        self._match("gres", _GRES, "use NAME[:TYPE]:NUMBER, e.g. gpu:h100:8")
        self._match("mem", _MEMORY, "use a whole number with K, M, G or T, e.g. 900G, or 0 for all of a node's memory")
        self._match("time", _TIME, "use minutes, HH:MM:SS or D-HH:MM:SS")
        self._match("ssh", login.NAME, "use user@host[:port], or a name from ~/.ssh/config")
        for field in ("venv", "job_dir", "ssh_key"):
            if getattr(self, field) is not None:
                check_path(getattr(self, field), field)
        object.__setattr__(self, "env", check_env(self.env))
        for name in self.secrets:
            check_variable(name)
        if self.env_file is not None:  # a job may be submitted again from another folder
            object.__setattr__(self, "env_file", str(Path(self.env_file).expanduser().absolute()))
        self._check_sbatch()
        self._check_texts()
        self._check_gpus()
        for field in ("cpus_per_node", "grace_s", "retries", "max_preemptions"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise LaunchError(f"{field}={value!r} is not allowed; use a whole number, 0 or more.")
        seconds = time_limit_s(self.time)
        if self.grace_s and seconds and seconds < self.grace_s + 90:
            raise LaunchError(
                f"time={self.time!r} leaves no time to train: SIGTERM is sent grace_s={self.grace_s} s before the end, "
                f"and Slurm may send it up to 60 s earlier; use at least {self.grace_s + 90} s, or a smaller grace_s."
            )
        self._settle_mode()

    def _check_sbatch(self) -> None:
        for key, value in self.sbatch.items():
            if not _FLAG.fullmatch(key) or _CONTROL.search(str(value)):
                raise LaunchError(
                    f"sbatch line {key}={value!r} is not allowed; use a long option's name and one line of text."
                )
            # Slurm takes the beginning of an option's name for it.
            if key == "time" or _begins(key, _OWN_LINES):
                fix = "use the setting time" if key == "time" else "leave it out"
                raise LaunchError(f"sbatch line {key} is not allowed: the job's script sets its own; {fix}.")
            check_no_password(str(value), f"sbatch line {key}")

    def _check_texts(self) -> None:
        for field in ("mounts", "modules", "srun_args"):
            for text in getattr(self, field):
                if _CONTROL.search(text) or not text or (field != "srun_args" and text.startswith("-")):
                    raise LaunchError(
                        f"{field} entry {text!r} is not allowed; use one line that does not start with '-'."
                    )
                check_no_password(text, f"{field} entry")
        before = ""
        for text in self.srun_args:
            _check_flag(text, before)
            before = text
        image = self.container_image
        if image is not None and (image[:1] in ("-", "") or _CONTROL.search(image)):
            raise LaunchError(f"container_image {image!r} is not allowed; use an image name or path.")
        check_no_password(image or "", "container_image")

    def _check_gpus(self) -> None:
        count = self.gpus_per_node
        if count is not None and (isinstance(count, bool) or not _COUNTS.fullmatch(str(count))):
            raise LaunchError(
                f"gpus_per_node={count!r} is not allowed; use a whole number, 0 or more, or TYPE:NUMBER as in h100:8."
            )
        if self.gpus not in (None, True, False):
            raise LaunchError(f"gpus={self.gpus!r} is not allowed; use true or false.")
        asking = self._gpu_requests()
        if len(asking) > 1:
            raise LaunchError(f"{' and '.join(asking)} both ask for GPUs; keep one of them.")

    def _gpu_requests(self) -> list[str]:
        """What asks Slurm for GPUs, by the names of settings."""
        asking = ["gpus_per_node"] if self.gpus_per_node not in (None, 0, "0") else []
        asking += ["gres"] if _is_gpu(self.gres) else []
        for key, value in self.sbatch.items():
            if key in _GPU_LINES or ((key == "gres" or key.startswith("tres")) and _is_gpu(value)):
                asking.append(f"sbatch.{key}")
        return asking

    @property
    def has_gpus(self) -> bool:
        """Whether the ranks have GPUs, however those were asked for."""
        return bool(self._gpu_requests()) if self.gpus is None else self.gpus

    def for_gpus(self, per_node: int) -> "Cluster":
        """This profile for a job whose ranks need GPUs.

        Args:
            per_node: What to ask for where nothing is said of it (``gpus_per_node=0`` says: ask for none).
        """
        ask = self.gpus_per_node is None and not self._gpu_requests()
        return dataclasses.replace(
            self,
            gpus=True if self.gpus is None else self.gpus,
            gpus_per_node=per_node if ask else self.gpus_per_node,
        )

    @property
    def login(self) -> str:
        """The login node as records name it; empty when Slurm's commands are here."""
        return login.address(self.ssh, self.ssh_key) if self.ssh else ""

    @property
    def elsewhere(self) -> bool:
        """Whether jobs may see other files than this machine: behind ssh, or in a container."""
        return bool(self.ssh) or self.mode != "venv"

    def folder(self, path: str | Path) -> Path:
        """A folder that jobs write to: a relative one is below ``job_dir`` behind ssh, and else below this folder."""
        return Path(self.job_dir or "", path) if self.ssh else Path(path).expanduser().absolute()

    def _settle_mode(self) -> None:
        mode = self.mode
        if not mode:
            apptainer = (self.container_image or "").endswith(".sif")
            mode = "venv" if not self.container_image else "apptainer" if apptainer else "pyxis"
            object.__setattr__(self, "mode", mode)
        if mode not in MODES:
            raise LaunchError(f"unknown mode {mode!r}.{nearest(mode, MODES)}")
        if (mode == "venv") == bool(self.container_image):
            need = "no container_image" if mode == "venv" else "a container_image"
            raise LaunchError(
                f"mode {mode!r} with container_image={self.container_image!r} does not work; {mode} mode needs {need}."
            )
        if self.ssh and not (self.job_dir and (self.venv or mode != "venv")):
            raise LaunchError(
                "a cluster reached through ssh needs job_dir, and venv unless it runs containers, as paths on that "
                "cluster."
            )

    def _match(self, field: str, pattern: re.Pattern[str], rule: str) -> None:
        value = getattr(self, field)
        if value is not None and (not isinstance(value, str) or not pattern.fullmatch(value)):
            raise LaunchError(f"{field}={value!r} is not allowed; {rule}.")


def _begins(name: str, names: tuple[str, ...]) -> bool:
    return any(own.startswith(name) for own in names)


def _check_flag(text: str, before: str) -> None:
    """Refuse an argument of srun that is one of the script's own, or no option but something to run."""
    option = text.partition("=")[0]
    name = option.removeprefix("--")
    own = "is not allowed: the job's script sets its own"
    if text.startswith("--") and _begins(name, _OWN_FLAGS):
        fix = "use env, secrets or env_file" if name.startswith("exp") else "leave it out"
        raise LaunchError(f"srun_args entry {option} {own}; {fix}.")
    if not text.startswith("--") and text[:1] == "-" and text[1:2] in _OWN_SHORT_FLAGS:
        raise LaunchError(f"srun_args entry {text[:2]} {own}; leave it out.")
    if not text.startswith("-") and not (before.startswith("-") and "=" not in before):
        raise LaunchError(
            f"srun_args entry {option!r} is not allowed: srun would run it as a program; use one of srun's options."
        )


def _is_gpu(resource: Any) -> bool:
    """Whether a list of generic resources names GPUs: ``gpu:8``, ``gres/gpu:h100:8``, ``lscratch:100,gpu:1``."""
    return any(re.match(r"(gres[/:])?gpu\b", entry) for entry in str(resource or "").split(","))


def time_limit_s(text: str) -> int:
    """Seconds of a Slurm time: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; 0 is no limit."""
    if not text[:1].isdigit():
        return 0
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def profile_file() -> Path:
    """clusters.toml: $MIXTRAL_RECIPES_CLUSTERS, or in the user's configuration folder."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("MIXTRAL_RECIPES_CLUSTERS") or config / "mixtral-recipes" / "clusters.toml")


def profiles() -> dict[str, dict[str, Any]]:
    """The tables of clusters.toml by name; empty without the file.

    Raises:
        LaunchError: the file is not TOML, or holds something other than tables.
    """
    path = profile_file()
    if not path.exists():
        return {}
    tables = read_table(path, LaunchError)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise LaunchError(f"{path}: {name} = {table!r} is not in a table; move it under [a-cluster-name].")
    return tables


def cluster(name: str | None = None, **settings: Any) -> Cluster:
    """A profile from clusters.toml, overridden by those ``settings`` that are not None.

    If nothing says how Python starts on a node, this process's virtual environment is used.

    Raises:
        LaunchError: no such profile or setting, or a value that is not allowed.
    """
    table: dict[str, Any] = {}
    if name:
        known = profiles()
        if name not in known:
            raise LaunchError(f"no cluster {name!r} in {profile_file()}.{nearest(name, list(known))}")
        check_name(name, f"{profile_file()}: cluster name")
        table = dict(known[name])
    if not any(settings.get(key) or table.get(key) for key in ("venv", "container_image", "ssh")):
        table["venv"] = sys.prefix  # the environment this process runs in, on a file system that all nodes see
    where = f"{profile_file()}: {name}" if name else "the cluster's settings"
    if isinstance(table.get("env"), dict) and isinstance(settings.get("env"), dict):
        settings["env"] = table["env"] | settings["env"]
    table |= {key: value for key, value in settings.items() if value is not None}
    fields = {field.name: field for field in dataclasses.fields(Cluster) if field.name != "name"}
    for key in table:
        if key not in fields:
            what = f"cluster {name!r}" if name else "a cluster"
            raise LaunchError(f"{what} has no setting {key!r}.{nearest(key, list(fields))}")
    try:
        return typed({**table, "name": name or ""}, Cluster, where, LaunchError)
    except LaunchError as error:
        if not name or str(error).startswith(where):
            raise
        raise LaunchError(f"cluster {name!r}: {error}") from None


def settings_from(texts: list[str]) -> dict[str, Any]:
    """Settings of a profile from ``key=value`` and ``table.key=value``; a list is written with commas.

    Raises:
        LaunchError: not of that form, no such setting, or a value that is not the number or boolean that is needed.
    """
    fields = {field.name: field for field in dataclasses.fields(Cluster) if field.name != "name"}
    kinds = get_type_hints(Cluster)
    settings: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        key, dot, inner = path.partition(".")
        if not equals:
            raise LaunchError(f"--slurm {text!r} has no value; use key=value.")
        if key not in fields:
            raise LaunchError(f"--slurm {text!r} does not name a setting.{nearest(key, list(fields))}")
        kind = str(kinds[key])
        if kind.startswith("dict") != bool(dot and inner):
            form = f"{key}.NAME" if kind.startswith("dict") else key
            raise LaunchError(f"--slurm {text!r} has the wrong form for {key}; use {form}=value.")
        if dot:
            flag = key == "sbatch" and value == "true"  # an option without a value, as --hold is
            settings.setdefault(key, {})[inner] = True if flag else value
        elif kind.startswith("tuple"):
            settings[key] = tuple(value.split(",")) if value else ()
        else:
            settings[key] = _typed(key, value, kind)
    return settings


def _typed(key: str, value: str, kind: str) -> Any:
    """``value`` as the int, bool or text that ``kind`` says."""
    if "int" in kind and not ("str" in kind and not value.isdigit()):
        if not re.fullmatch(r"\d{1,9}", value):
            raise LaunchError(f"{key}={value!r} is not allowed; use a whole number, 0 or more.")
        return int(value)
    if "bool" in kind:
        if value not in ("true", "false"):
            raise LaunchError(f"{key}={value!r} is not allowed; use true or false.")
        return value == "true"
    return value

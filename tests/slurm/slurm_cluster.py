"""A real two-node Slurm on loopback: munged, slurmctld, two slurmd, and on request slurmdbd with MariaDB.

Everything runs in the foreground as a child process on free ports, out of one scratch folder, and is stopped by its
own pid. Nothing is installed and no existing Slurm configuration is read.

``python tests/slurm/slurm_cluster.py [--accounting]`` starts one to play with and prints the variables to export.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
SSH_TOOLS = ("sshd", "ssh", "ssh-keygen")
ACCOUNTING_TOOLS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db")
PACKAGES = "slurm-wlm munge"
SSH_PACKAGES = "openssh-server"
ACCOUNTING_PACKAGES = "slurmdbd mariadb-server"
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# How long a busy machine may keep a node from starting a step (cred_expire; also how long a job waits before it runs
# again) and from answering (SlurmdTimeout): with less, jobs fail for "Job credential expired", with more, tests wait.
SLURM_CONF = """\
ClusterName=mxtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=20
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SrunPortRange={srun_low}-{srun_high}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
{accounting}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
DependencyParameters=kill_invalid_depend
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=mx[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{slurmd_low}-{slurmd_high}] CPUs=8 SocketsPerBoard=1 \
CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=requeued Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=ended Nodes=ALL MaxTime=INFINITE State=UP PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
CommunicationParameters=NoInAddrAny
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct
"""


def missing_tools(accounting: bool, ssh: bool = False) -> list[str]:
    """Programs the cluster needs that are not on PATH (or in /usr/sbin)."""
    tools = TOOLS + (ACCOUNTING_TOOLS if accounting else ()) + (SSH_TOOLS if ssh else ())
    return [tool for tool in tools if not shutil.which(tool, path=PATH)]


def tool(name: str) -> str:
    """The full path of a program."""
    found = shutil.which(name, path=PATH)
    assert found, f"{name} is not installed"
    return found


def free_ports(count: int) -> list[int]:
    """A run of consecutive ports below the ephemeral range that nobody listens on."""
    for _ in range(200):
        first = 20000 + secrets.randbelow(10000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise RuntimeError("no free ports")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Poll until ``condition`` holds.

    Raises:
        TimeoutError: it did not within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)


class Cluster:
    """Two Slurm nodes, mx0 and mx1, on this machine."""

    def __init__(self, root: Path, *, accounting: bool = False) -> None:
        self.root = root
        self.accounting = accounting
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = root / "etc" / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": PATH}

    def start(self) -> None:
        """Start every daemon and wait until both nodes are idle."""
        for name in ("etc", "state", "spool/mx0", "spool/mx1", "log", "run"):
            (self.root / name).mkdir(parents=True)
        version = re.findall(r"\d+", self.run("slurmctld", "-V").stdout)  # "slurm-wlm 22.05.8"
        if [int(part) for part in version[:2]] >= [23, 11]:  # where cgroups are missing these do not start without it
            (self.root / "etc" / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.root / "log").chmod(0o700)
        self.root.chmod(0o755)
        # a hundred ports: controller, dbd, mysql, two slurmd, and a range for srun's own listeners
        ports = free_ports(100)
        values = {
            "root": self.root, "host": socket.gethostname().split(".")[0], "user": getpass.getuser(),
            "ctld_port": ports[0], "dbd_port": ports[1], "sql_port": ports[2], "slurmd_low": ports[3],
            "slurmd_high": ports[4], "srun_low": ports[5], "srun_high": ports[-1], "password": secrets.token_hex(8),
        }  # fmt: skip
        self._munge()
        if self.accounting:
            self._database(values)
            accounting = (
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
                f"AccountingStoragePort={ports[1]}\nAccountingStoragePass={self.root}/run/munge.socket"
            )
        else:
            accounting = "AccountingStorageType=accounting_storage/none"
        self.conf.write_text(SLURM_CONF.format(accounting=accounting, **values))
        if self.accounting:
            for what in ("cluster mxtest", "account none cluster=mxtest", f"user {getpass.getuser()} account=none"):
                self.run("sacctmgr", "-i", "add", *what.split())
        self._controller()
        for node in ("mx0", "mx1"):
            self.start_node(node)
        self._wait_for(lambda: self.states() == {"mx0": "idle", "mx1": "idle"}, "both nodes to be idle")

    def start_node(self, node: str) -> None:
        """Start slurmd of mx0 or mx1."""
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> None:
        """Kill slurmd and every job step on the node, as a power cut would."""
        slurmd = self.processes.pop(node)
        pids = [slurmd.pid, *self._node_processes(node)]
        for pid in pids:  # stopped first: none may live to report another's death
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        # The youngest first: a stopped child whose parent dies is woken by SIGHUP and SIGCONT, and an srun would ask to
        # have its step killed, which Slurm does when the node is back, to the step that has the same number by then.
        for pid in sorted(pids, reverse=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slurmd.wait()

    def stop_controller(self) -> None:
        """Stop slurmctld only; jobs keep running."""
        self._stop("slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld again and wait until it answers."""
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self._wait_for(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "slurmctld")

    def states(self) -> dict[str, str]:
        """Node name to state, as sinfo tells it."""
        text = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout
        return dict(line.split() for line in text.splitlines() if len(line.split()) == 2)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command against this cluster."""
        return subprocess.run(command, env=self.env, check=check, capture_output=True, text=True, timeout=60)

    def stop(self) -> None:
        """Stop every process this cluster started, and only those."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", "-u", getpass.getuser(), check=False)
            wait_for(lambda: not self.run("squeue", "-h", check=False).stdout.strip(), "jobs to end", 5)
        for node in ("mx0", "mx1"):
            if node in self.processes:
                self.kill_node(node)
        for name in reversed(list(self.processes)):
            self._stop(name)

    def _node_processes(self, node: str) -> list[int]:
        """Processes whose environment names a job of this cluster on this node, after the slurmstepd they belong to."""
        marks = (f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.conf}".encode())
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                entries = (path / "environ").read_bytes().split(b"\0")
                if not all(mark in entries for mark in marks):
                    continue
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                found.append(int(path.name))
                if (Path("/proc", str(parent)) / "cmdline").read_bytes().startswith(b"slurmstepd"):
                    found.insert(0, parent)
        return [pid for pid in dict.fromkeys(found) if pid != os.getpid()]

    def _munge(self) -> None:
        key = self.root / "etc" / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        run = self.root / "run"
        self._spawn(
            "munged", "munged", "--foreground", "--num-threads=2", f"--socket={run}/munge.socket", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--log-file={self.root}/log/munged.log", f"--seed-file={run}/munge.seed",
            "--force",
        )  # fmt: skip
        self._wait_for((run / "munge.socket").exists, "munged")

    def _controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.conf))
        self._wait_for(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "slurmctld")

    def _database(self, values: dict[str, object]) -> None:
        data, run = self.root / "sql", self.root / "run"
        user = f"--user={getpass.getuser()}"
        install = [
            "mariadb-install-db",
            "--no-defaults",
            user,
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
        ]
        subprocess.run(install, env=self.env, check=True, capture_output=True)
        self._spawn(
            "mariadbd", "mariadbd", "--no-defaults", user, f"--datadir={data}", f"--socket={run}/sql.socket",
            f"--pid-file={run}/sql.pid", "--bind-address=127.0.0.1", f"--port={values['sql_port']}",
            "--innodb-buffer-pool-size=64M", "--skip-log-bin",
        )  # fmt: skip
        sql = ["mariadb", "--no-defaults", f"--socket={run}/sql.socket", "-u", "root", "-e"]
        password = values["password"]
        grant = (
            f"create user slurm@'127.0.0.1' identified by '{password}'; grant all on slurm_acct.* to slurm@'127.0.0.1'"
        )
        self._wait_for(
            lambda: subprocess.run([*sql, "select 1"], check=False, capture_output=True).returncode == 0, "mariadbd"
        )
        subprocess.run([*sql, grant], check=True, capture_output=True)
        conf = self.root / "etc" / "slurmdbd.conf"
        conf.write_text(SLURMDBD_CONF.format(**values))
        conf.chmod(0o600)
        self.conf.write_text(  # sacctmgr and slurmdbd need a slurm.conf before the accounting lines are known to work
            SLURM_CONF.format(
                accounting="AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
                f"AccountingStoragePort={values['dbd_port']}\nAccountingStoragePass={run}/munge.socket",
                **values,
            )
        )
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self._wait_for(lambda: self.run("sacctmgr", "-n", "show", "cluster", check=False).returncode == 0, "slurmdbd")

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """`wait_for`, unless a daemon ends before."""

        def holds() -> bool:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {(self.root / 'log' / f'{name}.out').read_text()[-500:]}")
            return condition()

        wait_for(holds, what)

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [tool(command[0]), *command[1:]], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mxslurm")), accounting="--accounting" in sys.argv)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}  # ready after {time.monotonic() - began:.1f} s", flush=True)
        signal.pause()
    finally:
        cluster.stop()
        shutil.rmtree(cluster.root, ignore_errors=True)

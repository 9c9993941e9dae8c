"""A real SLURM on one machine: each node a set of namespaces, so that it can be broken alone.

Everything lives in the namespaces of one process, the controller: it has its own network and its
own processes, and ends with the process that started it.  Any number of such clusters can be up at
once.  Needs root, and Debian's packages ``slurm-wlm``, ``munge`` and ``iproute2``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("slurm-wlm", "munge", "iproute2")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
CPUS = 8
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LEFT_OUT = ("SLURM_", "SBATCH_", "COMA_", "PYTEST_", "RANK", "WORLD_SIZE")


def missing_programs() -> list[str]:
    """What SLURM needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def missing_rights() -> str:
    """What this process may not do that a virtual cluster needs; empty when it may."""
    if os.geteuid() != 0:
        return "a virtual SLURM needs root"
    make = "ip link add bridge0 type bridge && ip link add one type veth peer name two"
    spaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc"]
    done = subprocess.run([*spaces, "sh", "-c", make], capture_output=True, text=True, timeout=30)
    if done.returncode:
        return f"a virtual SLURM needs namespaces and bridges: {done.stderr.strip()}"
    return ""


def install() -> None:
    """Install SLURM with apt.  Raises ``RuntimeError`` with apt's words when that fails."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(
            ["apt-get", *words], env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode and words[0] == "install":
            raise RuntimeError(f"apt-get {' '.join(words)} failed: {done.stderr[-1000:]}")


def wait_for(
    what: Callable[[], object],
    limit: float,
    name: str,
    pause: float = 0.3,
    log: Callable[[], str] = str,
) -> object:
    """The first true value of ``what()``; fails after ``limit`` seconds, with ``name`` and log."""
    end = time.monotonic() + limit
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < end, f"not within {limit:g} s: {name}\n{log()}"
        time.sleep(pause)


def descendants(pid: int) -> Iterator[int]:
    """Children of a process, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def init_of(outer: subprocess.Popen) -> int:
    """The bash that is PID 1 below an ``unshare``, as this machine numbers it."""
    for pid in descendants(outer.pid):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "bash":
                return pid
        except OSError:
            continue
    return 0


class VirtualCluster:
    """``nodes`` nodes named node1, node2, ...; a context manager."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.root = Path(tempfile.mkdtemp(prefix="coma-slurm-"))
        self.root.chmod(0o755)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)
        }
        self.environment |= {"SLURM_CONF": str(self.root / "etc" / "slurm.conf"), "PATH": PATH}
        self.controller: subprocess.Popen | None = None
        self.controller_init = 0
        self.machines: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> VirtualCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("etc", "run", "log", "state", "munge", *(f"spool/{n}" for n in self.nodes)):
            (self.root / name).mkdir(parents=True)
        text = (HERE / "slurm.conf.in").read_text()
        values = {"ROOT": self.root, "NODES": f"node[1-{len(self.nodes)}]", "CPUS": CPUS}
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        (self.root / "etc" / "slurm.conf").write_text(text)
        # the default, to find out, makes slurmd fail where /sys/fs/cgroup is absent
        (self.root / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = {f"10.88.0.{name.removeprefix('node')}": name for name in self.nodes}
        names |= {"127.0.0.1": "localhost", "10.88.0.254": "controller"}
        names |= {f"::ffff:{address}": name for address, name in names.items()}  # for torch
        hosts = "".join(f"{address} {name}\n" for address, name in names.items())
        (self.root / "etc" / "hosts").write_text(hosts)

        spaces = ["--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        self.spaces = ["unshare", *spaces, "--mount-proc"]
        self.controller = subprocess.Popen(
            [*self.spaces, "bash", str(HERE / "controller.sh"), str(self.root)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=(self.root / "log" / "controller.out").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for((self.root / "run" / "controller.up").exists, 30, "the controller is up", 0.05)
        self.controller_init = init_of(self.controller)
        for name in self.nodes:
            self.power_on(name)
        self.wait_for_nodes()

    def stop(self) -> None:
        """End every process of the cluster and remove its files."""
        if self.controller is not None:
            self.controller.stdin.close()
            try:
                self.controller.wait(10)
            except subprocess.TimeoutExpired:
                self.controller.kill()
                self.controller.wait()
        for machine in self.machines.values():
            machine.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    # the user's side

    def run(self, *command: str, limit: float = 30, cwd: Path | None = None, **environment) -> str:
        """What a command says on the login node; fails with both streams when it fails."""
        done = subprocess.run(
            self._inside(self.controller_init, "env", f"--chdir={cwd or self.root}", *command),
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, by name."""
        text = self.run("scontrol", "show", "job", str(number), "--oneliner")
        # of the task that has the number of its array SLURM shows the whole array
        (line,) = [x for x in text.splitlines() if x.startswith(f"JobId={number} ")]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait_for_state(self, number: int, *states: str, limit: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states; what SLURM says of it then."""

        def look() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in states else None

        return wait_for(look, limit, f"job {number} is {' or '.join(states)}", 0.5)

    # the machine's side

    @staticmethod
    def _inside(pid: int, *command: str) -> list[str]:
        return ["nsenter", "-t", str(pid), "-n", "-u", "-m", "-p", "-i", "--", *command]

    def power_on(self, node: str) -> None:
        """Start a node that was never up or has crashed."""
        ready = self.root / "run" / f"{node}.ready"
        ready.unlink(missing_ok=True)
        command = [*self.spaces, "bash", str(HERE / "node.sh"), str(self.root), node]
        self.machines[node] = machine = subprocess.Popen(
            self._inside(self.controller_init, *command),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=(self.root / "log" / f"{node}.out").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for(ready.exists, 30, f"{node} is up", 0.05)
        cable, init = f"to-{node}", init_of(machine)
        # by the number that this machine gives to the node: the controller's /proc has another one
        namespace = f"/proc/{init}/ns/net"
        script = f"ip link add {cable} type veth peer name eth0 && ip link set eth0 netns $INIT"
        inner = self._inner_pid(init)
        self.run("bash", "-c", script.replace("$INIT", str(inner)))
        self.run("ip", "link", "set", cable, "master", "bridge0", "up")
        assert Path(namespace).exists()

    @staticmethod
    def _inner_pid(pid: int) -> int:
        """A process of a node as the controller numbers it."""
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-2])
        raise AssertionError(f"no process {pid}")

    def init(self, node: str) -> int:
        """PID 1 of a node, as this machine numbers it."""
        return init_of(self.machines[node])

    def on(self, node: str, *command: str) -> str:
        """Run a command on a node."""
        done = subprocess.run(
            self._inside(self.init(node), *command),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, f"{node}: {' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def crash(self, node: str) -> None:
        """A power cut: everything on the node is gone at once."""
        os.kill(self.init(node), signal.SIGKILL)
        self.machines[node].wait()

    def kill_slurmd(self, node: str) -> None:
        """SLURM loses the node, whose jobs run on."""
        pid = (self.root / "run" / f"slurmd.{node}.pid").read_text().strip()
        self.on(node, "kill", "-KILL", pid)

    def start_slurmd(self, node: str) -> None:
        """SLURM finds the node again, and ends what should not run there."""
        os.kill(self.init(node), signal.SIGUSR1)

    def rank(self, node: str, job: int) -> int:
        """The first rank of a job on a node, as this machine numbers it; 0 without one."""
        named = b"SLURM_JOB_ID=%d" % job
        for pid in descendants(self.init(node)):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if named in environment and any(e.startswith(b"RANK=") for e in environment):
                return pid
        return 0

    def clear(self) -> None:
        """End all jobs, without mercy, and bring every node back."""
        for name, machine in self.machines.items():
            if machine.poll() is not None:
                self.power_on(name)
            for pid in list(descendants(self.init(name))):
                try:
                    if b"SLURM_JOB_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                except OSError:
                    continue
        numbers = self.run("squeue", "-h", "-o", "%A").split()
        if numbers:
            self.run("scancel", *sorted(set(numbers)))
            wait_for(lambda: not self.run("squeue", "-h"), 40, "no job is left")
        for name in self.machines:
            if not self._slurmd_lives(name):
                self.start_slurmd(name)
        self.wait_for_nodes()

    def _slurmd_lives(self, node: str) -> bool:
        for pid in descendants(self.init(node)):
            try:
                if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd":
                    return True
            except OSError:
                continue
        return False

    def wait_for_nodes(self, limit: float = 60) -> None:
        """Wait until every node can take a job."""
        names = sorted(self.nodes)

        def ready() -> bool:
            text = self.run("sinfo", "-h", "-N", "-t", "idle,alloc,mix", "-p", "main", "-o", "%N")
            return sorted(set(text.split())) == names

        wait_for(ready, limit, "all nodes are up")

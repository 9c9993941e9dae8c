"""Look at every node of a job, before it loads a model: one process a node, under srun."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from coma_ds.commands.preflight_inputs import (
    check_data,
    check_sets,
    evaluated_config,
    recipe_config,
)
from coma_ds.versions import package_versions, versions

if TYPE_CHECKING:
    from coma_ds.config import RunConfig

EXAMPLES = """The batch scripts of slurm/ run it; without a job it looks at this machine.

examples:
  coma-ds preflight --recipe demo-compress
  srun --ntasks-per-node=1 coma-ds preflight --recipe qwen2_5_vl_3b-match output=/shared/run"""

GIB = 2**30


@dataclass(frozen=True)
class Place:
    """This node in its job; ``names`` are the nodes in order, ``control`` is a shared folder."""

    number: int
    names: tuple[str, ...]
    control: Path
    ranks: int  # on each node
    restart: int
    address: str
    port: int
    seconds: float  # for all of it
    free_gib: float

    @property
    def name(self) -> str:
        """The name of this node."""
        return self.names[self.number]


@dataclass(frozen=True)
class Facts:
    """What must be the same on all nodes."""

    node: str
    commit: str
    code: str  # digest of the package's files
    versions: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--recipe", default="demo-compress", help="as for train")
    parser.add_argument(
        "--evaluate",
        nargs=argparse.REMAINDER,
        metavar="RUN ...",
        help="a finished run that is to be evaluated, with the options of coma-ds evaluate",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a value in place of the recipe's"
    )


def execute(args: argparse.Namespace) -> int:
    """All checks; 0 when this node can start, 2 when another node has said why it cannot.

    Raises ``ValueError``, with the node's name, for what is wrong on this one.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coma-ds-") as scratch:
        place = read_place(dict(os.environ), Path(scratch))
        try:
            config = recipe_config(args) if args.evaluate is None else None
        except ValueError:  # the same on all nodes: said once, without a name
            if place.number:
                return 2
            raise
        try:
            config = config or evaluated_config(args.evaluate)
            check = check_data if args.evaluate is None else check_sets
            said = look(place, config, began + place.seconds, check)
        except ValueError as error:
            raise ValueError(f"{place.name}: {error}") from None
    if said is None:
        return 2
    if place.number == 0:
        sys.stderr.write(f"preflight: {said}, {time.monotonic() - began:.1f} s\n")
    return 0


def read_place(environment: dict[str, str], scratch: Path) -> Place:
    """Where this process runs, from what SLURM and slurm/common.sh say."""
    names = environment.get("COMA_NODE_NAMES", "").split() or [socket.gethostname()]
    return Place(
        number=int(environment.get("SLURM_NODEID", 0)) if len(names) > 1 else 0,
        names=tuple(names),
        control=Path(environment.get("COMA_DS_CONTROL") or scratch),
        ranks=int(environment.get("COMA_RANKS_PER_NODE", 1)),
        restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environment.get("MASTER_PORT", 0)),
        seconds=float(environment.get("COMA_PREFLIGHT_SECONDS", 45)),
        free_gib=float(environment.get("COMA_MIN_FREE_GIB", 2)),
    )


def look(
    place: Place, config: RunConfig, deadline: float, check: Callable[[RunConfig], None]
) -> str | None:
    """Every check in turn: what is light first, ``check`` of the data last.  None when another node
    has a problem.

    Raises ``ValueError`` for one of this node, or of all.
    """
    folder = place.control / "preflight" / str(place.restart)
    mark = Path(config.output) / f".preflight-{place.restart}-{place.name}"
    problem = ""
    try:
        free = check_output(mark, place.free_gib)
    except ValueError as error:
        problem = str(error)
    try:
        mine = Facts(place.name, commit(), code_digest(), package_versions(), problem)
        leave(folder, place, mine)
        if problem:
            raise ValueError(problem)
        # two thirds of the time: the rest is for what comes after
        everyone = gather(folder, place, mine, deadline - place.seconds / 3)
        if any(facts.problem for facts in everyone):
            return None
        try:
            if place.number == 0:
                compare(everyone)
            if not sees(mark, place, folder):
                return None
            devices = check_devices(place)
            took = all_reduce(place, deadline)
            check(config)
        except ValueError as error:
            leave(folder, place, Facts(**asdict(mine) | {"problem": str(error)}))
            raise
        if place.number == 0:
            record(place, config, mine)
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written has none
            mark.unlink(missing_ok=True)
    return (
        f"{len(place.names)} node(s), {place.ranks} rank(s) each on {devices}, all-reduce "
        f"{1000 * took:.0f} ms, {free:.{1 if free < 10 else 0}f} GiB free at {config.output}, "
        f"commit {mine.commit}"
    )


def check_output(mark: Path, free_gib: float) -> float:
    """Write ``mark`` into the folder of the run; the free GiB there.  Raises ``ValueError``."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
        free = shutil.disk_usage(mark.parent).free / GIB
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output {mark.parent} cannot be written: it is no folder") from None
    except OSError as error:
        raise ValueError(f"output {mark.parent} cannot be written: {error.strerror}") from None
    if free < free_gib:
        raise ValueError(
            f"{free:.1f} GiB are free at {mark.parent}, {free_gib:g} are needed "
            "(COMA_MIN_FREE_GIB): make room, or give another output"
        )
    return free


def commit() -> str:
    """The commit of the code, with ``+`` when files differ from it; ``-`` without git."""
    git = ["git", "-C", str(Path(__file__).parents[2])]

    def said(*words: str) -> str:
        return subprocess.run(
            [*git, *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        found = said("describe", "--always", "--abbrev=12", "--exclude=*")
        code = ("coma_ds", "kernels", "ds_configs", "slurm")  # new files there count as well
        changed = said("diff", "HEAD", "--name-only") or said(
            "ls-files", "--others", "--exclude-standard", "--", *code
        )
    except (OSError, subprocess.SubprocessError):
        return "-"
    return f"{found}{'+' if changed else ''}"


def code_digest() -> str:
    """A digest of every Python file and recipe of the package on this node."""
    digest, package = hashlib.blake2b(digest_size=8), Path(__file__).parents[1]
    for path in sorted(p for kind in ("py", "yaml") for p in package.rglob(f"*.{kind}")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def leave(folder: Path, place: Place, facts: Facts) -> None:
    """Write this node's file for the others.  Raises ``ValueError`` where that fails."""
    path = folder / f"{place.number}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{place.name}.tmp")
        partial.write_text(json.dumps(asdict(facts)))
        partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"the shared folder {place.control} cannot be written: {error.strerror} (COMA_SHARED)"
        ) from None


def read_facts(folder: Path) -> dict[int, Facts]:
    """What the nodes have left, by their numbers."""
    return {int(p.stem): Facts(**json.loads(p.read_text())) for p in folder.glob("*.json")}


def gather(folder: Path, place: Place, mine: Facts, deadline: float) -> list[Facts]:
    """The files of all nodes, in their order; at once when one of them has a problem.

    Raises ``ValueError`` at the deadline, with the nodes that did not come.
    """
    while True:
        found = read_facts(folder)
        missing = [n for i, n in enumerate(place.names) if i not in found]
        if not missing or any(facts.problem for facts in found.values()):
            return [found[number] for number in sorted(found)]
        if time.monotonic() >= deadline:
            if place.number != min(found):  # one says it
                return [*found.values(), Facts("", "", "", problem="said by another node")]
            raise ValueError(
                f"{', '.join(missing)} did not come, or what is written there to {place.control} "
                f"is not seen here (sbatch --exclude={','.join(missing)} leaves a node out)"
            )
        time.sleep(0.2)
        leave(folder, place, mine)  # a folder of NFS is read anew after a change from this node


def compare(everyone: list[Facts]) -> None:
    """Raise ``ValueError`` for a node with other versions or other code than the first one."""
    first = everyone[0]
    for facts in everyone[1:]:
        for name, version in facts.versions.items():
            if version != first.versions.get(name):
                raise ValueError(
                    f"{facts.node} has {name} {version}, {first.node} has "
                    f"{first.versions.get(name)}: all nodes need the same environment"
                )
        if (facts.commit, facts.code) != (first.commit, first.code):
            raise ValueError(
                f"{facts.node} runs other code (commit {facts.commit}, digest {facts.code}) than "
                f"{first.node} (commit {first.commit}, digest {first.code})"
            )


def sees(mark: Path, place: Place, folder: Path) -> bool:
    """True where the output of all nodes is seen here, False where one has a problem and left.

    Raises ``ValueError`` when that of another node is not seen.
    """
    for name in place.names:
        if not mark.with_name(f".preflight-{place.restart}-{name}").exists():
            if any(facts.problem for facts in read_facts(folder).values()):
                return False
            raise ValueError(
                f"what {name} wrote to {mark.parent} is not seen here: output must be on a file "
                "system that all nodes share"
            )
    return True


def check_devices(place: Place) -> str:
    """The kind of device.  Raises ``ValueError`` for fewer GPUs than ranks."""
    import torch

    alone = "COMA_NODE_NAMES" not in os.environ and not torch.cuda.is_available()
    if os.environ.get("DS_ACCELERATOR") == "cpu" or alone:
        return "cpu"
    count = torch.cuda.device_count()
    if count < place.ranks:
        raise ValueError(
            f"{count} GPU(s) found, {place.ranks} are asked for (COMA_RANKS_PER_NODE, "
            f"--gpus-per-node; sbatch --exclude={place.name} leaves the node out)"
        )
    for number in range(place.ranks):  # one that is lost fails here
        try:
            torch.ones(8, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            raise ValueError(f"GPU {number} does not work: {str(error).splitlines()[0]}") from None
    return torch.cuda.get_device_name(0)


def all_reduce(place: Place, deadline: float) -> float:
    """Sum a MiB over the nodes, on the job's own address and port; the seconds that took.

    Raises ``ValueError`` when a node is not reached.
    """
    import torch
    import torch.distributed as dist

    count = len(place.names)

    def left() -> timedelta:
        return timedelta(seconds=max(2.0, deadline - time.monotonic()))

    where = f"{place.address}:{place.port}"
    try:
        socket.getaddrinfo(place.address, None)
    except OSError as error:
        raise ValueError(
            f"the address {place.address!r} is no host that is known here: {error.strerror} "
            "(COMA_MASTER_ADDR)"
        ) from None
    try:
        store = dist.TCPStore(
            place.address, place.port, count, place.number == 0, left(), wait_for_workers=False
        )
        store.set(f"here-{place.number}", "")
        for number, name in enumerate(place.names):
            try:
                store.wait([f"here-{number}"], left())
            except dist.DistError:
                raise ValueError(
                    f"{name} does not reach {where} (the network between the nodes)"
                ) from None
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{where} is not to be had: {reason} (COMA_MASTER_ADDR, COMA_MASTER_PORT)"
        ) from None
    if count == 1:
        return 0.0
    try:
        dist.init_process_group(
            "gloo", store=store, rank=place.number, world_size=count, timeout=left()
        )
        values = torch.ones(2**18)
        dist.all_reduce(values)  # connects
        began = time.perf_counter()
        dist.all_reduce(values)
        took = time.perf_counter() - began
        right = bool((values == count**2).all())
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:
        raise ValueError(
            f"no all-reduce with the other nodes: {str(error).splitlines()[0]} (gloo takes the "
            "address of the host name; GLOO_SOCKET_IFNAME names a network)"
        ) from None
    if not right:
        raise ValueError("an all-reduce gave a wrong sum")
    return took


def record(place: Place, config: RunConfig, facts: Facts) -> None:
    """Leave versions and the DeepSpeed config in the job's folder, once a job."""
    (place.control / "versions.txt").write_text(f"{versions()}code {facts.code}\n")
    from coma_ds.config import dump

    resolved = place.control / "config.yaml"
    if not resolved.exists():
        resolved.write_text(dump(config))
    target = place.control / "ds_config.json"
    if not target.exists():
        from coma_ds.mechanics import deepspeed_config

        target.write_text(f"{json.dumps(deepspeed_config(config), indent=2)}\n")

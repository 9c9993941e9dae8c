"""Checkpoints of a run: staged, complete on all ranks, hashed, renamed, then pointed to.

A reader never sees half of one.  Training waits for the copy to the disk alone: the hashes, the
renaming and the removal of old ones are done by a thread beside it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from coma_ds import comm
from coma_ds.config import CheckpointConfig
from coma_ds.engine import Engine
from coma_ds.manifest import (
    POINTER,
    STAGING,
    UNIVERSAL,
    Manifest,
    check_given,
    digest,
    problems,
    published,
    read_manifest,
    remove,
    remove_remains,
    set_aside,
    step_name,
    surplus,
    sync,
    whole,
    write_atomically,
    write_manifest,
)

log = logging.getLogger("coma_ds")

PATIENCE = 1800.0  # seconds in which the other ranks must have hashed their files


@dataclass(frozen=True)
class Published:
    """How a save ended; times in seconds: what training waited, and until it was published."""

    step: int
    problem: str = ""
    saving: float = 0.0
    publishing: float = 0.0


class Checkpoints:
    """The checkpoints of one run.  Every rank calls every method, at the same places.

    ``owned`` says whether the folder is still this run's: asked before a save and before it is
    published.  ``start`` tells what this one stages from what an older start still writes.
    ``announce(step)`` is called by rank 0 after each.  ``base``: where frozen weights came from.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        owned: Callable[[], bool] = lambda: True,
        announce: Callable[[int], None] = lambda step: None,
        start: int = 0,
        base: str = "",
    ) -> None:
        self.folder, self.config, self.start, self.base = folder, config, start, base
        self._owned, self._announce = owned, announce
        self._thread: threading.Thread | None = None
        self._outcome: Published | None = None

    def save(
        self,
        engine: Engine,
        step: int,
        *,
        extra: dict[str, str] | None = None,
        metric: float | None = None,
    ) -> Published | None:
        """Write the shards of ``step-00000100`` and start to publish it.

        ``extra`` are further files by name.  A published checkpoint is never written again, unless
        it is broken: then it is set aside as ``broken-step-00000100``.  Returns what hindered it
        (a full disk, say), the same on every rank; None when all is written.  What became of it
        ``settle`` tells.
        """
        if comm.broadcast(whole(self.folder / step_name(step)) is not None):
            return None
        began = time.monotonic()
        staging = self.folder / f"{STAGING}{self.start}-{step_name(step)}"
        problem = comm.broadcast(self._prepare(staging) if comm.rank() == 0 else "")
        files, errors = ([], [problem]) if problem else engine.save(self.folder, staging.name)
        if comm.rank() == 0 and not problem:
            errors += _write(staging, extra or {}, files)
        found = [error for part in comm.all_objects(errors) for error in part]
        if found:
            if comm.rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
            return Published(step, found[0])
        frozen = engine.frozen_weights()
        manifest = Manifest(
            step, comm.world_size(), engine.stage, {}, frozen, metric, self.config.best,
            self.base if frozen else "",
        )  # fmt: skip
        waited = time.monotonic() - began
        self._outcome = None
        self._thread = threading.Thread(
            target=self._publish, args=(staging, files, manifest, waited), daemon=True
        )
        self._thread.start()
        return None

    def _lost(self) -> str:
        return f"{self.folder} belongs to a newer start of this run"

    def _prepare(self, staging: Path) -> str:
        """An empty folder, or why there is none."""
        if not self._owned():
            return self._lost()
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return ""

    def _publish(self, staging: Path, files: list[Path], manifest: Manifest, waited: float) -> None:
        began = time.monotonic()
        problem = ""
        try:
            _leave_hashes(staging, files)
            if comm.rank() == 0:
                self._finish(staging, manifest)
        except (OSError, ValueError) as error:
            problem = str(error)
            shutil.rmtree(staging, ignore_errors=True)  # which rank 0 sees, whoever failed
        took = time.monotonic() - began
        self._outcome = Published(manifest.step, problem, waited, took)

    def _finish(self, staging: Path, manifest: Manifest) -> None:
        files = _collect_hashes(staging, manifest.world)
        write_manifest(staging, replace(manifest, files=files))
        sync(staging)
        target = self.folder / step_name(manifest.step)
        if not self._owned():
            raise ValueError(self._lost())
        if target.is_dir():
            set_aside(target)
        staging.rename(target)
        sync(self.folder)
        if not self._owned():  # by now: pointer and old checkpoints are the newer start's
            return
        try:
            write_atomically(self.folder / POINTER, target.name)
        except OSError as error:
            log.warning(
                "%s does not name %s (%s): only DeepSpeed's own tools read it",
                self.folder / POINTER, target.name, error.strerror,
            )  # fmt: skip
        self._announce(manifest.step)
        settings = self.config
        for path in surplus(
            self.folder,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            best=settings.best,
        ):
            remove(path)

    def poll(self) -> Published | None:
        """On rank 0, how the last save ended, once; None while it has not."""
        if self._thread is not None and self._thread.is_alive():
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def settle(self) -> Published | None:
        """Wait until the last save is published (or failed), on every rank; None without one."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return comm.broadcast(self.poll())

    def find(self, resume: str, *, going_on: bool = False) -> Path | None:
        """What to go on from: ``none``, ``auto`` (the newest that verifies), or a path.

        The ranks share the hashing.  For a run that is ``going_on``, newer ones that do not verify
        are set aside: their steps are published again, and they count as nothing that is kept.

        Raises ``ValueError`` for a given path that does not verify, and for ``auto`` when there
        are checkpoints but none does: a run never starts over silently.
        """
        if resume == "none":
            return None
        if resume != "auto":
            path = Path(resume)
            if going_on:
                comm.decide(lambda: check_given(resume))
            if found := _agreed_problems(path):
                raise ValueError(found[0])
            return path
        broken: list[Path] = []
        for path in comm.broadcast(published(self.folder)):
            found = _agreed_problems(path)
            if not found:
                if going_on and broken:
                    comm.decide(lambda path=path: self._fall_back(broken, path))
                return path
            log.warning("%s; falling back to the one before", found[0])
            broken.append(path)
        if broken:
            names = ", ".join(path.name for path in broken)
            raise ValueError(
                f"{self.folder}: no checkpoint is whole ({names}); "
                "checkpoint.resume=none starts over"
            )
        return None

    def _fall_back(self, broken: list[Path], good: Path) -> None:
        try:
            for path in broken:
                set_aside(path)
            write_atomically(self.folder / POINTER, good.name)
        except OSError as error:
            raise ValueError(f"{self.folder}: a broken checkpoint stays ({error})") from error

    def clean(self) -> None:
        """Rank 0: remove what an interrupted save or removal left."""
        remove_remains(self.folder)


def _agreed_problems(path: Path) -> list[str]:
    found = comm.all_objects(problems(path, comm.rank(), comm.world_size()))
    return [problem for part in found for problem in part]


def _write(staging: Path, extra: dict[str, str], files: list[Path]) -> list[str]:
    try:
        for name, text in extra.items():
            (staging / name).write_text(text)
            files.append(staging / name)
    except OSError as error:
        return [str(error)]
    return []


def _leave_hashes(staging: Path, files: list[Path]) -> None:
    """What this rank wrote, with size and hash, for rank 0."""
    found = {}
    for path in files:
        sync(path)
        found[str(path.relative_to(staging))] = (path.stat().st_size, digest(path))
    write_atomically(staging / f"hashes-{comm.rank()}", json.dumps(found))


def _collect_hashes(staging: Path, world: int) -> dict[str, tuple[int, str]]:
    """Size and hash of every file, as each rank left them.

    Raises ``ValueError`` when one does not come.
    """
    files, until = {}, time.monotonic() + PATIENCE
    for rank in range(world):
        left = staging / f"hashes-{rank}"
        while not left.exists():
            if time.monotonic() > until or not staging.is_dir():
                raise ValueError(f"{staging}: rank {rank} did not finish its files")
            time.sleep(0.02)
        files |= json.loads(left.read_text())
        left.unlink()
    return files


def load_checkpoint(
    engine: Engine, checkpoint: Path, base: str = "", scratch: Path | None = None
) -> int:
    """Load a published checkpoint; the step to go on with.

    One of another world size or ZeRO stage is converted first, in the folder ``scratch`` (default:
    where it lies).  ``base`` is the model that the frozen weights were read from now, for messages.
      Raises ``ValueError`` where DeepSpeed cannot
    convert, and when the frozen weights, which a checkpoint leaves out, are not those that it was
    trained with.
    """
    manifest = read_manifest(checkpoint)
    same = (manifest.world, manifest.stage) == (comm.world_size(), engine.stage)
    shards = any(name.endswith("_optim_states.pt") for name in manifest.files)
    if same or (manifest.stage == engine.stage and not shards):
        engine.load(checkpoint.parent, checkpoint.name)
    else:
        stages = {manifest.stage, engine.stage}
        if len(stages) > 1 and stages != {1, 2}:
            raise ValueError(
                f"checkpoint {checkpoint} is of ZeRO stage {manifest.stage}, this run has stage "
                f"{engine.stage}: DeepSpeed cannot convert it; take deepspeed=zero{manifest.stage},"
                " or start over with checkpoint.resume=none"
            )
        log.info(
            "converting %s: %d rank(s) at ZeRO stage %d -> %d at stage %d", checkpoint,
            manifest.world, manifest.stage, comm.world_size(), engine.stage,
        )  # fmt: skip
        universal = comm.decide(lambda: convert(checkpoint, scratch))
        try:
            engine.load_universal(universal.parent, universal.name)
        finally:
            comm.barrier()
            if comm.rank() == 0:
                shutil.rmtree(universal, ignore_errors=True)
    now, then = engine.frozen_weights(), manifest.frozen
    if now != then:
        raise ValueError(
            f"checkpoint {checkpoint}: its {then.get('parameters', 0)} frozen parameters "
            f"({then.get('fingerprint')}) are not those of {base or 'the model'} "
            f"({now.get('parameters', 0)}, {now.get('fingerprint')}): give the model that the run "
            f"started from{f', {manifest.base}' if manifest.base else ''}"
        )
    return manifest.step


def convert(checkpoint: Path, scratch: Path | None = None) -> Path:
    """A copy of a checkpoint in DeepSpeed's universal form, one file for each state of a weight, in
    the folder ``scratch`` or beside it.

    Raises ``ValueError`` with the last words of the conversion when that fails.
    """
    target = (scratch or checkpoint.parent) / (UNIVERSAL + checkpoint.name)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint.absolute()), "--inject_missing_state"]
    command += ["--output_folder", str(target.absolute())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (target.parent / "latest_universal").unlink(missing_ok=True)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ValueError(f"checkpoint {checkpoint}: DeepSpeed could not convert it ({last})")
    return target

"""The folder of a run: taken by one run at a time, and gone on with only by the same run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from coma_ds.config import RunConfig, dump
from coma_ds.data.processing import MODEL_EXTRAS
from coma_ds.disk import existing_part, room
from coma_ds.hardware import has_fast_bf16
from coma_ds.manifest import published, set_apart, write_atomically
from coma_ds.metrics import flatten
from coma_ds.ownership import Incarnation, read_owner, take, takes_over, this_start
from coma_ds.stopping import SWITCHES, check_not_held
from coma_ds.versions import place, versions

log = logging.getLogger("coma_ds")

CONFIG = "config.yaml"
RESULTS = "results.json"
BLOCKS, BLOCK = 64, 2**18  # of a file of weights
FINISHED = ("model", RESULTS, "neighbours.json")
# What a run may change when it goes on: where things lie, what is watched, how memory is used.
FREE = (
    *("recipe", "output", "init_from", "deepspeed", "eval.", "checkpoint.", "logging.", "chunk."),
    *("data.root", "data.path", "data.image_root", "data.workers", "data.bad_rows"),
    *("guard.", "model.path", "model.attention", "model.arithmetic", "model.liger"),
    "model.gradient_checkpointing",
)
_held: dict[str, int] = {}  # locks of this process, which may run one after the other in a folder


def claim(config: RunConfig, *, keep: bool) -> Incarnation | None:
    """Take ``config.output`` for this process until it ends; only look at it without ``keep``.

    Returns this start of the run, which owns the folder from here on.  Raises ``ValueError`` for a
    place that is no folder or cannot be written, a folder that another process on this machine
    trains into (but for one that this start replaces), a run that is held, and a finished run
    that would be written over.
    """
    folder = Path(config.output)
    try:
        if not keep:
            place = existing_part(folder)
            if not place.is_dir() or not os.access(place, os.W_OK):
                raise PermissionError(f"{place} is no folder that can be written")
            return None
        folder.mkdir(parents=True, exist_ok=True)
        key = os.path.realpath(folder)
        if key in _held:
            os.close(_held.pop(key))
        _held[key] = lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"output {config.output!r} cannot be used: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = read_owner(folder)
        if not takes_over(this_start(folder), owner):
            raise ValueError(
                f"output {config.output!r}: another process trains into this folder"
                + (f", {owner}" if owner else "")
            ) from None
        log.warning("%s is taken over from %s, which may still be alive", folder, owner)
    except OSError:  # a file system without locks
        pass
    _refuse_finished(folder, config)
    check_not_held(folder)
    mine = this_start(folder)
    with written(folder):
        take(folder, mine)
    return mine


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Raise ``ValueError`` where something cannot be written into the folder of the run."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"output '{folder}' cannot be used, {room(folder)} ({error})") from error


def begin(config: RunConfig, mine: Incarnation, ds_config: dict) -> None:
    """From here on the folder is this run's: what it is, and that this start made it so."""
    folder = Path(config.output)
    with written(folder):
        take(folder, replace(mine, began=True))
        (folder / SWITCHES).mkdir(exist_ok=True)
        write_atomically(folder / CONFIG, dump(config))
        write_atomically(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        write_atomically(folder / "versions.txt", versions() + place())


def _refuse_finished(folder: Path, config: RunConfig) -> None:
    finished, goes_on = (folder / "model").exists(), any((folder / "checkpoints").glob("step-*"))
    if config.checkpoint.resume == "auto" and finished and not goes_on:
        raise ValueError(
            f"output {config.output!r} holds a finished run: give another output, or replace it "
            "with checkpoint.resume=none"
        )


def start_over(folder: Path) -> None:
    """Remove what an earlier run in this folder ended with: it would not fit the new config.

    Its checkpoints are set apart as ``checkpoints-1`` (2, ...).
    """
    go_back(folder, -1)


def go_back(folder: Path, step: int) -> None:
    """Set apart the checkpoints after ``step``, and remove the end that they led to.

    Nothing happens where there are none, but for a run that starts over (-1).
    """
    place = set_apart(folder / "checkpoints", after=step)
    if place is not None:
        log.warning("what this folder held of later steps is kept in %s", place)
    if place is None and step >= 0:
        return
    for name in FINISHED:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def forget_results(folder: Path, step: int) -> None:
    """Remove what was measured after another step than the one whose model is written now."""
    if step_in(folder / RESULTS) != step:
        for name in FINISHED[1:]:
            (folder / name).unlink(missing_ok=True)


def is_finished(config: RunConfig) -> bool:
    """True when the folder holds the model of the last step, and what was measured of it."""
    folder, wanted = Path(config.output), [f"model/{MODEL_EXTRAS}"]
    if config.eval.at_end:
        wanted.append(RESULTS)
    return all(step_in(folder / name) == config.optim.steps for name in wanted)


def identity(model: Path) -> dict[str, int | str | None]:
    """Which model results are of: the step that it was exported after, and a fingerprint."""
    return {"step": step_in(model / MODEL_EXTRAS), "weights": fingerprint(model)}


def fingerprint(model: Path) -> str:
    """A hash over names, sizes and samples of the weight files: 64 blocks of each, 16 MiB at most.

    Two trainings do not share it; it costs no second reading of the weights.
    """
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        state.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(BLOCKS):
                file.seek(number * size // BLOCKS)
                state.update(file.read(BLOCK))
    return state.hexdigest()


def step_in(file: Path) -> int | None:
    """The ``step`` that a JSON file tells; None without one."""
    try:
        return json.loads(file.read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settled(config: RunConfig) -> RunConfig:
    """The config as this start takes it, with a precision in the place of ``auto``.

    A run that goes on keeps its own, on whatever machine; a new one takes what is fast on this.
    ``checkpoint.resume`` as ``none`` or a path is meant for the first start of a job: when SLURM
    starts it again it goes on from its own checkpoints.
    """
    resume, folder = config.checkpoint.resume, Path(config.output) / "checkpoints"
    own, given = published(folder), Path(resume).resolve()
    if given.parent == folder.resolve():  # what it was sent back to, and all before that, is not
        own = [path for path in own if path.name > given.name]
    if resume != "auto" and this_start(Path(config.output)).began and own:
        log.warning("checkpoint.resume=%s was for the first start of this job", resume)
        resume = "auto"
        settings = config.checkpoint.model_copy(update={"resume": resume})
        config = config.model_copy(update={"checkpoint": settings})
    if config.precision != "auto":
        return config
    precision = "bf16" if has_fast_bf16() else "fp32"
    for checkpoint in reversed(published(folder)) if resume == "auto" else [Path(resume)]:
        try:
            precision = yaml.safe_load((checkpoint / CONFIG).read_text())["precision"]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            continue  # whether it is whole is judged later, with all its files
    return config.model_copy(update={"precision": precision})


def changed(config: RunConfig, checkpoint: Path) -> list[str]:
    """What differs from the run that wrote ``checkpoint``, as ``key: old -> new``."""
    file = checkpoint / CONFIG
    if not file.is_file():
        return []
    before, now = (flatten(yaml.safe_load(text)) for text in (file.read_text(), dump(config)))
    # A key that only one version of the config knows is no change; column names are the user's.
    keys = before.keys() & now.keys() | {
        key for key in before.keys() | now.keys() if key.startswith("data.columns.")
    }
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(keys)
        if before.get(key) != now.get(key) and not key.startswith(FREE)
    ]


def check_same(config: RunConfig, checkpoint: Path, step: int) -> list[str]:
    """What differs from the run that wrote ``checkpoint``, where the config takes that on itself.

    Raises ``ValueError`` when anything that makes a difference has changed and the checkpoint was
    not named by ``checkpoint.resume``, when the model has, or when there is no step left to take.
    """
    differences = changed(config, checkpoint)
    of_model = [
        line for line in differences if line.startswith(("model.", "objective", "optim.kind"))
    ]
    if of_model:
        raise ValueError(
            f"{checkpoint} is of another run ({'; '.join(of_model)}): give another output, or "
            "start over with checkpoint.resume=none"
        )
    if other := [x for x in differences if x.startswith("precision:") and "bf16" in x]:
        raise ValueError(
            f"{checkpoint} was made with another {other[0]}, and DeepSpeed cannot go on between "
            "weights of 16 and of 32 bits: give the same one, or start over with "
            "checkpoint.resume=none"
        )
    if step > config.optim.steps:
        raise ValueError(
            f"{checkpoint} is at step {step}, optim.steps is {config.optim.steps}: raise it, or "
            "start over with checkpoint.resume=none"
        )
    if differences and config.checkpoint.resume == "auto":
        raise ValueError(
            f"{checkpoint} was made with another config ({'; '.join(differences[:6])}): give the "
            f"same one, go on with this one by checkpoint.resume={checkpoint}, or start over with "
            "checkpoint.resume=none"
        )
    return differences

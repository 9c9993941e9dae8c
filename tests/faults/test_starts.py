"""Starts that cannot go well, by the launcher as a user types it: one sentence, and why."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from coma_ds.model.source import resolve_model
from tests.distributed.launched import ROOT, Ended, launch
from tests.distributed.training import SMALL
from tests.faults.soak import lines as train_lines

TRAIN = "coma_ds/train.py"
LOST = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def training(place) -> Iterator[Path]:
    """The folder of a run that is training."""
    folder = place / "training"
    command = [sys.executable, TRAIN, *SMALL, "optim.steps=100000", f"output={folder}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.1)
    yield folder
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def gap(place) -> Path:
    """A model without one of its weights."""
    folder = place / "gap"
    shutil.copytree(resolve_model("builtin:demo-base"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights[LOST]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ended(place, taken, training, gap) -> Iterator[dict[str, Future[Ended]]]:
    """How each start ended; two at a time."""
    small = [TRAIN, "--recipe", "demo-compress", *SMALL, "optim.steps=2"]
    whole = [word for word in small if word != "model.weights=random"]
    with ThreadPoolExecutor(2) as pool:
        yield {
            "batch": pool.submit(launch, "torchrun", *small, "optim.batch_size=7"),
            "weights": pool.submit(launch, "deepspeed", *whole, f"model.path={gap}"),
            "folder": pool.submit(launch, "deepspeed", *small, f"output={training}"),
            "port, torchrun": pool.submit(launch, "torchrun", *small, port=taken),
            "port, deepspeed": pool.submit(launch, "deepspeed", *small, port=taken),
        }


# The launcher's exit code, and the sentence that ends the screen.
SENTENCES = {
    "batch": (1, "error: optim.batch_size 7 is not a multiple of the 2 ranks"),
    "weights": (2, f"the weights do not fit the model, missing: {LOST}"),
    "folder": (2, "another process trains into this folder"),
    "port, deepspeed": (2, "is in use on this machine, maybe by another run: give the launcher"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_one_sentence_says_why(ended, name):
    job, (code, said) = ended[name].result(), SENTENCES[name]
    assert job.code == code, job.text
    last = job.lines[-1] if set(job.lines[-1]) != {"="} else job.lines[-2]
    assert "error" in last and said in last, job.text
    assert "Traceback" not in job.text or "torchrun" in job.text, job.text


def test_a_port_in_use_under_torchrun(ended, taken):
    """torchrun itself finds it, before any of our code: its trace ends with the port."""
    job = ended["port, torchrun"].result()
    assert job.code == 1 and f"port: {taken}" in job.lines[-1], job.text
    assert "address already in use" in job.lines[-1], job.text


def test_a_folder_in_use_is_refused_and_left_alone(ended, training):
    """The run in it goes on, and every step stands once in its metrics."""
    ended["folder"].result()
    before, until = len(train_lines(training)), time.monotonic() + 60
    while len(train_lines(training)) < before + 3 and time.monotonic() < until:
        time.sleep(0.1)
    steps = [line["step"] for line in train_lines(training)]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) >= before + 3

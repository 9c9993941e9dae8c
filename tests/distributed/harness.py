"""Run a function on W ranks of one spawned world, with a time limit that fails."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path

import torch.multiprocessing as mp

# A world that hangs; the longest takes 140 s on two idle cores, twice or thrice that beside others.
LIMIT = 600.0  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(
    rank: int, world: int, port: int, target: str, arguments: dict, folder: str, limit: float
):
    faulthandler.dump_traceback_later(limit - 1)  # where it hangs, if it does
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )
    import torch

    from coma_ds import comm, engine

    torch.set_num_threads(1)
    engine.start(timeout_minutes=5)
    code = 0
    try:
        module, name = target.split(":")
        result = getattr(importlib.import_module(module), name)(**arguments)
        Path(folder, f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        code = 1
    comm.leave(code)


def run_world(world: int, target: str, *, limit: float = LIMIT, **arguments) -> list:
    """What ``module:function(**arguments)`` returns on each rank (JSON values), in rank order.

    Fails when a rank fails or dies, with its trace, and when the limit (seconds) is over, with
    the places where the ranks stood on stderr.
    """
    context = mp.get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank_main, args=(r, world, port, target, arguments, folder, limit)
            )
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + limit
        while any(p.is_alive() for p in ranks) and time.monotonic() < end:
            if any(p.exitcode not in (None, 0) for p in ranks):
                time.sleep(2)  # the others' traces
                break
            time.sleep(0.05)
        late = [r for r, p in enumerate(ranks) if p.is_alive()]
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        errors = [
            f"rank {r}: {Path(folder, f'{r}.error').read_text()}"
            for r in range(world)
            if Path(folder, f"{r}.error").exists()
        ]
        codes = [p.exitcode for p in ranks]
        assert not errors, "\n".join(errors)
        assert not late, f"ranks {late} still ran after {limit} s"
        assert codes == [0] * world, f"exit codes {codes}"
        return [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]

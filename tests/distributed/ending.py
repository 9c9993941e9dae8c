"""A rank that ends as its first argument says, for ``test_ends.py``; started by a launcher."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from coma_ds import comm
from coma_ds.entry import entry_point


def work(argv: list[str]) -> None:
    """Join the world, meet the others, then end: ``well``, ``user``, ``fault`` or ``all``."""
    how = next(word for word in argv if not word.startswith("--"))  # launchers add --local_rank
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    assert int(comm.all_sum(torch.ones(1))) == comm.world_size()
    last = comm.rank() == comm.world_size() - 1
    if how == "all" or (how == "user" and last):
        raise ValueError("pairs.jsonl, line 3: empty query; give it a text or an image")
    if how == "fault" and last:
        raise RuntimeError("the fault itself")
    if how != "well":
        comm.barrier()  # the others wait for the one that failed
        time.sleep(60)


if __name__ == "__main__":
    entry_point(work, sys.argv[1:])

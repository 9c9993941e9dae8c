"""Write the model folder of an unfinished run, from its newest whole checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coma_ds.commands.evaluate_command import read_run

EXAMPLES = """As many ranks as trained read a checkpoint as it is; for another number it is
converted first, which takes its size on the disk for a while:
  torchrun --nproc-per-node 8 -m coma_ds.commands.main export RUN

examples:
  coma-ds export runs/mine
  coma-ds export runs/mine --checkpoint runs/mine/checkpoints/step-00000400 --output best"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run (config.yaml, checkpoints)")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="a checkpoint (default: the newest that is whole)"
    )
    parser.add_argument("--output", metavar="DIR", help="a new folder (default: RUN/model)")


def execute(args: argparse.Namespace) -> int:
    """Load the checkpoint and export it.  Raises ``ValueError`` for bad input."""
    folder = Path(args.run)
    config = read_run(folder)
    output = Path(args.output).absolute() if args.output else folder.absolute() / "model"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: name a new folder with --output")

    from coma_ds import comm, engine, hardware
    from coma_ds.assemble import build_engine, build_processing, export_run
    from coma_ds.checkpoint import Checkpoints, load_checkpoint
    from coma_ds.screen import log_to_stderr

    device = engine.start()
    hardware.share_threads()
    log_to_stderr(comm.rank() == 0)
    published = Checkpoints(folder / "checkpoints", config.checkpoint)
    checkpoint = published.find(args.checkpoint or "auto")
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint to export")
    source, processing = build_processing(config)
    trainer = build_engine(config, source, processing, device)
    step = load_checkpoint(trainer, checkpoint)
    export_run(config, trainer, processing, output, step)
    if comm.rank() == 0:
        sys.stdout.write(f"step {step} of {config.optim.steps} -> {output}\n")
    return 0

"""What a job will read: its config, and the data that every node must see."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from coma_ds.config import RunConfig

ROWS, OPENED = 100, 4  # of each source: images found, and decoded


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def recipe_config(args: argparse.Namespace) -> RunConfig:
    """The config that ``train`` would resolve.  Raises ``ValueError`` as that does."""
    from coma_ds.config import load_config
    from coma_ds.effects import check_effect, in_a_job

    config = in_a_job(load_config(args.recipe, args.overrides))
    check_effect(config, args.overrides)
    return config


def evaluated_config(words: list[str]) -> RunConfig:
    """The config of a finished run as ``coma-ds evaluate`` takes it; ``output`` is the folder of
    the results.  Raises ``ValueError`` where there is no such run, or for wrong options."""
    from coma_ds.commands import evaluate_command

    parser = _Parser(prog="evaluate", allow_abbrev=False)
    evaluate_command.add_arguments(parser)
    args = parser.parse_args(words)
    config, file = evaluate_command.settle(args)
    sets = {"sets": tuple(args.sets) or config.eval.sets, "along": ()}
    sets = config.eval.model_copy(update=sets)
    return config.model_copy(update={"output": str(file.absolute().parent), "eval": sets})


def check_data(config: RunConfig) -> None:
    """Raise ``ValueError`` when the model, the checkpoint that a first start goes on from, or a
    sample of the training data or its images is not here.

    Where the config allows bad rows, more than that share of the sample.
    """
    from coma_ds.checks import check_names
    from coma_ds.manifest import check_given
    from coma_ds.model.source import resolve_model

    resolve_model(
        config.init_from or config.model.path, "init_from" if config.init_from else "model.path"
    )
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        check_given(config.checkpoint.resume)
    check_names(config)
    if config.data.format == "builtin":
        return
    from coma_ds.assemble import build_sources
    from coma_ds.checks import BadRows

    bad = BadRows(config.data.bad_rows)
    for name, reader in build_sources(config).items():
        count = min(ROWS, len(reader))
        rows = [number * len(reader) // count for number in range(count)]
        bad.look(name, rows, partial(_check_row, reader, set(rows[:: max(1, count // OPENED)])))
    logging.getLogger("coma_ds").setLevel(logging.ERROR)  # the trainer warns of the others
    bad.judge()


def check_sets(config: RunConfig) -> None:
    """Raise ``ValueError`` when a set that is to be evaluated, or one of a sample of its images, is
    not here."""
    from coma_ds.checks import check_names

    check_names(config)
    if config.objective != "match" or config.eval.root is None:
        return
    from coma_ds.assessment import load_tasks
    from coma_ds.data.images import FilePicture

    for task in load_tasks(config, Path(config.output)):
        sides = [*task.queries, *task.pool]
        for side in sides[:: max(1, len(sides) // ROWS)]:
            for picture in side.images:
                if isinstance(picture, FilePicture):
                    picture.check_exists()


def _check_row(reader: Sequence, decoded: set[int], row: int) -> None:
    from coma_ds.data.images import check_pictures

    check_pictures(reader[row], decoded=row in decoded)

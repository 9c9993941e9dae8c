"""Measure a finished run: the paper's table for stage 2, the bottleneck table for stage 1."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from coma_ds.config import RunConfig

EXAMPLES = """Results go to RUN/results.json.  More ranks share the work, with the same result:
  torchrun --nproc-per-node 8 -m coma_ds.commands.main evaluate RUN

examples:
  coma-ds evaluate runs/demo/match
  coma-ds evaluate runs/demo/match --sets name_t2i/seen i2i/seen
  coma-ds evaluate runs/mine --root /data/mmeb-eval --image-root /data/mmeb-images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run (config.yaml and model/)")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these sets")
    parser.add_argument("--root", help="a folder (or hub name) in MMEB-eval's format")
    parser.add_argument(
        "--image-root",
        metavar="DIR",
        help="where the image paths of --root start (default: ROOT/images, where that is)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="inputs at a time")
    parser.add_argument(
        "--output", metavar="FILE", help="where the results go (default: RUN/results.json)"
    )


def read_run(folder: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The config of the run in ``folder``.  Raises ``ValueError`` when there is no run."""
    from coma_ds.config import load_config

    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} is no run: there is no config.yaml in it")
    return load_config(str(file), list(overrides))


def settle(args: argparse.Namespace) -> tuple[RunConfig, Path]:
    """The config that is evaluated with, and the file of the results.

    Raises ``ValueError`` for a folder that is no finished run, for a run of stage 1 with options of
    stage 2, and where no results can be written.
    """
    folder = Path(args.run)
    given = {"eval.root": args.root, "eval.image_root": args.image_root}
    given["eval.batch_size"] = args.batch_size
    if args.root:
        given["eval.sets"] = []  # those of the run are of other data
    words = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    config = read_run(folder, tuple(words))
    if not (folder / "model" / "config.json").is_file():
        raise ValueError(
            f"{folder} has no model/: the run is not finished; "
            "coma-ds export writes it from the newest checkpoint"
        )
    if config.objective != "match" and (args.sets or args.root):
        raise ValueError(
            f"{folder} is a run of stage 1, which has no ranking sets: leave --sets and --root out"
        )
    file = Path(args.output) if args.output else folder / "results.json"
    read_results(file)
    if not os.access(file.absolute().parent, os.W_OK):
        raise ValueError(
            f"{file} cannot be written: {file.absolute().parent} is read-only here; --output names "
            "another place"
        )
    return config, file


def execute(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the results.  Raises ``ValueError`` for bad input."""
    config, file = settle(args)
    folder, before = Path(args.run), read_results(file)
    ranking = config.objective == "match"

    from coma_ds import comm, engine, hardware
    from coma_ds.evaluation import summed_up, write_results
    from coma_ds.run import log_to_stderr
    from coma_ds.run_folder import identity

    device = engine.start()
    hardware.share_threads()
    log_to_stderr(comm.rank() == 0)
    measure = _ranking if ranking else _bottleneck
    results, text = measure(folder, config, args.sets, device)
    if comm.rank() == 0:
        results |= identity(folder / "model")
        if any(before.get(key) != results.get(key) for key in ("weights", "root")):
            before = {}
        others = before.get("sets", {}).keys() - results.get("sets", {}).keys()
        kept = ""
        if args.sets and others:  # they stay, and the means are those of all
            results |= summed_up(before["sets"] | results["sets"])
            mean = 100 * results["groups"]["All"]
            kept = f", beside {len(others)} measured before: P@1 {mean:.1f} % over all"
        sys.stdout.write(f"{text}\n")
        write_results(file, before | results)
        sys.stdout.write(f"-> {file}{kept}\n")
    return 0


def read_results(file: Path) -> dict:
    """What ``file`` holds so far; empty where it is not there.

    Raises ``ValueError`` where no results can be written, or something else stands there.
    """
    if not file.is_dir() and file.absolute().parent.is_dir():
        try:
            results = json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} holds no results ({error}): name another --output") from None
        if isinstance(results, dict) and {"sets", "bottleneck", "training_seconds"} & {*results}:
            return results
        raise ValueError(f"{file} holds no results: name another --output")
    place = "is a folder" if file.is_dir() else f"cannot be: {file.absolute().parent} is no folder"
    raise ValueError(f"{file} {place}; --output names a file")


def _ranking(folder: Path, config: RunConfig, sets: list[str], device: torch.device):
    from coma_ds.assessment import evaluate_ranking, format_pixels, load_tasks
    from coma_ds.data.collate import Collator
    from coma_ds.evaluation import format_table
    from coma_ds.model.loading import load_finished

    tasks = load_tasks(config, folder.absolute().parent / "evaluation_sets", sets)
    if not tasks:
        raise ValueError(
            f"no evaluation sets: data.format is {config.data.format!r}, so name a folder in "
            "MMEB-eval's format with --root"
        )
    model, processing = load_finished(
        str(folder / "model"), config.model, precision=config.precision, device=device
    )
    results = evaluate_ranking(model, Collator(processing), tasks, config, device)
    return results, f"{format_table(results)}{format_pixels(results)}"


def _bottleneck(folder: Path, config: RunConfig, _: list[str], device: torch.device):
    from coma_ds.assessment import bottleneck_questions, evaluate_bottleneck, format_bottleneck
    from coma_ds.data.collate import Collator
    from coma_ds.model.loading import load_finished

    questions = bottleneck_questions(config)
    if not questions:
        raise ValueError(
            f"no questions to ask: data.format is {config.data.format!r} and "
            f"eval.bottleneck_questions {config.eval.bottleneck_questions}; "
            f"name a dialogue file as eval.path in {folder / 'config.yaml'}"
        )
    model, processing = load_finished(
        str(folder / "model"), config.model, precision=config.precision, device=device
    )
    table = evaluate_bottleneck(model, Collator(processing), questions, config, device)
    return {"bottleneck": table}, format_bottleneck(table)

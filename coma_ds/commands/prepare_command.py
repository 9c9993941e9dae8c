"""Look at all the data of a run before it takes a GPU: every image, every row, their lengths."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EXAMPLES = """All images are decoded, each once, and all rows made into samples as in training.
Into the folder --output go
  summary.json     by source: rows, images, what is missing or broken, lengths in tokens
  bad.jsonl        each image and row (from 0) that cannot be used, and why
  lengths.parquet  tokens and image tokens of each sample
  images/          with --resize: the images as large as they are used, for data.image_root
Evaluation sets (eval.root) are looked at as well; --resize is for the training data.
It ends with code 2 when more rows are bad than data.bad_rows lets be replaced.

examples:
  coma-ds prepare --recipe qwen2_5_vl_3b-match data.root=/data/mmeb/train \\
      data.image_root=/data/mmeb/images --output prepared --resize
  coma-ds prepare --recipe mine.yaml --workers 16 --output prepared"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--recipe", required=True, help="a shipped name or a YAML file")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="made where it is not")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one for each core); 0: this one",
    )
    parser.add_argument(
        "--resize", action="store_true", help="keep the images as large as they are used"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a value in place of the recipe's"
    )


def execute(args: argparse.Namespace) -> int:
    """Look, write, and print a table.  Raises ``ValueError`` for what the user can mend."""
    from coma_ds.config import load_config

    config = load_config(args.recipe, args.overrides)
    if config.data.format == "builtin":
        raise ValueError("data.format 'builtin' is whole as it is: there is nothing to prepare")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: expected 0 or more")
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: this is a file, a folder is expected")

    from tqdm import tqdm

    from coma_ds.assemble import build_processing, build_sources
    from coma_ds.assessment import load_tasks
    from coma_ds.data.lengths import Settings
    from coma_ds.data.resized import check_resized
    from coma_ds.preparation import prepare, sides_of, table, write
    from coma_ds.screen import log_to_stderr

    log_to_stderr(True)
    _, processing = build_processing(config)
    check_resized(config.data.image_root, processing)
    # Bad rows are counted here, whatever the run would let pass.
    data = config.data.model_copy(update={"bad_rows": 0.5})
    lenient = config.model_copy(update={"data": data})
    sources: dict = dict(build_sources(lenient))
    if config.objective == "match" and config.eval.root:
        for task in load_tasks(config, folder):
            sources[f"eval/{task.name}"] = sides_of(task)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for name, records in sources.items():
            training = not name.startswith("eval/")
            resized = folder / "images" if args.resize and training else None
            with tqdm(desc=name, unit="", disable=not sys.stderr.isatty()) as bar:
                found.append(
                    prepare(
                        name, records, processing,
                        workers=args.workers, resized=resized, progress=bar.update,
                    )
                )  # fmt: skip
        write(folder, found, Settings.of(config.model, processing.image_processor))
    except OSError as error:
        raise ValueError(f"--output {folder}: {error.strerror or error}") from error
    sys.stdout.write(table(found))
    sys.stdout.write(f"written: {folder}\n")
    judge(found, config.data.bad_rows, folder)
    return 0


def judge(found: list, allowed: float, folder: Path) -> None:
    """Raise ``ValueError`` for more bad rows than a run would take, of any source."""
    for source in found:
        bad = len(source.bad_rows)
        share = 0.0 if source.name.startswith("eval/") else allowed
        if bad > share * source.rows:
            image = next(iter(source.bad.values()), None)
            why = image.why if image else next(iter(source.bad_rows.values()))
            raise ValueError(
                f"source {source.name}: {bad} of {source.rows} rows cannot be used, the first: "
                f"{why}; {folder / 'bad.jsonl'} lists them"
            )

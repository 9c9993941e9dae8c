"""What a trained model is worth: ranking sets for stage 2, the bottleneck table for stage 1.

Shapes: N sides, E embedding width.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coma_ds import comm
from coma_ds.config import RunConfig
from coma_ds.data.builtin import BottleneckQuestions
from coma_ds.data.builtin.baseline import pixel_baseline
from coma_ds.data.builtin.evaluation_sets import write_mmeb_eval
from coma_ds.data.collate import Collator
from coma_ds.data.dialogues import DialogueFile, questions_of
from coma_ds.data.mmeb import mmeb_eval
from coma_ds.data.mmeb_layout import mmeb_eval_sets
from coma_ds.data.records import Dialogue, RankingTask, Side
from coma_ds.disk import unwritable
from coma_ds.evaluation import evaluate, precision_at_1
from coma_ds.inference import Run, encode_sides, greedy_answers

log = logging.getLogger("coma_ds")

IMAGE_TO_IMAGE = ("i2i/", "i2i_style/")  # of the built-in sets


def load_tasks(config: RunConfig, cache: Path, sets: Sequence[str] = ()) -> list[RankingTask]:
    """The ranking sets of a run: ``eval.root``, or the built-in ones written under ``cache``.

    Image paths start at ``eval.image_root``, else in ``images`` below the root, if that is there.
    ``sets`` names those wanted, else ``eval.sets``, else all.  Raises ``ValueError`` for a name
    that is not there.
    """
    root, images = config.eval.root, config.eval.image_root
    if root is None:
        if config.data.format != "builtin":
            return []
        comm.decide(lambda: _write_sets(cache))
        root = str(cache)
    if images is None and (Path(root) / "images").is_dir():
        images = str(Path(root) / "images")
    names = mmeb_eval_sets(root)
    wanted = tuple(sets) or config.eval.sets or tuple(names)
    for name in wanted:
        if name not in names:
            raise ValueError(f"evaluation set {name!r} is not in {root}: it has {', '.join(names)}")
    return [mmeb_eval(root, images, name) for name in wanted]


def _write_sets(folder: Path) -> None:
    try:
        write_mmeb_eval(folder)
    except OSError as error:
        raise ValueError(unwritable(folder, error)) from error


def evaluate_ranking(
    run: Run,
    collator: Collator,
    tasks: Sequence[RankingTask],
    config: RunConfig,
    device,
    watch: Callable | None = None,
) -> dict[str, Any]:
    """The results of ``evaluation.evaluate``, the same on any number of ranks.

    The built-in image-to-image sets have ``pixel_p@1`` as well, what raw pixels reach.  ``root``
    says where the sets are from: a folder, a hub name, or None for the built-in ones.
    """

    def encode(sides) -> np.ndarray:
        return encode_sides(
            run,
            collator,
            sides,
            batch_size=config.eval.batch_size,
            device=device,
            workers=config.data.workers,
        )

    results = evaluate(tasks, encode, watch, config.match.matryoshka)
    root = config.eval.root
    results["root"] = os.path.abspath(root) if root and os.path.isdir(root) else root
    if root is None:
        for task in tasks:
            if task.name.startswith(IMAGE_TO_IMAGE):
                results["sets"][task.name]["pixel_p@1"] = pixel_precision(task)
    return results


def pixel_precision(task: RankingTask) -> float:
    """Precision@1 of the raw-pixel baseline on a set whose sides all have one image."""

    def pixels(sides: Sequence[Side]) -> torch.Tensor:
        rows = [pixel_baseline(side.images[0].open()) for side in sides]
        return torch.from_numpy(np.stack(rows))

    hits_Q, _ = precision_at_1(pixels(task.queries), pixels(task.pool), task.candidates)
    return float(hits_Q.double().mean())


def format_pixels(results: dict[str, Any]) -> str:
    """A line that puts the raw-pixel baseline beside the model; empty where there is none."""
    parts = [
        f"{name} {100 * row['pixel_p@1']:.1f} (model {100 * row['p@1']:.1f})"
        for name, row in results["sets"].items()
        if "pixel_p@1" in row
    ]
    return f"raw pixels, P@1 in %: {', '.join(parts)}\n" if parts else ""


def bottleneck_questions(config: RunConfig) -> list[Dialogue]:
    """The questions of the bottleneck table, one turn each; none for data without them."""
    per_kind = config.eval.bottleneck_questions
    if not per_kind:
        return []
    if config.eval.path:
        dialogues = DialogueFile(config.eval.path, config.eval.image_root or config.data.image_root)
        return questions_of(dialogues, per_kind)
    if config.data.format == "builtin":
        return list(BottleneckQuestions(per_kind=per_kind))
    return []


def evaluate_bottleneck(
    run: Run, collator: Collator, questions: Sequence[Dialogue], config: RunConfig, device
) -> dict[str, dict[str, float]]:
    """Exact-match accuracy by kind of question: ``{kind: {"tokens", "visible", "blind"}}``.

    ``tokens``: through the compression tokens alone.  ``visible``: the image in sight, the upper
    control.  ``blind``: the tokens of another picture, the lower one.  A model without
    compression tokens has the upper one only.
    """
    ways = {"visible": ("causal", False)}
    if config.model.compression_tokens:
        ways = {"tokens": ("bottleneck", False), **ways, "blind": ("bottleneck", True)}
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for way, (visibility, blind) in ways.items():
        answers = greedy_answers(
            run,
            collator,
            questions,
            visibility,
            blind=blind,
            batch_size=config.eval.batch_size,
            device=device,
            workers=config.data.workers,
        )
        hits: dict[str, list[bool]] = defaultdict(list)
        for dialogue, answer in zip(questions, answers):
            turn = dialogue.turns[-1]
            hits[turn.kind].append(answer.strip().lower() == turn.answer.strip().lower())
        for kind, right in hits.items():
            table[kind][way] = sum(right) / len(right)
            table[kind]["questions"] = len(right)
    return dict(table)


def format_bottleneck(table: dict[str, dict[str, float]]) -> str:
    """The bottleneck table for a terminal, in percent."""
    ways = [w for w in ("tokens", "visible", "blind") if any(w in row for row in table.values())]
    lines = ["question        " + "".join(f"{w:>10}" for w in ways) + "   questions"]
    for kind, row in table.items():
        cells = "".join(f"{100 * row[w]:>9.1f}%" for w in ways)
        lines.append(f"{kind:<16}{cells}{row['questions']:>12}")
    return "\n".join(lines)

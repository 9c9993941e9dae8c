"""Which keys of a config do nothing in a run of its kind."""

from __future__ import annotations

import os
from collections.abc import Iterator

from coma_ds.config import RunConfig
from coma_ds.rank_report import CONTROL
from coma_ds.recipe_files import parse_overrides

JOB_CHECKPOINTS = 10  # of its run, at most

_FORMATS = {  # the keys of data that a format reads, beside those that all of them do
    "builtin": ("length", "turns", "sources"),
    "mmeb": (
        "root",
        "image_root",
        "sources",
        "split",
        "limit",
        "leave_out_empty",
        "bad_rows",
        "lengths",
    ),
    "pairs": ("path", "image_root", "limit", "min_score", "columns", "bad_rows", "lengths"),
    "dialogues": ("path", "image_root", "limit", "bad_rows", "lengths"),
}


def in_a_job(config: RunConfig) -> RunConfig:
    """A job of a cluster that is told of no checkpoints publishes some: it may end at any time."""
    if CONTROL not in os.environ or config.checkpoint.every:
        return config
    every = max(1, -(-config.optim.steps // JOB_CHECKPOINTS))
    settings = config.checkpoint.model_copy(update={"every": every})
    return config.model_copy(update={"checkpoint": settings})


def check_effect(config: RunConfig, overrides: list[str]) -> None:
    """Raise ``ValueError`` for an override that changes nothing of this run.

    A recipe may hold such keys, its heirs can use them; on a command line they are a mistake.
    One that says none (null, 0, false, an empty list) is taken.
    """
    over = parse_overrides(overrides)
    for key, cause in _idle(config):
        section, _, leaf = key.partition(".")
        node = over.get(section, {})
        given = node if not leaf else {leaf: node[leaf]} if leaf in node else {}
        for name in given:
            if getattr(getattr(config, section), name):
                raise ValueError(f"override {section}.{name} has no effect with {cause}")


def _idle(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys (or sections) without effect in this run, each with the cause of it."""
    model, data, compress, ways = config.model, config.data, config.compress, config.eval
    matching = config.objective == "match"
    objective, of_format = f"objective {config.objective!r}", f"data.format {data.format!r}"
    if matching:
        only_other = ("compress", "eval.path", "eval.bottleneck_questions", "model.bottleneck")
    else:
        only_other = ("match", "eval.root", "eval.sets", "eval.along")
    yield from ((key, objective) for key in only_other)
    for key in {key for keys in _FORMATS.values() for key in keys} - {*_FORMATS[data.format]}:
        yield f"data.{key}", of_format
    if data.format == "builtin" and matching:
        yield "data.turns", objective
    elif data.format == "builtin":
        yield "data.sources", f"{objective}, whose built-in data is one source"
        if compress.format != "multi_turn":
            yield "data.turns", f"compress.format {compress.format!r}"
    if data.format in ("pairs", "dialogues") or (data.format == "builtin" and not matching):
        yield from ((f"data.{key}", "a single source") for key in ("weighting", "sub_batch"))
    if compress.visible and not matching:
        yield "model.bottleneck", "compress.visible, which has none"
    if matching:
        yield (
            "model.gradient_checkpointing",
            f"{objective}, where chunks bound what is in memory (chunk.samples, chunk.tokens)",
        )
    else:
        yield "chunk.keep", f"{objective}, where no chunk runs twice"
    if model.adapter == "none":
        yield "model.lora", "model.adapter 'none'"
    if config.init_from:
        yield "model.path", "init_from, which names the model (init_from=null leaves it out)"
    if config.optim.kind == "sgd":
        yield "optim.betas", "optim.kind 'sgd'"
    if not (ways.every or ways.at_end):
        for leaf in ("root", "image_root", "sets", "along", "batch_size", "path"):
            yield f"eval.{leaf}", "eval.at_end=false and eval.every=0: nothing is evaluated"
    if not (ways.every and config.checkpoint.every):
        yield "checkpoint.best", "eval.every=0 or checkpoint.every=0: none is measured on the way"
    if matching and not ways.every:
        yield "eval.along", "eval.every=0: no evaluation on the way"
    asked = ways.root if matching else ways.path
    if not asked:
        yield "eval.image_root", f"eval.{'root' if matching else 'path'} left out"
    if matching and not ways.root and data.format != "builtin":
        yield from ((f"eval.{key}", "eval.root left out") for key in ("sets", "along"))

"""From a config to the parts of a run (processing, data, model, engine), and to what it leaves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.config import DataConfig, RunConfig
from coma_ds.data.builtin import BuiltinDialogues, BuiltinPairs
from coma_ds.data.collate import Collator
from coma_ds.data.dialogues import DialogueFile, SingleTurns
from coma_ds.data.lengths import Settings, read_lengths
from coma_ds.data.mmeb import MMEBTrain
from coma_ds.data.mmeb_layout import folders
from coma_ds.data.pairs import PairFile
from coma_ds.data.processing import Processing, load_processing
from coma_ds.data.replacements import Rows
from coma_ds.data.resized import check_resized
from coma_ds.data.sampler import BatchOrder, LocalBatches, Sources
from coma_ds.engine import Engine, full_parameters
from coma_ds.mechanics import deepspeed_config
from coma_ds.model.card import model_card
from coma_ds.model.embedder import CompressionModel
from coma_ds.model.export import export_model
from coma_ds.model.loading import build_model
from coma_ds.model.source import resolve_model
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer

log = logging.getLogger("coma_ds")

PREFETCHED = 2  # batches that each worker of the loader holds ready

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism


def build_sources(config: RunConfig) -> dict[str, Sequence]:
    """The training readers by name.

    Raises ``ValueError`` for a missing path, an unknown source, a wrong column.
    """
    data = config.data
    if data.format == "builtin":
        return _builtin_sources(config)
    if data.format == "mmeb":
        if not data.root:
            raise ValueError("data.format 'mmeb' needs data.root, the folder of the sets")
        if not data.sources:
            there = ""
            if Path(data.root).is_dir():
                there = f"; {data.root} has {', '.join(folders(data.root)) or 'none'}"
            raise ValueError(f"data.format 'mmeb' needs data.sources, the names of sets{there}")
        return {
            name: MMEBTrain(
                data.root,
                data.image_root,
                name,
                split=data.split,
                limit=data.limit,
                leave_out_empty=data.leave_out_empty,
                check_all=not data.bad_rows,
            )
            for name in data.sources
        }
    if not data.path:
        raise ValueError(f"data.format {data.format!r} needs data.path, the file to read")
    name = Path(data.path).name
    if data.format == "pairs":
        reader = PairFile(
            data.path, data.image_root, data.columns, min_score=data.min_score, limit=data.limit
        )
        return {name: reader}
    dialogues = DialogueFile(data.path, data.image_root, limit=data.limit)
    if config.compress.format == "single_turn":
        return {name: SingleTurns(dialogues, config.seed)}
    if config.compress.format != "multi_turn":
        raise ValueError(
            f"compress.format {config.compress.format!r} is made by the built-in data only: write "
            "such dialogues into the file and use 'multi_turn', which takes them as they are"
        )
    return {name: dialogues}


def _builtin_sources(config: RunConfig) -> dict[str, Sequence]:
    data = config.data
    if config.objective == "compress":
        return {
            "dialogues": BuiltinDialogues(
                seed=config.seed,
                length=data.length,
                format=config.compress.format,
                turns=data.turns,
            )
        }
    pairs = BuiltinPairs(seed=config.seed, length=data.length)
    names = data.sources or tuple(pairs.source_names)
    unknown = [n for n in names if n not in pairs.source_names]
    if unknown:
        raise ValueError(
            f"data.sources: unknown {unknown}, the built-in ones are {list(pairs.source_names)}"
        )
    return {name: pairs[name] for name in names}


@dataclass
class TrainingData:
    """Order, readers and collator of a run; ``batches`` is this rank's stream."""

    order: BatchOrder
    sources: Sources
    collator: Collator
    workers: int
    replaces: bool = False  # bad rows, by others of their source

    def names(self, step: int) -> list[tuple[str, int]]:
        """Source and row of the samples of a step, all ranks."""
        return [(self.order.names[source], row) for source, row in self.order.global_batch(step)]

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of the optimizer steps ``start .. stop - 1``.

        Raises ``ValueError`` for a bad row or image that is not replaced, with its own words, from
        workers as well.
        """
        loader = DataLoader(
            Rows(self.sources, self.collator, replaces=self.replaces),
            batch_sampler=LocalBatches(self.order, comm.rank(), comm.world_size(), start, stop),
            collate_fn=self.collator.pack,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCHED if self.workers else None,
        )
        try:
            yield from loader
        except ValueError as error:
            # torch wraps what a worker raised into its whole trace
            raise ValueError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from error


def build_data(config: RunConfig, processing: Processing) -> TrainingData:
    """Readers and order.  Raises ``ValueError`` for a batch that the world cannot share."""
    world, size = comm.world_size(), config.optim.batch_size
    if size % world:
        raise ValueError(f"optim.batch_size {size} is not a multiple of the {world} ranks")
    data: DataConfig = config.data
    check_resized(data.image_root, processing)
    sources = Sources(build_sources(config))
    weights = None
    if data.lengths:
        settings = Settings.of(config.model, processing.image_processor)
        weights = _row_tokens(data.lengths, sources.sizes, settings)
    order = BatchOrder(
        sources.sizes, size, data.sub_batch, data.weighting, config.seed,
        weights=weights,
    )  # fmt: skip
    return TrainingData(order, sources, Collator(processing), data.workers, data.bad_rows > 0)


def _row_tokens(folder: str, sizes: dict[str, int], settings: Settings) -> dict[str, np.ndarray]:
    try:
        known = read_lengths(folder, settings)
    except ValueError as error:
        raise ValueError(f"data.lengths {error}") from error
    found = {}
    for name, size in sizes.items():
        if name not in known:
            raise ValueError(
                f"data.lengths {folder!r}: source {name!r} was not measured, only "
                f"{', '.join(known)}: run coma-ds prepare again"
            )
        try:
            found[name] = known[name].of_rows(size)
        except ValueError as error:
            raise ValueError(f"data.lengths {folder!r}, source {name!r}: {error}") from error
    return found


def build_processing(config: RunConfig) -> tuple[str, Processing]:
    """The model's source folder (or hub name) and its processing."""
    model = config.model
    key = "init_from" if config.init_from else "model.path"
    source = resolve_model(config.init_from or model.path, key)
    try:
        return source, load_processing(
            source,
            compression_tokens=model.compression_tokens,
            min_vision_tokens=model.min_vision_tokens,
            max_vision_tokens=model.max_vision_tokens,
            max_length=model.max_length,
        )
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def build_objective(config: RunConfig) -> Compress | Match:
    """The objective that the config names."""
    return Compress(config.compress) if config.objective == "compress" else Match(config.match)


def build_bare_model(
    config: RunConfig,
    source: str,
    processing: Processing,
    device: torch.device,
    sharding: dict | None = None,
) -> CompressionModel:
    """The model alone, on the host unless it is sharded at once."""
    ids = processing.compression_ids
    return build_model(
        config.model,
        config.match,
        matching=config.objective == "match",
        source=source,
        first_id=ids[0] if ids else 0,
        extras=processing.extras,
        precision=config.precision,
        sharding=sharding,
        whole=full_parameters,
        seed=config.seed,
        device=device,
    )


def build_engine(
    config: RunConfig, source: str, processing: Processing, device: torch.device
) -> Engine:
    """The model on its shards, with its optimizer."""
    mechanics = deepspeed_config(config)
    stage = mechanics["zero_optimization"].get("stage", 0)
    sharding = mechanics if stage == 3 else None
    model = build_bare_model(config, source, processing, device, sharding)
    if stage < 3:
        model.to(device)
    return Engine(model, build_optimizer(model, config.optim), config, device)


def export_run(
    config: RunConfig, engine: Engine, processing: Processing, folder: Path, step: int
) -> None:
    """Write the model of a run, as it is after ``step`` steps; every rank takes part.

    Raises ``ValueError`` on every rank when it cannot be written.
    """
    problem = ""
    try:
        export_model(
            engine.model,
            processing,
            folder,
            whole=full_parameters,
            main=comm.rank() == 0,
            card=model_card(config, step),
            extras={"objective": config.objective, "recipe": config.recipe, "step": step},
        )
    except ValueError as error:
        problem = str(error)
    if found := [problem for problem in comm.all_objects(problem) if problem]:
        raise ValueError(found[0])

"""A GradCache step of ours and of sentence-transformers, on one CPU.

Both train the same embedder on the same batch with the same chunks and AdamW.  The rival sees it as
one of its modules, whose features are the numbers of samples: so it pays for nothing of ours but
the forward.  As it does not know of images, they go through the tower with their chunk, twice.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from coma_ds import engine as engines
from coma_ds.assemble import (
    build_bare_model,
    build_data,
    build_engine,
    build_objective,
    build_processing,
)
from coma_ds.batch import Batch
from coma_ds.config import RunConfig, load_config
from coma_ds.optim import build_optimizer
from coma_ds.step import Budget, grad_cache

log = logging.getLogger("coma_ds")

PACKAGES = ("torch", "deepspeed", "transformers", "sentence-transformers")
TEMPERATURE = 0.05
SAME = 1e-4  # of loss and gradient, relative: fp32
WARM = 2  # turns that do not count


@dataclass
class Ours:
    """A step under DeepSpeed."""

    engine: engines.Engine
    config: RunConfig
    batch: Batch

    def gradient(self) -> float:
        """Forward and backward; the loss."""
        objective = build_objective(self.config)
        report = grad_cache(
            self.engine, objective, self.batch, Budget.of(self.config.chunk), seed=0, step=0
        )
        return report["loss"]

    def step(self) -> None:
        """A whole one."""
        self.gradient()
        self.engine.step(0)


class Embedder(nn.Module):
    """A ``CompressionModel`` as a module of sentence-transformers; features are row numbers."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds ``sentence_embedding``, [B, E]."""
        part = self.batch.split([features["rows"]], with_images=True)[0]
        images = self.model.embed_images(part.images) if part.images is not None else None
        return features | {"sentence_embedding": self.model.embeddings(part, images)}


class Rival:
    """sentence-transformers' ``CachedMultipleNegativesRankingLoss``."""

    def __init__(self, model: nn.Module, config: RunConfig, batch: Batch) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )

        wrapped = SentenceTransformer(modules=[Embedder(model, batch)], device="cpu")
        self.model = wrapped.train()
        self.loss = CachedMultipleNegativesRankingLoss(
            wrapped, scale=1 / TEMPERATURE, mini_batch_size=config.chunk.samples
        )
        self.optimizer = build_optimizer(model, config.optim)
        rows = torch.arange(2 * batch.pairs)
        self.features = [{"rows": rows[: batch.pairs]}, {"rows": rows[batch.pairs :]}]
        self.clip = config.optim.clip

    def gradient(self) -> float:
        """Forward and backward; the loss."""
        self.optimizer.zero_grad()
        loss = self.loss([dict(f) for f in self.features], torch.zeros(0))
        loss.backward()
        return float(loss.detach())

    def step(self) -> None:
        """A whole one."""
        self.gradient()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()


def compare(*, rounds: int, pairs: int, chunk: int) -> dict:
    """Seconds of each turn at ZeRO-0 and ZeRO-3, and the ratios, as JSON values.

    Raises ``ValueError`` where the rival is not installed, or computes something else.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError("the rival is missing: pip install sentence-transformers")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    device = engines.start()
    found: dict = {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "chunk": chunk,
        "versions": {name: version(name) for name in PACKAGES},
    }
    with TemporaryDirectory() as folder:
        for stage in ("zero0", "zero3"):
            config = load_config(
                "demo-control",
                [
                    f"output={folder}/run", f"deepspeed={stage}", "precision=fp32",
                    f"optim.batch_size={pairs}", f"data.length={8 * pairs}", "data.workers=0",
                    f"chunk.samples={chunk}", f"match.temperature={TEMPERATURE}",
                    "match.mask_false_negatives=false",
                ],
            )  # fmt: skip
            source, processing = build_processing(config)
            batch = next(build_data(config, processing).batches(0, 1))
            ours = Ours(build_engine(config, source, processing, device), config, batch)
            keeps = config.chunk.model_copy(update={"keep": 2 * pairs})
            kept = replace(ours, config=config.model_copy(update={"chunk": keeps}))
            if stage == "zero0":
                twin = build_bare_model(config, source, processing, device)
                rival = Rival(twin, config, batch)
                found["loss"] = check(ours, rival)
            calls = {"replayed": ours.step, "rival": rival.step, "kept": kept.step}
            log.info("%s: %d turns of %s", stage, rounds + WARM, ", ".join(calls))
            found[stage] = interleave(rounds, calls)
            ours.engine.destroy()
    found["ratios"] = {
        f"{stage}, graphs {way}": ratio(found[stage]["rival"], found[stage][way])
        for stage in ("zero0", "zero3")
        for way in ("replayed", "kept")
    }
    return found


def check(ours: Ours, rival: Rival) -> list[float]:
    """Both losses, equal, with equal gradients, before anything is timed.

    Raises ``ValueError`` where they differ.
    """
    losses = [ours.gradient(), rival.gradient()]
    own, prefix = ours.engine.gradients(), "0.model."
    gap = size = 0.0
    for name, parameter in rival.model.named_parameters():
        if parameter.grad is not None:
            mine = own.pop(name.removeprefix(prefix))
            gap += float((mine - parameter.grad).square().sum())
            size += float(parameter.grad.square().sum())
    left = [name for name, gradient in own.items() if gradient.any()]
    ours.engine.discard_gradients()
    apart = (gap / size) ** 0.5
    if left or not (abs(losses[0] - losses[1]) < SAME * losses[1] and apart < SAME):
        raise ValueError(
            f"they do not compute the same: losses {losses}, gradients apart by {apart:.1e}, "
            f"without one at the rival: {left or 'none'}"
        )
    return losses


def interleave(rounds: int, calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, in turns; the first ones do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn >= WARM:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as long ``slow`` takes, turn by turn: the median, and the range."""
    each = sorted(a / b for a, b in zip(slow, fast))
    return {"median": statistics.median(each), "least": each[0], "most": each[-1]}


def table(found: dict) -> str:
    """For a screen."""
    lines = [
        f"stage 2 of the demo model, {found['pairs']} pairs in chunks of {found['chunk']} samples, "
        f"fp32, {found['threads']} thread(s), {found['cpu']}",
        "",
        f"{'':24}{'samples/s':>12}{'against the rival':>32}",
    ]
    samples = found["pairs"]
    rival = samples / statistics.median(found["zero0"]["rival"])
    lines.append(f"{'sentence-transformers':24}{rival:12.1f}")
    for name, r in found["ratios"].items():
        stage, _, way = name.partition(", graphs ")
        own = samples / statistics.median(found[stage][way])
        said = f"{r['median']:.2f} x ({r['least']:.2f} to {r['most']:.2f})"
        lines.append(f"{name:24}{own:12.1f}{said:>32}")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""Whole steps at the real shape of a model on one GPU: ours, improvements off, the usual way.

Weights are random: no time depends on them.  Nothing is reported before the tests that need a GPU
have passed, and every way has given the same loss.
"""

from __future__ import annotations

import datetime
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from coma_ds import engine as engines
from coma_ds.assemble import build_objective
from coma_ds.batch import Batch
from coma_ds.bench import usual
from coma_ds.bench.clock import Clock
from coma_ds.bench.made import Counts, Maker
from coma_ds.bench.rates import attention, matmul_rate
from coma_ds.budget import measure, share_out
from coma_ds.config import ChunkConfig, RunConfig, load_config
from coma_ds.model.liger import apply_liger, missing_liger
from coma_ds.model.loading import build_model
from coma_ds.model.varlen import best_carrier
from coma_ds.optim import build_optimizer
from coma_ds.planning.flops import ModelFlops
from coma_ds.planning.outline import shape_of
from coma_ds.step import Budget, accumulate, grad_cache

log = logging.getLogger("coma_ds")

FIRST_ID = 151_700  # of the compression tokens, in the empty rows of the table
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "flash-attn", "liger-kernel")
SAME = 0.02  # of losses, in 16 bits
WIDE = 65_536  # targets, at which memory is compared


@dataclass(frozen=True)
class Way:
    """How a step is done.  ``chunk``: None for what the memory allows."""

    name: str
    packed: bool = True
    liger: bool = True
    checkpointed: bool = False
    chunk: ChunkConfig | None = None
    is_usual: bool = False


MATCH = (
    Way("ours"),
    Way("no graph kept", chunk=ChunkConfig(samples=4096, tokens="auto")),
    Way("chunks of 4096 tokens", chunk=ChunkConfig(samples=4096, tokens=4096)),
    Way("replay with checkpoints", checkpointed=True, chunk=ChunkConfig(samples=32)),
    Way("padded, torch's attention", packed=False, chunk=ChunkConfig(samples=32)),
    Way("no Liger", liger=False),
    Way("usual", False, False, True, ChunkConfig(samples=32), is_usual=True),
)
COMPRESS = (
    Way("ours"),
    Way("with checkpoints", checkpointed=True),
    Way("chunks of 4096 tokens", chunk=ChunkConfig(samples=4096, tokens=4096)),
    Way("padded, torch's attention", packed=False, chunk=ChunkConfig(samples=4)),
    Way("no Liger", liger=False),
    Way("usual", False, False, True, ChunkConfig(samples=4), is_usual=True),
)
AUTO = ChunkConfig(samples=4096, tokens="auto", keep="auto")


def check(root: Path) -> None:
    """Run the tests that need a GPU.  Raises ``ValueError`` where they fail or are not there."""
    if not (root / "tests" / "gpu").is_dir():
        raise ValueError("the tests of the GPU (tests/gpu) are not here: run this in a checkout")
    found = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/gpu"], cwd=root)
    if found.returncode:
        raise ValueError("nothing is reported: tests of the GPU failed (see above)")


def compare(
    device: torch.device,
    *,
    recipes: dict[str, str],
    records: dict[str, int],
    rounds: int,
    counts: Counts | None = None,
    overrides: tuple[str, ...] = (),
) -> dict:
    """Each stage in each of its ways, as JSON values.

    ``recipes`` and ``records`` (pairs, dialogues) by stage.  Raises ``ValueError`` where a way
    computes something else than the first.
    """
    found: dict = {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {name: _version(name) for name in PACKAGES},
        "matmul_tflops": matmul_rate(device),
        "stages": {},
    }
    for stage, recipe in recipes.items():
        config = load_config(recipe, ["init_from=null", "model.weights=random", *overrides])
        found["stages"][stage] = _stage(config, device, records[stage], rounds, counts)
        found["stages"][stage]["recipe"] = recipe
    if device.type == "cuda":
        found["attention"] = attention(device)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _stage(
    config: RunConfig, device: torch.device, records: int, rounds: int, counts: Counts | None
) -> dict:
    matching = config.objective == "match"
    with device:
        model = build_model(
            config.model.model_copy(
                update={"liger": False, "attention": "split", "arithmetic": "auto"}
            ),
            config.match,
            matching=matching,
            source=shape_of(config),
            first_id=_first_id(config),
            extras={},
            precision=config.precision,
            sharding=None,
            whole=lambda _: nullcontext(),
            seed=0,
            device=device,
        )
    model.to(device)
    engine = engines.Engine(model, build_optimizer(model, config.optim), config, device)
    maker = Maker(
        model.backbone.lm.config, _first_id(config), config.model.compression_tokens, counts
    )
    batch = (maker.pairs if matching else maker.dialogues)(records, 0).to(device)
    bench = Bench(config, engine, batch, rounds)
    log.info("%s: %d records, %d tokens", config.objective, records, len(batch.input_ids_T))
    ways = sorted(MATCH if matching else COMPRESS, key=lambda way: way.liger)
    results, applied = {}, False
    for way in ways:
        if way.liger and not applied:
            applied = True
            lack = missing_liger(device, config.precision)
            said = lack or str(apply_liger(model))
        with patch.object(engines, "learning_rate", lambda *_: 0.0):  # all ways on one model
            results[way.name] = bench.run(way)
        log.info("%s, %s: %.2f s", config.objective, way.name, results[way.name]["seconds"])
    bench.judge(results)
    found = {
        "records": records,
        "tokens": len(batch.input_ids_T),
        "image_tokens": int(batch.images.tokens_I.sum()),
        "liger": said,
        "ways": {way.name: results[way.name] for way in (MATCH if matching else COMPRESS)},
    }
    if matching:
        found["wide"] = bench.wide()
    engine.destroy()
    return found


def _first_id(config: RunConfig) -> int:
    return FIRST_ID if "Qwen" in config.model.path else 4096


class Bench:
    """One engine whose model is rearranged from way to way."""

    def __init__(self, config: RunConfig, engine, batch: Batch, rounds: int) -> None:
        self.config, self.engine, self.batch, self.rounds = config, engine, batch, rounds
        self.objective = build_objective(config)
        self.matching = config.objective == "match"
        self.device, self.model = engine.device, engine.model
        self.carrier = best_carrier(self.device, torch.bfloat16)[0]

    def arrange(self, way: Way) -> Budget:
        """The model as ``way`` wants it, and its chunks."""
        backbone, lm = self.model.backbone, self.model.backbone.lm
        plain = "sdpa" if self.device.type == "cuda" else "matmul"
        backbone.carrier, backbone.arithmetic = "split", plain
        if way.is_usual:
            backbone.carrier = "dense"
        elif way.packed:
            backbone.carrier, backbone.arithmetic = "packed", self.carrier or plain
        if way.checkpointed:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            lm.gradient_checkpointing_disable()
        chunk = way.chunk or AUTO
        if "auto" not in (chunk.tokens, chunk.keep):
            return replace(Budget.of(chunk), packed=way.packed)
        cost, free = measure(self.engine, self.objective, self.batch)
        longest, total = int(self.batch.sizes_B.max()), len(self.batch.input_ids_T)
        return replace(share_out(chunk, cost, free, longest, total), packed=way.packed)

    def stepper(self, way: Way, budget: Budget) -> Callable[[int], float]:
        """A whole step of that way; its loss."""
        engine, objective, batch = self.engine, self.objective, self.batch
        plain = usual.match if self.matching else usual.compress
        ours = grad_cache if self.matching else accumulate

        def take(step: int) -> float:
            if way.is_usual:
                loss = plain(engine, objective, batch, budget.samples)
            else:
                loss = ours(engine, objective, batch, budget, seed=0, step=step)["loss"]
            engine.step(0)
            return loss

        return take

    def run(self, way: Way) -> dict:
        """Seconds, rates, memory and parts of a way, as JSON values."""
        budget = self.arrange(way)
        take, work = self.stepper(way, budget), self.model.backbone.work
        self._forget()
        self.engine.eval()  # without dropout, whose masks depend on the chunks
        with patch.object(self.engine, "step", _left_out):
            loss = take(0)
        self.engine.train()
        self.engine.discard_gradients()
        take(0)
        work.take()
        self._forget()
        times = []
        for number in range(self.rounds):
            began = self._now()
            take(number + 1)
            times.append(self._now() - began)
        executed = ModelFlops.of(self.model).executed(work.take()) / self.rounds
        memory = torch.cuda.max_memory_allocated(self.device) if self._on_gpu else 0
        clock = Clock(self.device)
        with clock.watch(self.engine, self.objective):
            take = self.stepper(way, budget)
            take(self.rounds + 1)
        seconds = statistics.median(times)
        needed = self.needed()
        return {
            "loss": loss,
            "seconds": seconds,
            "all_seconds": times,
            "records_per_second": self._records / seconds,
            "tokens_per_second": len(self.batch.input_ids_T) / seconds,
            "executed_tflops": executed / seconds / 1e12,
            "executed_per_needed": executed / needed,
            "memory_gib": memory / 2**30,
            "budget": vars(budget),
            "parts": dict(clock.seconds),
        }

    @property
    def _records(self) -> int:
        return self.batch.pairs if self.matching else len(self.batch)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def needed(self) -> float:
        """FLOPs that no way can save."""
        vision = self.model.backbone.lm.config.vision_config
        return ModelFlops.of(self.model).needed(
            self.batch, vision, matching=self.matching, bottleneck=not self.matching
        )

    def judge(self, results: dict[str, dict]) -> None:
        """Raise ``ValueError`` where a way has another loss than the first."""
        first = next(iter(results.values()))["loss"]
        for name, result in results.items():
            if not abs(result["loss"] - first) <= SAME * abs(first):
                raise ValueError(f"{name} has the loss {result['loss']}, another way {first}")

    def wide(self) -> dict[str, float]:
        """Peak memory of a step against 1,024 gathered targets and against ``WIDE``, in GiB."""
        from coma_ds.objectives import match

        budget = self.arrange(Way("ours", chunk=ChunkConfig(samples=4096, tokens=8192)))
        take, found = self.stepper(Way("ours"), budget), {}
        for count in (1024, WIDE):

            def gathered(rows, counts=None, count=count):
                shape = max(0, count - len(rows)), *rows.shape[1:]
                if rows.dtype == torch.int64:  # ids of contents
                    return torch.cat([rows, torch.randint(2**62, shape, device=rows.device)])
                extra = torch.randn(shape, device=rows.device, dtype=rows.dtype)
                return torch.cat([rows, F.normalize(extra, dim=-1)])

            self._forget()
            with patch.object(match.comm, "gather_rows", gathered):
                take(0)
            peak = torch.cuda.max_memory_allocated(self.device) if self._on_gpu else 0
            found[str(count)] = peak / 2**30
        return found

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _forget(self) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def _left_out(step: int) -> None:
    """In the place of the optimizer."""


def table(found: dict) -> str:
    """For a screen, and for the folder of results."""
    lines = [f"{found['card']}, {found['date']}, matmul {found['matmul_tflops']:.0f} TFLOP/s"]
    lines.append(", ".join(f"{name} {number}" for name, number in found["versions"].items()))
    for stage, result in found["stages"].items():
        lines += [
            "",
            f"{stage} ({result['recipe']}): {result['records']} records, {result['tokens']} "
            f"tokens, {result['image_tokens']} of images; Liger: {result['liger']}",
            f"{'':28}{'records/s':>10}{'tokens/s':>10}{'TFLOP/s':>9}{'of matmul':>10}"
            f"{'x needed':>9}{'GiB':>7}{'x usual':>9}",
        ]
        slow = result["ways"]["usual"]["seconds"]
        for name, way in result["ways"].items():
            lines.append(
                f"{name:28}{way['records_per_second']:10.2f}{way['tokens_per_second']:10.0f}"
                f"{way['executed_tflops']:9.0f}"
                f"{way['executed_tflops'] / found['matmul_tflops']:10.0%}"
                f"{way['executed_per_needed']:9.2f}{way['memory_gib']:7.1f}"
                f"{slow / way['seconds']:9.2f}"
            )
        for name in ("ours", "usual"):
            parts = result["ways"][name]["parts"]
            said = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
            lines.append(f"{name}, seconds: {said}")
        if "wide" in result:
            said = ", ".join(f"{size:.2f} GiB at {n}" for n, size in result["wide"].items())
            lines.append(f"memory by gathered targets: {said}")
    if found.get("attention"):
        ratio = found["attention"]["ratio"]
        by = found["attention"]["by"]
        lines += ["", f"attention of stage 1 over causal, same tokens ({by}): {ratio:.2f}"]
    return "\n".join(lines) + "\n"


def write(found: dict, folder: Path) -> Path:
    """The JSON and the table; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = found["card"].lower().replace(" ", "-")
    path = folder / f"{name}-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".txt").write_text(table(found))
    return path

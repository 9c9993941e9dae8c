"""The work of the exactness tests: DeepSpeed's parameters against one process with the batch.

Each case runs three SGD steps on W ranks; the reference holds all ranks' samples in one graph: no
cached embedding, no gather, no DeepSpeed.  The cases themselves stand in ``cases.py``.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.config import ChunkConfig, CompressConfig, MatchConfig, OptimConfig, RunConfig
from coma_ds.engine import Engine, full_parameters
from coma_ds.model.loading import trainable
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer
from coma_ds.step import TOWER, Budget, accumulate, grad_cache, plan_chunks, seed_chunk
from tests.definition import whole_loss
from tests.distributed.broken import broken_step
from tests.tiny import make_batch, tiny_model

STEPS = 3
STRICT = str(Path(__file__).with_name("strict.json"))


@dataclass(frozen=True)
class Case:
    """One configuration; ``broken`` names a fault of ``broken.py`` that it runs with.

    ``deepspeed`` is a name of ``ds_configs/``, or ``strict``: stage 3 with nothing kept whole.
    """

    name: str
    deepspeed: str = "strict"
    stage: str = "match"
    family: str = "qwen2_5_vl"
    images: str = "mixed"  # or "none"; stage 1 also "all"
    uneven: bool = False  # ranks hold different numbers of pairs and negatives, or of dialogues
    precision: str = "fp32"
    kind: str = "sgd"
    clip: float = 0.3
    lr: float = 0.2
    chunk: dict = field(default_factory=lambda: {"samples": 3})
    model: dict = field(default_factory=dict)
    match: dict = field(default_factory=dict)
    compress: dict = field(default_factory=dict)
    poisoned: bool = False  # the gradient of step 1 is not finite, on one rank
    broken: str = ""

    @property
    def run_config(self) -> RunConfig:
        """The same as a run would have it."""
        return RunConfig(
            objective=self.stage,
            precision=self.precision,
            deepspeed=STRICT if self.deepspeed == "strict" else self.deepspeed,
            chunk=ChunkConfig(**self.chunk),
            optim=OptimConfig(
                lr=self.lr, schedule="constant", warmup=0, clip=self.clip, kind=self.kind
            ),
            match=MatchConfig(**self.match),
            compress=CompressConfig(**self.compress),
        )

    def build(self, **changes):
        """The tiny model that the case starts from."""
        model = {**self.model, **changes}
        return tiny_model(self.family, matching=self.stage == "match", **model)

    def batch(self, step: int, rank: int) -> Batch:
        """What a rank gets in a step."""
        return (match_batch if self.stage == "match" else compress_batch)(self, step, rank)


def has_images(case: Case, step: int, rank: int) -> bool:
    """Of two neighbouring ranks one has images, the other one in the next step; none in step 2."""
    if case.images == "mixed":
        return (rank + step) % 2 == 0 and step < 2
    return case.images == "all"


def match_batch(case: Case, step: int, rank: int) -> Batch:
    """A few pairs, images on either side; one target and one query stand on every rank."""
    seen = has_images(case, step, rank)
    pairs = 4 - rank % 2 if case.uneven else 4
    queries = [{"text": 3 + (rank + i) % 4} for i in range(pairs)]
    queries[0]["content"] = 8  # the same question on every rank: its targets do not compete
    targets = []
    for i in range(pairs):
        images = [(2, 2 + i % 2)] * (1 + (i == 1)) if seen and i != 3 else []
        # content 7 stands on every rank: a false negative across ranks
        content = {"content": 7} if i == 2 else {}
        targets.append({"text": 2 + i, "images": images, **content})
    counts = [0] * pairs
    if seen:
        queries[1]["images"] = [(2, 2)]
    if case.uneven:
        counts = [(2 * rank + step + i) // pairs for i in range(pairs)]
    negatives = [{"text": 5, "images": [(2, 2)] if seen else []}] * sum(counts)
    return make_batch(
        queries + targets + negatives,
        case.family,
        seed=100 * step + 10 * rank + 1,
        pairs=pairs,
        negative_counts=counts,
        tasks=["ab"[(rank + i) % 2] for i in range(pairs)],
    )


def compress_batch(case: Case, step: int, rank: int) -> Batch:
    """Five dialogues with very uneven answers; one chunk of rank 1 has no answer at all."""
    samples = []
    for i in range(5 - rank if case.uneven else 5):
        length = 8 + (3 * i + 2 * rank + step) % 7
        answers = [(2, 3 + (i + rank) % 3), (6, 7 + (i * rank) % 2)]
        if rank == 1 and i in (1, 4):
            answers, length = [], 20  # the longest ones: they share the first chunk
        images = [(2, 2 + (i + rank) % 3)] if has_images(case, step, rank) else []
        samples.append(
            {"images": images, "text": 1 + i % 2, "dialogue": length, "answers": answers}
        )
    return make_batch(samples, case.family, seed=100 * step + 10 * rank + 1)


def reference_match(model, batches, case: Case, step: int) -> torch.Tensor:
    """Mean InfoNCE over all ranks' rows, in one graph, from the definition."""
    objective = Match(MatchConfig(**case.match))
    config = Budget.of(ChunkConfig(**case.chunk))
    wanted = max(len(plan_chunks(b, config, wanted=0)) for b in batches)
    sides, temperature = [], None
    for rank, batch in enumerate(batches):
        seed_chunk(0, step, TOWER, rank)
        features = model.embed_images(batch.images)
        rows = torch.zeros(len(batch), model.backbone.width)
        groups = plan_chunks(batch, config, wanted=wanted)
        for number, group in enumerate(groups):
            if not len(group):
                continue
            seed_chunk(0, step, number, rank)
            emb, temperature = objective.encode(model, batch.split([group])[0], features)
            rows = rows.index_copy(0, group, emb)
        sides.append(rows)
    return whole_loss(sides, batches, objective.config, temperature)


def reference_compress(model, batches, case: Case, step: int) -> torch.Tensor:
    """Mean over all answer tokens of all ranks, in one graph."""
    objective = Compress(CompressConfig(**case.compress))
    config = Budget.of(ChunkConfig(**case.chunk))
    total, weight = 0.0, 0
    wanted = max(len(plan_chunks(b, config, wanted=0)) for b in batches)
    for rank, batch in enumerate(batches):
        features = model.embed_images(batch.images)
        for number, group in enumerate(plan_chunks(batch, config, wanted=wanted)):
            seed_chunk(0, step, number, rank)
            if len(group):
                total = total + objective.loss(model, batch.split([group])[0], features)[0]
        weight += objective.weight(batch)
    return total / weight


@dataclass(frozen=True)
class Reference:
    """Parameters, losses and gradient norms (before clipping) of the steps in one process."""

    parameters: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]


def run_reference(case: Case, *, dropout: bool = True) -> Reference:
    """The case's steps in fp32 in one process, rank 0, which tells the others what it found."""
    key = asdict(case) | {"name": "", "deepspeed": "", "precision": "", "broken": ""}
    return comm.broadcast(_run_reference(json.dumps(key), dropout) if comm.rank() == 0 else None)


@cache
def _run_reference(key: str, dropout: bool) -> Reference:
    case = Case(**json.loads(key))
    model = case.build()
    model.train(dropout)
    if case.kind == "sgd":
        optimizer = torch.optim.SGD(trainable(model), lr=case.lr)
    else:
        optimizer = torch.optim.AdamW(trainable(model), lr=case.lr, weight_decay=0.0)
    losses, norms = [], []
    of = reference_match if case.stage == "match" else reference_compress
    for step in range(STEPS):
        batches = [case.batch(step, rank) for rank in range(comm.world_size())]
        optimizer.zero_grad()
        loss = of(model, batches, case, step)
        loss.backward()
        bound = case.clip or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(trainable(model), bound).item())
        if case.poisoned and step == 1:
            norms[-1] = float("inf")
        else:
            optimizer.step()
        losses.append(loss.item())
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return Reference(parameters, losses, norms)


class TowerCount:
    """Images that went through the vision tower: with a graph, without, and blank ones."""

    def __init__(self, model) -> None:
        self.seen = {"graph": 0, "no graph": 0, "blank": 0}
        model.backbone.visual.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs) -> None:
        pixels, grid = args[0], kwargs["grid_thw"]
        kind = "graph" if torch.is_grad_enabled() else "no graph"
        self.seen["blank" if not pixels.any() else kind] += len(grid)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        seen, self.seen = self.seen, dict.fromkeys(self.seen, 0)
        return seen


class PassCount:
    """Forwards of the language model, with a graph and without."""

    def __init__(self, model) -> None:
        self.seen = [0, 0]
        model.backbone.text.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.seen[int(torch.is_grad_enabled())] += 1

    def take(self) -> list[int]:
        """(without, with) since the last call."""
        seen, self.seen = self.seen, [0, 0]
        return seen


def run_case(case: Case) -> dict:
    """The case in this world beside its reference, as JSON values (differences are absolute)."""
    began = time.perf_counter()
    config = case.run_config
    budget = Budget.of(config.chunk)
    model = case.build()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    if case.precision == "bf16":
        model.to(torch.bfloat16)
    model.autocast = case.precision == "autocast"
    count, passes = TowerCount(model), PassCount(model)
    engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
    matching = case.stage == "match"
    objective = Match(config.match) if matching else Compress(config.compress)
    take_step = grad_cache if matching else accumulate
    losses, norms, tower, images, applied, forwards = [], [], [], [], [], []
    for step in range(STEPS):
        batch = case.batch(step, comm.rank())
        count.take()
        passes.take()
        fault = "not finite on one rank" if case.poisoned and step == 1 else case.broken
        with broken_step(fault) if fault else nullcontext():
            report = take_step(engine, objective, batch, budget, seed=0, step=step)
        tower.append(count.take())
        forwards.append([*passes.take(), len(plan_chunks(batch, budget))])
        images.append(len(batch.images) if batch.images else 0)
        result = engine.step(step)
        losses.append(report["loss"])
        norms.append(result.grad_norm)
        applied.append(result.applied)
    parameters = whole_parameters(engine)
    engine.destroy()
    reference = run_reference(case)
    gap, where = distance(parameters, reference.parameters)
    found = {
        "gap": gap,
        "where": where,
        "moved": distance(start, reference.parameters)[0],
        "losses": losses,
        "reference_losses": reference.losses,
        "norms": norms,
        "reference_norms": reference.norms,
        "applied": applied,
        "images": images,
        "tower": tower,
        "forwards": forwards,
        "seconds": time.perf_counter() - began,
        "finite": all(bool(p.isfinite().all()) for p in parameters.values()),
    }
    if case.model.get("adapter", "none") != "none":
        still = run_reference(case, dropout=False).parameters
        found["gap_without_dropout"] = distance(parameters, still)[0]
    return found


def whole_parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of every parameter of the engine's model, float32."""
    found = {}
    for name, parameter in engine.model.named_parameters():
        with full_parameters([parameter]):
            found[name] = parameter.detach().float().clone()
    return found


def distance(own: dict, other: dict) -> tuple[float, str]:
    """The largest difference of an element, and the parameter that holds it."""
    gaps = {n: (own[n] - p).abs().max().item() for n, p in other.items() if p.numel()}
    where = max(gaps, key=gaps.get)
    return gaps[where], where


def run_cases(cases: list[dict]) -> dict[str, dict]:
    """All cases in turn in this world, by name."""
    results = {}
    for case in cases:
        try:
            results[case["name"]] = run_case(Case(**case))
        except Exception as error:
            raise RuntimeError(f"case {case['name']}: {error!r}") from error
    return results

"""Before a job is queued: whether it fits, how long it takes, what it moves and costs.

Formulas of ``coma_ds.planning``, and one measured number of the card: the share of its FLOP/s
that steps reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from coma_ds.assemble import PREFETCHED
from coma_ds.budget import TRANSIENT, Cost, describe, share_out
from coma_ds.config import RunConfig
from coma_ds.kernels.info_nce import cost as loss_cost
from coma_ds.mechanics import read_mechanics
from coma_ds.model.answers import MAX_LOGITS
from coma_ds.model.embedder import CompressionModel
from coma_ds.planning.cards import Machine
from coma_ds.planning.flops import ModelFlops
from coma_ds.planning.graphs import Graphs, measure_graphs
from coma_ds.planning.load import Load
from coma_ds.planning.memory import Zero, host_traffic, states
from coma_ds.planning.outline import outline
from coma_ds.planning.traffic import step_traffic
from coma_ds.planning.weights import Weights, count_weights
from coma_ds.step import PATCHES, Budget

Changes = dict[str, object]  # values by dotted key
GIB = 2**30
MOST = 2**20  # records of a GPU
RESERVED = 2.0 * GIB  # what CUDA, NCCL and cuBLAS take for themselves
USABLE = 0.96  # of a card: the rest is lost between blocks
OVERLAP = 0.7  # of what is moved while there is something to compute, and the other way round
HOST_GB = 25.0  # GB/s between a GPU and its host, and of its share of an optimizer there (assumed)
FEW = 3.0  # times that the weights may be moved in a step
SMALL = 4096  # tokens of a chunk
HALF = 512  # tokens of a chunk at which a GPU reaches half of its rate (assumed)
TOWER = (10, 4)  # rows of the tower's width, and of its inner width, that a pass holds a patch


@dataclass(frozen=True)
class Cut:
    """The batch of a GPU in chunks of ``size`` tokens; ``largest``: what a chunk could have."""

    budget: Budget
    largest: int
    cost: Cost
    tokens: float
    size: float
    chunks: int
    kept: int


@dataclass
class Plan:
    """One arrangement.  ``memory``: bytes by what holds them; seconds are those of a step."""

    changes: Changes
    memory: dict[str, float]
    budget: Budget
    chunks: int
    kept: int
    largest_chunk: int
    executed: float  # FLOPs of a GPU
    needed: float
    gathered: float  # bytes that a GPU receives,
    times: float  # the same in weights of the whole model
    reduced: float
    between: float  # bytes that reach it from other nodes
    host: float  # seconds that what is offloaded takes
    computing: float
    moving: float
    capacity: float
    notes: list[str] = field(default_factory=list)

    @property
    def overrides(self) -> list[str]:
        """As they are given to a run."""
        return [f"{key}={_said(value)}" for key, value in self.changes.items()]

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        first, second = self.computing, self.moving + self.host
        return max(first, second) + (1 - OVERLAP) * min(first, second)

    @property
    def binds(self) -> str:
        """What would have to give way first."""
        if not self.fits:
            return f"memory: {max(self.memory, key=self.memory.get)}"
        parts = {"arithmetic": self.computing, "the network": self.moving, "the host": self.host}
        return max(parts, key=parts.get)


class Planner:
    """Everything about a run that does not depend on how it is arranged."""

    def __init__(self, config: RunConfig, machine: Machine, *, liger: bool) -> None:
        self.config, self.machine, self.liger = config, machine, liger
        self._outlines: dict[bool, tuple[CompressionModel, Graphs]] = {}
        self.model, _ = self._outline(config)
        self.weights: Weights = count_weights(self.model)

    def _outline(self, config: RunConfig) -> tuple[CompressionModel, Graphs]:
        key = config.model.gradient_checkpointing
        if key not in self._outlines:
            model = outline(config)
            self._outlines[key] = model, measure_graphs(model, liger=self.liger)
        return self._outlines[key]

    def plan(self, load: Load, changes: Changes | None = None) -> Plan:
        """The run as configured, with ``changes`` in place of what it says."""
        config = self.config
        for key, value in (changes or {}).items():
            config = _with(config, key, value)
        model, graphs = self._outline(config)
        card, item = self.machine.card, 2 if config.precision == "bf16" else 4
        zero = Zero.of(read_mechanics(config.deepspeed), model)
        is_whole = zero.stage == 3 and zero.whole == self.weights.total
        few = config.model.adapter != "none" and not model.vision_is_trained
        coalesced = zero.stage == 3 and (few or is_whole)
        memory = states(
            self.weights, zero, world=self.machine.gpus, item=item, kind=config.optim.kind,
            coalesced=coalesced,
        ) | self._of_batch(config, load, item)  # fmt: skip
        capacity = card.memory_gib * GIB * USABLE - RESERVED
        cut = self._cut(config, graphs, load, capacity - sum(memory.values()))
        memory |= self._of_chunks(config, graphs, load, cut, item)
        executed, needed = self._arithmetic(config, load, cut)
        gathered, reduced, host = self._moved(config, zero, load, cut, coalesced, is_whole, item)
        between, notes = 0.0, []
        if self.machine.nodes > 1:
            inside = 1 < zero.group and self.machine.per_node % zero.group == 0
            # Inside a node: all but the first gather of what the update has changed.
            between = reduced + (min(gathered, item * self.weights.trained) if inside else gathered)
            if not inside and gathered > FEW * self.weight_bytes:
                notes.append(
                    f"the weights come from other nodes {gathered / self.weight_bytes:.1f} times a "
                    f"step: zero_hpz_partition_size={self.machine.per_node} in a DeepSpeed file "
                    "keeps that inside each node"
                )
        if cut.size < SMALL and cut.tokens > 2 * cut.size:
            notes.append(f"chunks of {cut.size:.0f} tokens are small: a GPU wants 16,000 or more")
        if (cut.budget.tokens or math.inf) < load.longest:
            notes.append(f"samples above chunk.tokens go alone: the longest has {load.longest}")
        rate = card.tflops * 1e12 * card.share
        return Plan(
            changes=changes or {},
            memory=memory,
            budget=cut.budget,
            chunks=cut.chunks,
            kept=cut.kept,
            largest_chunk=cut.largest,
            executed=executed,
            needed=needed,
            gathered=gathered,
            times=gathered / self.weight_bytes,
            reduced=reduced,
            between=between,
            host=host / (HOST_GB * 1e9),
            computing=executed * (1 + HALF / cut.size) / rate,
            moving=self.machine.seconds(gathered + reduced, between),
            capacity=capacity,
            notes=notes,
        )

    def _records(self, config: RunConfig) -> float:
        """Pairs or dialogues of a GPU in a step."""
        return config.optim.batch_size / self.machine.gpus

    def _of_batch(self, config: RunConfig, load: Load, item: int) -> dict[str, float]:
        """Bytes that grow with the batch and stay for the whole step."""
        records, width = self._records(config), self.model.backbone.width
        levels = 1 + len(getattr(self.model.backbone.visual, "deepstack_visual_indexes", ()))
        found = {"features": records * load.image_tokens * width * item * levels}
        if config.objective == "match":
            # embeddings, the leaf of the loss, and its gradient
            found["embeddings"] = 3 * 4 * records * load.samples * width
            rows = max(1, int(records))
            columns = int(config.optim.batch_size * (load.samples - 1))
            loss = loss_cost(rows, columns, width, item=4, world=self.machine.gpus)
            gathered = 4 * columns * width
            found["loss"] = loss["extra"] + loss["copies"] + loss["gradients"] + gathered
        return found

    def _cut(self, config: RunConfig, graphs: Graphs, load: Load, free: float) -> Cut:
        """How the batch of a GPU is cut where so many bytes are free."""
        model, _ = self._outline(config)
        tokens = self._records(config) * load.tokens
        # A backward holds about a layer beside the graph, two where one is computed again.
        layers = 1.0 if model.backbone.lm.is_gradient_checkpointing else 0.5
        cost = Cost(graphs.held, graphs.layer * layers)
        if model.vision_is_trained and config.objective == "compress":
            images = load.image_tokens / load.tokens * model.backbone.merge
            cost = replace(cost, graph=graphs.held + graphs.patch * images)
        free -= self._logits(config)
        alone = config.chunk.model_copy(update={"tokens": "auto", "keep": 0})
        budget, largest = (
            share_out(chunk, cost, free, load.longest, int(tokens))
            for chunk in (config.chunk, alone)
        )
        mean = load.tokens / load.samples
        size = min(budget.samples * mean, max(budget.tokens or math.inf, mean), tokens)
        chunks, kept = max(1, math.ceil(tokens / size)), 0
        if config.objective == "match":
            kept = min(chunks, max(budget.keep, int((budget.keep_tokens or 0) / size)))
        return Cut(budget, largest.tokens, cost, tokens, size, chunks, kept)

    def _logits(self, config: RunConfig) -> float:
        """Logits, their gradient, and one of both in between, of a part of the answers."""
        if config.objective == "match":
            return 0.0
        taught = 2 * config.compress.taught  # a teacher's, and their logarithm
        return (3 + taught) * 4.0 * MAX_LOGITS

    def _of_chunks(
        self, config: RunConfig, graphs: Graphs, load: Load, cut: Cut, item: int
    ) -> dict[str, float]:
        """Bytes of what is computed at a time: a chunk, or the tower before the first of them."""
        model, records = self.model, self._records(config)
        running = cut.cost.graph if cut.kept < cut.chunks else 0.0
        chunk = cut.size * (running + TRANSIENT * cut.cost.transient) + self._logits(config)
        kept = min(cut.kept * cut.size, cut.tokens) * graphs.held
        tower = self._tower(records * load.image_tokens, item)
        if model.vision_is_trained and config.objective == "match":
            tower = records * load.image_tokens * model.backbone.merge * graphs.patch
        return {"chunk": max(chunk, tower - kept), "kept graphs": kept}

    def _arithmetic(self, config: RunConfig, load: Load, cut: Cut) -> tuple[float, float]:
        """FLOPs of a GPU: executed, and needed."""
        model, _ = self._outline(config)
        matching, records = config.objective == "match", self._records(config)
        merge, flops = model.backbone.merge, ModelFlops.of(model)
        replayed = 1 - cut.kept / cut.chunks
        taught = config.compress.taught
        work = load.work(records, merge, replayed=replayed, matching=matching, taught=taught)
        if not matching and (taught or not self.liger):
            at_once = MAX_LOGITS // model.answers.weight.shape[0]
            if cut.size / load.tokens * load.answers > at_once:
                work.head_rows_again = sum(work.head_rows)
        least = load.work(records, merge, replayed=0.0, matching=matching)
        if model.vision_is_trained:  # in stage 2 once more with its graph
            for name in ("patch_rows", "image_rows", "vision_pairs"):
                once = getattr(work, name)[0]
                setattr(work, name, [once if matching else 0, once])
                setattr(least, name, [0, once])
        return flops.executed(work), replace(flops, checkpointed=False).executed(least)

    def floors(self, load: Load) -> dict[str, float]:
        """Executed over needed FLOPs that a mode cannot go below, by what it does."""
        flops, merge = ModelFlops.of(self._outline(self.config)[0]), self.model.backbone.merge
        plain, again = (replace(flops, checkpointed=on) for on in (False, True))
        config = self.config
        matching, records = config.objective == "match", config.optim.batch_size
        once = load.work(records, merge, replayed=0.0, matching=matching)
        needed = plain.executed(once)
        if not matching:
            taught = config.compress.taught
            work = load.work(records, merge, replayed=0.0, matching=False, taught=taught)
            done = {"without checkpoints": plain.executed(work), "with": again.executed(work)}
            return {mode: flops / needed for mode, flops in done.items()}
        twice = load.work(records, merge, replayed=1.0, matching=True)
        usual = load.work(records, merge, replayed=1.0, matching=True)
        for name in ("patch_rows", "image_rows", "vision_pairs"):
            getattr(usual, name)[0] *= 2
        return {
            "with every graph kept": 1.0,
            "with every chunk replayed": plain.executed(twice) / needed,
            "as usual (checkpoints, the tower twice)": again.executed(usual) / needed,
        }

    @property
    def weight_bytes(self) -> float:
        """Of the whole model, in the precision of the run."""
        return (2 if self.config.precision == "bf16" else 4) * self.weights.total

    def _tower(self, image_tokens: float, item: int) -> float:
        """Bytes of a pass of the frozen tower."""
        vision = self.model.backbone.lm.config.vision_config
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio
        pixels = vision.patch_size**2 * vision.temporal_patch_size * 3
        patch = item * (TOWER[0] * width + TOWER[1] * inner) + (4 + item) * pixels
        return min(image_tokens * self.model.backbone.merge, PATCHES) * patch

    def largest_batch(self, load: Load, changes: Changes | None = None) -> int:
        """The largest global batch that fits, in chunks of one sample; 0 where none does."""
        world = self.machine.gpus
        alone = {**(changes or {}), "chunk.samples": 1, "chunk.tokens": None, "chunk.keep": 0}

        def fits(each: int) -> bool:
            return self.plan(load, alone | {"optim.batch_size": each * world}).fits

        low, high = 0, 1
        while high < MOST and fits(high):
            low, high = high, 2 * high
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * world

    def _moved(
        self, config: RunConfig, zero: Zero, load: Load, cut: Cut, coalesced: bool, whole: bool,
        item: int,
    ) -> tuple[float, float, float]:  # fmt: skip
        """Bytes that a GPU receives in a step: weights, gradients, and from or for its host."""
        world, trained, model = self.machine.gpus, self.weights.trained, self.model
        share = (world - 1) / world
        reductions = cut.chunks if zero.stage == 2 or (zero.stage == 3 and not coalesced) else 1
        count = {"reductions": reductions, "world": world, "item": item}
        if zero.stage < 3:
            host = host_traffic(self.weights, zero, gathered=0, **count)
            return item * trained * share, item * trained * reductions * share, host
        patches = self._records(config) * load.image_tokens * model.backbone.merge
        moved = step_traffic(
            self.weights,
            matching=config.objective == "match",
            chunks=cut.chunks,
            kept=cut.kept,
            passes=1 if model.vision_is_trained else math.ceil(patches / PATCHES) or 1,
            trains_vision=model.vision_is_trained,
            whole=whole,
            coalesced=coalesced,
            taught=config.compress.taught,
        )
        host = host_traffic(self.weights, zero, gathered=moved.gathered, **count)
        return item * moved.gathered * share, item * moved.reduced * share, host

    def waiting(self, load: Load) -> float:
        """Bytes of pixels that the loaders of a node hold at most, in shared memory."""
        vision, config = self.model.backbone.lm.config.vision_config, self.config
        batches = config.data.workers * PREFETCHED * self.machine.per_node
        patches = batches * self._records(config) * load.image_tokens * self.model.backbone.merge
        return patches * 3 * vision.patch_size**2

    def alternatives(self, load: Load) -> list[Plan]:
        """The run as configured, then the arrangements that a user would try."""
        matching = self.config.objective == "match"
        plans, seen = [self.plan(load)], set()
        whole = [self.config.deepspeed]
        if self.machine.gpus > 1:
            names = ["zero3", "zero3_whole"]
            group = read_mechanics("zero3_hpz")["zero_optimization"]["zero_hpz_partition_size"]
            if self.machine.nodes > 1 and self.machine.per_node % group == 0:
                names.append("zero3_hpz")
            whole += [name for name in names if name not in whole]
        for mechanics in whole:
            for checkpointing in (False,) if matching else (True, False):
                changes: Changes = {}
                if mechanics != self.config.deepspeed:
                    changes["deepspeed"] = mechanics
                if checkpointing != self.config.model.gradient_checkpointing and not matching:
                    changes["model.gradient_checkpointing"] = checkpointing
                changes["chunk.tokens"] = "auto"
                changes["chunk.samples"] = 4096
                if matching:
                    changes["chunk.keep"] = "auto"
                if str(changes) not in seen:
                    seen.add(str(changes))
                    plans.append(self.plan(load, changes))
        return plans


def best(plans: list[Plan]) -> Plan | None:
    """The fastest that fits; of those within a hundredth, one that moves the weights three times
    at most, and of these the one that takes the least memory."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    quick = min(plan.seconds for plan in fitting)
    near = (plan for plan in fitting if plan.seconds <= 1.01 * quick)
    return min(near, key=lambda plan: (plan.times > FEW, plan.total))


def _with(config: RunConfig, key: str, value: object) -> RunConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return config.model_copy(update={key: value})
    part = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: part})


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_chunks(plan: Plan) -> str:
    """In a line."""
    return f"{plan.chunks} of {describe(plan.budget)}"

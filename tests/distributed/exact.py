"""The work of the exactness tests: DeepSpeed's parameters against one process with the batch.

Each case runs three SGD steps in fp32 with clipping, on W ranks; the reference holds all ranks'
samples in one graph: no chunks cached, no gather, no DeepSpeed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coma_ds import comm
from coma_ds.config import ChunkConfig, CompressConfig, MatchConfig, OptimConfig, RunConfig
from coma_ds.engine import Engine, full_parameters
from coma_ds.model.loading import trainable
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.optim import build_optimizer
from coma_ds.step import TOWER, accumulate, grad_cache, plan_chunks, seed_chunk
from tests.tiny import make_batch, tiny_model

STEPS, CLIP, LR = 3, 0.3, 0.2
# Nothing stays whole: every parameter is sharded and gathered.
STRICT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@dataclass
class Case:
    name: str
    deepspeed: str = "strict"
    family: str = "qwen2_5_vl"
    stage: str = "match"
    chunk: dict = field(default_factory=lambda: {"samples": 3})
    model: dict = field(default_factory=dict)
    match: dict = field(default_factory=dict)
    compress: dict = field(default_factory=dict)
    no_images: bool = False
    negatives: bool = False


def match_batch(case: Case, step: int, rank: int):
    """Four pairs; the rank that has images changes with the step, in step 2 nobody has any."""
    bare = case.no_images or (rank + step) % 2 == 1 or step == 2
    queries = [{"text": 3 + (rank + i) % 4} for i in range(4)]
    queries[0]["content"] = 8  # the same question on every rank: its targets do not compete
    targets = []
    for i in range(4):
        images = [] if bare or i == 3 else [(2, 2 + i % 2)] * (1 + (i == 1))
        # content 7 stands on every rank: a false negative across ranks
        content = {"content": 7} if i == 2 else {}
        targets.append({"text": 2 + i, "images": images, **content})
    if not bare:
        queries[1]["images"] = [(2, 2)]
    extra = [{"text": 5, "images": [] if bare else [(2, 2)]}] * (rank + 1) if case.negatives else []
    seed = 100 * step + 10 * rank + 1
    return make_batch(queries + targets + extra, case.family, seed=seed, pairs=4)


def compress_batch(case: Case, step: int, rank: int):
    """Five dialogues with very uneven answers; one chunk of rank 1 has no answer at all."""
    samples = []
    for i in range(5):
        length = 8 + (3 * i + 2 * rank + step) % 7
        answers = [(2, 3 + (i + rank) % 3), (6, 7 + (i * rank) % 2)]
        if rank == 1 and i in (1, 4):
            answers, length = [], 20  # the longest ones: they share the first chunk
        samples.append(
            {
                "images": [(2, 2 + (i + rank) % 3)],
                "text": i % 2,
                "dialogue": length,
                "answers": answers,
            }
        )
    return make_batch(samples, case.family, seed=100 * step + 10 * rank + 1)


def reference_match(model, batches, case: Case, config: ChunkConfig, step: int):
    """Mean InfoNCE over all ranks' rows, in one graph, from the definition."""
    objective = Match(MatchConfig(**case.match))
    wanted = max(len(plan_chunks(b, config, wanted=0)) for b in batches)
    queries, targets, ids, asked, questions = [], [], [], [], []
    positives, offset = [], 0
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
        queries.append(rows[: batch.pairs])
        targets.append(rows[batch.pairs :])
        ids.append(batch.content_ids_B[batch.pairs :])
        own = batch.content_ids_B
        asked.append(torch.cat([own[: batch.pairs], own[2 * batch.pairs :]]))
        questions.append(own[: batch.pairs])
        positives.append(torch.arange(offset, offset + batch.pairs))
        offset += len(batch) - batch.pairs
    query, target = torch.cat(queries), torch.cat(targets)
    ids, positive = torch.cat(ids), torch.cat(positives)
    tau = case.match.get("temperature", 0.03) if temperature is None else temperature
    logits = query @ target.T / tau
    same = ids[None] == ids[positive][:, None]
    same |= torch.cat(asked)[None] == torch.cat(questions)[:, None]
    same[torch.arange(len(positive)), positive] = False
    if case.match.get("mask_false_negatives", True):
        logits = logits.masked_fill(same, float("-inf"))
    return torch.nn.functional.cross_entropy(logits, positive)


def reference_compress(model, batches, case: Case, config: ChunkConfig, step: int):
    """Mean over all answer tokens of all ranks, in one graph."""
    objective = Compress(CompressConfig(**case.compress))
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


def run_case(case: Case) -> dict:
    """Largest difference of a parameter after the steps, and what shows the case is not empty."""
    matching = case.stage == "match"
    make = match_batch if matching else compress_batch
    build = dict(family=case.family, matching=matching, **case.model)
    config = RunConfig(
        objective=case.stage,
        precision="fp32",
        deepspeed=_mechanics(case.deepspeed),
        chunk=ChunkConfig(**case.chunk),
        optim=OptimConfig(lr=LR, schedule="constant", warmup=0, clip=CLIP, kind="sgd"),
        match=MatchConfig(**case.match),
        compress=CompressConfig(**case.compress),
    )
    model = tiny_model(**build)
    calls = []
    model.backbone.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    engine = Engine(model, build_optimizer(model, config.optim), config, torch.device("cpu"))
    losses, norms, images_seen = [], [], []
    for step in range(STEPS):
        batch = make(case, step, comm.rank())
        calls.clear()
        if matching:
            objective = Match(config.match)
            report = grad_cache(engine, objective, batch, config.chunk, seed=0, step=step)
        else:
            objective = Compress(config.compress)
            report = accumulate(engine, objective, batch, config.chunk, seed=0, step=step)
        images_seen.append(len(calls))
        result = engine.step(step)
        losses.append(report["loss"])
        norms.append(result.grad_norm)
    reference, ref_losses, ref_norms = run_reference(case, build, config, make)
    worst, where, moved = 0.0, "", 0.0
    start = dict(tiny_model(**build).named_parameters())
    own = dict(engine.model.named_parameters())
    for name, wanted in reference.named_parameters():
        with full_parameters([own[name]]):
            gap = (own[name].detach() - wanted.detach()).abs().max().item()
        if gap > worst:
            worst, where = gap, name
        moved = max(moved, (wanted.detach() - start[name].detach()).abs().max().item())
    engine.destroy()
    return {
        "case": case.name,
        "gap": worst,
        "where": where,
        "moved": moved,
        "loss_gap": max(abs(a - b) for a, b in zip(losses, ref_losses)),
        "norms": norms,
        "ref_norms": ref_norms,
        "tower_calls": images_seen,
    }


def run_reference(case: Case, build: dict, config: RunConfig, make):
    """The same steps in one process (on every rank the same, without any communication)."""
    model = tiny_model(**build)
    model.train()
    optimizer = torch.optim.SGD(trainable(model), lr=LR)
    losses, norms = [], []
    for step in range(STEPS):
        batches = [make(case, step, rank) for rank in range(comm.world_size())]
        optimizer.zero_grad()
        of = reference_match if case.stage == "match" else reference_compress
        loss = of(model, batches, case, config.chunk, step)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable(model), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


_folder = None


def _mechanics(name: str) -> str:
    """A name of ds_configs/, or ``strict``: stage 3 with nothing kept whole."""
    global _folder
    if name != "strict":
        return name
    import json

    if _folder is None:
        _folder = tempfile.mkdtemp()
    path = Path(_folder, "strict.json")
    path.write_text(json.dumps(STRICT))
    return str(path)


def run_cases(cases: list[dict]) -> list[dict]:
    """All cases in turn in this world."""
    results = []
    for case in cases:
        try:
            results.append(run_case(Case(**case)))
        except Exception as error:
            raise RuntimeError(f"case {case['name']}: {error!r}") from error
    return results

"""What a run says of itself when it starts."""

from __future__ import annotations

import torch

from coma_ds import comm
from coma_ds.assemble import TrainingData
from coma_ds.config import MatchConfig, RunConfig
from coma_ds.engine import Engine
from coma_ds.hardware import SLOW, has_fast_bf16
from coma_ds.kernels.dispatch import outlook
from coma_ds.model.liger import missing_liger
from coma_ds.model.varlen import CARRIERS, best_carrier
from coma_ds.planning.weights import numel

ATTENTION = {
    "split": "split form of the visibility rule, two causal calls (a mask in the first one where "
    "contexts are of unequal length)",
    "dense": "dense mask [B, 1, L, L]",
    "packed": "packed sequences without padding, one call over their segments",
}


def describe_loss(match: MatchConfig, device: torch.device) -> str:
    """Which InfoNCE, on which path, and why that one."""
    temperatures = [f"{match.temperature}"]
    temperatures += [f"{name} {value}" for name, value in match.task_temperature.items()]
    learned = " (learned)" if match.learn_temperature else ""
    options = {
        "symmetric": match.symmetric,
        "queries as negatives": match.query_negatives,
        "targets against targets": match.target_negatives,
        "hard negatives of their own row alone": match.hard_negatives == "own",
        f"margin {match.false_negative_margin}": match.false_negative_margin is not None,
        f"hardness {match.hardness}": match.hardness > 0,
        f"widths {list(match.matryoshka)}": bool(match.matryoshka),
        "rounded to bf16": match.loss_dtype == "bf16",
    }
    said = "".join(f", {name}" for name, given in options.items() if given)
    path, values = _path("info_nce", device), ", ".join(temperatures)
    return f"InfoNCE ({path}); temperature {values}{learned}{said}"


def describe_arithmetic(name: str, precision: str, device: torch.device) -> str:
    """What computes attention, and why nothing that comes before it on a GPU."""
    if name == "matmul":
        return "matmul: faster than torch's fused attention for short sequences on a CPU"
    said = CARRIERS[name].said if name in CARRIERS else "sdpa: torch's fused attention"
    if device.type == "cuda":
        best, lacks = best_carrier(device, torch.float32 if precision == "fp32" else torch.bfloat16)
        if best != name:
            lacks = ""  # it was asked for by name
        said += f" ({lacks})" if lacks else ""
    return said


def _path(op: str, device: torch.device) -> str:
    choice, reason = outlook(op, device)
    return f"{choice}: {reason}"


def describe_run(config: RunConfig, engine: Engine, data: TrainingData, source: str) -> list[str]:
    """The start-up report, line by line: what is trained, how, and why not faster."""
    model = engine.model
    backbone = model.backbone
    total = sum(numel(p) for p in model.parameters())
    trained = sum(numel(p) for p in model.parameters() if p.requires_grad)
    adapter = "full training" if config.model.adapter == "none" else config.model.adapter
    tower = "trained" if model.vision_is_trained else "frozen"
    tokens = config.model.compression_tokens
    pooling = config.model.pooling
    if pooling == "attention":
        pooling += f" of {config.model.pooling_heads} head(s)"
    if pooling != "last" and config.objective == "match":
        pooling += f" ({_path('attention_pool', engine.device)})"
    world = comm.world_size()
    images = data.collator.processing.image_processor
    unit = (images.patch_size * images.merge_size) ** 2
    low, high = images.size["shortest_edge"] // unit, images.size["longest_edge"] // unit
    batch, chunk = config.optim.batch_size, config.chunk
    budget = f"{chunk.samples} samples"
    if chunk.tokens == "auto":
        budget += " and as many tokens as fit (measured at the first step)"
    elif chunk.tokens:
        budget = f"{chunk.tokens} tokens and {budget}"
    if chunk.keep and config.objective == "match":
        kept = "as many graphs as fit" if chunk.keep == "auto" else f"the graphs of {chunk.keep}"
        budget += f", {kept} kept"
    path = describe_arithmetic(backbone.arithmetic, config.precision, engine.device)
    rule = "rule off: the dialogue sees the image" if config.compress.visible else "rule on"
    attention = ATTENTION[backbone.carrier]
    if config.objective == "match":
        attention = "causal, the compression tokens last"
        attention += ", packed without padding" if backbone.carrier == "packed" else ""
    elif config.compress.visible:
        attention = "causal"
    teacher = ""
    if config.compress.taught:
        teacher = " to the model that sees the image, its adapter off"
        if config.model.adapter == "none":
            teacher = " to this model as it is now and sees the image (no adapter to switch off)"
    loss = {
        "compress": f"{config.compress.loss}{teacher} over answer tokens, logits in chunks, {rule}",
        "match": describe_loss(config.match, engine.device),
    }[config.objective]
    kernels = model.kernels
    if not kernels and engine.device.type == "cuda" and config.model.liger is not False:
        kernels = f"Liger: not used, {missing_liger(engine.device, config.precision)}"
    slow = ""
    if config.precision != "fp32" and not has_fast_bf16(engine.device.type):
        slow = f" ({SLOW})"
    sources = ", ".join(f"{n} ({len(r)})" for n, r in data.sources.readers.items())
    return [
        f"coma-ds  {config.objective}  recipe {config.recipe or '-'}  -> {config.output}",
        f"model      {backbone.lm.config.model_type} from {source} ({config.model.weights}), "
        f"{total / 1e6:.1f} M parameters",
        f"trained    {trained / 1e6:.3f} M: {adapter}, vision tower {tower}, "
        f"{tokens} compression tokens ({config.model.bottleneck}), pooling {pooling}",
        f"world      {world} rank(s) on {engine.device.type}, ZeRO-{engine.stage} "
        f"({config.deepspeed}{', weights whole' if engine.keeps_weights_whole else ''}), "
        f"{config.precision}{slow}",
        f"attention  {attention}; {path}",
        *([f"kernels    {kernels}"] if kernels else []),
        f"loss       {loss}",
        f"images     {low} to {high} image tokens each",
        f"batch      {batch} = {world} x {batch // world}, in chunks of at most {budget}",
        f"steps      {config.optim.steps}, lr {config.optim.lr:g} {config.optim.schedule}, "
        f"clip {config.optim.clip:g}"
        + (f", a checkpoint every {config.checkpoint.every}" if config.checkpoint.every else ""),
        f"data       {sources}",
    ]

"""From a folder, a hub name or a config to the module that is trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from coma_ds import comm
from coma_ds.config import PACKED_ARITHMETIC, MatchConfig, ModelConfig
from coma_ds.data.processing import (
    POOLING_FILE,
    Processing,
    first_line,
    load_processing,
    read_config,
)
from coma_ds.hardware import SLOW, has_fast_bf16
from coma_ds.model.adapters import add_adapter
from coma_ds.model.backbone import Backbone
from coma_ds.model.embedder import CompressionModel, Temperature
from coma_ds.model.liger import apply_liger, missing_liger
from coma_ds.model.pooling import Pooling
from coma_ds.model.tokens import CompressionTokens
from coma_ds.model.varlen import CARRIERS, best_carrier

log = logging.getLogger("coma_ds")

CLASSES: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
# A context in which the given parameters are whole on every rank (engine.full_parameters).
Whole = Callable[..., AbstractContextManager]


def load_language_model(
    source: str, *, weights: str, dtype: torch.dtype, sharding: dict | None, seed: int
) -> PreTrainedModel:
    """The ``...ForConditionalGeneration`` of ``source``, weights read or drawn from ``seed``.

    ``sharding`` is the DeepSpeed config of a ZeRO-3 run: the weights are then read into shards.
    Raises ``ValueError`` for a family that is not served, for a folder without weights, and for
    missing or unexpected weights, with their names.
    """
    config = read_config(source)
    cls = CLASSES[config.model_type]
    if weights == "random":
        torch.manual_seed(seed)
        return cls._from_config(config, attn_implementation="sdpa").to(dtype)
    if comm.rank() or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if sharding:
        # Under ZeRO-3 transformers tells neither unexpected weights nor wrong shapes.
        comm.decide(lambda: _read_weights(cls, source, dtype, device_map="meta") and None)
    # transformers looks this object up while it loads; it is forgotten when the name goes.
    sharded = HfDeepSpeedConfig(sharding) if sharding else None
    try:
        return _read_weights(cls, source, dtype)
    finally:
        del sharded


def _read_weights(cls: type, source: str, dtype: torch.dtype, **place) -> PreTrainedModel:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of the same is a table of warnings
    try:
        model, info = cls.from_pretrained(
            source,
            attn_implementation="sdpa",
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the missing ones
            **place,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source}: its weights cannot be read ({first_line(error)}); "
            "model.weights=random starts without any"
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
    check_loaded(source, info)
    return model


def check_loaded(source: str, info: dict) -> None:
    """Raise ``ValueError`` listing missing, unexpected or misshapen weights, if there are any."""
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(n) for n in info.get(kind) or ())
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{kind.split('_')[0]}: {', '.join(names[:8])}{more}")
    if problems:
        raise ValueError(f"{source}: the weights do not fit the model, {'; '.join(problems)}")


def set_trainable(model: CompressionModel, config: ModelConfig, *, matching: bool) -> None:
    """Choose what has a gradient: adapter or language model, the K rows, the tower if asked for.

    A parameter that no loss reaches stays frozen: the output matrix in stage 2 (where it is not
    the embedding table as well), the pooling query in stage 1.
    """
    lm = model.backbone.lm
    full = config.adapter == "none"
    for name, parameter in lm.named_parameters():
        if ".visual." in f".{name}":
            parameter.requires_grad_(config.train_vision and ".lora_" not in name)
        else:
            parameter.requires_grad_(full or "lora_" in name)
    tied = lm.lm_head.weight is lm.get_input_embeddings().weight
    if matching and not tied:
        lm.lm_head.weight.requires_grad_(False)
    if model.tokens is not None:
        model.tokens.requires_grad_(True)
    model.pooling.requires_grad_(matching)


def stored_tokens(
    lm: PreTrainedModel, extras: dict, count: int, whole: Whole
) -> torch.Tensor | None:
    """The rows [K, D] that an exported model holds in its embedding table, or None.

    Raises ``ValueError`` when it holds another number of tokens.
    """
    if not extras.get("compression_tokens"):
        return None
    if extras["compression_tokens"] != count:
        raise ValueError(
            f"model.compression_tokens is {count}, but the model was trained with "
            f"{extras['compression_tokens']}"
        )
    first = extras["first_id"]
    table = lm.get_input_embeddings().weight
    with whole([table]):
        return table[first : first + count].detach().float().cpu().clone()


def stored_query(source: str, extras: dict) -> torch.Tensor | None:
    """The pooling query [D], float32, of an exported model with attention pooling, or None.

    Raises ``ValueError`` when its file is missing.
    """
    if extras.get("pooling") != "attention":
        return None
    file = cached_file(source, POOLING_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ValueError(f"{source}: pooled by attention, but {POOLING_FILE} is not there")
    return load_file(file)["query"]


def choose_attention(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Arrangement and arithmetic of a ``Backbone`` whose products are in ``dtype``.

    Raises ``ValueError`` for one that was asked for and cannot be used.
    """
    wanted, arrangement = config.arithmetic, config.attention
    if wanted in PACKED_ARITHMETIC:
        if lack := CARRIERS[wanted].missing(device, dtype):
            raise ValueError(
                f"model.arithmetic {wanted!r} ({CARRIERS[wanted].said}) cannot be used: {lack}"
            )
        return "packed", wanted
    if wanted == "auto":
        wanted = "matmul" if device.type == "cpu" else "sdpa"
        packed = "" if arrangement in ("split", "dense") else best_carrier(device, dtype)[0]
        if packed:
            return "packed", packed
    return "split" if arrangement == "auto" else arrangement, wanted


def build_model(
    config: ModelConfig,
    match: MatchConfig,
    *,
    matching: bool,
    source: str,
    first_id: int,
    extras: dict,
    precision: str,
    sharding: dict | None,
    whole: Whole,
    seed: int,
    device: torch.device,
) -> CompressionModel:
    """Load, add adapter and tokens, choose what is trained.

    ``first_id`` is the id of the first compression token, ``extras`` what the model folder says of
    itself (``coma_ds.json``).  The tokens start from those of the folder if it has any, else from
    the statistics of the embedding table; the pooling query likewise, else from zero.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "autocast": torch.float32}[precision]
    lm = load_language_model(
        source, weights=config.weights, dtype=dtype, sharding=sharding, seed=seed
    )
    if config.family and lm.config.model_type != config.family:
        raise ValueError(
            f"model.family is {config.family!r}, but {source} is {lm.config.model_type!r}"
        )
    if config.adapter != "none":
        torch.manual_seed(seed)
        sharded = HfDeepSpeedConfig(sharding) if sharding else None  # DoRA reads whole weights
        add_adapter(lm, config.lora, dora=config.adapter == "dora")
        del sharded
    products = torch.bfloat16 if precision == "autocast" else dtype
    backbone = Backbone(lm, *choose_attention(config, device, products))
    tokens = None
    if config.compression_tokens:
        tokens = CompressionTokens(config.compression_tokens, backbone.width, first_id)
        rows = stored_tokens(lm, extras, config.compression_tokens, whole)
        if rows is None:
            table = lm.get_input_embeddings().weight
            with whole([table]):
                tokens.initialise(table, seed)
        else:
            tokens.weight.data.copy_(rows)
    pooling = Pooling(config.pooling, backbone.width, config.pooling_heads)
    if matching and match.matryoshka and match.matryoshka[-1] > backbone.width:
        raise ValueError(
            f"match.matryoshka {list(match.matryoshka)}: the embeddings have {backbone.width} "
            "numbers"
        )
    query = stored_query(source, extras)
    if query is not None:
        trained = ("attention", extras.get("pooling_heads", 1))
        if (config.pooling, config.pooling_heads) == trained:
            pooling.query.data.copy_(query)
        elif extras.get("objective") == "match":
            raise ValueError(
                f"model.pooling is {config.pooling} ({config.pooling_heads} head(s)), but {source} "
                f"was trained with attention of {trained[1]} head(s): its query would be lost"
            )
    temperature = None
    if matching and match.learn_temperature:
        temperature = Temperature(match.temperature, *match.task_temperature.values())
    model = CompressionModel(
        backbone,
        tokens,
        pooling,
        temperature,
        config.bottleneck,
        autocast=precision == "autocast",
    )
    lack = "model.liger=false" if config.liger is False else missing_liger(device, precision)
    if not lack:
        model.kernels = f"Liger: {apply_liger(model)}"
    elif config.liger is True:
        raise ValueError(f"model.liger is true, but Liger's kernels cannot be used: {lack}")
    if config.gradient_checkpointing and not matching:  # stage 2 has chunks for that
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_trainable(model, config, matching=matching)
    return model.to(dtype)


def load_finished(
    source: str, config: ModelConfig, *, precision: str, device: torch.device
) -> tuple[CompressionModel, Processing]:
    """An exported model that is used and not trained, whole on ``device``, and its processing.

    ``config`` says how it is arranged; its adapter and the source of its weights do not count.
    Raises ``ValueError`` as ``load_processing`` and ``load_language_model`` do, and for another
    number of tokens than the model has.
    """
    if precision != "fp32" and not has_fast_bf16(device.type):
        log.warning("%s is used in %s: %s", source, precision, SLOW)
    processing = load_processing(
        source, compression_tokens=config.compression_tokens, max_length=config.max_length
    )
    plain = {"adapter": "none", "weights": "pretrained", "gradient_checkpointing": False}
    if config.arithmetic in PACKED_ARITHMETIC:  # it may have been trained elsewhere
        plain["arithmetic"] = "auto"
    if config.liger is True:
        plain["liger"] = "auto"
    ids = processing.compression_ids
    model = build_model(
        config.model_copy(update=plain),
        MatchConfig(),
        matching=False,
        source=source,
        first_id=ids[0] if ids else 0,
        extras=processing.extras,
        precision=precision,
        sharding=None,
        whole=lambda _: nullcontext(),
        seed=0,
        device=device,
    )
    return model.requires_grad_(False).eval().to(device), processing


def trainable(model: nn.Module) -> Sequence[nn.Parameter]:
    """The parameters that have a gradient."""
    return [p for p in model.parameters() if p.requires_grad]

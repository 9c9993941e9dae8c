"""A finished model as a plain transformers folder that stock ``from_pretrained`` loads.

Adapters are merged, the K rows are written into the embedding table under named special tokens.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from coma_ds.data.processing import (
    COMPRESSION_TOKEN,
    MODEL_EXTRAS,
    POOLING_FILE,
    Processing,
    first_line,
)
from coma_ds.disk import room
from coma_ds.model.adapters import adapter_layers, merged_weight
from coma_ds.model.embedder import CompressionModel

log = logging.getLogger("coma_ds")

ROW_MULTIPLE = 64
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def whole_state(
    model: CompressionModel, whole: Callable[..., AbstractContextManager], *, keep: bool
) -> dict[str, torch.Tensor]:
    """The language model's weights under their stock names, on the host, adapters merged.

    Every rank calls this; only ranks with ``keep`` hold the result.  One parameter (or one adapted
    layer) is whole at a time.
    """
    lm = model.backbone.lm
    adapted = adapter_layers(lm)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in lm.named_parameters():
        if any(name.startswith(prefix + ".") for prefix in adapted):
            continue
        with whole([parameter]):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    for prefix, layer in adapted.items():
        with whole(list(layer.parameters())):
            if not keep:
                continue
            base = layer.get_base_layer()
            state[f"{prefix}.weight"] = merged_weight(layer).to(base.weight.dtype)
            if base.bias is not None:
                state[f"{prefix}.bias"] = base.bias.detach().cpu().clone()
    return state


def export_model(
    model: CompressionModel,
    processing: Processing,
    folder: Path,
    *,
    whole: Callable[..., AbstractContextManager],
    main: bool,
    card: str,
    extras: dict,
) -> None:
    """Write the model folder (on the rank that is ``main``; every rank takes part).

    ``card`` is the text of the model card, ``extras`` goes into ``coma_ds.json`` beside what a
    user of the model must know: the tokens, the pooling, the precision.  The folder is written
    under another name first, so that it is there as a whole or not at all; an earlier export of
    the same name is replaced.

    Raises ``ValueError`` when it cannot be written (a full disk).
    """
    state = whole_state(model, whole, keep=main)
    own = [p for p in (model.tokens, model.pooling) if p is not None]
    with whole([p for module in own for p in module.parameters()]):
        rows = None if model.tokens is None else model.tokens.weight.detach().cpu().clone()
        query = None if model.pooling.query is None else model.pooling.query.detach().cpu().clone()
    if not main:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(model, processing, partial, state, rows, query, card=card, extras=extras)
    except (OSError, SafetensorError) as error:
        problem = f"{folder} cannot be written, {room(folder)} ({first_line(error)})"
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(problem) from error
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def _write(
    model: CompressionModel,
    processing: Processing,
    partial: Path,
    state: dict[str, torch.Tensor],
    rows: torch.Tensor | None,
    query: torch.Tensor | None,
    *,
    card: str,
    extras: dict,
) -> None:
    lm = model.backbone.lm
    config = copy.deepcopy(lm.config)
    if rows is not None:
        write_rows(state, config, rows, model.tokens.first_id)
    dtype = next(iter(state.values())).dtype
    save_torch_state_dict(state, partial, max_shard_size="4GB")
    config.architectures = [type(lm).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(partial)
    save_generation_config(lm, partial)
    save_processor(processing, config.model_type, partial)
    if query is not None:
        save_file({"query": query.float()}, partial / POOLING_FILE)
    count = 0 if rows is None else len(rows)
    extras = {
        "compression_tokens": count,
        "first_id": model.tokens.first_id if count else None,
        "token_names": [COMPRESSION_TOKEN.format(k) for k in range(count)],
        "pooling": model.pooling.kind,
        "pooling_heads": model.pooling.heads,
        "precision": "autocast" if model.autocast else PRECISIONS[dtype],
        "max_length": processing.max_length,
        **extras,
    }
    (partial / MODEL_EXTRAS).write_text(json.dumps(extras, indent=2) + "\n")
    (partial / "README.md").write_text(card)
    for file in partial.glob("*.safetensors"):  # written for the owner alone
        shutil.copymode(partial / "README.md", file)


def save_generation_config(lm: PreTrainedModel, folder: Path) -> None:
    """The generation config that the weights came with, if transformers finds it consistent."""
    try:
        lm.generation_config.save_pretrained(folder)
    except ValueError as error:
        log.warning("generation_config.json is left out: %s", first_line(error))


def write_rows(state: dict, config, rows_KD: torch.Tensor, first_id: int) -> None:
    """Put the K rows into the embedding table, which grows by zero rows where it is too short.

    An untied output matrix grows with it: both have ``vocab_size`` rows.
    """
    table_name = "model.language_model.embed_tokens.weight"
    wanted = first_id + len(rows_KD)
    for name in (table_name, "lm_head.weight"):
        table = state.get(name)
        if table is not None and len(table) < wanted:
            height = -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE
            grown = table.new_zeros(height, table.shape[1])
            grown[: len(table)] = table
            state[name] = grown
    state[table_name][first_id:wanted] = rows_KD.to(state[table_name].dtype)
    config.text_config.vocab_size = len(state[table_name])


def save_processor(processing: Processing, family: str, folder: Path) -> None:
    """Tokenizer, image processor and processor config under the stock class's name."""
    name = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
    }[family]

    # The stock class cannot be built without torchvision (its video half); this one only saves.
    class ImageProcessorOnly(ProcessorMixin):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    ImageProcessorOnly.__name__ = name
    template = processing.tokenizer.chat_template
    processor = ImageProcessorOnly(
        processing.image_processor, processing.tokenizer, chat_template=template
    )
    processor.save_pretrained(folder)
    # The older place of the same: other runtimes read it, and transformers' own video processor.
    processing.image_processor.save_pretrained(folder)

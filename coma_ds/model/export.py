"""A finished model as a plain transformers folder that stock ``from_pretrained`` loads.

Adapters are merged, the K rows are written into the embedding table under named special tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers.processing_utils import ProcessorMixin

from coma_ds.data.processing import COMPRESSION_TOKEN, MODEL_EXTRAS, Processing
from coma_ds.model.adapters import adapter_layers, merged_weight
from coma_ds.model.embedder import CompressionModel

POOLING_FILE = "coma_ds_pooling.safetensors"
ROW_MULTIPLE = 64


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

    ``card`` is the text of the model card, ``extras`` goes into ``coma_ds.json`` beside the number
    of tokens and the pooling.
    """
    state = whole_state(model, whole, keep=main)
    own = [p for p in (model.tokens, model.pooling) if p is not None]
    with whole([p for module in own for p in module.parameters()]):
        rows = None if model.tokens is None else model.tokens.weight.detach().cpu().clone()
        query = None if model.pooling.query is None else model.pooling.query.detach().cpu().clone()
    if not main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.backbone.lm.config)
    count = 0
    if rows is not None:
        count = len(rows)
        write_rows(state, config, rows, model.tokens.first_id)
    save_torch_state_dict(state, folder, max_shard_size="4GB")
    config.architectures = [type(model.backbone.lm).__name__]
    config.dtype = next(iter(state.values())).dtype
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "sdpa"
    config.save_pretrained(folder)
    save_processor(processing, config.model_type, folder)
    if query is not None:
        save_file({"query": query.float()}, folder / POOLING_FILE)
    extras = {
        "compression_tokens": count,
        "first_id": model.tokens.first_id if count else None,
        "token_names": [COMPRESSION_TOKEN.format(k) for k in range(count)],
        "pooling": model.pooling.kind,
        **extras,
    }
    (folder / MODEL_EXTRAS).write_text(json.dumps(extras, indent=2) + "\n")
    (folder / "README.md").write_text(card)


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

"""Tiny random models of the three families, and packed batches made by hand."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from coma_ds.batch import IGNORE, Batch, ImageBatch
from coma_ds.config import ModelConfig
from coma_ds.data.collate import rope_positions
from coma_ds.data.processing import Processing, load_processing
from coma_ds.data.records import digest_id
from coma_ds.model.adapters import add_adapter
from coma_ds.model.backbone import FAMILIES, Backbone
from coma_ds.model.embedder import CompressionModel, Temperature
from coma_ds.model.loading import CLASSES, set_trainable
from coma_ds.model.pooling import Pooling
from coma_ds.model.tokens import CompressionTokens

VOCAB, K, FIRST_ID = 512, 4, 600  # the token ids lie beyond the table on purpose
IMAGE_ID, START_ID, END_ID = 503, 500, 501
SPECIAL = {
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
    "image_token_id": IMAGE_ID,
    "video_token_id": 504,
}
PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}


def tiny_config(
    family: str, *, width: int = 64, layers: int = 2, vocab: int = VOCAB, tied: bool = True
):
    """The stock config of a tiny model with grouped heads and two vision blocks."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "rope_parameters": rope,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH[family],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    shared = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **SPECIAL}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}
        return Qwen2VLConfig(**shared)
    vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": width}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(**shared)
    text["head_dim"] = 16
    text["rope_parameters"] = rope | {"mrope_interleaved": True}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(**shared)


def tiny_model(
    family: str = "qwen2_5_vl",
    *,
    matching: bool = True,
    carrier: str = "split",
    arithmetic: str = "sdpa",
    temperature: float | None = None,
    seed: int = 0,
    bottleneck: str = "kv",
    tokens: int = K,
    first_id: int = FIRST_ID,
    tied: bool = True,
    **model,
) -> CompressionModel:
    """A model as ``build_model`` makes it, without files; ``model`` are keys of ``ModelConfig``."""
    assert family in FAMILIES
    config = ModelConfig(compression_tokens=tokens, bottleneck=bottleneck, **model)
    torch.manual_seed(seed)
    shape = tiny_config(family, tied=tied)
    lm = CLASSES[family]._from_config(shape, attn_implementation="sdpa")
    if config.adapter != "none":
        add_adapter(lm, config.lora, dora=config.adapter == "dora")
        noise = torch.Generator().manual_seed(seed + 1)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:  # zero at the start: dropout would have nothing to act on
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=noise)
    backbone = Backbone(lm, carrier, arithmetic)
    rows = CompressionTokens(tokens, backbone.width, first_id)
    rows.initialise(lm.get_input_embeddings().weight, seed)
    starts = temperature if isinstance(temperature, list | tuple) else [temperature]
    learned = Temperature(*starts) if temperature else None
    pooling = Pooling(config.pooling, backbone.width, config.pooling_heads)
    built = CompressionModel(backbone, rows, pooling, learned, bottleneck)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_trainable(built, config, matching=matching)
    return built.float()


def make_batch(
    samples: list[dict],
    family: str = "qwen2_5_vl",
    *,
    seed: int = 0,
    pairs: int = 0,
    negative_counts: list[int] | None = None,
    tasks: list[str] | None = None,
    tokens: int = K,
    first_id: int = FIRST_ID,
) -> Batch:
    """A packed batch; each sample says ``images`` (list of (height, width) in merged cells),
    ``text`` (context tokens after the images), ``dialogue`` (its length), ``answers`` (pairs of
    begin and end inside it) and ``content``; ``tokens`` compression tokens stand in each.  Pairs
    have ``negative_counts`` and ``tasks``."""
    noise = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(5, 490, (count,), generator=noise).tolist()

    ids, labels, positions, lengths, grids, counts, features, contents = ([] for _ in range(8))
    for number, sample in enumerate(samples):
        context, own = [], []
        for height, width in sample.get("images", ()):
            context += [START_ID, *[IMAGE_ID] * (height * width), END_ID]
            own.append((1, 2 * height, 2 * width))
        context += words(sample.get("text", 0))
        dialogue = words(sample.get("dialogue", 0))
        label = [IGNORE] * len(dialogue)
        for begin, end in sample.get("answers", ()):
            label[begin:end] = dialogue[begin:end]
        row = np.array(context + list(range(first_id, first_id + tokens)) + dialogue)
        ids.append(row)
        labels += [IGNORE] * (len(context) + tokens) + label
        positions.append(rope_positions(row, own, IMAGE_ID, 2))
        lengths.append((len(context), tokens, len(dialogue)))
        grids += own
        counts.append(len(own))
        features.append(sum(t * h * w // 4 for t, h, w in own))
        contents.append(sample.get("content", 1000 * seed + number))
    images = None
    if grids:
        patches = sum(t * h * w for t, h, w in grids)
        pixels = torch.randn(patches, 3 * 2 * PATCH[family] ** 2, generator=noise)
        images = ImageBatch(pixels, torch.tensor(grids), 4)
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate(ids)),
        position_ids_3T=torch.from_numpy(np.concatenate(positions, 1)),
        labels_T=torch.tensor(labels),
        lengths_B3=torch.tensor(lengths),
        image_counts_B=torch.tensor(counts),
        feature_counts_B=torch.tensor(features),
        feature_rows_F=torch.arange(sum(features)),
        content_ids_B=torch.tensor(contents),
        images=images,
        pairs=pairs,
        negative_counts_N=None if negative_counts is None else torch.tensor(negative_counts),
        task_ids_N=tasks and torch.tensor([digest_id(name.encode()) for name in tasks]),
    )


@dataclass(frozen=True)
class Flat:
    """A picture of one colour; ``size`` is (width, height)."""

    name: str
    colour: tuple[int, int, int] = (200, 30, 30)
    size: tuple[int, int] = (64, 64)

    def open(self) -> Image.Image:
        return Image.new("RGB", self.size, self.colour)

    def digest(self) -> bytes:
        return hashlib.blake2b(repr((self.colour, self.size)).encode(), digest_size=16).digest()


def demo_processing(compression_tokens: int = 8, **limits) -> Processing:
    """The tokenizer and the image processor that the package ships."""
    folder = Path(__file__).resolve().parents[1] / "coma_ds" / "data" / "models" / "demo-base"
    return load_processing(folder, compression_tokens=compression_tokens, **limits)


def demo_model(processing: Processing, *, carrier: str = "split", **model) -> CompressionModel:
    """A smaller sister of the demo's base for its tokenizer, random weights, in fp64."""
    folder = Path(__file__).resolve().parents[1] / "coma_ds" / "data" / "models" / "demo-base"
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = config.vision_config.depth = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.fullatt_block_indexes = [0, 1]
    # tied, a random model says the last word again and again
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    lm = CLASSES[config.model_type]._from_config(config, attn_implementation="sdpa")
    backbone = Backbone(lm, carrier, "matmul")
    ids = processing.compression_ids
    tokens = CompressionTokens(len(ids), backbone.width, ids[0])
    tokens.initialise(lm.get_input_embeddings().weight)
    return CompressionModel(backbone, tokens, Pooling("mean", backbone.width), **model).double()


class PlainEngine:
    """What ``step`` needs of an engine, without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, model) -> None:
        self.model = model
        self.lasts: list[bool] = []

    def __call__(self, call):
        return call(self.model)

    def gradients_of_a_step(self, *, kept: bool = False):
        return nullcontext()

    def forward_backward(self, call, *, last: bool):
        loss, result = call(self.model)
        self.backward(loss, last=last)
        return result

    def backward(self, loss, *, last: bool) -> None:
        self.lasts.append(last)
        loss.backward()

"""Model folders on disk, small and random, and what the trainer makes of them."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoTokenizer

from coma_ds.config import MatchConfig, ModelConfig, RunConfig
from coma_ds.data.processing import Processing, load_processing
from coma_ds.model.card import model_card
from coma_ds.model.embedder import CompressionModel
from coma_ds.model.export import export_model
from coma_ds.model.loading import CLASSES, build_model
from tests.tiny import tiny_config

SKELETON = Path(__file__).resolve().parents[1] / "coma_ds" / "data" / "models" / "demo-base"
STOCK_FILES = ("tokenizer*.json", "chat_template.jinja", "*processor_config.json")
WORDS = 4032  # ids of the tokenizer without compression tokens


def whole(_):
    """Parameters that are whole already."""
    return nullcontext()


def base_folder(
    folder: Path, family: str = "qwen2_5_vl", *, tied: bool = True, vocab: int = 4096
) -> Path:
    """A folder as the hub has them, with the demo's tokenizer and pictures of 16 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in STOCK_FILES:
        for file in SKELETON.glob(pattern):
            shutil.copy(file, folder)
    config = tiny_config(family, vocab=vocab, tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("vision_start", "vision_end"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.vision_config.patch_size = 8
    torch.manual_seed(0)
    lm = CLASSES[family](config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:  # norms and biases of a trained model are not ones and zeros
                parameter.add_(0.1 * torch.randn(parameter.shape))
    lm.save_pretrained(folder)
    return folder


def load(
    folder: Path,
    *,
    precision: str = "fp32",
    matching: bool = True,
    match: MatchConfig | None = None,
    **model,
) -> tuple[CompressionModel, Processing]:
    """A model as a run of stage 2 (or 1) builds it, whole; ``model`` are keys of ``ModelConfig``.

    Adapters, tokens and query are moved off the values that they start from.
    """
    config = ModelConfig(**{"compression_tokens": 4, "max_length": 512} | model)
    processing = load_processing(
        folder, compression_tokens=config.compression_tokens, max_length=config.max_length
    )
    ids = processing.compression_ids
    built = build_model(
        config,
        match or MatchConfig(),
        matching=matching,
        source=str(folder),
        first_id=ids[0] if ids else 0,
        extras=processing.extras,
        precision=precision,
        sharding=None,
        whole=whole,
        seed=0,
        device=torch.device("cpu"),
    )
    return built, processing


def disturb(model: CompressionModel, size: float = 0.1) -> CompressionModel:
    """Noise on everything that is trained, as if steps had been taken."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=noise).to(parameter)
    return model


def export(
    model: CompressionModel,
    processing: Processing,
    folder: Path,
    *,
    main: bool = True,
    objective: str = "match",
) -> Path:
    """Export as a run does."""
    settings = ModelConfig(
        compression_tokens=len(processing.compression_ids),
        pooling=model.pooling.kind,
        pooling_heads=model.pooling.heads,
        max_length=processing.max_length,
    )
    if not settings.compression_tokens:
        config = RunConfig(model=settings, compress={"visible": True})
    else:
        config = RunConfig(model=settings, objective=objective)
    export_model(
        model,
        processing,
        folder,
        whole=whole,
        main=main,
        card=model_card(config, 3),
        extras={"objective": objective, "recipe": "test", "step": 3},
    )
    return folder


def png(seed: int) -> bytes:
    """A picture file of 64 x 64 pixels in coarse coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(stored, "PNG")
    return stored.getvalue()


def mmeb_folder(root: Path) -> None:
    """Two sets in MMEB-eval's format, of 9 and 5 queries."""
    (root / "images").mkdir(parents=True)
    for i in range(9):
        (root / "images" / f"{i}.png").write_bytes(png(i))
    index = []
    for name, group, rows in (("find", "Ret", 9), ("say", "Cls", 5)):
        numbers = [[(i + k) % 9 for k in range(6)] for i in range(rows)]
        texts = [[f"thing number {k}" for k in row] for row in numbers]
        paths = [[f"{k}.png" for k in row] for row in numbers]
        to_image = name == "find"
        blank = [[""] * 6] * rows
        columns = {
            "qry_text": [f"thing number {i}" if to_image else "say:" for i in range(rows)],
            "qry_img_path": ["" if to_image else f"{i}.png" for i in range(rows)],
            "tgt_text": blank if to_image else texts,
            "tgt_img_path": paths if to_image else blank,
        }
        (root / name).mkdir()
        pq.write_table(pa.table(columns), root / name / "test-00000-of-00001.parquet")
        index.append({"name": name, "group": group, "domain": "IND"})
    (root / "sets.json").write_text(json.dumps(index))

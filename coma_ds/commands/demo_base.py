"""The demo's base model: its folder before training, and the trained one that ships.

``python -m coma_ds.commands.demo_base FOLDER`` writes config, tokenizer and image processor; the
recipe ``demo-base`` trains them from random weights; ``--install RUN FOLDER`` puts the result
there (``make demo-base`` does all three).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from coma_ds.data.builtin import BuiltinDialogues, BuiltinPairs
from coma_ds.data.records import IMAGE_MARK
from coma_ds.model.loading import load_language_model

VOCABULARY = 4096  # rows of the table; some stay free for compression tokens
FREE_ROWS = 64
# The special tokens of Qwen2.5-VL, so that the demo has the layout of the real ones.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PATCH, MERGE, SIDE = 8, 2, 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(dialogues: int = 30_000, pairs: int = 3_000) -> Iterator[str]:
    """The text that the base and both stages train on: seen concepts only."""
    for dialogue in (BuiltinDialogues(length=dialogues)[i] for i in range(dialogues)):
        for turn in dialogue.turns:
            yield turn.question
            yield turn.answer
    sources = BuiltinPairs(length=pairs)
    for name in sources.source_names:
        for index in range(pairs):
            pair = sources[name][index]
            for side in (pair.query, pair.target):
                yield from filter(None, IMAGE_MARK.split(side.text))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the corpus, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - FREE_ROWS - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of some 2.6 million parameters for 64 x 64 pictures (16 image tokens)."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": SIDE,
        "fullatt_block_indexes": [0, 1, 2, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )


def write_skeleton(folder: Path) -> None:
    """Config, tokenizer and image processor under ``folder``; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "processor_config.json").unlink(missing_ok=True)  # of a trained model
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_config(tokenizer).save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        min_pixels=SIDE * SIDE,
        max_pixels=SIDE * SIDE,
    )
    images.save_pretrained(folder)


WEIGHTS = "model.safetensors"
SHIPPED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
LARGEST = 12_000_000  # bytes of the shipped folder


def install(run: Path, folder: Path) -> None:
    """Put the model of a finished ``demo-base`` run into ``folder``, in bf16, with its card.

    Raises ``ValueError`` for a run that is not finished or not of that recipe, and for a model
    that is too large to ship.
    """
    results_file = run / "results.json"
    if not results_file.is_file():
        raise ValueError(f"{results_file} is missing: the run is not finished")
    config = yaml.safe_load((run / "config.yaml").read_text())
    if config["recipe"] != "demo-base":
        raise ValueError(f"{run} is a run of the recipe {config['recipe']!r}, expected 'demo-base'")
    results = json.loads(results_file.read_text())
    if not results["step"]:
        raise ValueError(f"{run} took no training step: it evaluates a base, it does not train one")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        weights = load_file(run / "model" / WEIGHTS)
        weights = {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}
        save_file(weights, staged / WEIGHTS, metadata={"format": "pt"})
        (staged / WEIGHTS).chmod(0o644)
        for name in SHIPPED:
            shutil.copyfile(run / "model" / name, staged / name)
        settings = (run / "model" / "config.json").read_text().replace('"float32"', '"bfloat16"')
        (staged / "config.json").write_text(settings)
        parameters = sum(w.numel() for w in weights.values())
        (staged / "README.md").write_text(card(config, results, parameters))
        load_language_model(
            str(staged), weights="pretrained", dtype=torch.bfloat16, sharding=None, seed=0
        )
        size = sum(file.stat().st_size for file in staged.iterdir())
        if size > LARGEST:
            raise ValueError(f"{run}: the model takes {size:,} bytes, at most {LARGEST:,} ship")
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def card(config: dict, results: dict, parameters: int) -> str:
    """How the shipped model was made, and what it answers."""
    optim, steps = config["optim"], results["step"]
    hours = results["training_seconds"] / 3600
    rows = "\n".join(
        f"| {kind.replace('_', ' ')} | {100 * row['visible']:.1f} |"
        for kind, row in results["bottleneck"].items()
    )
    questions = max(row["questions"] for row in results["bottleneck"].values())
    return f"""---
library_name: transformers
tags: [coma-ds, qwen2_5_vl]
---
# demo-base

The model that coma-ds's demo starts from: a Qwen2.5-VL of {parameters / 1e6:.1f} million
parameters (bf16) for 64 x 64 pictures, trained by coma-ds from random weights. Toy size: it knows
the built-in picture set and nothing else. It has no compression tokens.

## How it was made

`make demo-base`: recipe `demo-base`, the visibility rule off, ordinary dialogues that see their
picture, cross-entropy on the answers. Data: the built-in picture set, its five training styles and
seen concepts; the test style and the held-out concepts stand neither in pictures nor in text.

| | |
|---|---|
| steps | {steps:,} |
| dialogues seen | {steps * optim["batch_size"]:,} |
| turns of a dialogue | {config["data"]["turns"][0]} to {config["data"]["turns"][1]} |
| optimizer | {optim["kind"]}, rate {optim["lr"]:g}, {optim["schedule"]} |
| seed | {config["seed"]} |
| training time | {hours:.2f} hours of wall clock on {os.cpu_count()} CPU cores |

## What it answers

Exact answers in percent with the picture in sight, {questions} questions of a kind, drawings of
seen concepts in the test style, which it has never seen:

| question | exact |
|---|---|
{rows}

## Licences

The weights carry the licence of coma-ds (Apache-2.0); those of the pictures they were trained on
stand in `coma_ds/data/builtin/NOTICE.md`.
"""


def main(argv: list[str] | None = None) -> None:
    """Write the untrained folder, or install a trained one."""
    parser = argparse.ArgumentParser(prog="demo_base", description=__doc__.splitlines()[0])
    parser.add_argument("--install", type=Path, metavar="RUN", help="a finished demo-base run")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if args.install:
        install(args.install, args.folder)
    else:
        write_skeleton(args.folder)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)

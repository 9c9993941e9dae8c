"""The demo's base model before training: config, tokenizer and image processor in a folder.

``python -m coma_ds.commands.demo_base FOLDER`` writes it; the recipe ``demo-base`` then trains it
from random weights (``make demo-base`` does both).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from coma_ds.data.builtin import BuiltinDialogues, BuiltinPairs
from coma_ds.data.records import IMAGE_MARK

log = logging.getLogger("coma_ds")

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


if __name__ == "__main__":
    write_skeleton(Path(sys.argv[1]))

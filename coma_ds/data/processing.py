"""Text and pictures to ids and pixels: a stock tokenizer and image processor, and K named tokens.

Shapes: P patches, C values of a patch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from coma_ds.data.records import Picture

COMPRESSION_TOKEN = "<|compress_{}|>"
MODEL_EXTRAS = "coma_ds.json"
REMEMBERED_LENGTH, REMEMBERED_PIECES = 120, 50_000


@dataclass
class Processing:
    """What turns records into model input.

    ``compression_ids`` are consecutive.  The image processor is the one without torchvision, also
    where torchvision is installed: the same picture gives the same pixels everywhere.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    compression_ids: list[int]
    vision_start: int
    vision_end: int
    image_id: int
    turn_start: int
    turn_end: int
    max_length: int
    max_vision_tokens: int
    extras: dict = field(default_factory=dict)
    _remembered: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @property
    def merge(self) -> int:
        """Patches that become one image token."""
        return self.image_processor.merge_size**2

    def pixels(self, picture: Picture) -> tuple[np.ndarray, tuple[int, int, int]]:
        """``pixels_PC`` float32 and the grid (t, h, w) of one picture.

        Raises ``ValueError`` naming the picture when it is broken or takes too many tokens.
        """
        image = picture.open()
        try:
            out = self.image_processor(images=image, return_tensors="np")
        except ValueError as error:
            raise ValueError(f"{picture.name}: the image processor refuses it ({error})") from None
        grid = tuple(int(x) for x in out["image_grid_thw"][0])
        tokens = grid[0] * grid[1] * grid[2] // self.merge
        if tokens > self.max_vision_tokens:
            raise ValueError(
                f"{picture.name}: {tokens} image tokens, more than the {self.max_vision_tokens} "
                "that model.max_vision_tokens and model.max_length leave"
            )
        return out["pixel_values"], grid

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added.

        Short pieces are remembered: questions and names come again and again.
        """
        if len(text) > REMEMBERED_LENGTH:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = self._remembered.get(text)
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(self._remembered) < REMEMBERED_PIECES:
                self._remembered[text] = ids
        return ids


def load_processing(
    folder: str | Path,
    *,
    compression_tokens: int,
    min_vision_tokens: int | None = None,
    max_vision_tokens: int | None = None,
    max_length: int = 8192,
) -> Processing:
    """The processing of a model folder (or hub name), with K named tokens added to its tokenizer.

    ``min_vision_tokens`` and ``max_vision_tokens`` bound the image tokens of a picture; None keeps
    what the folder says.  Raises ``ValueError`` when the tokenizer lacks Qwen's special tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    unit = (image_processor.patch_size * image_processor.merge_size) ** 2
    size = dict(image_processor.size)
    if min_vision_tokens:
        size["shortest_edge"] = min_vision_tokens * unit
    if max_vision_tokens:
        size["longest_edge"] = max_vision_tokens * unit
    image_processor.size = size

    names = [COMPRESSION_TOKEN.format(k) for k in range(compression_tokens)]
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"{folder}: the compression tokens do not have consecutive ids")

    config = AutoConfig.from_pretrained(folder)
    turn_start, turn_end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    if turn_start is None or turn_end is None:
        raise ValueError(f"{folder}: the tokenizer has no <|im_start|> and <|im_end|>")
    extras = Path(folder) / MODEL_EXTRAS
    return Processing(
        tokenizer=tokenizer,
        image_processor=image_processor,
        compression_ids=ids,
        vision_start=config.vision_start_token_id,
        vision_end=config.vision_end_token_id,
        image_id=config.image_token_id,
        turn_start=turn_start,
        turn_end=turn_end,
        max_length=max_length,
        max_vision_tokens=max_vision_tokens or max_length - compression_tokens - 2,
        extras=json.loads(extras.read_text()) if extras.is_file() else {},
    )

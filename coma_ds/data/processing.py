"""Text and pictures to ids and pixels: a stock tokenizer and image processor, and K named tokens.

Shapes: P patches, C values of a patch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from coma_ds.batch import ImageBatch
from coma_ds.config import FAMILIES
from coma_ds.data.records import Picture

COMPRESSION_TOKEN = "<|compress_{}|>"
# Beside the stock files of an exported model: what it says of itself, and its pooling query.
MODEL_EXTRAS = "coma_ds.json"
POOLING_FILE = "coma_ds_pooling.safetensors"
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
        """``pixels_PC`` and the grid (t, h, w) of one picture; with ``levels`` uint8, see
        ``ImageBatch``, else the float32 values of the image processor.

        Raises ``ValueError`` naming the picture when it is broken or takes too many tokens.
        """
        image = picture.open()
        try:
            raw = {"do_rescale": False, "do_normalize": False} if self.levels is not None else {}
            out = self.image_processor(images=image, return_tensors="np", **raw)
        except ValueError as error:
            raise ValueError(f"{picture.name}: the image processor refuses it ({error})") from None
        grid = tuple(int(x) for x in out["image_grid_thw"][0])
        tokens = grid[0] * grid[1] * grid[2] // self.merge
        if tokens > self.max_vision_tokens:
            raise ValueError(
                f"{picture.name}: {tokens} image tokens, more than the {self.max_vision_tokens} "
                "that model.max_vision_tokens and model.max_length leave"
            )
        pixels = out["pixel_values"]
        if self.levels is not None:
            by_frame = pixels.reshape(len(pixels), 3, self.image_processor.temporal_patch_size, -1)
            pixels = by_frame[:, :, 0].astype(np.uint8).reshape(len(pixels), -1)
        return pixels, grid

    @cached_property
    def levels(self) -> np.ndarray | None:
        """What the image processor makes of 0 .. 255 in each channel, float32 [3, 256]; None for
        one that does not scale and normalise."""
        p = self.image_processor
        if not (p.do_rescale and p.do_normalize):
            return None
        every = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (3, 256, 1))
        scaled = p.rescale(every, p.rescale_factor)
        return p.normalize(scaled, p.image_mean, p.image_std)[:, :, 0].astype(np.float32)

    def image_batch(self, pixels_PC: np.ndarray, grids: list) -> ImageBatch:
        """Of what ``pixels`` gave of some pictures, one after the other."""
        levels = None if self.levels is None else torch.from_numpy(self.levels)
        frames = self.image_processor.temporal_patch_size
        pixels = torch.from_numpy(pixels_PC)
        return ImageBatch(pixels, torch.tensor(grids), self.merge, levels, frames)

    @cached_property
    def reserved(self) -> list[str]:
        """The tokens that no text may spell: they would be read as parts of a sample."""
        own = [self.image_id, self.vision_start, self.vision_end, self.turn_start, self.turn_end]
        return self.tokenizer.convert_ids_to_tokens([*own, *self.compression_ids])

    def check_text(self, text: str) -> None:
        """Raise ``ValueError`` for a text that ``encode`` would refuse, without cutting it up."""
        _check_unicode(text)
        if "<|" in text:
            for name in self.reserved:
                if name in text:
                    raise _taken(text, name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added.

        Short pieces are remembered: questions and names come again and again.  Raises
        ``ValueError`` for a text that spells an image or compression token (their places are ours)
        or is no Unicode.
        """
        ids = self._remembered.get(text)
        if ids is None:
            _check_unicode(text)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            taken = {self.image_id, *self.compression_ids}.intersection(ids)
            if taken:
                raise _taken(text, self.tokenizer.convert_ids_to_tokens(min(taken)))
            if len(text) <= REMEMBERED_LENGTH and len(self._remembered) < REMEMBERED_PIECES:
                self._remembered[text] = ids
        return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {text[:80]!r} is not valid Unicode: half of a surrogate pair stands at "
            f"character {error.start}; take it out of the data"
        ) from None


def _taken(text: str, name: str) -> ValueError:
    return ValueError(
        f"the text {text[:80]!r} contains {name!r}, which stands for a part of a sample here (an "
        "image, a turn, a compression token): take it out of the data"
    )


def read_config(source: str | Path) -> PretrainedConfig:
    """The config of a model folder or hub name.

    Raises ``ValueError`` when it cannot be had, or is of a family that is not served.
    """
    try:
        tree, _ = PretrainedConfig.get_config_dict(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: its config.json cannot be read ({first_line(error)})"
        ) from error
    if not tree:
        raise ValueError(f"{source}: no config.json there, so it is no model folder")
    family = tree.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{source}: model family {family!r}, expected one of {', '.join(FAMILIES)}"
        )
    return AutoConfig.from_pretrained(source)


def read_extras(source: str | Path) -> dict:
    """What an exported model says of itself (``coma_ds.json``); empty for any other model."""
    file = cached_file(
        str(source),
        MODEL_EXTRAS,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # a cached hub model on an offline machine
    )
    return json.loads(Path(file).read_text()) if file else {}


def first_line(error: Exception) -> str:
    """The first line of an error of transformers or the hub, which can be pages long."""
    return str(error).strip().split("\n")[0].rstrip(".")[:200]


def _check_patches(folder: str | Path, config: PretrainedConfig, processor) -> None:
    """Raise ``ValueError`` for a processor that cuts pictures otherwise than the model does."""
    pairs = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size"}
    pairs["merge_size"] = "spatial_merge_size"
    for ours, theirs in pairs.items():
        cut, read = getattr(processor, ours), getattr(config.vision_config, theirs)
        if cut != read:
            raise ValueError(
                f"{folder}: the image processor has {ours} {cut}, the model {theirs} {read}: its "
                "processor's config is that of another model"
            )


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
    what the folder says.  Raises ``ValueError`` for a model that is not there or of another
    family, and when the tokenizer lacks Qwen's special tokens.
    """
    config = read_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: its tokenizer or image processor cannot be read ({first_line(error)})"
        ) from error
    unit = (image_processor.patch_size * image_processor.merge_size) ** 2
    size = dict(image_processor.size)
    if min_vision_tokens:
        size["shortest_edge"] = min_vision_tokens * unit
    if max_vision_tokens:
        size["longest_edge"] = max_vision_tokens * unit
    image_processor.size = size

    extras = read_extras(folder)
    names = [COMPRESSION_TOKEN.format(k) for k in range(compression_tokens)]
    if not extras and any(name in tokenizer.get_vocab() for name in names):
        raise ValueError(
            f"{folder}: the tokenizer has compression tokens, but {MODEL_EXTRAS} is not there: "
            "the export is not complete, copy the file that belongs to it"
        )
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"{folder}: the compression tokens do not have consecutive ids")

    turn_start, turn_end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    if turn_start is None or turn_end is None:
        raise ValueError(f"{folder}: the tokenizer has no <|im_start|> and <|im_end|>")
    _check_patches(folder, config, image_processor)
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
        extras=extras,
    )

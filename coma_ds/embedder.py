"""A finished model as one object: texts and images in, vectors out.

Shapes: N inputs, E embedding width.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from coma_ds.config import ModelConfig
from coma_ds.data.collate import Collator
from coma_ds.data.images import BytesPicture, decode, upright_rgb
from coma_ds.data.pairs import compose_side
from coma_ds.data.processing import MODEL_EXTRAS, read_extras
from coma_ds.data.records import Picture, Side
from coma_ds.evaluation import shortened
from coma_ds.hardware import usable_device
from coma_ds.inference import encode_sides
from coma_ds.model.loading import load_finished
from coma_ds.model.source import resolve_model

log = logging.getLogger("coma_ds")

NEEDED = ("compression_tokens", "pooling", "precision", "max_length")


class Embedder:
    """A model that coma-ds exported.

    Args:
        model: a model folder, the folder of a finished run, or a hub name.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes a GPU where there is one.
        precision: ``bf16``, ``fp32`` or ``autocast`` (fp32 weights, bf16 products); None is that
            of the training.

    Raises:
        ValueError: no such model, one that coma-ds did not export, one without compression
            tokens, or a precision that is none.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> None:
        source = resolve_model(os.fspath(model), "model")
        extras = read_extras(source)
        missing = [key for key in NEEDED if key not in extras]
        if missing:
            raise ValueError(
                f"{source}: {MODEL_EXTRAS} is not there or has no {', '.join(missing)}; "
                "expected a model that coma-ds exported (RUN/model)"
            )
        if not extras["compression_tokens"]:
            raise ValueError(
                f"{source}: the model has no compression tokens, so no embeddings; "
                "train it with objective 'compress' or 'match' first"
            )
        if precision not in (None, "bf16", "fp32", "autocast"):
            raise ValueError(f"precision {precision!r}: expected bf16, fp32 or autocast")
        if extras.get("objective") == "compress":
            log.warning("%s comes from stage 1: its vectors are not trained to match", source)
        config = ModelConfig(
            compression_tokens=extras["compression_tokens"],
            pooling=extras["pooling"],
            pooling_heads=extras.get("pooling_heads", 1),
            max_length=extras["max_length"],
        )
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = usable_device(device or default)
        self.precision = precision or extras["precision"]
        self.model, processing = load_finished(
            source, config, precision=self.precision, device=self.device
        )
        self.collator = Collator(processing)

    @property
    def width(self) -> int:
        """E, the length of a vector."""
        return self.model.backbone.width

    def encode(
        self,
        texts: Sequence[str | None] | None = None,
        images: Sequence[Any] | None = None,
        *,
        width: int | None = None,
        batch_size: int = 32,
        workers: int = 0,
    ) -> np.ndarray:
        """Vectors of unit length, float32 [N, E], in the order given.

        Args:
            texts: one for each input, as in training: ``<|image_1|>`` says where the image
                stands; an image without a mark stands first.
            images: one for each input: a path, the bytes of a file, a PIL image, a list of these
                (``<|image_2|>`` is the second), or None for an input without.  Both given, they
                are zipped.
            width: E, below that of the model: the first numbers alone, normalised again, for a
                model that was trained with ``match.matryoshka``.
            batch_size: inputs that go through the model together.
            workers: processes that read and cut images meanwhile.

        Raises:
            ValueError: neither texts nor images, different numbers of them, an input that is
                empty or of the wrong type, an image that cannot be read; named by its number;
                a width out of range.
        """
        whole = isinstance(width, int | np.integer) and not isinstance(width, bool)
        if width is not None and not (whole and 0 < width <= self.width):
            raise ValueError(
                f"width is {width!r}, expected a whole number from 1 to {self.width}, the numbers "
                "of the model's vectors"
            )
        sides = build_sides(texts, images)
        emb_NE = self.encode_sides(sides, batch_size=batch_size, workers=workers)
        return emb_NE if width is None else shortened(torch.from_numpy(emb_NE), width).numpy()

    def encode_sides(
        self,
        sides: Sequence[Side],
        *,
        batch_size: int = 32,
        workers: int = 0,
        shared: bool = False,
    ) -> np.ndarray:
        """Vectors of sides, float32 [N, E].

        ``shared``: the ranks of a world, each with the same sides, divide them among themselves.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        if not sides:
            return np.zeros((0, self.width), dtype=np.float32)
        return encode_sides(
            self.model,
            self.collator,
            sides,
            batch_size=batch_size,
            device=self.device,
            workers=workers,
            shared=shared,
        )


def build_sides(texts: Sequence[str | None] | None, images: Sequence[Any] | None) -> list[Side]:
    """The inputs of :meth:`Embedder.encode` as sides; errors as there."""
    if texts is None and images is None:
        raise ValueError("nothing to encode: give texts, images or both")
    for name, given in (("texts", texts), ("images", images)):
        if isinstance(given, str | bytes | os.PathLike | Image.Image):
            raise ValueError(f"{name} is a single one, a {type(given).__name__}; give a list")
    count = len(texts if texts is not None else images)
    texts = [None] * count if texts is None else texts
    images = [None] * count if images is None else images
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} texts but {len(images)} images: they are zipped")
    return [_side(text, image, f"input {i}") for i, (text, image) in enumerate(zip(texts, images))]


def _side(text: str | None, image: Any, where: str) -> Side:
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: a text must be a str, got {type(text).__name__} {text!r:.60}")
    several = image if isinstance(image, list | tuple) else [image]
    pictures = tuple(as_picture(each, where) for each in several if each is not None)
    if not pictures and not (text or "").strip():
        raise ValueError(f"{where} is empty: give it a text or an image")
    return compose_side(text or "", pictures, where)


def as_picture(image: Any, where: str) -> Picture:
    """A picture from a path, encoded bytes or a PIL image; a picture stays what it is.

    Unlike the paths of a data file, a path here is the caller's own and may lead anywhere.
    Raises ``ValueError``, beginning with ``where``, for anything else.
    """
    if isinstance(image, str | os.PathLike):
        return LocalPicture(os.fspath(image), where)
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise ValueError(f"{where}: the image has no bytes")
        return BytesPicture(bytes(image), where)
    if isinstance(image, Image.Image):
        return PillowPicture(image, where)
    if hasattr(image, "open") and hasattr(image, "digest"):
        return image
    raise ValueError(
        f"{where}: an image is a path, the bytes of a file or a PIL image, "
        f"got {type(image).__name__}"
    )


class LocalPicture:
    """An image file of the caller's."""

    def __init__(self, path: str, where: str) -> None:
        self.path = path
        self.name = f"{path} ({where})"

    def _read(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"image {self.name} cannot be read: {reason}") from None

    def open(self) -> Image.Image:
        """The image, upright RGB; raises ``ValueError`` naming it when it is broken."""
        return decode(self._read(), self.name)

    def digest(self) -> bytes:
        """16 bytes of blake2b over the bytes of the file."""
        return hashlib.blake2b(self._read(), digest_size=16).digest()


class PillowPicture:
    """An image that is open already."""

    def __init__(self, image: Image.Image, name: str) -> None:
        self.image, self.name = image, name

    def open(self) -> Image.Image:
        """The image, upright RGB; raises ``ValueError`` naming it when it cannot be used."""
        return upright_rgb(self.image, self.name)

    def digest(self) -> bytes:
        """16 bytes of blake2b over the pixels."""
        state = hashlib.blake2b(repr((self.image.mode, self.image.size)).encode(), digest_size=16)
        state.update(self.image.tobytes())
        return state.digest()

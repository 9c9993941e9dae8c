"""The drawings of the built-in set as pictures: one on a background, or several in a scene.

Shapes: H height, W width in pixels; drawings are [64, 64, 4] uint8, RGB premultiplied by alpha.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from coma_ds.data.builtin.colours import WHITE
from coma_ds.data.builtin.concepts import FOLDER

TRAINING_STYLES: tuple[str, ...] = ("noto", "twemoji", "emojione", "noto-v1", "fxemoji")
TEST_STYLE = "fluent-emoji-flat"
SIZE = 64
RGB = tuple[int, int, int]


def decode(encoded: bytes) -> np.ndarray:
    """A stored drawing as uint8 [H, W, 4], colours not premultiplied."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGBA"))


class PictureSet:
    """All drawings, decoded when first asked for and then kept.  Use ``PictureSet.load()``."""

    def __init__(self) -> None:
        table = pq.read_table(FOLDER / "pictures.parquet")
        self._encoded = table.column("image").combine_chunks()
        self._keys = list(zip(table.column("style").to_pylist(), table.column("code").to_pylist()))
        self._row = {key: row for row, key in enumerate(self._keys)}
        self._decoded: list[np.ndarray | None] = [None] * len(self._keys)
        self._digests: list[bytes | None] = [None] * len(self._keys)
        words, shares = (table.column(name).to_pylist() for name in ("colour", "colour_share"))
        self._colours = list(zip(words, shares, strict=True))

    @staticmethod
    @lru_cache(maxsize=1)
    def load() -> PictureSet:
        """The set of this process."""
        return PictureSet()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._row

    def keys(self) -> list[tuple[str, str]]:
        """(style, code) of every drawing, style by style."""
        return list(self._keys)

    def codes(self, style: str) -> list[str]:
        """The codes of the concepts that a style draws, in the order of the Unicode charts."""
        return [code for own, code in self._keys if own == style]

    def _find(self, style: str, code: str) -> int:
        row = self._row.get((style, code))
        if row is None:
            raise ValueError(
                f"the built-in set has no drawing {style}/{code}; "
                f"styles are {', '.join([*TRAINING_STYLES, TEST_STYLE])}"
            )
        return row

    def rgba(self, style: str, code: str) -> np.ndarray:
        """The drawing as stored, uint8 [64, 64, 4], colours not premultiplied."""
        return decode(self._encoded[self._find(style, code)].as_py())

    def drawing(self, style: str, code: str) -> np.ndarray:
        """The drawing premultiplied by its alpha, uint8 [64, 64, 4], cached; do not write to it."""
        row = self._find(style, code)
        drawing = self._decoded[row]
        if drawing is None:
            rgba = self.rgba(style, code)
            drawing = np.empty_like(rgba)
            alpha = rgba[..., 3:].astype(np.uint16)
            drawing[..., :3] = (rgba[..., :3] * alpha + 127) // 255
            drawing[..., 3:] = alpha
            self._decoded[row] = drawing
        return drawing

    def colour(self, style: str, code: str) -> tuple[str, float]:
        """The dominant colour word of the drawing and its share of the opaque pixels."""
        return self._colours[self._find(style, code)]

    def content(self, style: str, code: str) -> bytes:
        """16 bytes that are equal exactly for equal stored drawings."""
        row = self._find(style, code)
        if self._digests[row] is None:
            encoded = self._encoded[row].as_py()
            self._digests[row] = hashlib.blake2b(encoded, digest_size=16).digest()
        return self._digests[row]


def _over(drawing_HW4: np.ndarray, background: RGB) -> np.ndarray:
    """A premultiplied drawing over a plain colour: uint8 [H, W, 3]."""
    clear = 255 - drawing_HW4[..., 3:].astype(np.uint16)
    behind = (clear * np.asarray(background, np.uint16) + 127) // 255
    return drawing_HW4[..., :3] + behind.astype(np.uint8)


def _lit(drawing_HW4: np.ndarray, rng: random.Random) -> np.ndarray:
    """A premultiplied drawing lighter or darker by up to 15 %, its channels by 6 % more.

    Before the background is laid under it: the background keeps the colour its word names.
    """
    light = rng.randint(85, 115)
    gains = np.asarray([light * rng.randint(94, 106) for _ in range(3)], np.uint32)
    lit = drawing_HW4.copy()
    np.minimum(
        drawing_HW4[..., :3] * gains // 10_000,
        drawing_HW4[..., 3:],
        out=lit[..., :3],
        casting="unsafe",
    )
    return lit


def _blurred(image: Image.Image, rng: random.Random) -> Image.Image:
    """One picture in five a little out of focus, by up to 1 pixel."""
    if rng.random() >= 0.2:
        return image
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0)))


def _moved(image: Image.Image, background: RGB, rng: random.Random) -> Image.Image:
    """Scaled by 0.75 to 1.12 (each side by up to 10 % more), turned by up to 12 degrees, sheared
    by up to 0.12 and shifted by up to 8 % of the side: artists differ in more than that."""
    side = image.width
    zoom, angle = 1 / rng.uniform(0.75, 1.12), math.radians(rng.uniform(-12, 12))
    wide, high, shear = rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1), rng.uniform(-0.12, 0.12)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    a, b = cos * wide, cos * shear - sin
    d, e = sin, cos * high
    middle = side / 2
    x, y = (middle + rng.uniform(-0.08, 0.08) * side for _ in range(2))
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y),
        resample=Image.Resampling.BILINEAR,
        fillcolor=background,
    )


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class BuiltinPicture:
    """One drawing on a plain background, ``size`` pixels square.

    ``augment`` is the seed of a change (shift, scale, turn, shear, light), None for none.
    """

    style: str
    code: str
    background: RGB = WHITE
    size: int = SIZE
    augment: int | None = None

    @property
    def name(self) -> str:
        return f"builtin:{self.style}/{self.code}"

    def open(self) -> Image.Image:
        """The picture, RGB; the same pixels at every call."""
        drawing = PictureSet.load().drawing(self.style, self.code)
        rng = None if self.augment is None else random.Random(self.augment)
        if rng is not None:
            drawing = _lit(drawing, rng)
        image = Image.fromarray(_over(drawing, self.background))
        if self.size != SIZE:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return image if rng is None else _blurred(_moved(image, self.background, rng), rng)

    def digest(self) -> bytes:
        """16 bytes, equal exactly when drawing, background, size and change are equal."""
        content = PictureSet.load().content(self.style, self.code)
        return _digest("picture", content, self.background, self.size, self.augment)


@dataclass(frozen=True, slots=True)
class ScenePicture:
    """Drawings in the cells of a square grid on one background, row by row.

    ``cells`` holds 4 or 9 entries: (style, code), or None for an empty cell.
    """

    cells: tuple[tuple[str, str] | None, ...]
    background: RGB = WHITE
    size: int = SIZE
    augment: int | None = None

    def __post_init__(self) -> None:
        if len(self.cells) not in (4, 9):
            raise ValueError(f"a scene has {len(self.cells)} cells, expected 4 (2x2) or 9 (3x3)")
        if self.size < self.columns:
            raise ValueError(f"a scene of {self.size} pixels is too small; use 64 or more")

    @property
    def columns(self) -> int:
        """Cells in a row: 2 or 3."""
        return math.isqrt(len(self.cells))

    @property
    def name(self) -> str:
        inside = " ".join("-" if cell is None else "/".join(cell) for cell in self.cells)
        return f"builtin:scene[{inside}]"

    def box(self, cell: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a cell in pixels."""
        row, column = divmod(cell, self.columns)
        side = self.size // self.columns
        return column * side, row * side, (column + 1) * side, (row + 1) * side

    def open(self) -> Image.Image:
        """The scene, RGB; the same pixels at every call."""
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        canvas[:] = self.background
        rng = None if self.augment is None else random.Random(self.augment)
        for cell, key in enumerate(self.cells):
            if key is None:
                continue
            left, top, right, bottom = self.box(cell)
            drawing = PictureSet.load().drawing(*key)
            if rng is not None:
                drawing = _lit(drawing, rng)
            pixels = Image.fromarray(_over(drawing, self.background))
            canvas[top:bottom, left:right] = pixels.resize(
                (right - left, bottom - top), Image.Resampling.BILINEAR
            )
        image = Image.fromarray(canvas)
        return image if rng is None else _blurred(image, rng)

    def digest(self) -> bytes:
        """16 bytes, equal exactly when cells, background, size and change are equal."""
        pictures = PictureSet.load()
        contents = tuple(None if key is None else pictures.content(*key) for key in self.cells)
        return _digest("scene", contents, self.background, self.size, self.augment)


@dataclass(frozen=True, slots=True)
class CropPicture:
    """One cell cut out of a scene and enlarged to ``size`` pixels square."""

    scene: ScenePicture
    cell: int
    size: int = SIZE

    @property
    def name(self) -> str:
        return f"{self.scene.name}#{self.cell}"

    def open(self) -> Image.Image:
        """The crop, RGB."""
        crop = self.scene.open().crop(self.scene.box(self.cell))
        return crop.resize((self.size, self.size), Image.Resampling.BILINEAR)

    def digest(self) -> bytes:
        """16 bytes, equal exactly when scene, cell and size are equal."""
        return _digest("crop", self.scene.digest(), self.cell, self.size)

"""A dozen colour words: of pixels, and as backgrounds."""

from __future__ import annotations

import random

import numpy as np

# The colour of a background of that name, RGB.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (22, 22, 22),
    "gray": (145, 145, 145),
    "red": (214, 44, 44),
    "orange": (246, 146, 34),
    "yellow": (248, 214, 62),
    "green": (72, 168, 80),
    "teal": (44, 188, 188),
    "blue": (58, 116, 220),
    "purple": (138, 78, 202),
    "pink": (250, 150, 194),
    "brown": (128, 82, 48),
    "beige": (238, 212, 176),
}
WHITE = BACKGROUNDS["white"]
COLOUR_WORDS: tuple[str, ...] = tuple(BACKGROUNDS)
_JITTER = 6  # of a background, levels; small enough that its word stays the same
_OPAQUE = 128


def colour_ids(rgb: np.ndarray) -> np.ndarray:
    """The position in ``COLOUR_WORDS`` of every pixel's word.

    ``rgb`` is uint8 [..., 3]; the result int64 [...].  Rules on hue, saturation and value.
    """
    channels = rgb.astype(np.float32) / 255.0
    red, green, blue = channels[..., 0], channels[..., 1], channels[..., 2]
    value = channels.max(-1)
    chroma = value - channels.min(-1)
    safe = np.where(chroma > 0, chroma, 1.0)
    hue = (
        np.where(
            value == red,
            (green - blue) / safe % 6,
            np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
        )
        * 60.0
    )
    saturation = np.where(value > 0, chroma / np.maximum(value, 1e-6), 0.0)
    pale = saturation < np.where((hue > 150) & (hue < 280), 0.2, 0.12)
    warm = (hue >= 12) & (hue < 68)
    rules = [
        ((value < 0.2) | ((value < 0.3) & (saturation < 0.45)), "black"),
        (pale & (value > 0.92), "white"),
        (pale & (value < 0.33), "black"),
        (pale, "gray"),
        (warm & (value < 0.3), "black"),
        (warm & (value < 0.66), "brown"),
        (warm & (saturation < 0.42), "beige"),
        ((hue >= 12) & (hue < 26) & (value < 0.8), "brown"),
        ((hue >= 12) & (hue < 39), "orange"),
        ((hue >= 39) & (hue < 68), "yellow"),
        ((hue >= 68) & (hue < 164), "green"),
        ((hue >= 164) & (hue < 194), "teal"),
        ((hue >= 194) & (hue < 254), "blue"),
        ((hue >= 254) & (hue < 292), "purple"),
        ((hue >= 292) & (hue < 330) & (value < 0.6), "purple"),
        ((hue >= 292) & (hue < 342), "pink"),
        ((saturation < 0.55) & (value > 0.7), "pink"),
        ((value < 0.45) | (saturation < 0.5), "brown"),
    ]
    masks = [mask for mask, _ in rules]
    return np.select(
        masks, [COLOUR_WORDS.index(word) for _, word in rules], COLOUR_WORDS.index("red")
    )


def dominant_colour(rgba: np.ndarray) -> tuple[str, float]:
    """The commonest colour word of a drawing's opaque pixels, and its share of them.

    ``rgba`` is uint8 [H, W, 4].
    """
    solid = rgba[rgba[..., 3] >= _OPAQUE][:, :3]
    if not len(solid):
        solid = rgba[..., :3].reshape(-1, 3)
    counts = np.bincount(colour_ids(solid), minlength=len(COLOUR_WORDS))
    best = int(counts.argmax())
    return COLOUR_WORDS[best], float(counts[best] / len(solid))


def background_rgb(word: str, rng: random.Random | None = None) -> tuple[int, int, int]:
    """The RGB of a background; with ``rng`` slightly varied, always within the same word."""
    base = BACKGROUNDS[word]
    if rng is None or word == "white":
        return base
    offset = rng.randint(-_JITTER, _JITTER)
    return tuple(min(255, channel + offset) for channel in base)


def random_background(rng: random.Random, avoid: str = "", white_share: float = 0.5) -> str:
    """A background word: white with probability ``white_share``, else any but ``avoid``."""
    if rng.random() < white_share:
        return "white"
    return rng.choice([word for word in COLOUR_WORDS if word != avoid])

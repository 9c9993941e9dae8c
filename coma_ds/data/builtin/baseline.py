"""What raw pixels alone can tell: the floor that image-to-image retrieval must beat."""

from __future__ import annotations

import numpy as np
from PIL import Image


def pixel_baseline(image: Image.Image, side: int = 16) -> np.ndarray:
    """The embedding of an image by its pixels: float32 [3 * side * side], unit norm.

    The image is made RGB, shrunk to ``side`` x ``side`` by averaging and centred by the mean of
    each channel; the cosine similarity of two such vectors is the baseline.  An image of one
    colour gives a zero vector.
    """
    if side < 1:
        raise ValueError(f"side is {side}, expected at least 1")
    small = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
    pixels_HWC = np.asarray(small, dtype=np.float32)
    pixels = (pixels_HWC - pixels_HWC.mean((0, 1))).ravel()
    norm = float(np.linalg.norm(pixels))
    return pixels / norm if norm > 1e-3 else np.zeros_like(pixels)

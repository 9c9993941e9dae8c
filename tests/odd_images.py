"""Image files as strangers have them: of every kind, hostile and broken, with what they show."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from tests.folders import png


def picture(seed: int) -> np.ndarray:
    """The picture of ``folders.png``, uint8 [64, 64, 3], of 64 colours."""
    return np.asarray(Image.open(io.BytesIO(png(seed))))


def stored(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, kind, **options)
    return out.getvalue()


def odd_kinds(seed: int) -> dict[str, tuple[bytes, np.ndarray]]:
    """Files by kind, each with the upright RGB pixels that it shows, made without Pillow's own
    conversions: all are lossless."""
    rgb = picture(seed)
    colours, index = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True)
    palette = Image.fromarray(index.reshape(64, 64).astype(np.uint8), "P")
    palette.putpalette(colours.tobytes())
    clear = np.indices((64, 64)).sum(0) % 7 == 0
    alpha = np.where(clear, 0, 255).astype(np.uint8)
    on_white = np.where(clear[..., None], 255, rgb).astype(np.uint8)
    grey = rgb[..., 0]
    bits = grey > 127
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left: to be turned to the right
    ink = np.dstack([255 - rgb, np.zeros_like(grey)])

    def as_rgb(grey_HW: np.ndarray) -> np.ndarray:
        return np.dstack([grey_HW] * 3).astype(np.uint8)

    other = Image.fromarray(picture(seed + 1000))
    return {
        "palette.png": (stored(palette), rgb),
        "clear-colour.png": (
            stored(palette, transparency=0),
            np.where(index.reshape(64, 64, 1) == 0, 255, rgb).astype(np.uint8),
        ),
        "cmyk.tif": (stored(Image.fromarray(ink, "CMYK"), "TIFF"), rgb),
        "turned.png": (stored(np.rot90(rgb).copy(), exif=exif), rgb),
        "rgba.png": (stored(np.dstack([rgb, alpha])), on_white),
        "grey-alpha.png": (
            stored(Image.fromarray(np.dstack([grey, alpha]), "LA")),
            np.where(clear[..., None], 255, as_rgb(grey)).astype(np.uint8),
        ),
        "grey.png": (stored(grey), as_rgb(grey)),
        "deep.png": (stored((grey.astype(np.uint16) * 257) | 3), as_rgb(grey)),
        "bits.png": (stored(Image.fromarray(bits)), as_rgb(bits * 255)),
        "moving.gif": (stored(palette, "GIF", save_all=True, append_images=[other]), rgb),
        "moving.webp": (
            stored(rgb, "WEBP", save_all=True, append_images=[other], lossless=True),
            rgb,
        ),
    }


@cache
def bomb(side: int = 30_000) -> bytes:
    """A whole PNG of a few hundred kilobytes whose ``side`` x ``side`` pixels take gigabytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    rows = [packer.compress(row * 1000) for _ in range(side // 1000)]
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = b"".join(rows) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )

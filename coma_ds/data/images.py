"""Images of a data file: found below the image root, checked, decoded to upright RGB.

Data files come from strangers, so a path may not leave the image root, nothing is fetched
from a network, and what the header promises is checked before a pixel is decoded.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from typing import Any

import numpy as np
from PIL import Image

from coma_ds.data.records import Dialogue, Pair, Picture

MAX_PIXELS = 178_956_970
"""Width x height above which an image is refused from its header.

Pillow refuses above twice ``PIL.Image.MAX_IMAGE_PIXELS`` (the same figure) by itself, so a
larger value needs that one raised as well.
"""

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side; the Qwen image processors refuse more."""

# Plain raster formats; Pillow knows others, some of which start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# What is wrong with a path; any other error is one of the machine (a disk, a limit).
_OF_THE_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|(https?|ftp|file|data):", re.IGNORECASE)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class FilePicture:
    """An image file at ``path`` below ``root``.

    The form of the path is checked here (no file is touched), the file itself when it is
    read: links are followed only when they end inside the root.

    Args:
        root: the image root, a folder.
        path: relative to ``root``, as it stands in the data.

    Raises:
        ValueError: ``path`` is empty, absolute, a URL, or has ``..`` in it.
    """

    __slots__ = ("_digest", "name", "path", "root")

    def __init__(self, root: str | os.PathLike[str], path: str) -> None:
        self.root = os.fspath(root)
        self.path = path
        self._digest: bytes | None = None
        if not path or "\0" in path:
            raise ValueError(f"image path {path!r} is empty or no path; give a file below {root}")
        if _URL.match(path):
            raise ValueError(
                f"image path {path!r} is a URL and images are read from disk only; "
                f"download it below the image root {self.root} and give the relative path"
            )
        if os.path.isabs(path):
            raise ValueError(
                f"image path {path!r} is absolute; give it relative to the image root {self.root}"
            )
        if ".." in path.replace("\\", "/").split("/"):
            raise ValueError(
                f"image path {path!r} leaves the image root {self.root} by '..'; "
                "give a path that stays below the root"
            )
        self.name = os.path.join(self.root, path)

    def __repr__(self) -> str:
        return f"FilePicture({self.name!r})"

    def check_exists(self) -> None:
        """Find the file and read nothing: for dry runs.

        Raises:
            ValueError: missing, empty, not a regular file, or a link out of the root.
        """
        self._resolve()

    def open(self) -> Image.Image:
        """The image, upright RGB. Raises ``ValueError`` as :func:`decode` does."""
        return decode(self._read(), self.name)

    def digest(self) -> bytes:
        """16 bytes of blake2b over the bytes of the file; read once for each object."""
        if self._digest is None:
            self._read()
        assert self._digest is not None
        return self._digest

    def _resolve(self) -> str:
        try:
            real = os.path.realpath(self.name, strict=True)
            status = os.stat(real)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise ValueError(
                    f"image {self.name} does not exist; check the image root {self.root} "
                    "and that the images of this set are unpacked below it"
                ) from None
            raise self._unreadable(error) from error
        root = os.path.realpath(self.root)
        if os.path.commonpath((root, real)) != root:
            raise ValueError(
                f"image {self.name} is a link to {real}, outside the image root {self.root}; "
                "put the file below the root or choose a root that holds both"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"image {self.name} is not a regular file")
        if status.st_size == 0:
            raise ValueError(f"image {self.name} is an empty file (0 bytes); copy it again")
        return real

    def _unreadable(self, error: OSError) -> Exception:
        """A ``ValueError`` where the row is to blame; what the machine does is no bad row."""
        text = f"image {self.name} cannot be read: {error.strerror}"
        return ValueError(text) if error.errno in _OF_THE_PATH else OSError(error.errno, text)

    def _read(self) -> bytes:
        real = self._resolve()
        try:
            with open(real, "rb") as file:
                data = file.read()
        except OSError as error:
            raise self._unreadable(error) from error
        if self._digest is None:
            self._digest = _digest(data)
        return data


class BytesPicture:
    """An encoded image (PNG, JPEG, ...) held in memory; ``name`` says where it came from.

    Raises:
        ValueError: no bytes.
    """

    __slots__ = ("_digest", "data", "name")

    def __init__(self, data: bytes, name: str) -> None:
        if not data:
            raise ValueError(f"image {name} has no bytes")
        self.data = data
        self.name = name
        self._digest: bytes | None = None

    def __repr__(self) -> str:
        return f"BytesPicture({len(self.data)} bytes, {self.name!r})"

    def open(self) -> Image.Image:
        """The image, upright RGB. Raises ``ValueError`` as :func:`decode` does."""
        return decode(self.data, self.name)

    def digest(self) -> bytes:
        """16 bytes of blake2b over the encoded bytes."""
        if self._digest is None:
            self._digest = _digest(self.data)
        return self._digest


def as_picture(value: Any, image_root: str | os.PathLike[str] | None, name: str) -> Picture | None:
    """The picture in one cell of a data file, or None where the cell holds none.

    Args:
        value: None, an empty string, a path, encoded bytes, or the struct of Hugging Face
            image columns, ``{"bytes": ..., "path": ...}`` (bytes win, the path then only
            names them).
        image_root: where paths start.
        name: file and row, for messages.

    Raises:
        ValueError: a path without an image root, a refused path, or another type.
    """
    if isinstance(value, dict):
        if value.get("bytes"):
            name = f"{name} ({value.get('path') or 'bytes'})"
            return BytesPicture(_as_bytes(value["bytes"], name), name)
        value = value.get("path")
    if value is None or (isinstance(value, (str, bytes)) and not value):
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return BytesPicture(bytes(value), name)
    if not isinstance(value, str):
        raise ValueError(
            f"{name}: an image is a path, bytes or {{'bytes', 'path'}}, "
            f"got {type(value).__name__} {str(value)[:60]!r}"
        )
    if image_root is None:
        raise ValueError(
            f"{name}: the image is given as a path ({value!r}) but no image root is set: "
            "name the folder where the paths start (data.image_root, eval.image_root or "
            "--image-root)"
        )
    try:
        return FilePicture(image_root, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _as_bytes(value: Any, name: str) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise ValueError(
            f"{name}: 'bytes' of an image must be its encoded bytes, got {type(value).__name__} "
            f"{str(value)[:60]!r} (a file of text cannot hold them: give a path)"
        )
    return bytes(value)


def check_pictures(record: Pair | Dialogue, *, decoded: bool) -> None:
    """Find the images of one record, and decode them too where that is asked for.

    Raises ``ValueError``, naming the row, for the first that is missing or broken.
    """
    if isinstance(record, Dialogue):
        pictures = record.images
    else:
        sides = (record.query, record.target, *record.negatives)
        pictures = tuple(picture for side in sides for picture in side.images)
    for picture in pictures:
        try:
            if decoded:
                picture.open()
            elif isinstance(picture, FilePicture):
                picture.check_exists()
        except ValueError as error:
            if record.name in str(error):
                raise
            raise ValueError(f"{record.name}: {error}") from None


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an encoded image to upright RGB.

    EXIF orientation is applied, transparency laid on white, of an animation the first frame
    is taken, 16-bit grey is scaled to 8 bits; CMYK, palette and grey become RGB.

    Args:
        data: an encoded image in one of :data:`FORMATS`.
        name: where it came from, for messages.

    Raises:
        ValueError: no image, truncated or broken, without area, more than
            :data:`MAX_PIXELS`, an aspect ratio over :data:`MAX_ASPECT_RATIO`, or pixels
            without a fixed range (32-bit floats).
    """
    Image.init()  # Pillow loads a part of its formats by itself; a no-op from the second call on
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {name} is too large to decode safely: {error}") from None
    except MemoryError:  # of the machine, not of the image: its header was checked
        raise
    except Exception as error:  # decoders raise all kinds on damaged headers
        raise ValueError(
            f"image {name} cannot be decoded ({type(error).__name__}): {len(data)} bytes that "
            f"are broken or not one of {', '.join(FORMATS)}"
        ) from error
    _check_size(image.size, name)
    try:
        image.load()
        return upright_rgb(image, name)
    except (_Refused, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"image {name} is truncated or broken ({error}); replace the file or drop its row"
        ) from error


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An opened image as :func:`decode` gives it: upright RGB, on white.

    Raises ``ValueError`` naming it for a size or pixels that ``decode`` refuses.
    """
    _check_size(image.size, name)
    return _flatten(_upright(image), name)


class _Refused(ValueError):
    """A refusal whose text is already what the user reads."""


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"image {name} has no area ({width} x {height} pixels)")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"image {name} has {width} x {height} pixels, more than the {MAX_PIXELS} that are "
            "decoded; shrink the file"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"image {name} is {width} x {height} pixels, an aspect ratio over "
            f"{MAX_ASPECT_RATIO}; crop the file or drop its row"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF: the pixels are whole, viewers show them as stored
        orientation = 1
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise _Refused(
            f"image {name} has 32-bit float pixels, which have no fixed range; "
            "store it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()

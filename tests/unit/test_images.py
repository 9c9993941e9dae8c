"""Pictures: upright RGB from every kind of file, refusals with their text, digests."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import time

import numpy as np
import pytest
from PIL import Image

from coma_ds.data import images
from coma_ds.data.images import BytesPicture, FilePicture, as_picture, check_pictures, decode
from coma_ds.data.records import Dialogue, Pair, Side, Turn
from tests.odd_images import bomb, odd_kinds

# left half red, right half blue: turns and flips are visible
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def _halves(width: int = 8, height: int = 4) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _png(image: Image.Image | None = None) -> bytes:
    return _encoded(image or _halves(), "PNG")


def test_formats_are_known_to_pillow() -> None:
    Image.init()
    assert set(images.FORMATS) <= set(Image.OPEN)


# where the red half lies after the stored pixels are turned as the EXIF tag says
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (8, 4), (0, 0)),
        (2, (8, 4), (7, 0)),
        (3, (8, 4), (7, 3)),
        (4, (8, 4), (0, 0)),
        (5, (4, 8), (0, 0)),
        (6, (4, 8), (0, 0)),
        (7, (4, 8), (0, 7)),
        (8, (4, 8), (0, 7)),
    ],
)
def test_exif_orientation(orientation: int, size: tuple[int, int], red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(_encoded(_halves(), "PNG", exif=exif), "x")
    assert image.mode == "RGB" and image.size == size
    opposite = (size[0] - 1 - red_at[0], size[1] - 1 - red_at[1])
    assert image.getpixel(red_at) == RED and image.getpixel(opposite) == BLUE


def test_orientation_distinguishes_mirrored_turns() -> None:
    # one red corner, top left; after tag 5 (transpose) it stays, after 6 (turn right) it moves
    corner = Image.new("RGB", (8, 4), BLUE)
    corner.putpixel((0, 0), RED)
    for orientation, place in [(5, (0, 0)), (6, (3, 0)), (7, (3, 7)), (8, (0, 7)), (4, (0, 3))]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert decode(_encoded(corner, "PNG", exif=exif), "x").getpixel(place) == RED


@pytest.mark.parametrize("kind", odd_kinds(0))
def test_every_kind_becomes_the_pixels_that_it_shows(kind: str) -> None:
    for seed in (3, 4):
        data, shown = odd_kinds(seed)[kind]
        image = decode(data, kind)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), shown)


def test_a_real_bomb_is_refused_before_it_takes_memory() -> None:
    data = bomb()
    assert len(data) < 300_000
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"image x is too large to decode safely.*900000000"):
        decode(data, "x")
    assert time.process_time() - began < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # KiB
    assert decode(bomb(1000), "x").size == (1000, 1000)  # it is an image, only a large one


def test_a_full_memory_is_no_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "upright_rgb", full)
    with pytest.raises(MemoryError):
        decode(_png(), "x")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, OSError), (errno.EMFILE, OSError), (errno.EACCES, ValueError)]
)
def test_a_failing_disk_is_no_bad_row(tmp_path: object, monkeypatch, code, kind) -> None:
    """What fails now and not after a restart must not decide which rows are read."""

    def fail(*_: object) -> None:
        raise OSError(code, "it failed")

    with open(os.path.join(os.fspath(tmp_path), "1.png"), "wb") as file:
        file.write(_png())
    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(kind, match=r"image .*1\.png cannot be read: it failed") as caught:
        FilePicture(os.fspath(tmp_path), "1.png").open()
    assert isinstance(caught.value, ValueError) == (kind is ValueError)


def test_modes_become_rgb() -> None:
    cmyk = decode(_encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"), "x")
    assert cmyk.mode == "RGB"
    assert np.allclose(cmyk.getpixel((5, 5)), RED, atol=8)
    palette = decode(_png(_halves().convert("P", palette=Image.Palette.ADAPTIVE)), "x")
    assert palette.getpixel((0, 0)) == RED and palette.getpixel((7, 0)) == BLUE
    grey = decode(_png(Image.new("L", (4, 4), 100)), "x")
    assert grey.getpixel((0, 0)) == (100, 100, 100)
    assert decode(_png(Image.new("1", (4, 4), 1)), "x").getpixel((0, 0)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.full((4, 4), 257 * 100 + 28, dtype=np.uint16))
    assert decode(_png(deep), "x").getpixel((0, 0)) == (100, 100, 100)
    assert decode(_encoded(deep, "TIFF"), "x").getpixel((0, 0)) == (100, 100, 100)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image x has 32-bit float pixels"):
        decode(_encoded(Image.new("F", (4, 4)), "TIFF"), "x")


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    clear.putpixel((2, 0), (0, 0, 0, 51))
    image = decode(_png(clear), "x")
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((1, 0)) == RED
    assert image.getpixel((2, 0)) == (204, 204, 204)
    assert decode(_png(Image.new("LA", (4, 4), (0, 0))), "x").getpixel((0, 0)) == WHITE
    palette = Image.new("P", (4, 4), 0)
    keyed = decode(_encoded(palette, "PNG", transparency=0), "x")
    assert keyed.getpixel((0, 0)) == WHITE


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data, "x").getpixel((4, 4)) == RED, kind


def test_file_picture_opens_and_digests(tmp_path: object) -> None:
    root = os.fspath(tmp_path)
    os.makedirs(os.path.join(root, "a"))
    for path in ("a/1.png", "a/2.png"):
        with open(os.path.join(root, path), "wb") as file:
            file.write(_png())
    with open(os.path.join(root, "3.png"), "wb") as file:
        file.write(_png(Image.new("RGB", (8, 4), RED)))
    first, second, third = (FilePicture(root, p) for p in ("a/1.png", "a/2.png", "3.png"))
    assert first.open().size == (8, 4)
    assert len(first.digest()) == 16
    assert first.digest() == second.digest() != third.digest()
    assert BytesPicture(_png(), "memory").digest() == first.digest()
    assert first.name == os.path.join(root, "a/1.png")
    copied = pickle.loads(pickle.dumps(first))
    assert copied.digest() == first.digest() and copied.name == first.name


def test_digest_is_read_once(tmp_path: object) -> None:
    path = os.path.join(os.fspath(tmp_path), "1.png")
    with open(path, "wb") as file:
        file.write(_png())
    picture = FilePicture(os.fspath(tmp_path), "1.png")
    picture.open()
    os.unlink(path)
    assert picture.digest() == BytesPicture(_png(), "memory").digest()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("http://host/a.png", "is a URL"),
        ("HTTPS://host/a.png", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("file:/etc/passwd", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("s3://bucket/a.png", "is a URL"),
        ("/etc/passwd", "is absolute"),
        ("../secret.png", r"leaves the image root .* by '\.\.'"),
        ("a/../../secret.png", r"leaves the image root"),
        ("a\\..\\..\\secret.png", r"leaves the image root"),
        ("", "is empty"),
        ("a\0.png", "no path"),
    ],
)
def test_refused_paths(path: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FilePicture("/images", path)


def test_dots_in_names_are_no_parents() -> None:
    assert FilePicture("/images", "a..b/..c.png").path == "a..b/..c.png"


def test_links_may_not_leave_the_root(tmp_path: object) -> None:
    base = os.fspath(tmp_path)
    root, outside = os.path.join(base, "root"), os.path.join(base, "root2")
    os.makedirs(os.path.join(root, "real"))
    os.makedirs(outside)
    for folder in (os.path.join(root, "real"), outside):
        with open(os.path.join(folder, "1.png"), "wb") as file:
            file.write(_png())
    os.symlink(os.path.join(outside, "1.png"), os.path.join(root, "out.png"))
    os.symlink(outside, os.path.join(root, "folder"))
    os.symlink("real/1.png", os.path.join(root, "in.png"))
    os.symlink(root, os.path.join(base, "alias"))
    assert FilePicture(root, "in.png").open().size == (8, 4)
    assert FilePicture(os.path.join(base, "alias"), "real/1.png").open().size == (8, 4)
    for path in ("out.png", "folder/1.png"):
        for act in (FilePicture.check_exists, FilePicture.open, FilePicture.digest):
            with pytest.raises(ValueError, match="outside the image root"):
                act(FilePicture(root, path))


def test_missing_empty_and_odd_files(tmp_path: object) -> None:
    root = os.fspath(tmp_path)
    with open(os.path.join(root, "empty.png"), "wb"):
        pass
    os.makedirs(os.path.join(root, "folder"))
    os.mkfifo(os.path.join(root, "pipe"))
    for path, text in [
        ("none.png", r"none\.png does not exist; check the image root"),
        ("empty.png/1.png", "does not exist"),
        ("empty.png", r"is an empty file \(0 bytes\)"),
        ("folder", "is not a regular file"),
        ("pipe", "is not a regular file"),
    ]:
        with pytest.raises(ValueError, match=text):
            FilePicture(root, path).check_exists()


def test_broken_bytes_are_named() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = _encoded(Image.fromarray(noise), kind)
        with pytest.raises(ValueError, match=r"image row 7 (is truncated|cannot be decoded)"):
            decode(whole[: len(whole) // 2], "row 7")
    with pytest.raises(ValueError, match="image row 7 cannot be decoded"):
        decode(_encoded(_halves(), "TGA"), "row 7")  # Pillow could, but it is not on our list
    with pytest.raises(ValueError, match="image row 7 has no bytes"):
        BytesPicture(b"", "row 7")


def _png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; no pixels follow."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def test_size_limits_come_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="image x is too large to decode safely"):
        decode(_png_header(60_000, 60_000), "x")
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(ValueError, match=r"image x has 10 x 10 pixels, more than the 99"):
        decode(_png_header(10, 10), "x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"image x (has no area|cannot be decoded)"):
        decode(_png_header(0, 10), "x")
    with pytest.raises(ValueError, match=r"201 x 1 pixels, an aspect ratio over 200"):
        decode(_png(Image.new("RGB", (201, 1))), "x")
    with pytest.raises(ValueError, match=r"1 x 201 pixels, an aspect ratio over 200"):
        decode(_png(Image.new("RGB", (1, 201))), "x")
    assert decode(_png(Image.new("RGB", (200, 1))), "x").size == (200, 1)


def test_as_picture() -> None:
    assert as_picture(None, None, "r") is None
    assert as_picture("", None, "r") is None
    assert as_picture({"bytes": None, "path": None}, None, "r") is None
    both = as_picture({"bytes": _png(), "path": "a.png"}, None, "r")
    assert isinstance(both, BytesPicture) and both.name == "r (a.png)"
    path = as_picture({"bytes": None, "path": "a.png"}, "/images", "r")
    assert isinstance(path, FilePicture) and path.name == "/images/a.png"
    with pytest.raises(ValueError, match=r"file\.jsonl line 3: .*no image root is set"):
        as_picture("a.png", None, "file.jsonl line 3")
    with pytest.raises(ValueError, match=r"file\.jsonl line 3: image path '/a\.png' is absolute"):
        as_picture("/a.png", "/images", "file.jsonl line 3")
    for value in ("text", 10**13, [1, 2]):
        with pytest.raises(
            ValueError, match=r"r \(bytes\): 'bytes' of an image must be its encoded"
        ):
            as_picture({"bytes": value}, "/images", "r")
    with pytest.raises(ValueError, match=r"r: an image is a path, bytes or .* got int '3'"):
        as_picture(3, "/images", "r")


def test_check_pictures(tmp_path: object) -> None:
    root = os.fspath(tmp_path)
    for name in ("first", "second"):
        with open(os.path.join(root, f"{name}.png"), "wb") as file:
            file.write(_png())
    first, second = FilePicture(root, "first.png"), FilePicture(root, "second.png")
    side = Side("<|image_1|>", (first,)), Side("<|image_1|>", (second,))
    records = [
        Pair(Side("q"), side[0], (side[1],), name="line 13"),
        Pair(*side, name="line 13"),
        Dialogue((first, second), (Turn("q", "a"),), name="line 13"),
    ]
    for record in records:
        for decoded in (False, True):
            check_pictures(record, decoded=decoded)
    with open(second.name, "wb") as file:
        file.write(_png()[:40])
    for record in records:
        check_pictures(record, decoded=False)
        with pytest.raises(ValueError, match=r"line 13: image .*second\.png cannot be decoded"):
            check_pictures(record, decoded=True)
    os.unlink(second.name)
    for record in records:
        for decoded in (False, True):
            with pytest.raises(ValueError, match=r"line 13: image .*second\.png does not exist"):
                check_pictures(record, decoded=decoded)

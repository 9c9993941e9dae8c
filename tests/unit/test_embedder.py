"""The public Embedder: the trainer's vectors, and those of transformers alone."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import coma_ds
from coma_ds import Embedder
from coma_ds.config import FAMILIES
from coma_ds.data.collate import Collator
from coma_ds.data.pairs import PairFile
from coma_ds.data.records import Side
from coma_ds.embedder import build_sides
from coma_ds.inference import encode_sides
from tests.folders import base_folder, disturb, export, load
from tests.tiny import Flat


def picture(seed: int, size=(64, 64)) -> Image.Image:
    """Coloured noise, coarse enough to survive a resize."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


POOLINGS = {kind: {"pooling": kind} for kind in ("mean", "attention", "last")}
POOLINGS["heads"] = {"pooling": "attention", "pooling_heads": 4}
TEXTS = ["a red car", "", "what is <|image_1|> here?", "a much longer text about nothing at all"]
IMAGES = [None, picture(1), picture(2, (90, 40)), picture(3)]


def trainer_vectors(model, processing, sides, batch_size=3) -> np.ndarray:
    """As an evaluation of the trainer computes them."""
    model.eval()
    return encode_sides(model, Collator(processing), sides, batch_size=batch_size)


def random_query(model):
    if model.pooling.query is not None:
        model.pooling.query.data.copy_(torch.randn(model.pooling.query.shape))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished model in float32."""
    place = tmp_path_factory.mktemp("finished")
    model, processing = load(base_folder(place / "base"))
    return export(disturb(model), processing, place / "run" / "model")


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_of_the_trainer(tmp_path, family, pooling):
    model, processing = load(base_folder(tmp_path / "base", family), **pooling)
    disturb(model)
    random_query(model)
    want = trainer_vectors(model, processing, build_sides(TEXTS, IMAGES))
    folder = export(model, processing, tmp_path / "model")
    got = Embedder(folder).encode(TEXTS, IMAGES, batch_size=3)
    assert got.dtype == np.float32 and got.shape == (4, 64)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert np.abs(got - want).max() <= 1e-6
    assert np.abs(got[:, None] - got).max(-1)[np.triu_indices(4, 1)].min() > 1e-2  # not vacuous


def test_shorter_vectors(finished):
    embedder = Embedder(finished)
    whole, short = embedder.encode(TEXTS, IMAGES), embedder.encode(TEXTS, IMAGES, width=16)
    assert np.array_equal(short, embedder.encode(TEXTS, IMAGES, width=np.int64(16)))
    assert short.shape == (4, 16) and short.dtype == np.float32
    want = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    assert np.abs(short - want).max() <= 1e-6
    for width in (0, 65):
        with pytest.raises(
            ValueError, match=f"width is {width!r}, expected a whole number from 1 to 64"
        ):
            embedder.encode(TEXTS, IMAGES, width=width)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_low_precision_gives_equal_bits_for_equal_batches(tmp_path, precision):
    model, processing = load(base_folder(tmp_path / "base"), precision=precision)
    want = trainer_vectors(disturb(model), processing, build_sides(TEXTS, IMAGES))
    embedder = Embedder(export(model, processing, tmp_path / "model"))
    assert embedder.precision == precision
    assert np.array_equal(embedder.encode(TEXTS, IMAGES, batch_size=3), want)
    exact = Embedder(tmp_path / "model", precision="fp32").encode(TEXTS, IMAGES, batch_size=3)
    assert 0 < np.abs(exact - want).max() < 0.05


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_merged_adapters_give_the_vectors_of_the_trainer(tmp_path, adapter):
    model, processing = load(base_folder(tmp_path / "base"), adapter=adapter)
    untrained = trainer_vectors(model, processing, build_sides(TEXTS, IMAGES))
    want = trainer_vectors(disturb(model), processing, build_sides(TEXTS, IMAGES))
    got = Embedder(export(model, processing, tmp_path / "model")).encode(TEXTS, IMAGES)
    assert np.abs(want - untrained).max() > 0.01
    assert np.abs(got - want).max() <= 1e-5  # W x + s B A x against (W + s B A) x


def turned_and_clear() -> tuple[Image.Image, bytes]:
    """A picture that is clear in parts, and a file that is stored turned."""
    clear = picture(7).convert("RGBA")
    clear.putalpha(picture(8).convert("L"))
    exif, stored = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture(9).save(stored, "PNG", exif=exif)
    return clear, stored.getvalue()


def code_blocks(folder) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_of_the_card_gives_the_vectors(tmp_path, monkeypatch, family, pooling):
    model, processing = load(base_folder(tmp_path / "base", family), **pooling)
    disturb(model)
    random_query(model)
    folder = export(model, processing, tmp_path / "model")
    want = trainer_vectors(model, processing, build_sides(TEXTS, IMAGES), batch_size=1)
    ours, stock = code_blocks(folder)
    assert "coma_ds" in ours and "coma_ds." not in stock and "import coma_ds" not in stock
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(stock, names)
    got = torch.stack([names["embed"](t, i) for t, i in zip(TEXTS, IMAGES)]).numpy()
    assert np.abs(got - want).max() <= 1e-5
    odd = [turned_and_clear()[0], Image.open(io.BytesIO(turned_and_clear()[1]))]
    want_odd = Embedder(folder).encode(images=odd, batch_size=1)
    got_odd = torch.stack([names["embed"](image=image) for image in odd]).numpy()
    assert np.abs(got_odd - want_odd).max() <= 1e-5
    exec(ours, names)
    assert names["vectors"].shape == (1, 64)
    assert np.abs(names["vectors"][0] - want[0]).max() <= 1e-6


def test_the_recipe_runs_where_the_package_is_not(finished):
    folder = finished
    stock = code_blocks(folder)[1]
    code = (
        f"import sys\nsys.modules['coma_ds'] = None\n{stock}\nprint(*embed('a red car').tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    got = np.array([float(x) for x in done.stdout.split()], dtype=np.float32)
    assert np.abs(got - Embedder(folder).encode(["a red car"])[0]).max() <= 1e-5


def test_a_run_folder_is_a_model(finished):
    folder = finished
    vectors = Embedder(str(folder.parent)).encode(texts=["a red car"])
    assert np.array_equal(vectors, Embedder(folder).encode(texts=["a red car"]))


def test_images_in_every_form_are_the_same(finished, tmp_path):
    embedder = Embedder(finished)
    image = picture(5)
    path = tmp_path / "elsewhere" / "a b.png"
    path.parent.mkdir()
    image.save(path)
    link = tmp_path / "link.png"
    link.symlink_to(path)  # the caller's own path may lead anywhere, unlike those of data files
    forms = [image, path, str(link), path.read_bytes(), image.convert("RGBA"), [image]]
    vectors = embedder.encode(images=forms, batch_size=1)
    assert all(np.array_equal(v, vectors[0]) for v in vectors)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    turned.save(stored, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(stored.getvalue()))
    assert np.array_equal(embedder.encode(images=[opened]), vectors[:1])
    assert np.array_equal(embedder.encode(images=[stored.getvalue()]), vectors[:1])


def test_text_conventions_are_those_of_stage_two(tmp_path):
    picture(6).save(tmp_path / "x.png")
    file = tmp_path / "pairs.jsonl"
    rows = ["", "a car", "two <|image_1|> words", "  spaces "]
    lines = [f'{{"query": "{r}", "query_image": "x.png", "target": "t"}}' for r in rows]
    file.write_text("\n".join(lines))
    pairs = PairFile(file, tmp_path)
    sides = build_sides(rows, [picture(6)] * 4)
    assert [s.text for s in sides] == [pairs[i].query.text for i in range(4)]
    assert [s.text for s in sides[:3]] == [
        "<|image_1|>",
        "<|image_1|> a car",
        "two <|image_1|> words",
    ]


def test_zipped_inputs_and_several_images(finished):
    embedder = Embedder(finished)
    one, two = picture(1), picture(2)
    both = "<|image_1|> then <|image_2|>"
    vectors = embedder.encode([both, "x", None], [[one, two], None, one])
    assert vectors.shape == (3, 64)
    assert np.allclose(vectors[1], embedder.encode(["x"])[0], atol=1e-6)
    assert np.allclose(vectors[2], embedder.encode(images=[one])[0], atol=1e-6)
    swapped = embedder.encode([both], [[two, one]])
    assert np.abs(swapped - vectors[0]).max() > 1e-3


def test_order_and_batches_do_not_matter(finished):
    embedder = Embedder(finished)
    texts = ["word " * n for n in (9, 1, 5, 3, 7)]
    alone = np.concatenate([embedder.encode([t]) for t in texts])
    for size in (1, 2, 5, 32):
        assert np.abs(embedder.encode(texts, batch_size=size) - alone).max() < 1e-6


def test_long_text_is_cut_as_in_training_and_that_is_said(tmp_path, caplog):
    model, processing = load(base_folder(tmp_path / "base"), max_length=20)
    folder = export(model, processing, tmp_path / "model")
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    want = trainer_vectors(model, processing, [Side(text)])
    embedder = Embedder(folder)
    assert np.array_equal(embedder.encode([text], batch_size=3), want)
    said = "1 of 1 inputs lost the end of their text: longer than 20 tokens"
    assert caplog.messages[-1:] == [said]


def test_no_inputs_give_no_vectors(finished):
    assert Embedder(finished).encode(texts=[]).shape == (0, 64)


def test_each_process_encodes_for_itself(finished, monkeypatch):
    """Under a launcher, ``encode`` is no collective: ranks may call it with different inputs."""
    embedder = Embedder(finished)
    want = embedder.encode(["a", "b", "c"], batch_size=1)
    monkeypatch.setattr("coma_ds.comm.rank", lambda: 1)
    monkeypatch.setattr("coma_ds.comm.world_size", lambda: 2)
    monkeypatch.setattr("coma_ds.comm.all_objects", lambda _: pytest.fail("a collective"))
    assert np.array_equal(embedder.encode(["a", "b", "c"], batch_size=1), want)


def test_workers_give_the_same(finished):
    embedder = Embedder(finished)
    want = embedder.encode(TEXTS, IMAGES, batch_size=2)
    assert np.array_equal(embedder.encode(TEXTS, IMAGES, batch_size=2, workers=1), want)


class Broken(Flat):
    def open(self):
        raise ValueError(f"image {self.name} is truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(finished, workers):
    with pytest.raises(ValueError, match=r"^image photo 7 is truncated$"):
        Embedder(finished).encode(images=[Broken("photo 7")], workers=workers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to encode: give texts, images or both"),
        ({"texts": "a car"}, "texts is a single one, a str; give a list"),
        ({"images": picture(1)}, "images is a single one, a Image; give a list"),
        ({"texts": ["a"], "images": []}, "1 texts but 0 images: they are zipped"),
        ({"texts": ["a", ""]}, "input 1 is empty: give it a text or an image"),
        ({"texts": ["a", " \n"], "images": [None, None]}, "input 1 is empty"),
        ({"texts": [b"a"]}, "input 0: a text must be a str, got bytes b'a'"),
        ({"images": [3.5]}, "input 0: an image is a path, the bytes of a file or a PIL image, "),
        ({"images": [b""]}, "input 0: the image has no bytes"),
        ({"images": ["no/such.png"]}, "image no/such.png (input 0) cannot be read: No such file"),
        ({"images": [b"not an image"]}, "image input 0 cannot be decoded"),
        ({"texts": ["<|image_1|>"]}, "input 0: the text has the image marks <|image_1|> but 0"),
        ({"images": [Image.new("RGB", (2000, 4))]}, "image input 0 is 2000 x 4 pixels, an aspect"),
        ({"images": [Image.new("F", (64, 64))]}, "image input 0 has 32-bit float pixels"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size is 0, expected 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(finished, arguments, message):
    with pytest.raises(ValueError) as caught:
        Embedder(finished).encode(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_embed(tmp_path):
    base = base_folder(tmp_path / "base")
    with pytest.raises(ValueError, match=r"coma_ds.json is not there or has no compression_tokens"):
        Embedder(base)
    model, processing = load(base, compression_tokens=0)
    export(model, processing, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"the model has no compression tokens, so no embeddings"):
        Embedder(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"model .*nowhere': no such folder"):
        Embedder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json"):
        Embedder(tmp_path)


def test_unknown_precision(finished):
    with pytest.raises(ValueError, match=r"precision 'fp16': expected bf16, fp32 or autocast"):
        Embedder(finished, precision="fp16")


def test_an_embedder_of_stage_one_says_so(tmp_path, caplog, monkeypatch):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = export(model, processing, tmp_path / "model", objective="compress")
    monkeypatch.setattr("coma_ds.embedder.log.propagate", True)
    Embedder(folder)
    assert "comes from stage 1" in caplog.text
    assert "as an embedding model it is unfinished" in (folder / "README.md").read_text()


def test_import_of_the_package_is_cheap():
    code = (
        "import sys, coma_ds; coma_ds.__version__; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "from coma_ds import Embedder; assert 'deepspeed' not in sys.modules; print(Embedder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "coma_ds.embedder.Embedder" in done.stdout
    assert coma_ds.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        coma_ds.Embeder  # noqa: B018

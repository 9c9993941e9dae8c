"""Sides and pairs as packed samples: order, images, truncation, what is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from coma_ds.batch import IGNORE
from coma_ds.config import FAMILIES
from coma_ds.data.collate import Collator
from coma_ds.data.processing import load_processing, read_config
from coma_ds.data.records import Dialogue, Pair, Side, Turn
from tests.folders import base_folder
from tests.tiny import Flat, demo_processing, tiny_config

RED, BLUE = Flat("red"), Flat("blue", (20, 20, 220))
WIDE = Flat("wide", (10, 200, 10), (128, 32))
IMAGE = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
TOKENS = "".join(f"<|compress_{k}|>" for k in range(8))


@pytest.fixture(scope="module")
def processing():
    return demo_processing()


@pytest.fixture
def collator(processing) -> Collator:
    return Collator(processing)


def texts(batch, processing) -> list[str]:
    rows = batch.input_ids_T.split(batch.sizes_B.tolist())
    return [processing.tokenizer.decode(row) for row in rows]


def test_images_stand_where_their_marks_stand(collator, processing) -> None:
    sides = [
        Side("a cat"),
        Side("<|image_1|>", (RED,)),
        Side("<|image_1|>\nWhat differs from <|image_2|>?", (RED, BLUE)),
        Side("both<|image_1|><|image_2|>", (BLUE, RED)),
    ]
    batch = collator.sides(sides)
    assert texts(batch, processing) == [
        f"a cat{TOKENS}",
        f"{IMAGE}{TOKENS}",
        f"{IMAGE}\nWhat differs from {IMAGE}?{TOKENS}",
        f"both{IMAGE}{IMAGE}{TOKENS}",
    ]
    assert batch.image_counts_B.tolist() == [0, 1, 2, 2]
    assert batch.feature_counts_B.tolist() == [0, 16, 32, 32]
    assert torch.equal(batch.feature_rows_F, torch.arange(80))
    wanted = np.concatenate([processing.pixels(p)[0] for p in (RED, RED, BLUE, BLUE, RED)])
    assert np.array_equal(batch.images.pixels_PC.numpy(), wanted)
    # an eighth of the bytes that the stock processor gives, and the same values
    stock = processing.image_processor(images=[p.open() for p in (RED, RED, BLUE, BLUE, RED)])
    values = batch.images.values("cpu")
    assert np.array_equal(values.numpy(), np.asarray(stock["pixel_values"]))
    assert values.dtype == torch.float32 and batch.images.merge == 4
    assert 8 * batch.images.pixels_PC.nbytes == values.nbytes
    assert batch.images.grid_I3.tolist() == [[1, 8, 8]] * 5
    assert batch.lengths_B3[:, 1:].tolist() == [[8, 0]] * 4
    assert (batch.labels_T == IGNORE).all() and batch.pairs == 0


def test_pairs_are_queries_then_targets_then_negatives(collator, processing) -> None:
    pairs = [
        Pair(Side("q1"), Side("<|image_1|>", (RED,)), (Side("n1"), Side("n2"))),
        Pair(Side("q2"), Side("t2")),
        Pair(Side("q3"), Side("t3"), (Side("n3"),)),
    ]
    batch = collator(pairs)
    wanted = ["q1", "q2", "q3", IMAGE, "t2", "t3", "n1", "n2", "n3"]
    assert texts(batch, processing) == [text + TOKENS for text in wanted]
    assert batch.pairs == 3 and batch.image_counts_B.tolist() == [0] * 3 + [1] + [0] * 5
    sides = [p.query for p in pairs] + [p.target for p in pairs]
    sides += [n for p in pairs for n in p.negatives]
    assert batch.content_ids_B.tolist() == [side.content_id() for side in sides]


def test_equal_content_has_an_equal_id(collator) -> None:
    again = Flat("another file", RED.colour)
    sides = [
        Side("a <|image_1|>", (RED,)),
        Side("a <|image_1|>", (again,)),
        Side("a <|image_1|>", (BLUE,)),
        Side("b <|image_1|>", (RED,)),
        Side("a "),
    ]
    ids = collator.sides(sides).content_ids_B
    assert ids[0] == ids[1] and len(ids.unique()) == 4


def test_a_batch_of_text_has_no_images(collator) -> None:
    batch = collator([Pair(Side("a"), Side("b"))])
    assert batch.images is None and batch.feature_rows_F.dtype == torch.int64
    assert len(batch.feature_rows_F) == 0


def test_images_of_any_shape_keep_their_grid() -> None:
    processing = demo_processing(min_vision_tokens=4, max_vision_tokens=16)
    batch = Collator(processing).sides([Side("<|image_1|>", (p,)) for p in (WIDE, RED)])
    assert batch.images.grid_I3.tolist() == [[1, 4, 16], [1, 8, 8]]
    small = Flat("small", size=(32, 32))  # 4 tokens as it is
    for limits, wanted in (((4, 4), [4, 4]), ((4, 16), [16, 4]), ((16, 16), [16, 16])):
        processing = demo_processing(min_vision_tokens=limits[0], max_vision_tokens=limits[1])
        batch = Collator(processing).sides([Side("<|image_1|>", (p,)) for p in (RED, small)])
        assert batch.feature_counts_B.tolist() == wanted


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ],
)
def test_the_processor_of_another_model(tmp_path, ours, theirs) -> None:
    folder = base_folder(tmp_path)
    load_processing(folder, compression_tokens=4)
    file = folder / "processor_config.json"
    tree = json.loads(file.read_text())
    tree["image_processor"][ours] = 3
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError) as caught:
        load_processing(folder, compression_tokens=4)
    model = getattr(read_config(folder).vision_config, theirs)
    assert str(caught.value) == (
        f"{folder}: the image processor has {ours} 3, the model {theirs} {model}: its processor's "
        "config is that of another model"
    )


def test_text_is_cut_to_the_maximum_and_counted() -> None:
    """Images and compression tokens stay whole; the text gives way, from its end."""
    processing = demo_processing(max_length=40)
    collator = Collator(processing)
    long = "one two three four five six seven eight nine ten eleven twelve thirteen " * 3
    words = len(processing.encode(long))
    assert words > 32
    batch = collator.sides([Side(f"<|image_1|>{long}", (RED,)), Side(long), Side("short")])
    assert batch.sizes_B.tolist()[0] == 40 and batch.lengths_B3[:, 1].tolist() == [8, 8, 8]
    assert batch.sizes_B[1] == 40
    kept = processing.tokenizer.decode(processing.encode(long)[: 40 - 8 - 18])
    assert texts(batch, processing)[0] == f"{IMAGE}{kept}{TOKENS}"
    assert batch.truncated == 2
    both = collator.sides([Side(f"{long}<|image_1|>{long}", (RED,))])
    assert both.sizes_B.tolist() == [40] and both.truncated == 1
    assert texts(both, processing) == [f"{kept}{IMAGE}{TOKENS}"]
    longer = Collator(demo_processing(max_length=56))
    twice = longer.sides([Side(f"<|image_1|>a b c<|image_2|>{long}", (RED, BLUE))])
    assert twice.sizes_B.tolist() == [56] and twice.truncated == 1
    exact = Collator(demo_processing(max_length=8 + words))
    fits = exact.sides([Side(long)])
    assert fits.sizes_B.tolist() == [8 + words] and fits.truncated == 0


def test_images_that_do_not_fit_are_named() -> None:
    collator = Collator(demo_processing(max_length=40))
    message = r"red, blue: the images alone take 36 tokens, more than model.max_length 40 allows"
    with pytest.raises(ValueError, match=message):
        collator.sides([Side("<|image_1|><|image_2|>", (RED, BLUE))])


def test_too_many_image_tokens_are_named() -> None:
    collator = Collator(demo_processing(max_length=24))
    message = "red: 16 image tokens, more than the 14 that model.max_vision_tokens and "
    with pytest.raises(ValueError, match=message + "model.max_length leave"):
        collator.sides([Side("<|image_1|>", (RED,))])
    with pytest.raises(ValueError, match="red: 16 image tokens"):
        collator([Dialogue((RED,), (Turn("q", "a"),))])


def test_an_image_that_the_processor_refuses_is_named(collator) -> None:
    thin = Flat("thin.png", size=(900, 2))
    with pytest.raises(ValueError, match=r"thin.png: the image processor refuses it \(.*ratio"):
        collator.sides([Side("<|image_1|>", (thin,))])


def test_an_empty_side_is_an_error(collator) -> None:
    with pytest.raises(ValueError, match="a side is empty: it has neither text nor an image"):
        collator.sides([Side("a"), Side("")])


SPELT = ["<|image_pad|>", "<|compress_0|>", "<|compress_7|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("name", [*SPELT, "<|vision_start|>", "<|vision_end|>"])
def test_a_text_cannot_spell_our_tokens(name, collator) -> None:
    message = "contains '.*', which stands for a part of a sample here"
    for text in (f"say {name}", f"say {name} " + "very long " * 30):
        for _ in range(2):  # refused texts are not remembered
            with pytest.raises(ValueError, match=message):
                collator.sides([Side(text)])
        with pytest.raises(ValueError, match=message):
            collator([Dialogue((), (Turn("q", text),))])
        with pytest.raises(ValueError, match=message):
            collator([Dialogue((), (Turn("q", "a"), Turn(text, "a")))])
        with pytest.raises(ValueError, match=message):
            collator([Dialogue((), (Turn("q", "a"),), instruction=text)])


def test_remembered_texts_do_not_change(collator, processing) -> None:
    first = collator.sides([Side("again"), Side("again <|image_1|> again", (RED,))])
    second = collator.sides([Side("again"), Side("again <|image_1|> again", (RED,))])
    assert torch.equal(first.input_ids_T, second.input_ids_T)
    long = "word " * 60
    assert processing.encode(long) == processing.encode(long)
    assert long not in processing._remembered


def test_collator_travels_to_workers(collator, processing) -> None:
    copy = pickle.loads(pickle.dumps(collator))
    sides = [Side("a <|image_1|>", (RED,))]
    assert torch.equal(copy.sides(sides).input_ids_T, collator.sides(sides).input_ids_T)


def test_compression_tokens_are_named_and_consecutive(processing) -> None:
    ids = processing.compression_ids
    assert ids == list(range(ids[0], ids[0] + 8))
    names = processing.tokenizer.convert_ids_to_tokens(ids)
    assert names == [f"<|compress_{k}|>" for k in range(8)]
    assert demo_processing(0).compression_ids == []
    without = Collator(demo_processing(0)).sides([Side("a")])
    assert without.lengths_B3[0, 1] == 0


def test_another_family_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match=f"model family 'llava', expected one of {FAMILIES[0]}"):
        load_processing(tmp_path, compression_tokens=2)


def test_a_tokenizer_without_turns_is_refused(tmp_path) -> None:
    processing = demo_processing(0)
    processing.tokenizer.save_pretrained(tmp_path)
    processing.image_processor.save_pretrained(tmp_path)
    tiny_config("qwen2_5_vl").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|begin|>"))
    with pytest.raises(ValueError, match=r"has no <\|im_start\|> and <\|im_end\|>"):
        load_processing(tmp_path, compression_tokens=8)


FINE = Side("fine")
TWICE = Side("<|image_1|><|image_2|>", (RED, BLUE))


class Broken(Flat):
    """A picture that cannot be opened, and says so by its name."""

    def open(self):
        raise ValueError(f"image {self.name} is truncated")


SPELLED = Side("say <|image_pad|>")
BROKEN = Side("<|image_1|>", (Broken("b.png"),))
ROW = "rows.jsonl line 7"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (Pair(SPELLED, FINE, (), ROW), "the text 'say <|image_pad|>' contains"),
        (Pair(FINE, SPELLED, (), ROW), "the text 'say <|image_pad|>' contains"),
        (Pair(FINE, FINE, (FINE, SPELLED), ROW), "the text 'say <|image_pad|>' contains"),
        (Pair(FINE, BROKEN, (), ROW), "image b.png is truncated"),
        (Pair(Side(""), FINE, (), ROW), "a side is empty"),
        (Pair(FINE, TWICE, (), ROW), "red, blue: the images alone take 36 tokens"),
        (Dialogue((RED,), (Turn("q", "<|compress_1|>"),), "", ROW), "the text '<|compress_1|>' "),
        (Dialogue((Broken("b.png"),), (Turn("q", "a"),), "", ROW), "image b.png is truncated"),
        (Dialogue((RED, BLUE), (Turn("q", "a"),), "", ROW), "its images and first turn take "),
    ],
)
def test_an_error_begins_with_its_row_and_names_it_once(record, said) -> None:
    collator = Collator(demo_processing(max_length=40))
    good = Dialogue((), (Turn("q", "a"),), "", "rows.jsonl line 6")
    if isinstance(record, Pair):
        good = Pair(FINE, FINE, (), "rows.jsonl line 6")
    with pytest.raises(ValueError) as caught:
        collator([good, record])
    assert str(caught.value).startswith(f"{ROW}: {said}")
    assert str(caught.value).count("rows.jsonl") == 1


def test_a_prompt_that_does_not_fit_names_its_row_once() -> None:
    collator = Collator(demo_processing(max_length=40))
    turns = (Turn("q", "a"), Turn("q " * 30, "a"))
    with pytest.raises(ValueError) as caught:
        collator.dialogues([Dialogue((RED,), turns, "", ROW)], prompt_only=True)
    assert str(caught.value).startswith(f"{ROW}: its images and all its turns take ")
    assert str(caught.value).count(ROW) == 1


def test_a_picture_stored_in_its_row_names_the_row_once(collator) -> None:
    picture = Broken(f"{ROW}, target_image")
    with pytest.raises(ValueError) as caught:
        collator([Pair(FINE, Side("<|image_1|>", (picture,)), (), ROW)])
    assert str(caught.value) == f"image {ROW}, target_image is truncated"


def test_parts_of_a_batch_do_not_count_its_truncated_samples_again() -> None:
    long = "one two three four five six seven " * 9
    collator = Collator(demo_processing(max_length=40))
    pairs = collator([Pair(Side(long), FINE), Pair(FINE, Side(long), (Side(long),))])
    turns = (Turn("q", "a"), Turn(long, "a"))
    dialogues = collator([Dialogue((), turns), Dialogue((), turns[:1])])
    assert (pairs.truncated, dialogues.truncated) == (3, 1)
    for batch in (pairs, dialogues):
        assert batch.to("cpu").truncated == batch.truncated
        for with_images in (False, True):
            parts = batch.split([torch.tensor([0]), torch.tensor([1])], with_images=with_images)
            assert [part.truncated for part in parts] == [0, 0]

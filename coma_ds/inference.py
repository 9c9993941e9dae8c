"""Using a model without training it: embeddings of many sides, greedy answers to questions.

Both run on any number of ranks with the same result: blocks of samples have a fixed composition,
ranks take them in turn, and every rank runs the same number of forwards (ZeRO-3 gathers together).

Shapes: N sides, E embedding width, B samples of a block, R rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from coma_ds import comm
from coma_ds.batch import Batch
from coma_ds.data.collate import Collator
from coma_ds.data.records import Dialogue, Side
from coma_ds.model.attention import Visibility

log = logging.getLogger("coma_ds")

# An engine or a bare model: ``run(call)`` is ``call(model)`` inside its forward.
Run = Callable[[Callable[[Any], Any]], Any]


def _blocks(count: int, size: int) -> list[list[int]]:
    return [list(range(a, min(a + size, count))) for a in range(0, count, size)]


class _Blocks(torch.utils.data.Dataset):
    def __init__(self, records, blocks, collate):
        self.records, self.blocks, self.collate = records, blocks, collate

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, number) -> tuple[list[int], Batch]:
        rows = self.blocks[number]
        return rows, self.collate([self.records[i] for i in rows])


def _own_batches(records: Sequence, size: int, collate: Callable, workers: int, shared: bool):
    """(rows, batch) of this rank's blocks, as many on every rank: the last may come twice.

    Raises ``ValueError`` for a bad record, with its own words, from workers as well.
    """
    rank, world = (comm.rank(), comm.world_size()) if shared else (0, 1)
    blocks = _blocks(len(records), size)
    if not blocks:
        return
    own = blocks[rank::world]
    turns = -(-len(blocks) // world)
    own += [blocks[-1]] * (turns - len(own))
    loader = DataLoader(
        _Blocks(records, own, collate), batch_size=None, num_workers=min(workers, len(own))
    )
    try:
        yield from loader
    except ValueError as error:
        # torch wraps what a worker raised into its whole trace
        raise ValueError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from error


@torch.no_grad()
def encode_sides(
    run: Run,
    collator: Collator,
    sides: Sequence[Side],
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    workers: int = 0,
    shared: bool = True,
) -> np.ndarray:
    """Embeddings of the sides, float32 [N, E], on every rank.

    Sides of similar length share a block, by the length of their text.  Dropout is the caller's.
    Not ``shared``: this rank encodes all of them alone, whatever the others do.
    """
    if not sides:
        return np.zeros((0, 0), dtype=np.float32)
    order = sorted(range(len(sides)), key=lambda i: (len(sides[i].images), len(sides[i].text)))
    sorted_sides = [sides[i] for i in order]
    found: dict[int, np.ndarray] = {}
    cut: dict[int, int] = {}  # by the first row of a block: two ranks may take the same one
    for rows, batch in _own_batches(sorted_sides, batch_size, collator.sides, workers, shared):
        cut[rows[0]] = batch.truncated
        batch = batch.to(device)
        emb = run(lambda m, b=batch: m.embeddings(b, m.embed_images(b.images)))
        found.update(zip((order[r] for r in rows), emb.float().cpu().numpy()))
    merged: dict[int, np.ndarray] = {}
    for part, its_cut in comm.all_objects((found, cut)) if shared else [(found, cut)]:
        merged.update(part)
        cut |= its_cut
    if lost := sum(cut.values()):
        limit = collator.processing.max_length
        log.warning(
            "%d of %d inputs lost the end of their text: longer than %d tokens",
            lost, len(sides), limit,
        )  # fmt: skip
    return np.stack([merged[i] for i in range(len(sides))])


@torch.no_grad()
def greedy_answers(
    run: Run,
    collator: Collator,
    dialogues: Sequence[Dialogue],
    visibility: Visibility,
    *,
    blind: bool = False,
    max_tokens: int | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> list[str]:
    """The greedy answer to the last question of each dialogue.

    ``visibility`` ``bottleneck``: through the compression tokens alone.  ``blind``: with the
    images of another dialogue (``swap_images``), so that what is right is right by guessing.
    An answer ends with its end token or after ``max_tokens``, as many as the longest right answer
    and its end token where that is not given.
    """
    if max_tokens is None:
        encode = collator.processing.encode
        max_tokens = max(len(encode(d.turns[-1].answer)) for d in dialogues) + 1
    if blind:
        dialogues = swap_images(dialogues)

    def collate(records):
        return collator.dialogues(records, prompt_only=True)

    end = collator.processing.turn_end
    tokens = collator.processing.compression_ids
    vocabulary = tokens[0] if tokens else None
    found: dict[int, list[int]] = {}
    for rows, batch in _own_batches(dialogues, batch_size, collate, workers, True):
        batch = batch.to(device)
        features = run(lambda m, b=batch: m.embed_images(b.images))
        answers: list[list[int]] = [[] for _ in rows]
        for _ in range(max_tokens):
            last = batch.sizes_B.cumsum(0) - 1

            def predict(model, batch=batch, last=last, features=features):
                states = model.dialogue_states(batch, features, last.to(device), visibility)
                return model.answers.predict(states, vocabulary)

            words = run(predict).cpu()
            # an image token that stands for no image: the answer ends there
            words = words.masked_fill(words == collator.processing.image_id, end)
            for answer, word in zip(answers, words.tolist()):
                answer.append(word)
            batch = append(batch, words)
        for row, answer in zip(rows, answers):
            found[row] = answer[: answer.index(end)] if end in answer else answer
    merged: dict[int, list[int]] = {}
    for part in comm.all_objects(found):
        merged.update(part)
    decode = collator.processing.tokenizer.decode
    return [decode(merged[i]).strip() for i in range(len(dialogues))]


def swap_images(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Each dialogue with the images of another one, whose content differs.

    Raises ``ValueError`` when all images are the same.
    """
    count = len(dialogues)
    digests = [tuple(p.digest() for p in d.images) for d in dialogues]
    swapped = []
    for i, own in enumerate(dialogues):
        others = ((i + count // 2 + k) % count for k in range(count))
        other = next((j for j in others if digests[j] != digests[i]), None)
        if other is None:
            raise ValueError("all dialogues have the same images: there is no other one to show")
        swapped.append(Dialogue(dialogues[other].images, own.turns, own.instruction, own.name))
    return swapped


def append(batch: Batch, words_B: torch.Tensor) -> Batch:
    """The batch with one more text token at the end of each sample; ``words_B`` int64 [B]."""
    device = batch.input_ids_T.device
    ends = batch.sizes_B.cumsum(0)
    count = int(ends[-1])
    # where each old token goes: one place further for each sample that ended before it
    moved = torch.arange(count) + torch.arange(len(batch)).repeat_interleave(batch.sizes_B)
    added = ends + torch.arange(len(batch))
    ids = torch.empty(count + len(batch), dtype=torch.int64, device=device)
    ids[moved.to(device)] = batch.input_ids_T
    ids[added.to(device)] = words_B.to(device)
    labels = torch.full_like(ids, -100)
    labels[moved.to(device)] = batch.labels_T
    positions = ids.new_empty(3, len(ids))
    positions[:, moved.to(device)] = batch.position_ids_3T
    last = batch.position_ids_3T[:, (ends - 1).to(device)]
    positions[:, added.to(device)] = last.amax(0, keepdim=True) + 1
    lengths = batch.lengths_B3 + torch.tensor([0, 0, 1])
    return Batch(
        input_ids_T=ids,
        position_ids_3T=positions,
        labels_T=labels,
        lengths_B3=lengths,
        image_counts_B=batch.image_counts_B,
        feature_counts_B=batch.feature_counts_B,
        feature_rows_F=batch.feature_rows_F,
        content_ids_B=batch.content_ids_B,
        images=batch.images,
    )

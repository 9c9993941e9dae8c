"""Bad rows in the middle of a training: what takes their place, how they are counted."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from coma_ds.assemble import TrainingData, build_data
from coma_ds.batch import Replaced
from coma_ds.config import MatchConfig, RunConfig, validate
from coma_ds.data.collate import Collator
from coma_ds.data.dialogues import DialogueFile, SingleTurns
from coma_ds.data.pairs import PairFile
from coma_ds.data.replacements import ALWAYS_ALLOWED, IN_A_ROW, WARNINGS, Replacements, Rows
from coma_ds.data.sampler import LocalBatches, Sources
from coma_ds.objectives.match import Match
from tests.pair_files import BROKEN, ROWS, bad_rows, digests, pairs_of, write
from tests.tiny import demo_processing


@cache
def collator(max_length: int = 64) -> Collator:
    return Collator(demo_processing(max_length=max_length))


def rows_of(folder: Path, *, replaces: bool = True) -> Rows:
    reader = PairFile(folder / "pairs.jsonl", folder)
    return Rows(Sources({"pairs": reader}), collator(), replaces=replaces)


class TestRows:
    @pytest.mark.parametrize("kind", [
        "json", "no object", "empty", "type", "missing", "broken", "empty file", "bomb", "thin",
        "parent", "link", "absolute", "url", "spelled", "surrogate", "tokens",
    ])  # fmt: skip
    def test_the_next_good_row_takes_the_place(self, tmp_path, kind):
        folder = tmp_path / "data"
        folder.mkdir()
        kinds = bad_rows(folder)
        assert len(kinds) == 16
        change, said = kinds[kind]
        rows = rows_of(write(folder, {7: change}))
        found, wanted = rows[0, 7], rows[0, 8]
        assert digests(collator().pack([found])) == digests(collator().pack([wanted]))
        assert wanted.replaced is None
        assert found.replaced.reason.startswith(f"{folder}/pairs.jsonl line 8") and (
            said in found.replaced.reason
        )
        assert found.replaced.by == f"{folder}/pairs.jsonl line 9"
        with pytest.raises(ValueError) as caught:
            rows_of(folder, replaces=False)[0, 7]
        assert str(caught.value) == found.replaced.reason

    def test_from_the_end_on_to_the_start(self, tmp_path):
        rows = rows_of(write(tmp_path, dict.fromkeys((ROWS - 2, ROWS - 1, 0), BROKEN)))
        for row in (ROWS - 2, ROWS - 1, 0):
            assert rows[0, row].replaced.by == f"{tmp_path}/pairs.jsonl line 2"

    def test_a_row_of_its_own_source(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            write(tmp_path / name, {2: BROKEN} if name == "b" else {}, 3)
        readers = {n: PairFile(tmp_path / n / "pairs.jsonl", tmp_path / n) for n in ("a", "b")}
        rows = Rows(Sources(readers), collator(), replaces=True)
        assert rows[1, 2].replaced.by == f"{tmp_path}/b/pairs.jsonl line 1"
        assert len(rows) == 6 and not rows[0, 2].replaced

    def test_too_many_in_a_row(self, tmp_path):
        first, last = 3, 3 + IN_A_ROW
        rows = rows_of(write(tmp_path, {row: BROKEN for row in range(first, last)}))
        assert rows[0, first].replaced.by == f"{tmp_path}/pairs.jsonl line {last + 1}"
        rows = rows_of(write(tmp_path, {row: BROKEN for row in range(first, last + 1)}))
        with pytest.raises(ValueError) as caught:
            rows[0, first]
        said = str(caught.value)
        assert said.startswith(f"{tmp_path}/pairs.jsonl line {first + 1}: image ")
        assert "; no row can take its place: the 16 after it are bad too (the last one " in said
        assert f"pairs.jsonl line {last + 1}: image" in said
        assert rows[0, first + 1].replaced.by == f"{tmp_path}/pairs.jsonl line {last + 2}"

    def test_a_small_source_without_a_good_row(self, tmp_path):
        rows = rows_of(write(tmp_path, {1: BROKEN, 0: BROKEN, 2: BROKEN}, 3))
        with pytest.raises(ValueError, match=r"line 2: .*the 2 after it are bad too .*line 1: "):
            rows[0, 1]

    def test_a_fault_of_the_machine_is_no_bad_row(self, tmp_path, monkeypatch):
        rows = rows_of(write(tmp_path, {}))
        prepare = rows.collator.prepare
        for fault in (OSError("disk"), MemoryError(), RuntimeError("bug")):
            faults = [fault]

            def fail_once(record, faults=faults):
                if faults:
                    raise faults.pop()
                return prepare(record)

            monkeypatch.setattr(rows.collator, "prepare", fail_once)
            with pytest.raises(type(fault)):
                rows[0, 1]

    @pytest.mark.parametrize("single", [False, True])
    def test_dialogues(self, tmp_path, single):
        turns = [{"from": who, "value": f"{who} {n}"} for n in range(4) for who in ("human", "gpt")]
        rows = [{"image": f"{row}.png", "conversations": turns} for row in range(6)]
        rows[2]["conversations"] = turns[:3]
        rows[3]["image"] = "none.png"
        write(tmp_path, {})
        (tmp_path / "dialogues.jsonl").write_text("\n".join(map(json.dumps, rows)))
        reader = DialogueFile(tmp_path / "dialogues.jsonl", tmp_path)
        data = Rows(
            Sources({"talk": SingleTurns(reader, 1) if single else reader}),
            collator(200),
            replaces=True,
        )
        assert "3 turns, an odd number" in data[0, 2].replaced.reason
        batch = collator(200).pack([data[0, row] for row in (1, 2, 3, 4)])
        assert digests(batch)[1:] == [digests(batch)[3]] * 3
        assert [each.by for each in batch.replaced] == [f"{tmp_path}/dialogues.jsonl line 5"] * 2


def config_of(folder: Path, bad_rows: float = 0.5, workers: int = 0) -> RunConfig:
    return validate({
        "objective": "match",
        "data": {
            "format": "pairs", "path": str(folder / "pairs.jsonl"), "image_root": str(folder),
            "workers": workers, "bad_rows": bad_rows,
        },
        "optim": {"batch_size": 8, "steps": 5},
    })  # fmt: skip


def data_of(folder: Path, **options) -> TrainingData:
    return build_data(config_of(folder, **options), collator().processing)


BAD = {3: BROKEN, 4: {"query": ""}, 11: '{"query"', 20: {"query": "<|compress_1|>"}, 39: BROKEN}


class TestBatches:
    @pytest.fixture
    def clean(self, tmp_path) -> list[list[tuple[str, ...]]]:
        """The batches of a file in which the rows that replace bad ones stand in their place."""
        folder = tmp_path / "clean"
        folder.mkdir()
        write(folder, {})
        lines = (folder / "pairs.jsonl").read_text().split("\n")
        for row, other in ((3, 5), (4, 5), (11, 12), (20, 21), (39, 0)):
            lines[row] = lines[other]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        return [pairs_of(batch) for batch in data_of(folder, bad_rows=0).batches(0, 5)]

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_only_the_bad_rows_change(self, tmp_path, clean, workers):
        data = data_of(write(tmp_path, BAD), workers=workers)
        batches = list(data.batches(0, 5))
        assert [pairs_of(batch) for batch in batches] == clean
        replaced = [each.reason.split()[2] for batch in batches for each in batch.replaced]
        assert sorted(replaced) == sorted(f"{row + 1}:" for row in BAD)
        assert all(batch.to("cpu").replaced == batch.replaced for batch in batches)
        assert not batches[0].split([torch.tensor([0])])[0].replaced

    def test_a_later_start_reads_the_same(self, tmp_path, clean):
        data = data_of(write(tmp_path, BAD))
        for start in (1, 3):
            assert [pairs_of(batch) for batch in data.batches(start, 5)] == clean[start:]

    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_the_same_global_batches_at_any_world_size(self, tmp_path, clean, world):
        data = data_of(write(tmp_path, BAD))
        rows = Rows(data.sources, data.collator, replaces=data.replaces)
        for step in range(5):
            found = []
            for rank in range(world):
                (indices,) = LocalBatches(data.order, rank, world, step, step + 1)
                found += pairs_of(data.collator.pack([rows[index] for index in indices]))
            assert found == clean[step]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_without_the_key_the_first_bad_row_is_the_error(self, tmp_path, workers):
        data = data_of(write(tmp_path, {5: BROKEN}), bad_rows=0, workers=workers)
        with pytest.raises(ValueError) as caught:
            list(data.batches(0, 5))
        assert str(caught.value).startswith(f"{tmp_path}/pairs.jsonl line 6: image {tmp_path}/brok")
        assert "Traceback" not in str(caught.value)

    def test_a_replacement_that_is_in_the_batch_already_is_no_negative(self, tmp_path):
        rows = rows_of(write(tmp_path, {3: BROKEN}))
        batch = collator().pack([rows[0, row] for row in (3, 4, 5)])
        ids = batch.content_ids_B.tolist()
        assert ids[0] == ids[1] != ids[2] and ids[3] == ids[4] != ids[5]
        emb = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
        emb[1], emb[4] = emb[0], emb[3]
        loss, report = Match(MatchConfig()).loss(emb, None, batch)
        assert report["masked_negatives"] * 2 == pytest.approx(2 / 3)  # of 2 others, of 3 queries
        cosines = (emb[:3] @ emb[3:].T / MatchConfig().temperature)[[0, 2]][:, [0, 2]]
        alone = -cosines.log_softmax(-1).diagonal()  # as if the copy were not there
        twice = torch.stack([cosines[1, 0], cosines[1, 0], cosines[1, 1]]).log_softmax(0)[2]
        assert float(loss) == pytest.approx(float(2 * alone[0] - twice) / 3, rel=1e-5)


def bad(number: int, kind: str = "k") -> Replaced:
    return Replaced(f"a.jsonl line {number}: wrong", kind, f"a.jsonl line {number + 1}")


def count(counter: Replacements, *replaced: Replaced, rows: int = 100) -> None:
    counter.add(replaced, rows, "cpu")


class TestCounter:
    def test_a_line_for_each_kind(self, caplog):
        counter = Replacements(0.5)
        count(counter, bad(1), bad(2), bad(3, "other"))
        count(counter)
        count(counter, bad(4), bad(5, "third"))
        assert caplog.messages == [
            f"a.jsonl line {row}: wrong; replaced by a.jsonl line {row + 1} ({number} so far)"
            for row, number in ((1, 1), (3, 3), (5, 5))
        ]
        assert str(counter) == "5 of 300 rows were bad and replaced (1.7 %)"

    def test_not_more_than_ten_lines(self, caplog):
        counter = Replacements(0.5)
        count(counter, *(bad(number, f"kind {number}") for number in range(30)))
        assert len([line for line in caplog.messages if "so far" in line]) == WARNINGS == 10
        assert caplog.messages[-1] == (
            "further rows are replaced without a word (metric: replaced_rows; coma-ds prepare "
            "lists them all)"
        )

    @pytest.mark.parametrize(
        ("rows", "replaced", "ends"),
        [(20, 10, False), (20, 11, True), (109, 11, True), (110, 11, False), (10_000, 999, False),
         (9_980, 999, True)],
    )  # fmt: skip
    def test_the_limit(self, rows, replaced, ends):
        assert ALWAYS_ALLOWED == 10
        counter = Replacements(0.1)
        many = [bad(number) for number in range(1, replaced + 1)]
        if not ends:
            return count(counter, *many, rows=rows)
        with pytest.raises(ValueError) as caught:
            count(counter, *many, rows=rows)
        share = f"{replaced} of {rows} rows were bad and replaced ({100 * replaced / rows:.2g} %)"
        first = "; ".join(f"a.jsonl line {number}: wrong" for number in range(1, 6))
        assert str(caught.value) == (
            f"{share}, more than data.bad_rows 0.1 allows: the first {first}; repair or drop these "
            "rows, or raise data.bad_rows"
        )

    def test_it_counts_over_the_whole_run(self):
        counter = Replacements(0.1)
        for step in range(5):
            count(counter, bad(2 * step), bad(2 * step + 1), rows=10)
        with pytest.raises(ValueError, match="11 of 60 rows were bad"):
            count(counter, bad(10), rows=10)

    def test_a_resumed_run_goes_on_counting(self, caplog):
        whole, before, after = Replacements(0.1), Replacements(0.1), Replacements(0.1)
        for counter in (whole, before):
            count(counter, bad(1), bad(2, "other"))
        after.load(json.loads(json.dumps(before.state())))
        caplog.clear()
        for counter in (whole, after):
            count(counter, *(bad(number, "other") for number in range(3, 11)))
            assert not caplog.messages
        assert after.state() == whole.state() and after.replaced == 10 and after.rows == 200
        for counter in (whole, after):
            with pytest.raises(ValueError, match=r"40 of 210 .*the first a.jsonl line 1: wrong; "):
                count(counter, *map(bad, range(30)), rows=10)
        fresh = Replacements(0.1)
        fresh.load({})
        assert fresh.state() == Replacements(0.1).state()

    def test_rows_are_counted_before_any_is_allowed(self):
        """A run that its first bad row ended goes on with a share of them."""
        counter, later = Replacements(0.0), Replacements(0.1)
        count(counter, rows=1000)
        later.load(counter.state())
        count(later, *map(bad, range(20)), rows=10)
        assert str(later).startswith("20 of 1010 ")


def test_rows_bad_in_the_same_way_share_a_kind(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    changes = [change for change, _ in bad_rows(folder).values()] * 2
    rows = rows_of(write(folder, {2 * i + 1: change for i, change in enumerate(changes)}, 66))
    kinds = [rows[0, 2 * i + 1].replaced.kind for i in range(len(changes))]
    half = len(kinds) // 2
    assert kinds[:half] == kinds[half:] and len(set(kinds)) == half

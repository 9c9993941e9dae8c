"""``coma-ds synthesize`` with a server: dialogues in a fixed order, stopped, gone on, rejected."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coma_ds.commands.main import run
from coma_ds.data.dialogues import DialogueFile
from coma_ds.synthesis import output as output_module
from coma_ds.synthesis import server as server_module
from coma_ds.synthesis.output import Output, write_all
from coma_ds.synthesis.talk import TROUBLE, Outcome
from tests.chat_server import chat_server, image_of, texts_of, well
from tests.folders import png

IMAGES = 7


@pytest.fixture
def images(tmp_path) -> Path:
    """Seven pictures in two folders, and what is none."""
    folder = tmp_path / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(IMAGES):
        place = folder / "deep" / "er" if number % 2 else folder
        (place / f"{number}.png").write_bytes(png(number))
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.png").write_text("what a Mac leaves")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    """Between two tries of a request."""
    monkeypatch.setattr(server_module, "LONGEST_WAIT", 0.0)


def argv(images: Path, server, output: Path, *more: str) -> list[str]:
    words = ["synthesize", "--images", str(images), "--output", str(output), "--model", "m"]
    return [*words, "--server", server if isinstance(server, str) else server.url, *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(path: Path) -> list[str]:
    return [row["image"] for row in rows(path)]


@pytest.fixture
def whole(images, tmp_path) -> bytes:
    """What an undisturbed run with a good server writes."""
    with chat_server() as server:
        assert run(argv(images, server, tmp_path / "whole.jsonl", "--parallel", "1")) == 0
    return (tmp_path / "whole.jsonl").read_bytes()


class TestDialogues:
    def test_are_read_by_stage_1(self, images, tmp_path, capsys):
        out = tmp_path / "out.jsonl"
        with chat_server() as server:
            assert run(argv(images, server, out, "--turns", "2", "4")) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"{IMAGES} dialogues -> {out}" and said[1].endswith(" s")
        dialogues = DialogueFile(out, images)
        assert len(dialogues) == IMAGES == len(set(names(out)))
        assert set(names(out)) == {
            os.path.relpath(p, images) for p in images.rglob("*.png") if p.name[0] != "."
        }
        for dialogue in (dialogues[row] for row in range(IMAGES)):
            assert len(dialogue.turns) == 4 and dialogue.images[0].open().size == (64, 64)
            assert all(turn.question.startswith("What is part") for turn in dialogue.turns)
            assert all(turn.answer.startswith("It is ") for turn in dialogue.turns)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "images", "out.jsonl", "out.settings.json",
        ]  # fmt: skip

    def test_are_one_conversation_with_the_image(self, images, tmp_path, monkeypatch):
        Image.new("RGB", (300, 100), (200, 30, 30)).save(images / "wide.png")
        monkeypatch.setenv("MY_KEY", "secret\n")
        out = tmp_path / "out.jsonl"
        more = ["--turns", "3", "3", "--max-pixels", "3000", "--temperature", "0.3"]
        more += ["--max-tokens", "77", "--api-key-env", "MY_KEY", "--parallel", "1"]
        with chat_server() as server:
            assert run(argv(images, server, out, *more)) == 0
        row = names(out).index("wide.png")
        turns = [turn["value"] for turn in rows(out)[row]["conversations"]]
        assert turns[0].startswith("<image>\n")
        turns[0] = turns[0].removeprefix("<image>\n")
        own = server.bodies[4 * row : 4 * row + 4]  # the questions, then three answers
        assert [texts_of(body) for body in own[1:]] == [turns[:1], turns[:3], turns[:5]]
        roles = [[message["role"] for message in body["messages"]] for body in own]
        assert roles[0] == ["user"] and roles[3] == ["user", "assistant"] * 2 + ["user"]
        for body in own:
            picture = image_of(body)
            assert picture.size == (94, 31) and picture.getpixel((40, 15))[0] > 150
            assert {key: body[key] for key in ("model", "temperature", "max_tokens", "top_p")} == {
                "model": "m", "temperature": 0.3, "max_tokens": 77, "top_p": 1.0,
            }  # fmt: skip
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies)
        assert {h["Authorization"] for h in server.headers} == {"Bearer secret"}
        assert {h["path"] for h in server.headers} == {"/v1/chat/completions"}

    def test_order_comes_from_the_seed_alone(self, images, tmp_path, whole):
        """The first request waits until others have been answered."""
        others, enough = [], threading.Event()

        def behave(body: dict, number: int) -> str:
            if number == 0:
                assert enough.wait(60)
            others.append(number)
            if len(others) == 3 * IMAGES:
                enough.set()
            return well(body)

        out = tmp_path / "out.jsonl"
        with chat_server(behave) as server:
            assert run(argv(images, server, out, "--parallel", "8")) == 0
        assert others[0] != 0 and out.read_bytes() == whole
        with chat_server() as server:
            assert run(argv(images, server, tmp_path / "seed.jsonl", "--seed", "1")) == 0
        assert names(tmp_path / "seed.jsonl") != names(out)
        assert sorted(names(tmp_path / "seed.jsonl")) == sorted(names(out))
        other = {row["image"]: row for row in rows(tmp_path / "seed.jsonl")}
        assert not any(other[row["image"]] == row for row in rows(out))


class TestGoingOn:
    def test_after_a_kill(self, images, tmp_path, whole):
        """The process dies by SIGKILL while the fourth dialogue is being asked for."""
        out = tmp_path / "out.jsonl"
        begun: list[subprocess.Popen] = []
        ready = threading.Event()

        def behave(body: dict, number: int) -> str:
            if number == 3 * 6 + 2:
                assert ready.wait(60)
                begun[0].send_signal(signal.SIGKILL)
                begun[0].wait()
            return well(body)

        with chat_server(behave) as server:
            call = [sys.executable, "-m", "coma_ds.commands.main"]
            begun.append(subprocess.Popen([*call, *argv(images, server, out, "--parallel", "1")]))
            ready.set()
            assert begun[0].wait(120) == -signal.SIGKILL
        assert out.read_bytes() == b"".join(whole.splitlines(True)[:3])
        with chat_server() as server:
            assert run(argv(images, server, out, "--parallel", "2")) == 0
        assert out.read_bytes() == whole
        assert len(server.bodies) == 6 * (IMAGES - 3)  # nothing is asked for twice

    @pytest.mark.parametrize("cut", ["end", "middle", "first", "empty"])
    def test_a_cut_line_is_written_again(self, images, tmp_path, whole, cut, capsys):
        lines = whole.splitlines(True)
        kept = {
            "end": whole[:-1],
            "middle": b"".join(lines[:4]) + lines[4][:50],
            "first": lines[0][:10],
            "empty": b"",
        }[cut]
        out = tmp_path / "whole.jsonl"
        out.write_bytes(kept)
        with chat_server() as server:
            assert run(argv(images, server, out)) == 0
        assert out.read_bytes() == whole
        assert len(server.bodies) == 6 * (IMAGES - kept.count(b"\n"))

    def test_a_larger_limit_and_more_images(self, images, tmp_path, whole):
        out = tmp_path / "out.jsonl"
        with chat_server() as server:
            assert run(argv(images, server, out, "--limit", "3")) == 0
            assert out.read_bytes() == b"".join(whole.splitlines(True)[:3])
            assert run(argv(images, server, out)) == 0
            assert out.read_bytes() == whole
            (images / "new.png").write_bytes(png(99))
            assert run(argv(images, server, out)) == 0
            asked = len(server.bodies)
            assert run(argv(images, server, out)) == 0  # nothing is left to do
        assert out.read_bytes().startswith(whole) and names(out)[IMAGES:] == ["new.png"]
        assert asked == len(server.bodies) == 6 * (IMAGES + 1)

    def test_rejects_are_tried_again_without_their_list(self, images, tmp_path, whole):
        out, rejects = tmp_path / "out.jsonl", tmp_path / "out.rejected.jsonl"
        bad = {0, 1, 2}  # the three tries of the first image
        with chat_server(lambda body, n: "no" if n in bad else well(body)) as server:
            assert run(argv(images, server, out, "--parallel", "1")) == 0
            left_out = names(rejects)
            asked = len(server.bodies)
            assert run(argv(images, server, out)) == 0
            assert asked == len(server.bodies) == 3 + 6 * (IMAGES - 1)
            rejects.unlink()
            assert run(argv(images, server, out)) == 0
        lines = whole.splitlines(True)
        assert left_out == names(tmp_path / "whole.jsonl")[:1] and not rejects.exists()
        assert out.read_bytes() == b"".join(lines[1:] + lines[:1])

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--seed", "1"], "seed was 0, now 1"),
            (["--turns", "1", "5"], "turns was [3, 5], now [1, 5]"),
            (["--model", "n"], "model was 'm', now 'n'"),
            (["--temperature", "1"], "temperature was 0.7, now 1.0"),
            (["--max-tokens", "9"], "max_tokens was 1024, now 9"),
            (["--max-pixels", "9"], "max_pixels was 802816, now 9"),
            (["--images", "."], "images was "),
        ],
    )
    def test_not_with_other_settings(self, images, tmp_path, whole, more, said, capsys):
        with chat_server() as server:
            assert run(argv(images, server, tmp_path / "whole.jsonl", *more)) == 2
        err = capsys.readouterr().err
        assert f"begun with other settings: {said}" in err and not server.bodies
        assert (tmp_path / "whole.jsonl").read_bytes() == whole

    def test_not_with_another_prompt(self, images, tmp_path, whole, monkeypatch, capsys):
        monkeypatch.setattr("coma_ds.synthesis.talk.PROMPT", "Ask {count} questions.")
        with chat_server() as server:
            assert run(argv(images, server, tmp_path / "whole.jsonl")) == 2
        assert "other settings: prompt was 'Look at" in capsys.readouterr().err

    def test_not_in_a_file_of_somebody_else(self, images, tmp_path, whole, capsys):
        out = tmp_path / "whole.jsonl"
        settings = tmp_path / "whole.settings.json"
        with chat_server() as server:
            for text in ("[1]", "{", None):
                settings.unlink() if text is None else settings.write_text(text)
                assert run(argv(images, server, out)) == 2
                assert "is not there or no JSON object: name another" in capsys.readouterr().err
        assert out.read_bytes() == whole and not settings.exists()

    def test_not_beside_another_process(self, images, tmp_path, whole, capsys):
        out = tmp_path / "whole.jsonl"
        written = json.loads((tmp_path / "whole.settings.json").read_text())
        other = Output(out, written)
        with chat_server() as server:
            assert run(argv(images, server, out)) == 2
        other.close()
        assert capsys.readouterr().err.endswith("whole.jsonl: another process is writing it\n")
        assert out.read_bytes() == whole

    def test_a_strange_line_is_named(self, images, tmp_path, whole, capsys):
        out = tmp_path / "whole.jsonl"
        lines = whole.splitlines(True)
        out.write_bytes(lines[0] + b'{"other": 1}\n' + lines[1])
        with chat_server() as server:
            assert run(argv(images, server, out)) == 2
        assert "whole.jsonl line 2: not a line of this command" in capsys.readouterr().err

    def test_a_full_disk_is_said(self, tmp_path):
        output = Output(tmp_path / "out.jsonl", {})
        output.write(Outcome("a.png", ("q", "a")))
        full = open("/dev/full", "wb")
        output._files[0].close()
        output._files[0] = full
        with pytest.raises(ValueError, match=r"disk is full .* run the same command again"):
            output.write(Outcome("b.png", ("q", "a")))
        output.close()
        assert names(tmp_path / "out.jsonl") == ["a.png"]


class TestMmeb:
    COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")

    def root(self, folder: Path) -> Path:
        """Four images, twice as many with those among them, and none."""
        (folder / "images" / "a").mkdir(parents=True)
        for number in range(9):
            (folder / "images" / "a" / f"{number}.jpg").write_bytes(png(number))
        sets = {
            "one": [("a/0.jpg", "", ""), ("a/1.jpg", "a/2.jpg", ""), ("a/0.jpg", "", "a/3.jpg")],
            "two": [("", f"a/{number}.jpg", "") for number in range(8)],
            "words": [("", "", "")],
        }
        for name, found in sets.items():
            columns = {column: ["t"] * len(found) for column in self.COLUMNS[::2]}
            columns |= {c: [row[i] for row in found] for i, c in enumerate(self.COLUMNS[1::2])}
            (folder / "train" / name).mkdir(parents=True)
            pq.write_table(
                pa.table(columns), folder / "train" / name / "original-00000-of-00001.parquet"
            )
        return folder

    def ask(self, root: Path, *more: str) -> list[str]:
        out = root / f"{hashlib.md5(repr(more).encode()).hexdigest()}.jsonl"
        words = ["synthesize", "--mmeb", str(root / "train"), "--image-root", str(root / "images")]
        with chat_server() as server:
            words += ["--output", str(out), "--model", "m", "--server", server.url]
            assert run([*words, "--turns", "1", "1", *more]) == 0
        assert len(DialogueFile(out, root / "images")) == len(names(out))
        return names(out)

    def test_every_image_once(self, tmp_path):
        root = self.root(tmp_path)
        found = self.ask(root)
        assert sorted(found) == [f"a/{i}.jpg" for i in range(8)] != found
        assert self.ask(root, "--limit", "4") == found[:4]
        one = self.ask(root, "--sources", "one")
        assert one == [name for name in found if name < "a/4"]
        four = self.ask(root, "--per-source", "4")  # of the second set, four others
        assert four == found
        two = self.ask(root, "--per-source", "2")
        assert two == [name for name in found if name in two] and len(two) == 4
        assert len(self.ask(root, "--per-source", "1", "--sources", "two", "one")) == 2

    def test_wrong_places(self, tmp_path, capsys):
        root = self.root(tmp_path)
        words = ["synthesize", "--output", str(root / "o.jsonl"), "--model", "m", "--server"]
        words += ["http://localhost:1/v1", "--image-root", str(root / "images"), "--mmeb"]
        assert run([*words, str(root / "train"), "--sources", "three"]) == 2
        assert run([*words, str(root / "train"), "--sources", "words"]) == 2
        assert run([*words, str(root / "images")]) == 2
        assert run([*words, "owner/name"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert "no set 'three' here; there are one, two, words" in lines[0]
        assert any(line.endswith("no row of words has an image") for line in lines)
        assert any("no set of MMEB-train here" in line for line in lines)
        assert lines[-1] == "error: owner/name is on the hub: name the sets to take with --sources"


class TestWriting:
    def outcomes(self, marks: str) -> list[Outcome]:
        """``+`` a dialogue, ``-`` a reject, ``!`` a failure of the server."""
        kinds = {
            "+": lambda name: Outcome(name, ("q", "a")),
            "-": lambda name: Outcome(name, reason="cut", detail="why"),
            "!": lambda name: Outcome(name, reason=TROUBLE, detail="it broke"),
        }
        return [kinds[mark](f"{number}") for number, mark in enumerate(marks)]

    @pytest.mark.parametrize(
        ("marks", "said", "kept"),
        [
            ("+!+", "", 3),
            ("!!+", "", 3),
            ("+!!!!!!!", "", 8),
            ("!", "it broke", 0),
            ("+!!!!!!!!+", "it broke", 1),
            ("+!!!!+!!!!+", "", 11),
            ("--", "not one image became a dialogue (2 cut)", 2),
            ("-" * 60, "(50 cut; the last one: why)", 50),
            ("+" + "-" * 60, "", 61),
        ],
    )
    def test_what_ends_a_run(self, tmp_path, marks, said, kept):
        output = Output(tmp_path / "out.jsonl", {})
        told: list[int] = []
        if said:
            with pytest.raises(ValueError) as error:
                write_all(self.outcomes(marks), output, told.append)
            assert said in str(error.value)
        else:
            write_all(self.outcomes(marks), output, told.append)
        output.close()
        found = Output(tmp_path / "out.jsonl", {})
        assert sum(told) == kept == len(found.done)
        assert found.written == marks[:kept].count("+")
        found.close()
        assert output_module.HOPELESS == 50 and output_module.FAILURES == 8

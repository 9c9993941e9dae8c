"""``coma-ds synthesize`` with a model in this process: stock generation, drawn from seeds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from coma_ds.commands.main import run
from coma_ds.data.chat import Reply, Request
from coma_ds.data.dialogues import DialogueFile
from coma_ds.data.records import Picture
from coma_ds.model.generate import LocalChat, SeededSampling
from tests.folders import base_folder, export, load, png
from tests.tiny import Flat

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXTS = [
    ("What is that?",),
    ("Name three things that can be seen here, from left to right.", "a red car", "And then?"),
    ("Colour?",),
]
PICTURES: list[Picture] = [Flat("a"), Flat("b", (10, 200, 60)), Flat("c", (0, 0, 90), (96, 32))]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / request.param, request.param, tied=False)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory) -> Path:
    """Untied: a tied one of random weights says the last word again and again."""
    return base_folder(tmp_path_factory.mktemp("base") / "one", tied=False)


def local(folder: Path, **more) -> LocalChat:
    return LocalChat(str(folder), dtype=torch.float32, device="cpu", max_tokens=8, **more)


def requests(chat: LocalChat) -> list[Request]:
    seen = map(chat.see, PICTURES)
    return [Request(image, texts, 10 + i) for i, (image, texts) in enumerate(zip(seen, TEXTS))]


def plain_greedy(chat: LocalChat, request: Request) -> str:
    """Token by token through the stock forward, without a cache, a batch or padding."""
    ids, said = chat._ids(request), []
    pixels, grid = request.image
    values = chat.processing.image_batch(pixels, [grid]).values("cpu")
    while len(said) < 8:
        row = torch.tensor([ids + said])
        logits_V = chat.lm(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            mm_token_type_ids=(row == chat.processing.image_id).int(),
            pixel_values=values,
            image_grid_thw=torch.tensor([grid]),
            use_cache=False,
        ).logits[0, -1]
        said.append(int(logits_V[: chat.words].argmax()))
        if said[-1] in chat.ends:
            said.pop()
            break
    return chat.processing.tokenizer.decode(said)


class TestLocalChat:
    def test_a_batch_says_what_each_would(self, folder):
        """Other lengths, other images: padding and neighbours change nothing."""
        chat = local(folder, temperature=0.0)
        asked = requests(chat)
        together = [reply.text for reply in chat.replies(asked)]
        assert together == [plain_greedy(chat, request) for request in asked]
        assert len(set(together)) > 1

    def test_replies_are_drawn_from_their_seed(self, folder):
        chat = local(folder)
        asked = requests(chat)
        together = chat.replies(asked)
        assert together == [chat.replies([request])[0] for request in asked]
        assert together[::-1] == chat.replies(asked[::-1])
        others = [Request(r.image, r.texts, r.seed + 1) for r in asked]
        assert chat.replies(others) != together

    def test_reads_image_and_earlier_turns(self, one_folder):
        """Each part of a request reaches the model."""
        chat = local(one_folder, temperature=0.0)
        asked = requests(chat)[1]
        ids = chat._ids(asked)
        text = chat.processing.tokenizer.decode(ids)
        image = chat.image_token * 16
        assert text.replace(image, "IMAGE") == (
            "<|im_start|>user\n<|vision_start|>IMAGE<|vision_end|>Name three things that can be "
            "seen here, from left to right.<|im_end|>\n<|im_start|>assistant\na red car<|im_end|>\n"
            "<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
        )
        heard: list[torch.Tensor] = []
        hook = chat.lm.lm_head.register_forward_hook(lambda *call: heard.append(call[2][0, -1]))
        for request in (
            asked,
            asked,
            Request(asked.image, ("Other?", *asked.texts[1:]), 0),
            Request(chat.see(Flat("n", (250, 250, 0))), asked.texts, 0),
        ):
            chat.replies([request])
        hook.remove()
        same, words, image = ((logits_V - heard[0]).abs().max() for logits_V in heard[8::8])
        assert same == 0 and words > 1e-3 and image > 1e-3

    def test_stops_at_the_end_of_a_turn(self, one_folder):
        """A model that ends its turn after two words, and one that never does."""
        chat = local(one_folder, temperature=0.0)
        words = chat.processing.tokenizer("a car", add_special_tokens=False)["input_ids"][:2]
        (asked, *_) = requests(chat)
        said = [*words, chat.ends[-1], *words]
        start = len(chat._ids(asked))

        class Says(torch.nn.Module):
            """In place of the output matrix: the next word of ``said``, again and again."""

            def forward(self, hidden):
                place = places.pop(0)
                logits = torch.zeros(*hidden.shape[:2], 4096)
                logits[..., said[place % len(said)]] = 9.0
                return logits

        places = list(range(99))
        head, chat.lm.lm_head = chat.lm.lm_head, Says()
        (reply,) = chat.replies([asked])
        assert not reply.cut and reply.text == chat.processing.tokenizer.decode(words)
        assert places[0] == 3 and start > 16  # not a word after the end
        said, places = words, list(range(99))
        (reply,) = chat.replies([asked])
        assert reply.cut and places[0] == 8
        chat.lm.lm_head = head

    def test_what_an_exported_model_adds_is_no_word(self, tmp_path):
        """Compression tokens stand in the table that a tied model speaks from."""
        model, processing = load(base_folder(tmp_path / "base"))
        with torch.no_grad():  # one of the two has the largest logit, if it counted
            model.tokens.weight[0].mul_(1000.0)
            model.tokens.weight[1].copy_(-model.tokens.weight[0])
        chat = local(export(model, processing, tmp_path / "model"))
        assert chat.words == processing.compression_ids[0] < len(chat.processing.tokenizer)
        replies = chat.replies(requests(chat))
        assert not any("compress" in reply.text for reply in replies)
        chat.words = 5000
        assert any("compress" in reply.text for reply in chat.replies(requests(chat)))


class TestSampling:
    def test_draws_from_the_softmax_at_its_temperature(self):
        logits_V, rows, temperature = torch.tensor([1.0, 0.0, -1.0, 0.5, 9.0]), 20_000, 0.7
        draw = SeededSampling(range(rows), temperature, 4, torch.device("cpu"))
        scores = draw(None, logits_V.expand(rows, 5))
        share = scores.argmax(-1).bincount(minlength=5) / rows
        want = torch.softmax(logits_V[:4] / temperature, 0)
        assert (share[:4] - want).abs().max() < 0.015 and share[4] == 0
        again = draw(None, logits_V.expand(rows, 5))  # the next word, other noise
        assert (again.argmax(-1) != scores.argmax(-1)).any()

    def test_no_temperature_is_the_largest(self):
        scores = torch.tensor([[0.0, 3.0, 2.0, 9.0]])
        draw = SeededSampling([1], 0.0, 3, torch.device("cpu"))
        assert draw(None, scores).argmax() == 1 and scores[0, 3] == 9.0


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    return tmp_path / "images"


def argv(folder, images: Path, output: Path, *more: str) -> list[str]:
    words = ["synthesize", "--images", str(images), "--model", str(folder), "--device", "cpu"]
    return [*words, "--output", str(output), "--max-tokens", "12", *more]


class TestCommand:
    @pytest.mark.parametrize("model", ["random", "builtin:demo-base"])
    def test_nothing_well_formed_is_an_error(self, one_folder, images, tmp_path, capsys, model):
        out = tmp_path / "out.jsonl"
        folder = one_folder if model == "random" else model
        assert run(argv(folder, images, out)) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: not one image became a dialogue (")
        rejects = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").open()]
        assert len(rejects) == 5 and not out.exists()
        assert {r["reason"] for r in rejects} <= {"no list of questions", "reply cut off"}
        assert run(argv(folder, images, out)) == 2  # no image is left, and none was accepted
        assert "error: not one image became a dialogue (" in capsys.readouterr().err

    def well_formed(self, monkeypatch) -> list[int]:
        """What a tiny model says, as a list of questions or as an answer; the sizes of batches."""
        sizes: list[int] = []
        replies = LocalChat.replies

        def asked(self, requests):
            sizes.append(len(requests))
            counts = [re.search(r"exactly (\d+) questions", r.texts[-1]) for r in requests]
            said = [reply.text.encode().hex() for reply in replies(self, requests)]
            return [Reply(written(text, count)) for text, count in zip(said, counts)]

        def written(text: str, count: re.Match | None) -> str:
            if count is None:
                return f"It is {text}."
            return json.dumps([f"What is {number} of {text}?" for number in range(int(count[1]))])

        monkeypatch.setattr(LocalChat, "replies", asked)
        return sizes

    def test_dialogues_whatever_the_batch(self, one_folder, images, tmp_path, monkeypatch):
        monkeypatch.setattr("coma_ds.model.generate.has_fast_bf16", lambda _: False)
        sizes = self.well_formed(monkeypatch)
        whole = tmp_path / "whole.jsonl"
        assert run(argv(one_folder, images, whole, "--turns", "1", "3", "--parallel", "3")) == 0
        assert max(sizes) == 3 and sum(sizes) == sum(
            1 + len(json.loads(line)["conversations"]) // 2 for line in whole.open()
        )
        assert len(DialogueFile(whole, images)[4].turns) == 3
        assert whole.read_text().count("What is 0 of") == len(set(whole.open())) == 5
        for more in (["--parallel", "1"], ["--limit", "2"], []):
            out = tmp_path / f"{len(more)}{more[:1]}.jsonl"
            assert run(argv(one_folder, images, out, "--turns", "1", "3", *more)) == 0
            if "--limit" in more:  # stopped, and gone on with a half line
                assert out.read_bytes() == b"".join(whole.read_bytes().splitlines(True)[:2])
                out.write_bytes(out.read_bytes()[:-9])
                assert run(argv(one_folder, images, out, "--turns", "1", "3")) == 0
            assert out.read_bytes() == whole.read_bytes()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--model", "nowhere"], "--model 'nowhere': no such folder"),
            (["--model", "builtin:x"], "--model 'builtin:x': no such model in the package"),
            (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
            (["--images", "nowhere"], "nowhere: no such folder of images"),
            (["--images", "empty"], "empty: no image files in it (looked for .jpg"),
            (["--output", "out.json"], "--output out.json: expected a name that ends in .jsonl"),
            (["--output", "no/out.jsonl"], "--output no/out.jsonl: there is no folder "),
            (["--output", "a.jsonl"], "--output a.jsonl: Is a directory"),
            (["--turns", "3", "2"], "--turns 3 2: expected LEAST MOST"),
            (["--turns", "0", "2"], "--turns 0 2: expected LEAST MOST"),
            (["--temperature", "-1"], "--temperature -1.0: expected 0 or more"),
            (["--temperature", "nan"], "--temperature nan: expected 0 or more"),
            (["--parallel", "0"], "--parallel 0: expected 1 or more"),
            (["--max-pixels", "0"], "--max-pixels 0: expected 1 or more"),
            (["--limit", "-1"], "--limit -1: expected 1 or more"),
            (["--sources", "a"], "--sources goes with --mmeb only"),
            (["--image-root", "a"], "--image-root goes with --mmeb only"),
            (["--per-source", "1"], "--per-source goes with --mmeb only"),
            (["--api-key-env", "A"], "--api-key-env goes with --server only"),
            (["--server", "http://h/v1"], "--device is for a model in this process"),
        ],
    )
    def test_wrong_use(self, one_folder, images, tmp_path, monkeypatch, capsys, more, said):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "a.jsonl").mkdir()
        assert run([*argv(one_folder, images, tmp_path / "out.jsonl"), *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {said}") and err.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "empty", "images"]

    def test_more_wrong_use(self, images, monkeypatch, capsys):
        words = ["synthesize", "--output", "o.jsonl", "--model", "m"]
        monkeypatch.setenv("MY_KEY", "top\x07secret")
        server = ["--server", "http://127.0.0.1:9/v1", "--api-key-env"]
        assert run([*words, "--mmeb", "x"]) == 2
        assert run([*words, "--images", str(images), *server, "MY_KEY"]) == 2
        assert run([*words, "--images", str(images), *server, "NO_SUCH"]) == 2
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run([*words, "--images", str(images)]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "error: --mmeb needs --image-root, the folder where its image paths start",
            "error: --api-key-env MY_KEY: it holds what can be no key",
            "error: --api-key-env NO_SUCH: the environment variable is not set",
            "error: this command is one process: for several GPUs start a server (--server)",
        ]

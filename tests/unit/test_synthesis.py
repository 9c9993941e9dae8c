"""The parts of ``coma-ds synthesize``: what a reply must be, many talks at once, the server."""

from __future__ import annotations

import json
import socket
import threading
import time
from email.utils import formatdate

import pytest

from coma_ds.commands.main import run
from coma_ds.data.chat import Fitted, Reply, Request
from coma_ds.data.dialogues import DialogueFile
from coma_ds.data.listing import folder_images, in_drawn_order
from coma_ds.synthesis import schedule, server
from coma_ds.synthesis.schedule import in_batches, in_threads
from coma_ds.synthesis.server import ChatServer
from coma_ds.synthesis.talk import Outcome, number_of_turns, read_questions, talk
from tests.chat_server import asked_for, chat_server, well
from tests.folders import png
from tests.tiny import Flat

THREE = '["What is red?", "Who sits there?", "Which word is on the sign?"]'
LIST = json.loads(THREE)
LINES = "1. What is red?\n2. Who sits there?\n3. Which word is on the sign?"


class TestReplies:
    @pytest.mark.parametrize(
        "text",
        [
            THREE,
            f"  {THREE}\n",
            f"```json\n{THREE}\n```",
            f"```\n{THREE}\n```\n",
            f"Here is the list:\n\n```json\n{THREE}\n```",
            f"Questions:\n{THREE}",
            json.dumps(LIST, indent=2),
            LINES,
            LINES.replace(".", ")"),
            LINES.replace("1.", "(1)").replace("2.", "(2)").replace("3.", "(3)"),
            f"Here are three questions:\n\n{LINES}\n",
            f"```\n{LINES}\n```",
        ],
    )
    def test_a_list_in_its_forms(self, text):
        assert read_questions(text, 3) == LIST

    # every way in which a reply to the first request is not a list of five good questions
    QUESTIONS = (
        ("I cannot see it.", "no list of questions"),
        ("[", "no list of questions"),
        ('{"questions": []}', "no list of questions"),
        ('["a?", 2, "c?", "d?", "e?"]', "no list of questions"),
        ("1. a?\n3. b?\n4. c?\n5. d?\n6. e?", "no list of questions"),
        ("1. a?\nb?\n2. c?\n3. d?\n4. e?\n5. f?", "no list of questions"),
        (f"{THREE} I hope this helps", "no list of questions"),
        ("", "no list of questions"),
        ("[]", "wrong number of questions"),
        (THREE, "wrong number of questions"),
        ("1. a?\n2. b?\n3. c?\n4. d?\n5. e?\n6. f?", "wrong number of questions"),
        ('["a?", "b?", "c?", " A ?", "e?"]', "repeated question"),
        ('["a?", "b?", "c?", "d?", " "]', "empty text"),
        ('["a?", "b?", "c?", "d?", "where <image> is?"]', "reserved text"),
        ('["a?", "b?", "c?", "d?", "\\ud800?"]', "reserved text"),
        (("", "length"), "reply cut off"),
        (('["a?", "b?", "c?", "d?", "e?"]', "length"), "reply cut off"),
    )
    ANSWERS = (
        (" \n", "empty text"),
        (None, "empty text"),
        ("<think>So", "reserved text"),
        ("a <|vision_start|>", "reserved text"),
        ("a <video>", "reserved text"),
        (("It is", "length"), "reply cut off"),
        (("", "content_filter"), "reply cut off"),
        ((400, {"error": {"message": "too long."}}, {}), "refused by the server"),
        ((413, b"<html>too  large</html>", {}), "refused by the server"),
    )

    @pytest.mark.parametrize(
        ("place", "answer", "reason"),
        [(0, *case) for case in QUESTIONS] + [(3, *case) for case in ANSWERS],
    )
    def test_malformed_is_asked_again_then_rejected(self, tmp_path, capsys, place, answer, reason):
        """One of three images has a bad reply, to its questions or to its third answer."""
        for number in range(3):
            (tmp_path / f"{number}.png").write_bytes(png(number))
        bad: list[dict] = []

        def behave(body: dict, _: int):
            image = body["messages"][0]["content"][0]["image_url"]["url"]
            chosen.setdefault("image", image)
            if image == chosen["image"] and len(body["messages"]) == 2 * max(place, 1) - 1:
                if bool(asked_for(body)) == (place == 0):
                    bad.append(body)
                    return (answer, "stop") if answer is None else answer
            return well(body)

        chosen: dict[str, str] = {}
        out = tmp_path / "out.jsonl"
        with chat_server(behave) as stand_in:
            words = ["synthesize", "--images", str(tmp_path), "--output", str(out)]
            words += ["--model", "m", "--server", stand_in.url, "--parallel", "1"]
            assert run([*words, "--turns", "5", "5"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"2 dialogues -> {out}"
        assert said[1] == f"rejected: 1 {reason} -> {tmp_path / 'out.rejected.jsonl'}"
        (reject,) = [json.loads(x) for x in (tmp_path / "out.rejected.jsonl").open()]
        order = in_drawn_order(folder_images(str(tmp_path)), 0)
        assert reject["image"] == order[0] and reject["reason"] == reason and reject["detail"]
        assert [json.loads(line)["image"] for line in out.open()] == order[1:]
        assert len(DialogueFile(out, tmp_path)[1].turns) == 5
        again = 1 if reason == "refused by the server" else 3
        assert len(bad) == again == len({body["seed"] for body in bad})
        assert len({json.dumps(body | {"seed": 0}) for body in bad}) == 1

    def test_one_bad_reply_costs_nothing(self):
        replies = iter([Reply("no"), Reply(THREE), Reply("x", cut=True), *map(Reply, "abc")])
        (outcome,) = in_batches(
            [talk("i", str, turns=(3, 3), seed=0)], lambda asked: [next(replies) for _ in asked], 1
        )
        assert outcome.texts == (LIST[0], "a", LIST[1], "b", LIST[2], "c") and not outcome.reason

    def test_turns_as_in_the_paper(self):
        counts = [number_of_turns(f"{i}.jpg", (3, 5), 0) for i in range(40_000)]
        share = {turns: counts.count(turns) / len(counts) for turns in set(counts)}
        assert set(share) == {3, 4, 5} and abs(share[5] - 0.986) < 0.002
        assert abs(share[3] - share[4]) < 0.002
        other = [number_of_turns(f"{i}.jpg", (3, 5), 1) for i in range(40_000)]
        assert counts != other and {number_of_turns("a", (4, 4), s) for s in range(99)} == {4}

    def test_an_unreadable_image_is_a_reject(self, tmp_path, capsys):
        (tmp_path / "good.png").write_bytes(png(1))
        (tmp_path / "broken.png").write_bytes(png(1)[:90])
        (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
        out = tmp_path / "out.jsonl"
        with chat_server() as stand_in:
            words = ["synthesize", "--images", str(tmp_path), "--output", str(out)]
            assert run([*words, "--model", "m", "--server", stand_in.url]) == 0
        rejects = {r["image"]: r for r in map(json.loads, (tmp_path / "out.rejected.jsonl").open())}
        assert set(rejects) == {"broken.png", "gone.png"}
        assert "does not exist" in rejects["gone.png"]["detail"]
        assert "2 unreadable image ->" in capsys.readouterr().out


class TestSchedule:
    def talks(self, count: int, taken: list[int]):
        """Talks of two requests; their outcome names what they heard."""

        def one(number: int):
            first = yield Request(number, ("a",), 0)
            second = yield Request(number, ("b",), 0)
            return Outcome(str(number), (first.text, second.text))

        for number in range(count):
            taken.append(number)
            yield one(number)

    @pytest.mark.parametrize("spread", [in_threads, in_batches])
    @pytest.mark.parametrize("parallel", [1, 3, 50])
    def test_outcomes_in_order(self, spread, parallel):
        most = 0

        def replies(requests):
            nonlocal most
            most = max(most, len(requests))
            return [Reply(f"{r.image}{r.texts[0]}") for r in requests]

        found = list(spread(self.talks(20, []), replies, parallel))
        assert found == [Outcome(f"{i}", (f"{i}a", f"{i}b")) for i in range(20)]
        assert most == (1 if spread is in_threads else min(parallel, 20))

    def test_threads_read_a_bounded_number_ahead(self):
        """The first talk hears nothing until all that may be begun beside it have ended."""
        window = 2 * schedule.AHEAD
        taken, ended, enough, seen = [], [], threading.Event(), []

        def replies(requests):
            (request,) = requests
            if request.image == 0 and request.texts == ("a",):
                assert enough.wait(60)
                seen.append(len(taken))
            elif request.texts == ("b",):
                ended.append(request.image)
                if len(ended) == window - 1:
                    enough.set()
            return [Reply("x")]

        found = list(in_threads(self.talks(30, taken), replies, 2))
        assert [outcome.image for outcome in found] == [str(i) for i in range(30)]
        assert seen == [window]

    def test_batches_read_a_bounded_number_ahead(self):
        taken, most = [], 0

        def slow():
            for _ in range(100):
                yield Request(0, ("a",), 0)
            return Outcome("slow")

        def all_talks():
            yield slow()
            yield from self.talks(100, taken)

        def replies(requests):
            nonlocal most
            if any(request.image == 0 and request.texts == ("a",) for request in requests):
                most = max(most, len(taken))
            return [Reply("x")] * len(requests)

        found = list(in_batches(all_talks(), replies, 2))
        assert len(found) == 101 and found[0].image == "slow"
        assert most == 2 * schedule.AHEAD - 1

    @pytest.mark.parametrize("spread", [in_threads, in_batches])
    def test_many_that_ask_nothing(self, spread):
        def see(_):
            raise ValueError("broken")

        talks = (talk(f"{i}", see, turns=(1, 1), seed=0) for i in range(30))
        found = list(spread(talks, lambda _: pytest.fail("asked"), 2))
        assert [outcome.image for outcome in found] == [str(i) for i in range(30)]
        assert {(outcome.reason, outcome.detail) for outcome in found} == {
            ("unreadable image", "broken")
        }


class TestServer:
    ASKED = Request("data:image/jpeg;base64,", ("Hello?",), 7)

    def ask(self, behave, **more) -> tuple[Reply, list[float]]:
        """The reply to one request, and the waits before it."""
        waits: list[float] = []
        with chat_server(behave) as stand_in:
            chat = ChatServer(stand_in.url, "m", pause=waits.append, **more)
            return chat.replies([self.ASKED])[0], waits

    @pytest.mark.parametrize(
        ("status", "headers", "waited"),
        [
            (429, {"Retry-After": "7"}, [7, 7]),
            (429, {"Retry-After": "1e9"}, [300, 300]),
            (503, {"Retry-After": "-3"}, [0, 0]),
            (503, {"Retry-After": "soon"}, [1, 2]),
            (500, {}, [1, 2]),
            (408, {}, [1, 2]),
        ],
    )
    def test_what_passes_is_waited_for(self, status, headers, waited):
        reply, waits = self.ask(lambda _, n: (status, {}, headers) if n < 2 else "good")
        assert reply == Reply("good") and waits == waited

    def test_a_date_to_wait_for(self):
        when = formatdate(time.time() + 100, usegmt=True)
        _, waits = self.ask(lambda _, n: (503, {}, {"Retry-After": when}) if n < 1 else "good")
        assert 0 < waits[0] <= 100

    def test_what_does_not_pass_ends(self):
        reply, waits = self.ask(lambda *_: (502, b"<html>bad\n gateway</html>", {}))
        assert reply.trouble.endswith("the server answers 502, <html>bad gateway</html>")
        assert waits == [1, 2, 4, 8, 16, 32, 60] and len(waits) == server.TRIES - 1

    def test_a_reply_that_takes_too_long(self):
        held = threading.Event()
        try:
            reply, waits = self.ask(lambda *_: held.wait(60) and "late", timeout=0.1)
        finally:
            held.set()
        assert reply.trouble.endswith("no answer within 0.1 seconds") and waits == [1]

    def test_nothing_at_the_address_is_told_at_once(self):
        with chat_server() as stand_in:
            pass
        waits: list[float] = []
        chat = ChatServer(stand_in.url, "m", pause=waits.append)
        said = r"nothing answers there \(Connection refused\); start the server or mend --server"
        with pytest.raises(ValueError, match=said):
            chat.replies([self.ASKED])
        assert not waits

    def test_a_page_of_a_proxy_is_waited_for_once_there_were_replies(self):
        answers, waits = ["good", (200, b"<html>starting", {}), "again"], []
        with chat_server(lambda *_: answers.pop(0)) as stand_in:
            chat = ChatServer(stand_in.url, "m", pause=waits.append)
            replies = [chat.replies([self.ASKED])[0].text for _ in range(2)]
        assert replies == ["good", "again"] and waits == [1]

    def test_a_server_that_goes_away_is_waited_for(self):
        with chat_server(lambda *_: "good") as stand_in:
            chat = ChatServer(stand_in.url, "m")
            assert chat.replies([self.ASKED])[0].text == "good"
        port = int(stand_in.url.rpartition(":")[2].partition("/")[0])
        listener: list[socket.socket] = []

        def pause(_):
            if not listener:  # a server that hangs up, then none
                listener.append(socket.create_server(("127.0.0.1", port)))
                listener[0].close()

        chat.pause = pause
        reply = chat.replies([self.ASKED])[0]
        assert listener and reply.trouble.endswith("nothing answers (Connection refused)")

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ((401, {"error": {"message": "no key"}}, {}), "401, it wants a key (no key); name the"),
            ((403, {"detail": "not you"}, {}), "403, it wants a key (not you)"),
            ((404, {"message": "no such model."}, {}), "no model 'm' (--model), or the address"),
            ((307, b"", {"Location": "http://x/"}), "307, it has moved to http://x/; mend"),
            ((405, b"", {}), "the server answers 405, without a word"),
            ((200, b"<html>", {}), "no chat completion (<html>); is this an OpenAI"),
            ((200, {"choices": []}, {}), "no chat completion"),
            ((200, [1], {}), "no chat completion ([1])"),
        ],
    )
    def test_errors_end_the_run_in_a_sentence(self, tmp_path, capsys, answer, said):
        (tmp_path / "a.png").write_bytes(png(1))
        with chat_server(lambda *_: answer) as stand_in:
            words = ["synthesize", "--images", str(tmp_path), "--model", "m", "--server"]
            assert run([*words, stand_in.url, "--output", str(tmp_path / "out.jsonl")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {stand_in.url}: ") and said in err and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

    def test_500_for_ever(self, tmp_path, capsys, monkeypatch):
        """Some images become dialogues before; the same command goes on later."""
        monkeypatch.setattr(server, "LONGEST_WAIT", 0.0)
        for number in range(20):
            (tmp_path / f"{number}.png").write_bytes(png(number))
        out, repaired = tmp_path / "out.jsonl", threading.Event()
        words = ["synthesize", "--images", str(tmp_path), "--output", str(out), "--model", "m"]
        words += ["--parallel", "1", "--turns", "1", "1", "--server"]

        def behave(body: dict, number: int):
            fails = number >= 6 and not repaired.is_set()
            return (500, {"error": "the engine died"}, {}) if fails else well(body)

        with chat_server(behave) as stand_in:
            assert run([*words, stand_in.url]) == 2
            err = capsys.readouterr().err
            assert "error: http" in err and "500, the engine died\n" in err
            kept = out.read_bytes()
            assert kept.count(b"\n") == 3
            assert "out.jsonl holds 3 dialogues; the same command goes on\n" in err
            assert not (tmp_path / "out.rejected.jsonl").exists()
            repaired.set()
            assert run([*words, stand_in.url]) == 0
        assert out.read_bytes().startswith(kept) and out.read_bytes().count(b"\n") == 20

    def test_an_end_stops_what_is_under_way(self):
        """``close`` ends a request that waits for its reply, and no other one begins."""
        asked, held, raised = threading.Event(), threading.Event(), []

        def behave(*_):
            asked.set()
            held.wait(60)
            return "late"

        with chat_server(behave) as stand_in:
            chat = ChatServer(stand_in.url, "m")

            def ask():
                with pytest.raises(ValueError, match="the run has ended"):
                    chat.replies([self.ASKED])
                raised.append(True)

            thread = threading.Thread(target=ask)
            thread.start()
            assert asked.wait(60)
            chat.close()
            thread.join(60)
            assert raised and not held.is_set() and len(stand_in.bodies) == 1
            with pytest.raises(ValueError, match="the run has ended"):
                chat.replies([self.ASKED])
            assert len(stand_in.bodies) == 1
            held.set()

    @pytest.mark.parametrize(
        "url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:x/v1"]
    )
    def test_an_address_that_is_none(self, url):
        with pytest.raises(ValueError, match="expected an address as http://host:8000/v1"):
            ChatServer(url, "m")

    def test_large_pictures_are_scaled_down(self):
        def size(width, height, pixels):
            return Fitted(Flat("f", size=(width, height)), pixels).open().size

        assert size(64, 64, 64 * 64) == (64, 64) and size(64, 64, 64 * 64 - 1) == (63, 63)
        assert size(2000, 1000, 802816) == (1267, 633) and size(100, 1, 4) == (20, 1)

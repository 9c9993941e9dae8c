"""One image to one dialogue: questions first, then their answers, turn by turn.

After Li et al., arXiv 2511.08480, section 4.1 and appendix: three to five specific questions by
the model itself, answered by it as one conversation with the image in sight.  The wording is ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from coma_ds.data.chat import Reply, Request
from coma_ds.data.dialogues import LLAVA_MARK
from coma_ds.data.listing import derived

PROMPT = (
    "Look at the image and write exactly {count} questions about it. Somebody who sees the image, "
    "and nothing else, must be able to answer each of them with certainty: ask for no opinion, no "
    "guess and no knowledge from outside. Let each question be about another part of what is "
    "shown: the main things and what they look like, the place and what is going on there, "
    "writing, numbers and logos that can be read, where things are and how they belong together. "
    "Be specific, and let no question give away the answer of another one. "
    "Reply with a JSON list of {count} strings and nothing else."
)
FULL_SHARE = 0.986
"""Share of the dialogues that have the most turns; the others have fewer, evenly."""

ATTEMPTS = 3  # of each request, with another seed, until its reply is well formed

UNREADABLE, REFUSED, TROUBLE = "unreadable image", "refused by the server", "server failure"
NO_LIST, WRONG_NUMBER = "no list of questions", "wrong number of questions"
REPEATED, EMPTY, CUT = "repeated question", "empty text", "reply cut off"
RESERVED = "reserved text"

# What a reader or a tokenizer would take for a part of the sample, or reasoning left in a reply.
_RESERVED = re.compile(r"<(image|video|/?think)>|<\|\w+\|>|[\ud800-\udfff]")
_FENCE = re.compile(r"```\w*\s*\n(.*?)\n?\s*```", re.DOTALL)
_NUMBERED = re.compile(r"\(?(\d+)[.)]\s*(.*)")
_EXCERPT = 160

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of one image: its questions and answers, or why it has none."""

    image: str  # its path below the image root
    texts: tuple[str, ...] = ()  # question, answer, question, ...
    reason: str = ""
    detail: str = ""

    def row(self) -> dict[str, Any]:
        """A dialogue in LLaVA's form, or an entry of the list of rejects."""
        if self.reason:
            return {"image": self.image, "reason": self.reason, "detail": self.detail}
        turns = [
            {"from": ("human", "gpt")[place % 2], "value": text}
            for place, text in enumerate(self.texts)
        ]
        turns[0]["value"] = f"{LLAVA_MARK}\n{turns[0]['value']}"
        return {"image": self.image, "conversations": turns}


class Rejected(Exception):
    """A reply that is not well formed."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def number_of_turns(name: str, turns: tuple[int, int], seed: int) -> int:
    """Turns of the dialogue of one image, between the least and the most of ``turns``."""
    least, most = turns
    if least == most or derived("turns", seed, name) < FULL_SHARE * 2**31:
        return most
    return least + derived("fewer turns", seed, name) % (most - least)


def talk(
    name: str,
    see: Callable[[str], Any],
    *,
    turns: tuple[int, int],
    seed: int,
    attempts: int = ATTEMPTS,
) -> Generator[Request, Reply, Outcome]:
    """Make the dialogue of one image: yields requests, is sent their replies, returns the outcome.

    ``see`` makes of the name what a request carries, and raises ``ValueError`` for an image that
    is broken.  The same name and seed ask the same, whatever was asked before.
    """

    def ask(place: int, texts: tuple[str, ...], read: Callable[[str], T]):
        for attempt in range(attempts):
            reply = yield Request(image, texts, derived("reply", seed, name, place, attempt))
            if reply.refused or reply.trouble:
                reason = REFUSED if reply.refused else TROUBLE
                raise Rejected(reason, reply.refused or reply.trouble)
            try:
                if reply.cut:
                    raise Rejected(
                        CUT, f"the reply is longer than the limit: {excerpt(reply.text)}"
                    )
                return read(reply.text)
            except Rejected:
                if attempt + 1 == attempts:
                    raise

    try:
        image = see(name)
    except ValueError as error:
        return Outcome(name, reason=UNREADABLE, detail=str(error))
    count = number_of_turns(name, turns, seed)
    texts: tuple[str, ...] = ()
    try:
        prompt = PROMPT.format(count=count)
        questions = yield from ask(0, (prompt,), lambda text: read_questions(text, count))
        for place, question in enumerate(questions, start=1):
            texts += (question,)
            texts += ((yield from ask(place, texts, read_text)),)
    except Rejected as fault:
        return Outcome(name, reason=fault.reason, detail=fault.detail)
    return Outcome(name, texts)


def read_questions(text: str, count: int) -> list[str]:
    """The questions in a reply: a JSON list, or lines numbered from 1; a code fence may stand
    around them, a line of introduction that ends in a colon before them.

    Raises ``Rejected`` for anything else, another number than ``count``, an empty or repeated one.
    """
    fenced = _FENCE.findall(text)
    body = (fenced[0] if len(fenced) == 1 else text).strip()
    questions = _json_list(body)
    if questions is None:
        questions = _numbered_lines(body)
    if questions is None:
        raise Rejected(NO_LIST, f"neither a JSON list nor numbered lines: {excerpt(text)}")
    questions = [read_text(question) for question in questions]
    if len(questions) != count:
        raise Rejected(WRONG_NUMBER, f"asked for {count}, got {len(questions)}: {excerpt(text)}")
    seen: set[str] = set()
    for question in questions:
        bare = " ".join(re.findall(r"\w+", question.casefold()))
        if bare in seen:
            raise Rejected(REPEATED, excerpt(question))
        seen.add(bare)
    return questions


def read_text(text: str) -> str:
    """A question or an answer without the space around it.

    Raises ``Rejected`` for an empty one and for one that a reader of dialogues would misread.
    """
    text = text.strip()
    if not text:
        raise Rejected(EMPTY, "a question or an answer is empty")
    if found := _RESERVED.search(text):
        raise Rejected(RESERVED, f"{found[0]!r} stands in {excerpt(text)}")
    return text


def _json_list(body: str) -> list[str] | None:
    head, _, rest = body.partition("\n")
    if _introduces(head):
        body = rest.strip()
    try:
        entries = json.loads(body)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
    return entries if fits else None


def _numbered_lines(body: str) -> list[str] | None:
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    if lines and _introduces(lines[0]):
        lines = lines[1:]
    found = [_NUMBERED.fullmatch(line) for line in lines]
    numbers = [int(match[1]) for match in found if match]
    if not lines or numbers != list(range(1, len(lines) + 1)):
        return None
    return [match[2] for match in found if match]


def _introduces(line: str) -> bool:
    return line.rstrip().endswith(":") and not _NUMBERED.fullmatch(line.strip())


def excerpt(text: str) -> str:
    """The beginning of a reply, on one line and in quotes."""
    return repr(" ".join(text.split())[:_EXCERPT])

"""A chat about one image: what a model, behind a server or in process, is asked and replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from coma_ds.data.records import Picture


@dataclass(frozen=True, slots=True)
class Request:
    """``texts``: of user and model in turn, the user's first and last; the image stands before
    them.  Equal requests have equal replies, as far as the model's arithmetic goes."""

    image: Any  # what ``Chat.see`` made of the picture
    texts: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said, or why it said nothing."""

    text: str = ""
    cut: bool = False  # ended by the limit of tokens
    refused: str = ""  # a server will not answer this one
    trouble: str = ""  # a server could not, again and again; it may be its own fault


class Chat(Protocol):
    """A model that is asked about images."""

    def see(self, picture: Picture) -> Any:
        """The picture as a request carries it; raises ``ValueError`` for one that is broken."""

    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply each; raises ``ValueError`` for what ends the run."""

    def close(self) -> None:
        """Ask no more; what is being asked ends at once."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A picture, scaled down where it has more than ``pixels`` pixels."""

    picture: Picture
    pixels: int

    @property
    def name(self) -> str:
        """That of the picture."""
        return self.picture.name

    def open(self) -> Image.Image:
        """Upright RGB of at most ``pixels`` pixels (a side has one at least)."""
        image = self.picture.open()
        width, height = image.size
        if width * height <= self.pixels:
            return image
        scale = math.sqrt(self.pixels / (width * height))
        size = max(1, int(width * scale)), max(1, int(height * scale))
        return image.resize(size, Image.Resampling.LANCZOS)

    def digest(self) -> bytes:
        """That of the picture."""
        return self.picture.digest()

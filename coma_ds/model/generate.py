"""A model of ours, asked about images: stock ``generate`` over a batch of chats.

Shapes: B chats, T tokens with their padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from coma_ds.data.chat import Fitted, Reply, Request
from coma_ds.data.processing import load_processing
from coma_ds.data.records import Picture
from coma_ds.hardware import has_fast_bf16, usable_device
from coma_ds.model.loading import load_language_model
from coma_ds.model.source import resolve_model

Seen = tuple[np.ndarray, tuple[int, int, int]]  # pixels_PC and the grid (t, h, w)

NO_LIMIT = 2**20  # image tokens: the pixels are bounded before


class SeededSampling(LogitsProcessor):
    """Draws each row from its own seed, whatever stands beside it in the batch.

    The largest of logits / temperature + Gumbel noise is distributed as the softmax of the former:
    under greedy search this samples.  Ids from ``words`` on are never drawn.
    """

    def __init__(
        self, seeds: Sequence[int], temperature: float, words: int, device: torch.device
    ) -> None:
        self.sources = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature, self.words = temperature, words

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores_BV = scores.float().clone()
        scores_BV[:, self.words :] = -torch.inf
        if not self.temperature:
            return scores_BV
        noise_BV = torch.empty_like(scores_BV)
        for noise_V, source in zip(noise_BV, self.sources):
            noise_V.exponential_(generator=source)
        tiny = torch.finfo(noise_BV.dtype).tiny
        return scores_BV / self.temperature - noise_BV.clamp_(min=tiny).log_()


class LocalChat:
    """The model at ``source`` (a folder, a finished run, a hub name) in this process.

    ``device`` None takes a GPU where there is one, ``dtype`` None bf16 where it is fast, else
    fp32.  Raises ``ValueError`` for no such model, one without a chat template, or a device that
    cannot be used.
    """

    def __init__(
        self,
        source: str,
        *,
        temperature: float = 0.7,
        max_tokens: int = 1024,
        max_pixels: int = 1024 * 28 * 28,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        source = resolve_model(source, "--model")
        self.temperature, self.max_pixels = temperature, max_pixels
        self.device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processing = load_processing(source, compression_tokens=0, max_length=NO_LIMIT)
        tokenizer = self.processing.tokenizer
        if not tokenizer.chat_template:
            raise ValueError(f"{source}: its tokenizer has no chat template, so it cannot be asked")
        if dtype is None:
            dtype = torch.bfloat16 if has_fast_bf16(self.device.type) else torch.float32
        lm = load_language_model(source, weights="pretrained", dtype=dtype, sharding=None, seed=0)
        self.lm = lm.requires_grad_(False).eval().to(self.device)
        # of an exported model, ids from here on are compression tokens, and of any, no words
        self.words = self.processing.extras.get("first_id", len(tokenizer))
        self.image_token = tokenizer.convert_ids_to_tokens(self.processing.image_id)
        self.ends = sorted({self.processing.turn_end, tokenizer.eos_token_id} - {None})
        self.lm.generation_config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
        )

    def see(self, picture: Picture) -> Seen:
        """Pixels and grid; raises ``ValueError`` naming a picture that is broken."""
        return self.processing.pixels(Fitted(picture, self.max_pixels))

    @torch.no_grad()
    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply each, from one batch.  Raises ``ValueError`` when memory is too small."""
        rows = [self._ids(request) for request in requests]
        ids_BT, mask_BT = self._left_padded(rows)
        pixels, grids = zip(*(request.image for request in requests))
        images = self.processing.image_batch(np.concatenate(pixels), list(grids))
        sampling = SeededSampling(
            [request.seed for request in requests], self.temperature, self.words, self.device
        )
        try:
            out_BT = self.lm.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                mm_token_type_ids=(ids_BT == self.processing.image_id).int(),
                pixel_values=images.values(self.device).to(self.lm.dtype),
                image_grid_thw=images.grid_I3.to(self.device),
                logits_processor=LogitsProcessorList([sampling]),
            )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{len(requests)} chats at a time do not fit in memory: take a smaller --parallel, "
                "--max-pixels or --max-tokens"
            ) from None
        return [self._reply(row) for row in out_BT[:, ids_BT.shape[1] :].tolist()]

    def close(self) -> None:
        """Nothing is under way between two calls."""

    def _ids(self, request: Request) -> list[int]:
        first, *later = request.texts
        content = [{"type": "image"}, {"type": "text", "text": first}]
        messages: list[dict] = [{"role": "user", "content": content}]
        for place, text in enumerate(later):
            messages.append({"role": ("assistant", "user")[place % 2], "content": text})
        tokenizer = self.processing.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(self.image_token) != 1:
            raise ValueError("the model's chat template does not say where an image stands")
        frames, height, width = request.image[1]
        tokens = frames * height * width // self.processing.merge
        text = text.replace(self.image_token, self.image_token * tokens)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), self.ends[0])
        mask_BT = torch.zeros_like(ids_BT)
        for place, row in enumerate(rows):
            ids_BT[place, longest - len(row) :] = torch.tensor(row)
            mask_BT[place, longest - len(row) :] = 1
        return ids_BT.to(self.device), mask_BT.to(self.device)

    def _reply(self, ids: list[int]) -> Reply:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        text = self.processing.tokenizer.decode(ids[:end], skip_special_tokens=False)
        return Reply(text, cut=end is None)

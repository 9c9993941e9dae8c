"""The weights of a model by the part that reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Numbers of weights.  ``embedding`` is the table of the token ids, which ``language`` (all of
    the language model that an embedding needs) holds too; ``head`` is 0 where it is that table."""

    vision: int
    language: int
    embedding: int
    head: int
    trained: int

    @property
    def total(self) -> int:
        """Each weight once."""
        return self.vision + self.language + self.head


def count_weights(model) -> Weights:
    """The weights of a ``CompressionModel``, sharded or not."""
    lm = model.backbone.lm
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    parameters = list(model.parameters())
    vision = sum(numel(p) for p in model.backbone.visual.parameters())
    own_head = numel(head) if head is not embedding else 0
    return Weights(
        vision=vision,
        language=sum(map(numel, parameters)) - vision - own_head,
        embedding=numel(embedding),
        head=own_head,
        trained=sum(numel(p) for p in parameters if p.requires_grad),
    )


def numel(parameter) -> int:
    """Elements of a parameter, sharded or not."""
    return parameter.ds_numel if hasattr(parameter, "ds_id") else parameter.numel()

"""FLOPs of a step: those that were executed, and those that no way of doing it can save.

One multiplication with its addition counts as two.  Norms, activations, softmax, rotations and the
optimizer are left out, which memory bounds; so are the similarities of stage 2, whose cost
``coma_ds.kernels`` tells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from coma_ds.batch import Batch
from coma_ds.model.work import Work, visible_pairs, vision_pairs
from coma_ds.planning.weights import numel


@dataclass(frozen=True)
class Matrices:
    """Weights that multiply a row, and those of them that are trained."""

    every: int
    trained: int

    def forward(self, rows: int) -> float:
        """FLOPs of one forward."""
        return 2.0 * rows * self.every

    def backward(self, rows: int, *, first: bool = False) -> float:
        """FLOPs of one backward: gradients of the rows (not in front of the ``first`` trained
        one), and of what is trained."""
        return 2.0 * rows * (self.trained + (0 if first else self.every))


@dataclass(frozen=True)
class ModelFlops:
    """The arithmetic of a ``CompressionModel``."""

    patch: Matrices  # of the convolution that embeds patches
    vision: Matrices  # of the tower's layers, met by each patch
    merger: Matrices  # met by each image token
    text: Matrices
    again: Matrices  # of the text layers, what a checkpoint computes again: all but the last one
    head: Matrices
    vision_pair: int  # FLOPs of a pair in one layer, forward
    text_pair: int  # the same in all layers
    checkpointed: bool

    @classmethod
    def of(cls, model) -> ModelFlops:
        """From the modules of a model, sharded or not."""
        lm = model.backbone.lm
        visual, text = model.backbone.visual, model.backbone.text
        config, tower = lm.config.text_config, lm.config.vision_config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        tower_width = getattr(tower, "embed_dim", None) or tower.hidden_size
        head = lm.get_output_embeddings().weight
        return cls(
            patch=_matrices([visual.patch_embed.proj]),
            vision=_matrices(visual.blocks.modules()),
            merger=_matrices(
                m for n, m in visual.named_modules() if n.startswith(("merger", "deepstack_merger"))
            ),
            text=_matrices(text.layers.modules()),
            again=_matrices(m for n, m in text.layers.named_modules() if ".down_proj" not in n),
            head=Matrices(numel(head), numel(head) * head.requires_grad),
            vision_pair=4 * tower_width,
            text_pair=4 * config.num_attention_heads * width * config.num_hidden_layers,
            checkpointed=lm.is_gradient_checkpointing,
        )

    def executed(self, work: Work) -> float:
        """FLOPs of passes, with the backwards of those that have a graph."""
        parts = ((self.patch, work.patch_rows), (self.vision, work.patch_rows))
        parts += ((self.merger, work.image_rows), (self.text, work.text_rows))
        parts += ((self.head, work.head_rows),)
        total = sum(m.forward(sum(rows)) for m, rows in parts)
        total += sum(m.backward(rows[1], first=m is self.patch) for m, rows in parts)
        pairs = ((self.vision_pair, work.vision_pairs), (self.text_pair, work.text_pairs))
        total += sum(each * (sum(pair) + 2 * pair[1]) for each, pair in pairs)
        total += self.head.forward(work.head_rows_again)
        if self.checkpointed:
            total += self.again.forward(work.text_rows[1]) + self.text_pair * work.text_pairs[1]
        return total

    def needed(self, batch: Batch, vision, *, matching: bool, bottleneck: bool) -> float:
        """FLOPs of one forward and one backward of a batch: no replay, no recomputation, no
        padding, no pair that may not see each other, no gradient of what is frozen; no teacher.

        ``vision``: the tower's config.
        """
        work, trains = Work(), bool(self.vision.trained)
        if batch.images is not None:
            images = batch.images
            work.add(
                graph=trains,
                patch_rows=int(images.grid_I3.prod(-1).sum()),
                image_rows=int(images.tokens_I.sum()),
                vision_pairs=vision_pairs(images, vision),
            )
        work.add(
            graph=True,
            text_rows=len(batch.input_ids_T),
            text_pairs=visible_pairs(batch.lengths_B3, bottleneck=bottleneck),
            head_rows=0 if matching else len(batch.answer_rows),
        )
        return replace(self, checkpointed=False).executed(work)


def _matrices(modules) -> Matrices:
    weights = [
        m.weight for m in modules if isinstance(m, nn.Linear | nn.Conv3d | nn.Conv2d | nn.Conv1d)
    ]
    every = sum(map(numel, weights))
    return Matrices(every, sum(numel(w) for w in weights if w.requires_grad))

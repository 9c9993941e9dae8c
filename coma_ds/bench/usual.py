"""A step as scripts usually do it: the rival of ``gpu``.

Samples are padded to the longest of their chunk and attend through a dense mask; the output matrix
meets every position, whatever is read of it; activations are checkpointed.  Stage 2: GradCache
whose two passes both send the images through the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coma_ds.batch import IGNORE, Batch


def _states(model, part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states of every position and their logits, [T, D] and [T, V], which nobody reads."""
    rows = torch.arange(len(part.input_ids_T))
    features = model.embed_images(part.images) if part.images is not None else None
    states = model.backbone.hidden_states(part, features, rows, "causal")
    model.backbone.work.add(graph=False, head_rows=len(rows))
    return states, F.linear(states, model.answers.weight)


def _embed(model, part: Batch) -> torch.Tensor:
    states, _ = _states(model, part)
    rows = states[part.token_rows.to(states.device)]
    return model.pooling(rows.view(len(part), -1, states.shape[-1]))


def match(engine, objective, batch: Batch, samples: int) -> float:
    """Stage 2 in chunks of so many samples, as they come; the loss."""
    groups = torch.arange(len(batch)).split(samples)
    parts = batch.split(groups, with_images=True)
    with torch.no_grad():
        rows = [engine(lambda m, p=part: _embed(m, p)) for part in parts]
    leaf = torch.cat(rows).requires_grad_()
    loss, report = objective.loss(leaf, None, batch)
    loss.backward()
    with engine.gradients_of_a_step():
        for number, (part, group) in enumerate(zip(parts, groups)):
            wanted = leaf.grad[group.to(leaf.device)]

            def surrogate(m, part=part, wanted=wanted):
                return (_embed(m, part) * wanted).sum(), None

            engine.forward_backward(surrogate, last=number == len(parts) - 1)
    return report["loss"]


def compress(engine, objective, batch: Batch, samples: int) -> float:
    """Stage 1 in micro-batches; the mean loss of an answer token."""
    groups = torch.arange(len(batch)).split(samples)
    parts = batch.split(groups, with_images=True)
    total, answers = 0.0, len(batch.answer_rows)
    with engine.gradients_of_a_step():
        for number, part in enumerate(parts):

            def run(m, part=part):
                rows = torch.arange(len(part.input_ids_T))
                features = m.embed_images(part.images)
                states = m.backbone.hidden_states(part, features, rows, objective.visibility)
                m.backbone.work.add(head_rows=len(rows))
                logits = F.linear(states, m.answers.weight).float()
                loss = F.cross_entropy(
                    logits[:-1], part.labels_T[1:], ignore_index=IGNORE, reduction="sum"
                )
                return loss / answers, loss.detach()

            total += float(engine.forward_backward(run, last=number == len(parts) - 1))
    return total / answers

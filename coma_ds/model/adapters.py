"""LoRA and DoRA through peft: put in, switched off, merged."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from coma_ds.config import LoRAConfig


def add_adapter(lm: nn.Module, lora: LoRAConfig, *, dora: bool) -> None:
    """Put LoRA (or DoRA) layers into the language model of ``lm``, in place.

    Raises ``ValueError`` for a target that no layer of the language model is named after.
    """
    modules = lm.named_modules()
    linear = [n for n, m in modules if isinstance(m, nn.Linear) and "language_model." in n]
    for target in lora.targets:
        if not any(name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"model.lora.targets: the language model has no layer {target!r}; it has {known}"
            )
    names = "|".join(re.escape(t) for t in lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf".*language_model\..*\.({names})",
        use_dora=dora,
    )
    inject_adapter_in_model(config, lm)


def adapter_layers(module: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted layers of ``module`` by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)}


@contextmanager
def base_model(module: nn.Module) -> Iterator[None]:
    """The module as its base, without dropout: adapters off, evaluation mode."""
    layers = adapter_layers(module).values()
    training = module.training
    module.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        module.train(training)


def merged_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """The weight of the base layer with its adapter merged in float32, on the host.

    The layer itself stays as it is.  Its parameters must be whole.
    """
    alone = copy.deepcopy(layer).float().cpu()
    alone.merge()
    return alone.get_base_layer().weight.detach()

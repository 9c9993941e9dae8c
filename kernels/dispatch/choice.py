"""The choice between a Triton kernel and its plain-torch reference, and the reason for it.

``COMA_KERNELS`` is ``auto`` (the default), ``triton`` or ``torch``.  ``auto`` takes Triton on a
CUDA device when Triton can be imported and serves the call, else torch.  ``triton`` where that is
impossible is an error.  With ``TRITON_INTERPRET=1`` Triton runs on the CPU when it is asked for.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache

import torch

log = logging.getLogger("coma_ds")

VARIABLE = "COMA_KERNELS"
MODES = ("auto", "triton", "torch")
_said: set[tuple[str, str, str]] = set()


def _mode() -> str:
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}={mode!r}: expected 'auto', 'triton' or 'torch'")
    return mode


@cache
def _import_failure() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises anything
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def interpreted() -> bool:
    """True when Triton's interpreter is on: kernels run on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device | str) -> str | None:
    """Why no Triton kernel can run on ``device``, or None where one can."""
    kind = torch.device(device).type
    if kind == "cpu" and not interpreted():
        return "the tensors are on the CPU"
    if kind not in ("cpu", "cuda"):
        return f"the tensors are on a device of type {kind}"
    return _import_failure()


def _decide(op: str, device: torch.device, obstacle: str | None) -> tuple[str, str]:
    mode = _mode()
    if mode == "torch":
        return "torch", f"{VARIABLE}=torch"
    obstacle = unavailable(device) or obstacle
    if mode == "triton":
        if obstacle:
            raise ValueError(
                f"{VARIABLE}=triton, but {op} cannot run on Triton: {obstacle}; "
                "use 'auto' or 'torch'"
            )
        return "triton", f"{VARIABLE}=triton"
    if obstacle:
        return "torch", obstacle
    if device.type == "cpu":
        return "torch", "the interpreter runs only where COMA_KERNELS=triton asks for it"
    return "triton", f"{torch.cuda.get_device_name(device)}"


def choose(op: str, *tensors: torch.Tensor | None, supported: str | None = None) -> str:
    """``"triton"`` or ``"torch"`` for one call of ``op`` on ``tensors`` (None is passed over).

    ``supported`` is None where the kernel serves the call, else why it does not ("float64 input").
    A choice is logged (at level debug: a run says it at its start) the first time that it is made
    for its reason.

    Raises ``ValueError`` for an unknown mode, for tensors on several devices, and for
    ``COMA_KERNELS=triton`` where Triton cannot run.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"{op}: tensors on {names}: expected all on one device")
    choice, reason = _decide(op, devices.pop(), supported)
    if (op, choice, reason) not in _said:
        _said.add((op, choice, reason))
        log.debug("%s: %s (%s)", op, choice, reason)
    return choice


def outlook(op: str, device: torch.device | str, supported: str | None = None) -> tuple[str, str]:
    """What ``choose`` would say on ``device``, as (choice, reason): for a report at the start.

    Raises ``ValueError`` like ``choose``.
    """
    return _decide(op, torch.device(device), supported)

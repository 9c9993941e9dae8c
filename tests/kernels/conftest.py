"""Triton's interpreter, on before anything imports triton."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already: set TRITON_INTERPRET=1 in tests/conftest.py")
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def on_triton(monkeypatch) -> None:
    """The kernels themselves, in the interpreter, not the reference."""
    monkeypatch.setenv("COMA_KERNELS", "triton")

"""What a start does not pay for."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import coma_ds.train
import deepspeed.runtime.zero.muon.muon_optimizer
assert "coma_ds.engine" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_the_compiler_is_not_imported() -> None:
    """DeepSpeed would in each start, for an optimizer of its own that no run uses."""
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().splitlines()[-1] == "False", found.stdout

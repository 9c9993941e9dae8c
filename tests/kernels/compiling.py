"""Compile kernels for cards that are not there; used in a process without the interpreter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of one block


def build(fn, types: dict[str, str], constants: dict, card: int, *, divisible=(), **options):
    """Compiled ``fn`` for sm_``card``.

    ``types`` of the arguments that are no constants (``*bf16``, ``i32``, ``fp32``); pointers and
    the names in ``divisible`` are taken as multiples of 16, as the launcher would find them.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = fn.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [
        i
        for i, n in enumerate(names)
        if n not in constants and (types[n].startswith("*") or n in divisible)
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    return compile(source, target=GPUTarget("cuda", card, 32), options=options)


def resources(kernel, card: int) -> dict[str, int]:
    """Registers of a thread, bytes of spills and of stack (ptxas), bytes of shared memory."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    name = "ptxas-blackwell" if card >= 100 else "ptxas"
    target = f"sm_{card}a" if card >= 90 else f"sm_{card}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.ptx").write_text(kernel.asm["ptx"])
        done = subprocess.run(
            [tools / name, "-v", f"--gpu-name={target}", f"{folder}/k.ptx", "-o", f"{folder}/o"],
            capture_output=True,
            text=True,
            check=True,
        )

    def number(pattern: str) -> int:
        return int(re.search(pattern, done.stderr).group(1))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "shared": kernel.metadata.shared,
    }

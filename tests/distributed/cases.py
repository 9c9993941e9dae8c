"""The configurations of the exactness tests, and the faults that they must see."""

from __future__ import annotations

from tests.distributed.exact import Case

ONE = {"samples": 1}
BUDGET = {"samples": 64, "tokens": 40}
LORA = {"adapter": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}}
DORA = LORA | {"adapter": "dora"}
TOWER = {"train_vision": True}
CHECKPOINTED = {"gradient_checkpointing": True}
LEARNED = {"temperature": 0.05}
ATTENTION = {"pooling": "attention"}
UNTIED = {"tied": False}
LAST_HIDDEN = {"bottleneck": "last_hidden"}
# Without clipping the scale of the gradient shows in the parameters too; the rate makes up.
UNCLIPPED = {"clip": 0.0, "lr": 1e-4}
STAGES = ("zero0", "zero1", "zero2", "zero3", "strict", "zero3_offload")


def match_cases() -> list[Case]:
    """Stage 2; frozen tower, mixed images, three samples a chunk where nothing else is said."""
    cases = [Case(f"match {d}", d) for d in STAGES]
    cases += [Case(f"match {d} unclipped", d, **UNCLIPPED) for d in ("zero0", "zero1")]
    for d in ("zero0", "zero1", "zero2", "strict", "zero3_offload"):
        cases.append(Case(f"match {d} tower", d, model=TOWER))
    for d in ("zero0", "zero1", "zero2", "strict", "zero3_offload"):
        cases.append(Case(f"match {d} poisoned", d, poisoned=True))
    for d in ("zero2", "strict"):
        cases += [
            Case(f"match {d} lora", d, model=LORA),
            Case(f"match {d} uneven", d, uneven=True, **UNCLIPPED),
            Case(f"match {d} temperature", d, model=LEARNED),
        ]
    return [
        *cases,
        Case("match strict one sample a chunk", chunk=ONE, uneven=True),
        Case("match strict token budget", chunk=BUDGET),
        Case("match strict dora", model=DORA),
        Case("match strict attention pooling", model=ATTENTION),
        Case("match zero2 last token", "zero2", model={"pooling": "last"}),
        Case("match zero2 no mask", "zero2", match={"mask_false_negatives": False}),
        Case("match strict tower no image", images="none", model=TOWER),
        Case("match strict qwen2_vl tower", family="qwen2_vl", model=TOWER),
        Case("match strict qwen3_vl tower", family="qwen3_vl", model=TOWER),
        Case("match zero2 qwen3_vl", "zero2", family="qwen3_vl"),
        Case("match strict untied", model=UNTIED),
        *option_cases(),
        *kept_cases(),
        Case("match zero2 packed", "zero2", model={"carrier": "packed", "arithmetic": "matmul"}),
        Case(
            "match strict all at once",
            uneven=True,
            chunk=BUDGET,
            model=LORA | TOWER | ATTENTION | LEARNED,
        ),
    ]


def kept_cases() -> list[Case]:
    """Graphs of one chunk, of all but one, of all; three samples a chunk, three chunks or more."""
    one, some, every = ({"samples": 3, "keep": keep} for keep in (1, 2, 99))
    cases = [Case(f"match {d} kept", d, chunk=some) for d in STAGES]
    for d in ("zero0", "zero1", "zero2", "strict", "zero3_offload"):
        cases.append(Case(f"match {d} all kept", d, chunk=every, uneven=True))
    for d in ("zero2", "strict", "zero3_offload"):
        cases.append(Case(f"match {d} kept tower", d, chunk=every, model=TOWER))
    for d in ("zero2", "strict"):
        cases.append(Case(f"match {d} kept poisoned", d, chunk=some, poisoned=True))
        cases.append(Case(f"match {d} kept lora", d, chunk=every, model=LORA))
    return [
        *cases,
        Case("match strict kept lora poisoned", chunk=some, model=LORA, poisoned=True),
        Case("match strict one kept", chunk=one),
        Case("match strict kept of uneven", chunk=ONE | {"keep": 5}, uneven=True),
        Case("match strict kept unclipped", chunk=some, **UNCLIPPED),
        Case(
            "match strict kept all at once",
            uneven=True,
            chunk=BUDGET | {"keep": 3},
            model=LORA | TOWER | ATTENTION | LEARNED,
        ),
    ]


def option_cases() -> list[Case]:
    """What a recipe can add to InfoNCE, alone and together; uneven ranks with hard negatives."""
    tasks = {"task_temperature": {"b": 0.1}}
    # Cosines of the tiny model are near 1: a margin below 0 makes some of them false.
    margin = {"false_negative_margin": -1e-3}
    both = {"query_negatives": True, "target_negatives": True}
    widths = {"matryoshka": [8, 24], "matryoshka_weights": [0.5, 2.0]}
    named = {
        "tasks": tasks,
        "margin": margin,
        "hardness": {"hardness": 3.0},
        "own negatives": {"hard_negatives": "own"},
        "own negatives, no mask": {"hard_negatives": "own", "mask_false_negatives": False},
        "queries": {"query_negatives": True},
        "targets": {"target_negatives": True},
        "symmetric": {"symmetric": True},
        "widths": widths,
        "all one way": {**tasks, **margin, **both, **widths, "hard_negatives": "own"}
        | {"hardness": 3.0},
        "all both ways": {**tasks, **margin, **widths, "symmetric": True, "hardness": 3.0},
    }
    return [
        Case(f"match zero2 {name}", "zero2", uneven=True, match=match, **UNCLIPPED)
        for name, match in named.items()
    ] + [
        Case(
            "match strict learned tasks",
            uneven=True,
            match=tasks,
            model={"temperature": [0.05, 0.1]},
        )
    ]


def compress_cases() -> list[Case]:
    """Stage 1; images in every dialogue where nothing else is said."""

    def case(name: str, deepspeed: str = "strict", **more) -> Case:
        return Case(f"compress {name}", deepspeed, "compress", **{"images": "all", **more})

    unclipped = UNCLIPPED | {"lr": 1e-2}
    return [
        *[case(d, d) for d in STAGES],
        *[case(f"{d} unclipped", d, **unclipped) for d in ("zero0", "zero2")],
        *[case(f"{d} tower", d, model=TOWER) for d in ("zero0", "zero2", "strict")],
        case("strict mixed", images="mixed"),
        case("strict tower mixed", images="mixed", model=TOWER),
        case("strict one sample a chunk", chunk=ONE, uneven=True),
        case("zero1 token budget", "zero1", chunk=BUDGET),
        case("strict lora", model=LORA),
        case("strict dora", model=DORA),
        case("strict checkpointing", model=CHECKPOINTED),
        case("strict untied", model=UNTIED),
        case("strict kl", model=LORA, compress={"loss": "kl"}, clip=0.05, lr=1.0),
        case("zero2 visible", "zero2", compress={"visible": True}),
        case("strict last_hidden", model=LAST_HIDDEN),
        case("zero2 last_hidden tower", "zero2", model=LAST_HIDDEN | TOWER),
        case("zero2 dense", "zero2", model={"carrier": "dense"}),
        case("zero2 packed", "zero2", model={"carrier": "packed"}),
        case("strict qwen2_vl tower", family="qwen2_vl", model=TOWER),
        case("strict qwen3_vl tower", family="qwen3_vl", model=TOWER),
    ]


def precision_cases() -> list[Case]:
    """One per ZeRO arrangement and precision below fp32, with AdamW as in a real run.

    A temperature of 0.2, so that the loss does not magnify the rounding of the cosines.
    """
    stages = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
    pairs = [*[(d, "bf16") for d in stages], ("zero0", "autocast"), ("zero3", "autocast")]
    shared = {"kind": "adamw", "lr": 1e-3, "match": {"temperature": 0.2}}
    kept = {"chunk": {"samples": 3, "keep": 2}, "precision": "bf16", "images": "all"}
    return [
        Case(f"{stage} {d} {precision}", d, stage, precision=precision, images="all", **shared)
        for stage in ("match", "compress")
        for d, precision in pairs
    ] + [
        Case(f"match {d} bf16 kept{name}", d, **kept, **shared, model=model)
        for d, name, model in (
            ("zero0", " tower", TOWER),
            ("zero1", "", {}),
            ("zero2", " tower", TOWER),
            ("zero3", "", {}),
            ("zero3", " lora", LORA),
            ("zero3_offload", " tower", TOWER),
        )
    ]


def broken_cases() -> list[Case]:
    """A case that is exact, with a fault: it must not pass."""
    faults = [
        ("surrogate times W", Case("", "zero2", **UNCLIPPED)),
        ("surrogate times W", Case("", "strict")),  # seen in the gradient norm
        ("no boundary calls", Case("", "zero1")),
        ("no boundary calls", Case("", "zero2")),
        ("every part is the last", Case("", "zero2", "compress", images="all")),
        ("no touch of the trained tower", Case("", "strict", model=TOWER)),
        ("seed not replayed", Case("", "strict", model=LORA)),
        ("kept graphs unsaid", Case("", "strict", chunk={"samples": 3, "keep": 2})),
        ("rows counted on one rank", Case("", "strict", uneven=True, **UNCLIPPED)),
        ("rows counted on one rank", Case("", "zero2", "compress", images="all")),
        ("ids of one rank only", Case("", "strict")),
        ("gather without a sum", Case("", "strict", **UNCLIPPED)),
    ]
    return [
        Case(**{**vars(case), "name": f"{fault}, {case.deepspeed} {case.stage}", "broken": fault})
        for fault, case in faults
    ]


# W = 4 on two cores: one case for each thing that depends on the number of ranks.
REDUCED = (
    "match zero0", "match zero1 unclipped", "match strict", "match strict tower",
    "match strict uneven", "match strict temperature", "match strict all at once",
    "match zero2 all one way", "match zero2 all both ways", "match strict learned tasks",
    "compress zero2 unclipped", "compress strict", "compress strict tower mixed",
    "match zero0 all kept", "match zero1 kept", "match zero2 kept tower", "match zero3 kept",
    "match strict kept", "match strict kept lora", "match strict kept all at once",
)  # fmt: skip


def all_cases(world: int) -> list[Case]:
    """What runs in a world of that size."""
    cases = match_cases() + compress_cases()
    if world == 4:
        return [c for c in cases if c.name in REDUCED]
    if world == 1:  # nothing of the kept graphs depends on the ranks but what 2 and 4 show
        return [c for c in cases if c.name in REDUCED or not c.chunk.get("keep")]
    return cases + precision_cases() + broken_cases()

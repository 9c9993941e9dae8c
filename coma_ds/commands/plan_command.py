"""Say whether a run fits, how long it takes and what it costs, before it is queued."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from coma_ds.planning.cards import Machine

EXAMPLES = """Nothing is downloaded and no GPU is needed.  Memory is counted on the shapes of the
real model; time is its arithmetic over the rate of the card, assumed until one was measured
(--against).

examples:
  coma-ds plan --recipe qwen2_5_vl_3b-match --gpus 8 --gpu h200 --price 3.5
  coma-ds plan --recipe qwen2_5_vl_7b-compress --gpus 32 --gpu a100 --network 100 --lengths prepared
  coma-ds plan --recipe mine.yaml --gpus 8 --gpu h100 optim.batch_size=4096 chunk.keep=auto
  coma-ds plan --against runs/qwen2_5_vl_3b/match --gpus 8 --gpu h200 --lengths prepared"""

ROWS = 256  # of built-in data
WARM = 3  # logged steps of a measured run that do not count
GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--recipe", help="a shipped name or a YAML file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="in all nodes")
    parser.add_argument("--gpu", required=True, metavar="CARD", help="h200, h100, a100, ...")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs (default: 8)")
    parser.add_argument(
        "--network", type=float, default=50.0, metavar="GB/S",
        help="what a node receives from the others (default: 50, one link of 400 Gbit/s)",
    )  # fmt: skip
    parser.add_argument("--price", type=float, metavar="X", help="of a GPU for an hour")
    parser.add_argument("--lengths", metavar="FOLDER", help="what coma-ds prepare wrote")
    parser.add_argument(
        "--image-tokens", type=int, metavar="N", help="of an image, where nothing was measured"
    )
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", help="of a text or dialogue, the same"
    )
    parser.add_argument("--no-liger", action="store_true", help="without Liger's kernels")
    parser.add_argument("--cards", metavar="FILE", help="YAML with cards of your own, or new rates")
    parser.add_argument(
        "--against", metavar="RUN", help="a run that was measured: errors, its rate"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a value in place of the recipe's"
    )


def execute(args: argparse.Namespace) -> int:
    """Print the plan; code 1 where nothing fits.  Raises ``ValueError`` for wrong arguments."""
    from coma_ds.planning.cards import read_cards

    cards = read_cards(args.cards)
    if args.gpu not in cards:
        raise ValueError(
            f"--gpu {args.gpu!r}: known are {', '.join(cards)}; --cards adds one of your own"
        )
    for name in ("gpus", "per_node", "network", "price", "image_tokens", "text_tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: a number above 0 is expected")
    if args.against and (args.recipe or args.overrides):
        raise ValueError(
            "--against: the run's own config is planned, without --recipe or KEY=VALUE"
        )
    if args.against and not (Path(args.against) / "config.yaml").is_file():
        raise ValueError(f"--against {args.against!r}: no run there (a config.yaml is missing)")
    if not args.recipe and not args.against:
        raise ValueError("--recipe is missing: a shipped name (coma-ds config --list) or a file")

    from coma_ds.config import load_config
    from coma_ds.plan import Planner
    from coma_ds.planning.load import assume, measured

    recipe = args.recipe or str(Path(args.against) / "config.yaml")
    config = load_config(recipe, args.overrides)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": "bf16"})
    if config.optim.batch_size % args.gpus:
        raise ValueError(
            f"optim.batch_size {config.optim.batch_size} is not a multiple of the {args.gpus} GPUs"
        )
    per_node = min(args.per_node, args.gpus)
    if args.gpus % per_node:
        raise ValueError(f"--gpus {args.gpus} is not a multiple of --per-node {per_node}")
    machine = Machine(cards[args.gpu], args.gpus, per_node, args.network)
    if args.against:
        check_place(Path(args.against), machine)
    planner = Planner(config, machine, liger=not args.no_liger and config.model.liger is not False)
    folder = args.lengths or config.data.lengths
    if folder:
        load = measured(config, planner.model, folder)
    elif config.data.format == "builtin":
        load = measured_here(config, planner.model)
    else:
        for name, most in (
            ("image", config.model.max_vision_tokens),
            ("text", config.model.max_length),
        ):
            value = getattr(args, f"{name}_tokens")
            if most and value and value > most:
                raise ValueError(f"--{name}-tokens {value}: the model takes {most} at most")
        load = assume(config, planner.model, args.image_tokens, args.text_tokens)
    plans = [planner.plan(load)] if args.against else planner.alternatives(load)
    found = {"text": describe(planner, load, plans, args.price), "json": as_json(plans)}
    if args.against:
        compared = compare(planner, plans[0], Path(args.against))
        found["text"] += compared.pop("text")
        found["json"] = {"plan": found["json"][0], "against": compared}
    text = json.dumps(found["json"], indent=1) + "\n" if args.json else found["text"]
    sys.stdout.write(text)
    return 0 if any(plan.fits for plan in plans) else 1


def check_place(run: Path, machine: Machine) -> None:
    """Raise ``ValueError`` where a run was not made on such a machine."""
    from coma_ds.versions import CPU

    known = run_place(run)
    ranks, device = known.get("ranks", str(machine.gpus)), known.get("device", "")
    if device == CPU:
        raise ValueError(f"--against {str(run)!r}: that run was made on a CPU")
    if ranks != str(machine.gpus):
        raise ValueError(f"--against {str(run)!r}: that run had {ranks} ranks: give --gpus {ranks}")


def run_place(run: Path) -> dict[str, str]:
    """What the run has noted of packages, ranks and device."""
    file = run / "versions.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return dict(line.split(" ", 1) for line in lines if " " in line)


def measured_here(config, model):
    """The load of built-in data, which is always at hand."""
    from coma_ds.assemble import build_processing, build_sources
    from coma_ds.planning.load import from_prepared
    from coma_ds.planning.outline import is_finished
    from coma_ds.preparation import prepare

    if config.init_from and not is_finished(config.init_from):  # a stage that is yet to run
        config = config.model_copy(update={"init_from": None})
    _, processing = build_processing(config)
    few = config.model_copy(update={"data": config.data.model_copy(update={"length": ROWS})})
    found = [prepare(n, x, processing, workers=0) for n, x in build_sources(few).items()]
    return from_prepared(config, model, found)


def describe(planner, load, plans: list, price: float | None) -> str:
    """For a screen."""
    from coma_ds.plan import FEW, GIB, best, describe_chunks

    config, machine, card = planner.config, planner.machine, planner.machine.card
    weights, steps = planner.weights, config.optim.steps
    records = "pairs" if config.objective == "match" else "dialogues"
    nodes = f"{machine.nodes} node{'s' if machine.nodes > 1 else ''}"
    rate = card.measured or "assumed: no run was measured on this card"
    lines = [
        f"plan       {config.recipe or '-'} ({config.objective}) on {machine.gpus} x {card.name}, "
        f"{nodes}",
        f"model      {planner.model.backbone.lm.config.model_type}, {weights.total / 1e6:.0f} M "
        f"weights, {weights.trained / 1e6:.1f} M of them trained, {config.precision}",
        f"batch      {config.optim.batch_size} {records}, a sample has "
        f"{load.tokens / load.samples:.0f} tokens on average "
        f"({load.image_tokens / load.samples:.0f} of images)",
        f"           {load.said}",
        f"rate       {card.share:.0%} of {card.tflops:g} TFLOP/s ({rate})"
        + ("" if config.precision == "bf16" else f", in bf16: {config.precision} is slower")
        + f"; {card.node_gb:g} GB/s "
        "in a node" + (f", {machine.network_gb:g} between nodes" if machine.nodes > 1 else ""),
        "",
    ]
    rows = [["", "memory, GiB", "chunks", "step", "run", "GPU-hours", "executed/needed", "binds"]]
    for number, plan in enumerate(plans):
        hours = plan.seconds * steps / 3600
        rows.append([
            f"{number}", f"{plan.total / GIB:.1f} of {plan.capacity / GIB:.0f}",
            describe_chunks(plan), f"{plan.seconds:.2f} s", f"{hours:.1f} h",
            f"{hours * machine.gpus:.0f}", f"{plan.executed / plan.needed:.2f}", plan.binds,
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    lines.append("")
    for number, plan in enumerate(plans):
        lines.append(f"{number}  {' '.join(plan.overrides) or 'as configured'}")
        lines += [f"   {note}" for note in plan.notes]
    lines.append("")
    chosen = best(plans)
    if chosen is None:
        plan = min(plans, key=lambda plan: plan.total)
        ways = ["more GPUs", "a larger card", "shorter samples"]
        if config.model.adapter == "none":
            ways.append("model.adapter=lora")
        if not offloaded(planner, {}):
            ways.append("deepspeed=zero3_offload")
        return "\n".join([
            *lines,
            f"nothing fits: {plan.binds} is the largest part of the smallest of them",
            f"to try: {', '.join(ways)}\n",
        ])  # fmt: skip
    quickest = min((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds)
    why = ""
    if quickest is not chosen:
        gain = "moves less" if quickest.times > FEW >= chosen.times else "takes less memory"
        why = f" (as fast as {plans.index(quickest)} within 1 %, and {gain})"
    lines.append(
        f"best       {plans.index(chosen)}: {' '.join(chosen.overrides) or 'as it is'}{why}"
    )
    away = offloaded(planner, chosen.changes)
    held = ", ".join(
        f"{name} {size / GIB:.1f}" for name, size in chosen.memory.items() if size > 0.05 * GIB
    )
    hours = chosen.seconds * steps / 3600 * machine.gpus
    cost = f", {hours * price:,.0f} at {price:g} an hour" if price else ""
    floors = ", ".join(f"{x:.2f} {name}" for name, x in planner.floors(load).items())
    lines += [
        f"memory     {held} GiB",
        f"largest    a chunk of {chosen.largest_chunk} tokens; a batch of "
        f"{planner.largest_batch(load, chosen.changes)} "
        f"{records}",
        f"time       {config.optim.batch_size / chosen.seconds:.1f} {records}/s, "
        f"{chosen.computing:.2f} s of arithmetic and {chosen.moving:.2f} s of network a step"
        + (f", {chosen.host:.2f} s for what is offloaded" if chosen.host else ""),
        f"moved      {chosen.gathered / GB:.1f} GB of weights "
        f"({chosen.times:.1f} times all of them) and "
        f"{chosen.reduced / GB:.2f} GB of gradients to a GPU each step"
        + (f", {chosen.between / GB:.2f} GB of it between nodes" if machine.nodes > 1 else ""),
        f"host       {planner.waiting(load) / GB:.1f} GB of pixels wait in the loaders of a node "
        f"at most ({config.data.workers} workers a GPU), in /dev/shm"
        + (f"; {away / GB:.1f} GB of weights and optimizer states beside" if away else ""),
        f"floors     executed/needed: {floors}",
        f"cost       {hours:.0f} GPU-hours{cost}, without evaluation and saving",
    ]
    return "\n".join(lines) + "\n"


def offloaded(planner, changes: dict) -> float:
    """Bytes of weights and optimizer states in the memory of a node."""
    from coma_ds.mechanics import read_mechanics
    from coma_ds.planning.memory import Zero, host_states

    config, weights = planner.config, planner.weights
    zero = Zero.of(read_mechanics(changes.get("deepspeed", config.deepspeed)), planner.model)
    item = planner.weight_bytes // weights.total
    found = host_states(weights, zero, item=item, kind=config.optim.kind)
    return found / planner.machine.nodes


def as_json(plans: list) -> list[dict]:
    """Each plan with what the table says of it."""
    return [
        vars(plan)
        | {"budget": vars(plan.budget), "seconds": plan.seconds, "total": plan.total}
        | {"fits": plan.fits, "binds": plan.binds}
        for plan in plans
    ]


def compare(planner, plan, run: Path) -> dict:
    """Planned beside measured: seconds of a step, memory, and the rate that was reached.

    Raises ``ValueError`` for a run that has logged too few steps.
    """
    steps, file = [], run / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else []:
        values = json.loads(line)
        if "samples_per_second" in values:
            steps.append(values)
    if len(steps) < 2 * WARM:
        raise ValueError(
            f"--against {str(run)!r}: {len(steps)} logged steps, fewer than {2 * WARM} "
            "(logging.every=1 logs each)"
        )
    steps = steps[WARM:]

    def median(name: str) -> float:
        return statistics.median(values[name] for values in steps)

    batch, card = planner.config.optim.batch_size, planner.machine.card
    took = batch / median("samples_per_second")
    # What small chunks cost is in the formula: the share is that of large ones.
    small = plan.computing * card.tflops * 1e12 * card.share / plan.executed
    reached = median("tflops_per_second")
    share = reached / card.tflops * small
    memory = max(values["memory_mib"] for values in steps) / 1024
    rated = replace(plan, computing=plan.computing * card.share / share)
    found = {
        "seconds": took,
        "seconds_error": plan.seconds / took - 1,
        "seconds_error_at_its_rate": rated.seconds / took - 1,
        "memory_gib": memory,
        "memory_error": plan.total / 2**30 / memory - 1,
        "share": share,
        "executed_per_needed": median("executed_per_needed"),
    }
    found["text"] = (
        f"\nmeasured   {run}, {len(steps)} steps on {run_place(run).get('device', 'a GPU')}\n"
        f"step       {took:.2f} s, planned {plan.seconds:.2f} ({found['seconds_error']:+.0%}); "
        f"with the rate of this run {rated.seconds:.2f} "
        f"({found['seconds_error_at_its_rate']:+.0%})\n"
        f"memory     {memory:.1f} GiB, planned {plan.total / 2**30:.1f} "
        f"({found['memory_error']:+.0%})\n"
        f"executed   {found['executed_per_needed']:.2f} times what is needed, planned "
        f"{plan.executed / plan.needed:.2f}\n"
        f"rate       {reached:.3g} TFLOP/s, {share:.3g} of {card.tflops:g} in large chunks: with "
        "--cards a file that says\n"
        f"           {card.key}: {{share: {share:.3g}, measured: {run.name}}}\n"
    )
    return found

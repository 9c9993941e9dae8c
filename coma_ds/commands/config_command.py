"""Print the resolved config of a recipe, or list the recipes."""

from __future__ import annotations

import argparse
import sys
from importlib import resources

EXAMPLES = """examples:
  coma-ds config --list
  coma-ds config --recipe qwen2_5_vl_3b-match optim.lr=2e-5 > mine.yaml
  coma-ds train --recipe mine.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "--recipe",
        default="demo-compress",
        help="a shipped name or a YAML file (default: demo-compress)",
    )
    parser.add_argument("--list", action="store_true", help="the shipped recipes, a line each")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a value in place of the recipe's"
    )


def execute(args: argparse.Namespace) -> int:
    """Write to stdout.  Raises ``ValueError`` for a recipe or an override that is wrong."""
    if args.list:
        sys.stdout.write(list_recipes())
        return 0
    from coma_ds.config import dump, load_config
    from coma_ds.effects import check_effect, in_a_job

    config = in_a_job(load_config(args.recipe, args.overrides))
    check_effect(config, args.overrides)
    sys.stdout.write(dump(config))
    return 0


def list_recipes() -> str:
    """Each shipped recipe with the first sentence of the comment at its head."""
    from coma_ds.recipe_files import recipe_names

    names = recipe_names()
    width = max(map(len, names))
    folder = resources.files("coma_ds.recipes")
    lines = []
    for name in names:
        text = folder.joinpath(f"{name}.yaml").read_text()
        lines.append(f"{name:<{width}}  {head_comment(text)}".rstrip())
    return "\n".join(lines) + "\n"


def head_comment(text: str) -> str:
    """The first sentence of the comment that a YAML text begins with."""
    words = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    sentence, stop, _ = " ".join(words).partition(". ")
    return sentence + stop.strip()

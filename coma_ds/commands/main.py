"""The command line ``coma-ds``: one subcommand, one file each, loaded when it is used."""

from __future__ import annotations

import argparse
import os
import sys

from coma_ds.commands import (
    config_command,
    encode_command,
    evaluate_command,
    export_command,
    plan_command,
    preflight_command,
    prepare_command,
    synthesize_command,
    train_command,
)

COMMANDS = {
    "train": train_command,
    "evaluate": evaluate_command,
    "encode": encode_command,
    "synthesize": synthesize_command,
    "export": export_command,
    "config": config_command,
    "prepare": prepare_command,
    "plan": plan_command,
    "preflight": preflight_command,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="coma-ds",
        description="Turn a multimodal LLM into an embedding model: compress, then match.",
        epilog="coma-ds COMMAND --help says more about a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="say the version and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers add it
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        what = module.__doc__.splitlines()[0]
        sub = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(execute=module.execute)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; ``rest`` holds what ``train`` passes on to the training script."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse loses what stands after an option
    if args.command in ("train", "config", "prepare", "plan", "preflight"):
        late = [word for word in rest if "=" in word and not word.startswith("-")]
        args.overrides += late
        rest = [word for word in rest if word not in late]
    if rest and args.command != "train":
        parser.error(f"unknown: {' '.join(rest)}; see coma-ds {args.command or ''} --help")
    args.rest = rest
    return args


def dispatch(argv: list[str]) -> int:
    """Run a command; its exit code.  Raises ``ValueError`` for what the user can mend."""
    args = parse(argv)
    if args.version:
        import coma_ds

        sys.stdout.write(f"coma-ds {coma_ds.__version__}\n")
        return 0
    if args.command is None:
        build_parser().print_help()
        return 2
    return args.execute(args)


def run(argv: list[str]) -> int:
    """``dispatch`` with a user's error as one sentence on stderr and code 2.

    Raises what is a fault of ours or of a library.
    """
    try:
        return dispatch(argv)
    except ValueError as error:
        if "torch" in sys.modules:  # what is light has no library that could be at fault
            from coma_ds.entry import is_users

            if not is_users(error):
                raise
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def main() -> None:
    """The process ``coma-ds``, or one rank of it under a launcher."""
    argv = sys.argv[1:]
    if "RANK" in os.environ and argv[:1] != ["train"]:
        from coma_ds.entry import entry_point

        entry_point(lambda argv: sys.exit(dispatch(argv)), argv)
    code = run(argv)
    if "coma_ds.engine" in sys.modules:  # a world of one was joined
        from coma_ds import comm

        comm.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""`unit COMMAND`, or `python -m unit_cli COMMAND`, with one of `COMMANDS`; each is a file beside this one.

Exit status: 0, or 2 if an argument or any input was refused, each with one line on stderr (the other inputs are still
done); 1 if `unit plan` finds that a batch does not fit, or `unit evaluate` could measure nothing. Sub-commands import
torch and transformers when they run, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .common import CommandError

COMMANDS = ("read", "describe", "features", "demo", "convert", "export", "llava")
COMMANDS += ("plan", "train", "ablate", "curve", "merge", "average", "data", "evaluate", "peers", "lmms")
COMMANDS += ("push", "push-space")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="unit", description="UNIT: one vision encoder that recognises pictures and reads text."
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".{name.replace('-', '_')}", __package__)
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return int(status or 0)
    except CommandError as error:
        print(f"unit {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        on = "; the same command goes on from the last checkpoint, if there is one" * (arguments.command == "train")
        print(f"\nunit {arguments.command}: interrupted{on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing to say, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Version(argparse.Action):
    """Prints the installed version, looked up only when it is asked for."""

    def __call__(self, parser, *_) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"unit {version('unit-vision')}")
        except PackageNotFoundError:
            print("unit (run from its folder, not installed)")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())

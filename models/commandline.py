"""What all commands share: a parser that says in one line what is wrong, and numbers of things."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's own, whose sub-parsers are of this class too; a mistake is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End as any other wrong input does."""
        self.exit(2, f"tundish: {message}; see: {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override] # argparse declares three forms; all come down to this one
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Let the command that was given too much say so, whose help is the one to see."""
        found, more = super().parse_known_args(args, namespace)
        if more:
            self.error(f"unrecognized arguments: {' '.join(more)}")
        return found, more


def counted(number: int, thing: str, things: str = "") -> str:
    """Say how many.

    >>> counted(1, "gateway"), counted(2, "gateway"), counted(0, "entry", "entries")
    ('1 gateway', '2 gateways', '0 entries')
    """
    return f"{number} {thing if number == 1 else things or thing + 's'}"

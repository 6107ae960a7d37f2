"""What all commands share: a parser that says in one line what is wrong, and numbers of things."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's own, whose sub-parsers are of this class too; a mistake is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End as any other wrong input does."""
        self.exit(2, f"tundish: {message}; see: {self.prog} --help\n")


def counted(number: int, thing: str, things: str = "") -> str:
    """Say how many.

    >>> counted(1, "gateway"), counted(2, "gateway"), counted(0, "entry", "entries")
    ('1 gateway', '2 gateways', '0 entries')
    """
    return f"{number} {thing if number == 1 else things or thing + 's'}"

"""What our command lines share: help as it is written, and errors of the user as one line."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from dfm_d2.errors import UserError


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows `description` as it is written."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def exit_status(run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """What `run` returns (None: 0), or 2 with the message of a UserError on stderr.

    With the environment variable DFM_DEBUG the traceback is printed, too.
    """
    try:
        return run(args) or 0
    except UserError as error:
        if os.environ.get("DFM_DEBUG"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2

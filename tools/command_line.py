"""What the tools share: the checkout on Python's path, and the arguments that several of them have."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not


def number_or_auto(word: str) -> float | str:
    return word if word == "auto" else float(word)


# A score threshold. "auto" is the checkpoint's own, of greatest F1.
SCORE = {"type": number_or_auto, "default": 0.3, "help": "least score that is drawn, or auto"}


def argument_parser(description: str | None, **config_file) -> argparse.ArgumentParser:
    """With options of --config-file: that file of a config, and KEY VALUE overrides."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    if config_file:
        parser.add_argument("--config-file", metavar="FILE", **config_file)
        parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config")
    return parser

#!/usr/bin/env python
r"""Run a script of Detectron2, unchanged, on a config of dfm_d2, where Detectron2 is installed.

python tools/run_detectron2.py detectron2/tools/analyze_model.py --num-inputs 10 --tasks flop parameter \
    --config-file configs/shapes_flow_r18.yaml

What follows the script is its own command line. Such a script knows neither the keys of dfm_d2 nor its
meta-architectures nor its data sets: this puts them in place first. Detectron2's training loop does not know
local updates: benchmarks/scaling.py times a loop that does.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.config import add_dfm_config, split_overrides  # noqa: E402
from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.setup import load_config, resolve_classes, resolve_device  # noqa: E402
from dfm_d2.errors import UserError, input_errors  # noqa: E402
from dfm_d2.framework import run_detectron2_script  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", help="file of Detectron2")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script, --config-file among them")
    args = parser.parse_args(arguments)
    try:
        words = completed_words(args.arguments)
        with input_errors():
            run_detectron2_script(args.script, words, add_dfm_config)
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def completed_words(words: list[str]) -> list[str]:
    """The command line with what only the data sets and the machine say; the data sets are registered.

    Raises UserError, one sentence.
    """
    if "--config-file" not in words[:-1]:
        raise UserError("--config-file is missing among the arguments of the script.")
    place = words.index("--config-file")
    file, others = words[place + 1], words[:place] + words[place + 2 :]
    others, opts = split_overrides(others)
    cfg = load_config(DETECTION, file, opts)
    with input_errors():
        resolve_device(cfg, explicit="MODEL.DEVICE" in opts[0::2])
        DETECTION.register(cfg)
        resolve_classes(cfg)
    opts += ["MODEL.DFM.NUM_CLASSES", str(cfg.MODEL.DFM.NUM_CLASSES), "MODEL.DEVICE", cfg.MODEL.DEVICE]
    # The file last: an option that takes several words, as --tasks, would take the overrides, too.
    return [*others, "--config-file", file, *opts]


if __name__ == "__main__":
    sys.exit(main())

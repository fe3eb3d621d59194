#!/usr/bin/env python
"""Write the generated VOC-format set and print what a detector that never looks at the image would score."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.errors import UserError, input_errors, report  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder to write, for example data/shapes")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=300, help="number of validation images")
    parser.add_argument("--size", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        with input_errors():
            run(args)
    except UserError as error:
        return report(error)
    return 0


def run(args: argparse.Namespace) -> None:
    from dfm_d2.data.files import write_text_atomically
    from dfm_d2.data.problems import ProblemReport
    from dfm_d2.detection.data.readers import read_voc_split
    from dfm_d2.detection.data.registration import dataset_dict
    from dfm_d2.detection.data.shapes import SHAPE_CLASSES, write_shapes
    from dfm_d2.detection.evaluation.baseline import constant_box_baseline

    wrote = write_shapes(args.out, args.train, args.val, args.size, args.seed)
    done = "wrote" if wrote else "already complete, nothing to do:"
    print(f"{done} {args.out} ({args.train} train, {args.val} val, {args.size} px, seed {args.seed})")
    baseline, names, sets = args.out / "baseline.txt", list(SHAPE_CLASSES), []
    if wrote or not baseline.is_file():
        for split in ("train", "val"):
            problems = ProblemReport(f"shapes {split}")
            records = read_voc_split(args.out, split, problems, decode_up_to=0)
            sets.append([dataset_dict(record, names, problems) for record in records])
        name, ap50, ap = constant_box_baseline(*sets, names)
        line = f"constant-box baseline on val, best of a few ({name}): AP50 {ap50:.2f}, AP {ap:.2f}"
        write_text_atomically(baseline, line + "\n")
    print(baseline.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    sys.exit(main())

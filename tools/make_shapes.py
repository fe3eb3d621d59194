"""Write the generated VOC-format set and print what a detector that never looks at the image would score."""

import argparse
import sys
from pathlib import Path

from dfm_d2.data.files import write_text_atomically
from dfm_d2.data.problems import ProblemReport
from dfm_d2.detection.data.readers import read_voc_split
from dfm_d2.detection.data.registration import dataset_dict
from dfm_d2.detection.data.shapes import SHAPE_CLASSES, write_shapes
from dfm_d2.detection.evaluation.baseline import constant_box_baseline


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one sentence on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder to write, for example data/shapes")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=300, help="number of validation images")
    parser.add_argument("--size", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    out = Path(args.out)
    try:
        wrote = write_shapes(out, args.train, args.val, args.size, args.seed)
    except (ValueError, OSError) as error:
        print(f"make_shapes: {error}", file=sys.stderr)
        return 2
    done = "wrote" if wrote else "already complete, nothing to do:"
    print(f"{done} {out} ({args.train} train, {args.val} val, {args.size} px, seed {args.seed})")
    baseline = out / "baseline.txt"
    if wrote or not baseline.is_file():
        write_text_atomically(baseline, _baseline_line(out) + "\n")
    print(baseline.read_text(encoding="utf-8"), end="")
    return 0


def _baseline_line(out: Path) -> str:
    train, val = (_read(out, split) for split in ("train", "val"))
    name, ap50, ap = constant_box_baseline(train, val, list(SHAPE_CLASSES))
    return f"constant-box baseline on val, best of a few ({name}): AP50 {ap50:.2f}, AP {ap:.2f}"


def _read(out: Path, split: str) -> list[dict]:
    report = ProblemReport(f"shapes {split}")
    records = read_voc_split(out, split, report, decode_up_to=0)
    return [dataset_dict(record, list(SHAPE_CLASSES), report) for record in records]


if __name__ == "__main__":
    sys.exit(main())

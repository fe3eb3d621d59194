#!/usr/bin/env python
"""AP of detectors on corrupted test images: Gaussian noise, blur, occlusion, JPEG.

python benchmarks/robustness_detection.py --config configs/shapes_flow_r18.yaml --seeds 3 --save
    --variants sequential         only of these trainings
    --samplers steps_4 fresh_noise_4x1  only by these samplers

Of the trainings of benchmarks/accuracy.py, made here where they are not there, by samplers of it: a step of
the backprop twin asks all of its heads, one of the local detector those that answer at its time, so the rows
say how many evaluations of a head an image takes. Corruptions are seeded by image; on a resume only what is
missing is evaluated.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

from accuracy import SAMPLERS, STUDY
from corruptions import CASES, corrupted_batches, draw_curves
from harness import reported
from runs import Key, op_of

from dfm_d2.detection.data.loader import build_test_loader
from dfm_d2.detection.inference import BoxFlowModel
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.run import evaluate
from dfm_d2.errors import exit_status

METRICS = ("AP50", "AP")


def evaluations_of(model: BoxFlowModel) -> int:
    """How often the sampler of a detector asks a head for an image."""
    settings, heads = model.sampler.settings, model.predictors
    if not model.is_local:  # the twin
        return settings.noise_passes * settings.steps * len(heads)
    asked = [len(heads.answering(t, settings.members)) for t in model.time_grid[:-1]]
    return settings.noise_passes * sum(asked)


def scores_of(variant: str, samplers: list[str], out: Path) -> dict[Key, float]:
    """Of every corruption by every sampler; what was evaluated before is in robustness.json of the folder."""
    file, scores = out / "robustness.json", {}
    found = json.loads(file.read_text()) if file.exists() else {}
    cfg, model = STUDY.load(out)
    settings = model.sampler.settings
    for name in samplers:
        model.sampler.settings = dataclasses.replace(settings, **SAMPLERS[name])
        mode = f"{name}, {evaluations_of(model)} evaluations"
        for kind, severity in CASES:
            case = f"{name} {kind} {severity:g}"
            if case not in found:
                found[case] = _corrupted_ap(cfg, model, kind, severity)
                file.write_text(json.dumps(found))
            for metric in METRICS:
                scores[variant, mode, metric, "%", kind, f"{severity:g}"] = found[case][metric]
    return scores


def _corrupted_ap(cfg, model: BoxFlowModel, kind: str, severity: float) -> dict[str, float]:
    def loader(cfg, name):
        return corrupted_batches(cfg, build_test_loader(cfg, name), kind, severity)

    results = evaluate(dataclasses.replace(DETECTION, test_loader=loader), cfg, model)["bbox"]
    return {metric: results[metric] for metric in METRICS}


def main() -> None:
    parser = STUDY.parser(__doc__)
    usual = ["steps_1", "steps_4", "steps_8"]
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=usual, metavar="SAMPLER")
    args = parser.parse_args()
    name = f"robustness_{op_of(args)}"
    for variant in args.variants or ["sequential", "cascade"]:
        rows = STUDY.rows(args, variant, partial(scores_of, variant, args.samplers))
        reported(rows, args.save and name)
    if args.save:
        draw_curves(name, f"{op_of(args)}: corrupted test images", "AP50")


if __name__ == "__main__":
    sys.exit(exit_status(main))

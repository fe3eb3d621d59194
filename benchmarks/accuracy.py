#!/usr/bin/env python
"""AP of local updates, joint training and the backprop cascade, with the controls that iteration must beat.

python benchmarks/accuracy.py --config configs/shapes_flow_r18.yaml --seeds 3 --save
python benchmarks/accuracy.py --config configs/bccd_flow_r18.yaml --seeds 3 --device cuda --save \\
    --opts DATASETS.VOC_ROOT ../shared/data/bccd
    --variants sequential cascade      only these trainings

Every training is evaluated with several samplers; on a resume only with those that it lacks.
"""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

from harness import reported
from runs import Key, Study, costs_of, op_of

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.run import evaluate
from dfm_d2.errors import exit_status

_SHARED = ["MODEL.DFM.INTERVALS", "1", "MODEL.DFM.SAMPLER.STEPS", "4"]

_CASCADE = "MODEL.META_ARCHITECTURE CascadeDetector MODEL.DFM.UPDATE joint MODEL.DFM.SAMPLER.STEPS 1".split()
_DENSE = ["MODEL.DFM.DENSE_WEIGHT", "2.0"]

# Trainings: overrides of the config. The first is what the config says.
VARIANTS: dict[str, list[str]] = {
    "sequential": [],
    "joint": ["MODEL.DFM.UPDATE", "joint"],
    # Every stage of the backbone a block, too.
    "local_backbone": ["MODEL.DFM.BACKBONE_UPDATE", "local"],
    # The backprop twin, trained at every t as DiffusionDet is.
    "cascade": _CASCADE,
    # With a loss of the shared block's own: every cell of the pyramid answers.
    "sequential_dense": _DENSE,
    "cascade_dense": [*_CASCADE, *_DENSE],
    # Later predictors trained on the path instead of where the earlier ones lead.
    "off_policy": ["MODEL.DFM.ROLLOUT", "0"],
    "time_rate_0": ["MODEL.DFM.TIME_RATE", "0.0"],
    "time_rate_3": ["MODEL.DFM.TIME_RATE", "3.0"],
    "gt_repeat_4": ["MODEL.DFM.GT_REPEAT", "4"],
    "one_predictor": ["MODEL.DFM.NUM_PREDICTORS", "1"],
    "shared": _SHARED,
    "shared_path": [*_SHARED, "MODEL.DFM.ASSIGNMENT", "path"],
    "path": ["MODEL.DFM.ASSIGNMENT", "path"],
    "independent": ["MODEL.DFM.COUPLING", "independent"],
    "velocity_loss": ["MODEL.DFM.LOSS.VELOCITY_WEIGHT", "0.1"],
    "quality_focal": ["MODEL.DFM.LOSS.CLS", "quality_focal"],
    "dynamic_conv": ["MODEL.DFM.HEAD.INTERACTION", "dynamic_conv"],
}

# Samplers: fields of SamplerSettings. "fresh_noise_4x1" spends what 4 steps spend on passes of one step.
SAMPLERS: dict[str, dict] = {
    "default": {},
    "steps_1": {"steps": 1},
    "steps_2": {"steps": 2},
    "steps_4": {"steps": 4},
    "steps_8": {"steps": 8},
    "steps_16": {"steps": 16},
    "heun_4": {"steps": 4, "method": "heun"},
    "fresh_noise_2x1": {"steps": 1, "noise_passes": 2},
    "fresh_noise_4x1": {"steps": 1, "noise_passes": 4},
    "fresh_noise_2x4": {"steps": 4, "noise_passes": 2},
    "fresh_noise_4x4": {"steps": 4, "noise_passes": 4},
}
# Each with more proposals than any training here has, too.
SAMPLERS |= {f"{name}_n160": {**fields, "num_proposals": 160} for name, fields in SAMPLERS.items()}
METRICS = {"AP50": "%", "AP": "%", "VOC07_AP50": "%", "time": "s"}
STUDY = Study(DETECTION, "train_net", VARIANTS)


def scores_of(variant: str, samplers: list[str], out: Path) -> dict[Key, float]:
    """Scores, time and memory of a training; what was evaluated before is in its folder."""
    file = out / "scores.json"
    scores = json.loads(file.read_text()) if file.exists() else {}
    missing = [name for name in samplers if name not in scores]
    if missing:
        cfg, model = STUDY.load(out)
        settings = model.sampler.settings
    for name in missing:
        model.sampler.settings = dataclasses.replace(settings, **SAMPLERS[name])
        begun = time.perf_counter()
        found = evaluate(DETECTION, cfg, model)["bbox"] | {"time": time.perf_counter() - begun}
        scores[name] = {metric: found[metric] for metric in METRICS if metric in found}
        file.write_text(json.dumps(scores))
    evaluated = {}
    for name in samplers:
        for metric, value in scores[name].items():
            evaluated[variant, "eval", metric, METRICS[metric], "sampler", name] = value
    return evaluated | costs_of(variant, out) | disagreement_of(variant, out)


def disagreement_of(variant: str, out: Path) -> dict[Key, float]:
    """Share of the queries at the end of a training of shared time, averaged over its predictors (see
    dfm_d2.detection.training.disagreement); nothing where a training has no such thing."""
    for line in reversed(read_metrics(out / METRICS_FILE)):
        shares = [value for key, value in line.items() if key.startswith("disagreement/")]
        if shares:
            return {(variant, "train", "disagreement", "%", "seeds", "all"): 100 * sum(shares) / len(shares)}
    return {}


def main() -> None:
    parser = STUDY.parser(__doc__)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    args = parser.parse_args()
    for variant in args.variants or VARIANTS:
        rows = STUDY.rows(args, variant, partial(scores_of, variant, args.samplers))
        reported(rows, args.save and f"accuracy_{op_of(args)}")


if __name__ == "__main__":
    sys.exit(exit_status(main))

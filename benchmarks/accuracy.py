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

_CASCADE = "MODEL.META_ARCHITECTURE CascadeDetector MODEL.DFM.UPDATE joint MODEL.DFM.SAMPLER.STEPS 1".split()
_NO_DENSE = ["MODEL.DFM.DENSE_WEIGHT", "0.0"]

# Trainings: overrides of the config. The first is what the config says.
VARIANTS: dict[str, list[str]] = {
    "sequential": [],
    "joint": ["MODEL.DFM.UPDATE", "joint"],
    # The backprop twin, trained at every t as DiffusionDet is.
    "cascade": _CASCADE,
    # Both without the loss of the shared block's own.
    "no_dense": _NO_DENSE,
    "cascade_no_dense": [*_CASCADE, *_NO_DENSE],
    # Every stage of the backbone a block, too.
    "local_backbone": ["MODEL.DFM.BACKBONE_UPDATE", "local"],
    # From chain to ensemble: twice the predictors in a row, two in each interval, all in one; wider ones.
    "chain_8": ["MODEL.DFM.NUM_PREDICTORS", "8"],
    "members_4x2": ["MODEL.DFM.NUM_PREDICTORS", "8", "MODEL.DFM.INTERVALS", "4"],
    "wide": "MODEL.FPN.OUT_CHANNELS 256 MODEL.DFM.HEAD.HIDDEN_DIM 256".split(),
    "ensemble": "MODEL.DFM.INTERVALS 1 MODEL.DFM.ROLLOUT 4 MODEL.DFM.SAMPLER.STEPS 4".split(),
    "one_predictor": "MODEL.DFM.NUM_PREDICTORS 1 MODEL.DFM.ROLLOUT 4 MODEL.DFM.SAMPLER.STEPS 4".split(),
    # Predictors trained on the path instead of where answers lead.
    "off_policy": ["MODEL.DFM.ROLLOUT", "0"],
    "time_rate_0": ["MODEL.DFM.TIME_RATE", "0.0"],
    "time_rate_3": ["MODEL.DFM.TIME_RATE", "3.0"],
    "time_rate_12": ["MODEL.DFM.TIME_RATE", "12.0"],
    "gt_repeat_4": ["MODEL.DFM.GT_REPEAT", "4"],
    "path": ["MODEL.DFM.ASSIGNMENT", "path"],
    "independent": ["MODEL.DFM.COUPLING", "independent"],
    "velocity_loss": ["MODEL.DFM.LOSS.VELOCITY_WEIGHT", "0.1"],
    "dynamic_conv": ["MODEL.DFM.HEAD.INTERACTION", "dynamic_conv"],
}

# Samplers: fields of SamplerSettings. "fresh_noise_4x1" spends what 4 steps spend on passes of one step.
SAMPLERS: dict[str, dict] = {
    "default": {},
    **{f"steps_{k}": {"steps": k, "noise_passes": 1} for k in (1, 2, 4, 8, 16)},
    "fresh_noise_2x1": {"steps": 1, "noise_passes": 2},
    "fresh_noise_4x1": {"steps": 1, "noise_passes": 4},
    "fresh_noise_2x4": {"steps": 4, "noise_passes": 2},
    "fresh_noise_4x4": {"steps": 4, "noise_passes": 4},
}
# By name only: with more proposals than any training here has; one member of every interval by itself.
MORE = {f"{name}_n160": {**fields, "num_proposals": 160} for name, fields in SAMPLERS.items()}
MORE |= {f"member_{e}_steps_{k}": {"members": (e,), "steps": k} for e in range(2) for k in (4, 8)}
METRICS = {"AP50": "%", "AP": "%", "VOC07_AP50": "%", "D-ECE": "%", "time": "s"}
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
        model.sampler.settings = dataclasses.replace(settings, **(SAMPLERS | MORE)[name])
        begun = time.perf_counter()
        found = evaluate(DETECTION, cfg, model)["bbox"] | {"time": time.perf_counter() - begun}
        scores[name] = {metric: found[metric] for metric in METRICS if metric in found}
        file.write_text(json.dumps(scores))
    evaluated = {}
    for name in samplers:
        for metric, value in scores[name].items():
            evaluated[variant, "eval", metric, METRICS[metric], "sampler", name] = value
    return evaluated | costs_of(variant, out) | members_of(variant, out)


def members_of(variant: str, out: Path) -> dict[Key, float]:
    """How far the members of an interval were from each other at the end of a training, averaged over them:
    see disagreement and member_iou in dfm_d2.detection.training. Nothing where they are alone."""
    found = {}
    for name in ("disagreement", "member_iou"):
        for line in reversed(read_metrics(out / METRICS_FILE)):
            shares = [value for key, value in line.items() if key.startswith(f"{name}/")]
            if shares:
                found[variant, "train", name, "%", "seeds", "all"] = 100 * sum(shares) / len(shares)
                break
    return found


def main() -> None:
    parser = STUDY.parser(__doc__)
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS | MORE, default=list(SAMPLERS), metavar="SAMPLER"
    )
    args = parser.parse_args()
    for variant in args.variants or VARIANTS:
        rows = STUDY.rows(args, variant, partial(scores_of, variant, args.samplers))
        reported(rows, args.save and f"accuracy_{op_of(args)}")


if __name__ == "__main__":
    sys.exit(exit_status(main))

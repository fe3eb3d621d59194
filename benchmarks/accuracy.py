#!/usr/bin/env python
"""AP of local updates, joint training and the backprop cascade, with the controls that iteration must beat.

python benchmarks/accuracy.py --config configs/shapes_flow_r18.yaml --seeds 3
python benchmarks/accuracy.py --config configs/bccd_flow_r18.yaml --seeds 3 --device cuda \\
    --opts DATASETS.VOC_ROOT ../shared/data/bccd
    --variants local cascade      only these trainings (the names are printed by --help)

Resumable: a training that is done is not run again (only samplers that it lacks), one that was interrupted
continues. Every (variant, seed) is trained in a process of its own under output/accuracy/ and then evaluated
with several samplers.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402

_CASCADE = ["MODEL.META_ARCHITECTURE", "CascadeDetector", "MODEL.DFM.UPDATE", "joint"]
_ONE_STEP = ["MODEL.DFM.SAMPLER.STEPS", "1"]
_SHARED = ["MODEL.DFM.TIME", "shared", "MODEL.DFM.SAMPLER.STEPS", "4"]

# Trainings: overrides of the config. The first is what the config says.
VARIANTS: dict[str, list[str]] = {
    "local": [],
    "joint": ["MODEL.DFM.UPDATE", "joint"],
    # Every stage of the backbone a block, too.
    "local_backbone": ["MODEL.DFM.BACKBONE_UPDATE", "local"],
    # The backprop twin, trained at every t as DiffusionDet is; and at t = 0 only, where inference begins.
    "cascade": [*_CASCADE, *_ONE_STEP],
    "cascade_t0": [*_CASCADE, *_ONE_STEP, "MODEL.DFM.FROM_NOISE", "1.0"],
    "half_from_noise": ["MODEL.DFM.FROM_NOISE", "0.5"],
    # Later predictors trained on the path instead of where the earlier ones lead.
    "off_policy": ["MODEL.DFM.ON_POLICY", "0.0"],
    "half_on_policy": ["MODEL.DFM.ON_POLICY", "0.5"],
    "time_rate_0": ["MODEL.DFM.TIME_RATE", "0.0"],
    "time_rate_3": ["MODEL.DFM.TIME_RATE", "3.0"],
    "time_rate_6": ["MODEL.DFM.TIME_RATE", "6.0"],
    "endpoint_noise": ["MODEL.DFM.ENDPOINT_NOISE", "0.1"],
    "gt_repeat_1": ["MODEL.DFM.GT_REPEAT", "1"],
    "gt_repeat_4": ["MODEL.DFM.GT_REPEAT", "4"],
    "one_predictor": ["MODEL.DFM.NUM_PREDICTORS", "1"],
    "shared": _SHARED,
    "shared_path": [*_SHARED, "MODEL.DFM.ASSIGNMENT", "path"],
    "path": ["MODEL.DFM.ASSIGNMENT", "path"],
    "independent": ["MODEL.DFM.COUPLING", "independent"],
    "independent_path": ["MODEL.DFM.COUPLING", "independent", "MODEL.DFM.ASSIGNMENT", "path"],
    "velocity_loss": ["MODEL.DFM.LOSS.VELOCITY_WEIGHT", "0.1"],
    "quality_focal": ["MODEL.DFM.LOSS.CLS", "quality_focal"],
    "cross_attention": ["MODEL.DFM.HEAD.INTERACTION", "cross_attention"],
    "dynamic_conv": ["MODEL.DFM.HEAD.INTERACTION", "dynamic_conv"],
}

# Samplers: fields of SamplerSettings. "fresh_noise" spends what 4 steps spend on passes of one step.
SAMPLERS: dict[str, dict] = {
    "default": {},
    "steps_1": {"steps": 1},
    "steps_2": {"steps": 2},
    "steps_4": {"steps": 4},
    "steps_8": {"steps": 8},
    "heun_4": {"steps": 4, "method": "heun"},
    "fresh_noise_4x1": {"steps": 1, "noise_passes": 4},
    "fresh_noise_4x4": {"steps": 4, "noise_passes": 4},
    "ensemble_4": {"steps": 4, "ensemble_steps": True},
    "renewal_4": {"steps": 4, "renewal_thresh": 0.3},
}
METRICS = ("AP50", "AP", "VOC07_AP50")


def run_one(config: str, opts: list[str], out: str, samplers: list[str]) -> None:
    """The child: train (or continue), evaluate with every sampler, write result.json."""
    import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.run import evaluate, load_for_inference, train
    from dfm_d2.engine.setup import load_config, setup_run

    cfg = load_config(DETECTION, config, [*opts, "OUTPUT_DIR", out])
    args = argparse.Namespace(opts=opts, eval_only=False)
    classes = setup_run(DETECTION, cfg, args)
    started = time.perf_counter()
    train(DETECTION, cfg, classes, resume=True)
    seconds = time.perf_counter() - started
    before = read_result(out)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(Path(out) / "model_final.pth")
    cfg.freeze()
    model = load_for_inference(DETECTION, cfg, classes)
    settings, scores = model.sampler.settings, before.get("samplers", {})
    for name in samplers:
        if name in scores:
            continue
        model.sampler.settings = dataclasses.replace(settings, **SAMPLERS[name])
        begun = time.perf_counter()
        found = evaluate(DETECTION, cfg, model)["bbox"]
        scores[name] = {m: found[m] for m in METRICS if m in found}
        scores[name]["seconds"] = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if cfg.MODEL.DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    result = {
        "samplers": scores, "seconds": seconds, "peak_mib": peak, "commit": commit(),
        "device": device_name(cfg.MODEL.DEVICE), "iterations": cfg.SOLVER.MAX_ITER,
        "disagreement": last_disagreement(Path(out) / "metrics.json"),
    }  # fmt: skip
    # Of a training that was done, only samplers are new.
    result |= {key: value for key, value in before.items() if key != "samplers"}
    partial = Path(out) / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(Path(out) / "result.json")


def read_result(out: str | Path) -> dict:
    """What is known of a training already; empty if it is not done."""
    file = Path(out) / "result.json"
    return json.loads(file.read_text()) if file.exists() else {}


def last_disagreement(metrics: Path) -> float | None:
    """Share of the queries, in %, at the end of a training of shared time, averaged over its predictors (see
    dfm_d2.detection.training.disagreement); None where a training has no such thing."""
    shares = None
    for line in metrics.read_text().splitlines():
        found = [value for key, value in json.loads(line).items() if key.startswith("disagreement/")]
        shares = found or shares
    return 100 * sum(shares) / len(shares) if shares else None


def train_variant(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """The result of one training, from its file if it is done already."""
    name = Path(args.config).stem
    out = ROOT / "output" / "accuracy" / (args.name or name) / variant / f"seed{seed}"
    if not set(args.samplers) <= set(read_result(out).get("samplers", {})):
        opts = [*args.opts, *VARIANTS[variant], "SEED", str(seed), "MODEL.DFM.SEED", str(seed)]
        if args.device:
            opts += ["MODEL.DEVICE", args.device]
        command = [sys.executable, __file__, "--config", args.config, "--child", str(out)]
        command += ["--samplers", *args.samplers, "--opts", *opts]
        out.mkdir(parents=True, exist_ok=True)
        with (out / "stdout.txt").open("a") as log:
            print(f"training {variant}, seed {seed}: {out}", flush=True)
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
    return read_result(out)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"variants: {', '.join(VARIANTS)}", formatter_class=raw
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, less one")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--device", default="", help="cpu or cuda; else what the config says")
    parser.add_argument("--name", default="", help="of the results; else the config's")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    args = parser.parse_args()
    if args.child:
        run_one(args.config, args.opts, args.child, args.samplers)
        return
    rows = []
    for variant in args.variants:
        results = [train_variant(args, variant, seed) for seed in range(args.seeds)]
        rows += summarize(args, variant, results)
    # Written whole at the end: the results of every training are kept in its folder.
    print(save_rows(f"accuracy_{args.name or Path(args.config).stem}", rows))


def summarize(args: argparse.Namespace, variant: str, results: list[dict]) -> list[Row]:
    """Rows of one variant: quantiles over its seeds."""
    op = args.name or Path(args.config).stem
    first = results[0]
    tail = (first["device"], torch.__version__, first["commit"])
    seeds = f"seeds 0-{len(results) - 1}, {first['iterations']} iterations"
    rows = []
    for sampler in args.samplers:
        for metric in METRICS:
            values = [r["samplers"][sampler][metric] for r in results if metric in r["samplers"][sampler]]
            if values:
                rows.append(
                    Row(op, variant, "eval", metric, "%", "sampler", sampler, *quantiles(values), *tail,
                        f"{seeds}: {' '.join(f'{v:.2f}' for v in values)}")
                )  # fmt: skip
        times = [r["samplers"][sampler]["seconds"] for r in results]
        rows.append(
            Row(op, variant, "eval", "time", "s", "sampler", sampler, *quantiles(times), *tail, seeds)
        )
    of_training = (
        ("time", "s", "seconds"),
        ("peak memory", "MiB", "peak_mib"),
        ("disagreement", "%", "disagreement"),
    )
    for metric, unit, key in of_training:
        values = [r[key] for r in results if r.get(key) is not None]
        if values:
            rows.append(
                Row(op, variant, "train", metric, unit, "seeds", "all", *quantiles(values), *tail, seeds)
            )
    return rows


if __name__ == "__main__":
    main()

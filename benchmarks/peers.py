#!/usr/bin/env python
"""This detector beside what its users would pick instead: one backbone, the same images, accuracy and costs.

python tools/make_shapes.py --out data/shapes --train 2000 --val 300 --size 128
python benchmarks/peers.py --save
    --sets shapes bccd --methods fcos retinanet     only these; flow is always there, to compare with
    --name peers_short --opts SOLVER.MAX_ITER 300   another table, with overrides for all

Methods: flow (this detector), cascade (its backprop twin), fcos, retinanet and faster_rcnn (torchvision's,
see benchmarks/peer_models.py), all on EfficientNet-Lite0 with ImageNet weights. Sets: shapes (generated),
bccd, cards and voc2012_subset (by the recipe for photographs; in ../shared/data or the folder
DFM_SHARED_DATA). What is done is not run again; the order:

1. tune: every method gets three learning rates (0.3, 1 and 3 times the config's) for 400 iterations on
   shapes, seed 0, and keeps that of the best AP on a fifth of the training images that is set aside.
2. equal iterations: every method is trained for those of the set's config, and evaluated seven times.
3. train, inference: seconds a step and of a batch of 1 and 8 test images, in turns with flow in one process,
   scores under 0.05 dropped; peak memory, each in a process of its own ("process peak" is the operating
   system's, with Python and its libraries; "allocated" is torch.cuda's).
4. equal minutes: every method is trained anew, by a schedule that ends when flow's time of 2 is over.

The picture has AP over minutes: the iterations of 2 times the seconds a step of 3.
"""

import argparse
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import harness
import torch
from accuracy import VARIANTS
from harness import MIB, RESULTS, ROOT, Row, draw_panels, lines_of, load_rows, measured, reported
from peer_models import PEERS
from runs import Key, Study, result_of

from dfm_d2.data.catalog import HELD_OUT
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.engine.run import build_trainer, evaluate, load_for_inference
from dfm_d2.engine.setup import keep_freed_memory, load_config, resolve_classes, run_tool
from dfm_d2.errors import exit_status

FLOW = "flow"
METHODS = {FLOW: [], "cascade": VARIANTS["cascade"]}
for _name, _maker in (("fcos", "FCOS"), ("retinanet", "RetinaNet"), ("faster_rcnn", "FasterRCNN")):
    METHODS[_name] = ["MODEL.META_ARCHITECTURE", f"Torchvision{_maker}", "MODEL.DFM.UPDATE", "joint"]
    # Backbones have no level that is finer than these.
    _levels = "['p2','p3','p4','p5']" if _maker == "FasterRCNN" else "['p3','p4','p5']"
    METHODS[_name] += ["MODEL.DFM.HEAD.IN_FEATURES", _levels]

_DATA = Path(os.environ.get("DFM_SHARED_DATA") or ROOT.parent / "shared" / "data")
# Name of a config and overrides.
SETS = {"shapes": ("shapes_flow_lite0", ["DATASETS.HOLD_OUT", "0"])}
SETS |= {
    name: ("photos", ["DATASETS.ROOT", str(_DATA / name)]) for name in ("bccd", "cards", "voc2012_subset")
}
TUNED_ON, TUNING, RATES = "shapes", 400, (0.3, 1.0, 3.0)
_EVALUATIONS, _BATCHES, _SHOWN, _RATIO = 7, (1, 8), "0.05", "time / flow"

run_command = partial(run_tool, PEERS)  # of the processes that train
STUDY = Study(PEERS, "peers", METHODS)


def arguments_of(args: argparse.Namespace, subject: str) -> argparse.Namespace:
    """What a Study takes, of one of SETS. UserError for a mistake in it and for missing files."""
    config, opts = SETS[subject]
    path, opts = str(ROOT / "configs" / f"{config}.yaml"), [*opts, *args.opts]
    cfg = load_config(PEERS, path, opts)
    PEERS.find_data(cfg)
    own = {"config": path, "opts": opts, "name": f"{args.name}_{subject}", "solver": cfg.SOLVER}
    return argparse.Namespace(seeds=args.seeds, device=args.device, **own)


def tuned_rate(args: argparse.Namespace, method: str) -> tuple[float, list[Row]]:
    """The learning rate of a method, and the rows by which it was chosen."""
    rows = []
    for rate in (args.solver.BASE_LR * factor for factor in RATES):
        more = ["SOLVER.BASE_LR", rate, "SOLVER.MAX_ITER", TUNING, "DATASETS.HOLD_OUT", 0.2]
        out = STUDY.trained(args, method, 0, f"tune_{method}_{rate:g}", [*more, "TEST.EVAL_PERIOD", 0])
        file = out / "held_out.json"
        if not file.exists():
            cfg, model = STUDY.load(out)
            cfg.DATASETS.TEST = (HELD_OUT,)
            file.write_text(json.dumps(evaluate(PEERS, cfg, model)["bbox"]["AP"]))
        where = (args.name, method, "tune", "held-out AP", "%", "BASE_LR", f"{rate:g}")
        made = {"on": result_of(out)["device"], "made_by": result_of(out)["commit"]}
        rows.append(measured(*where, values=[json.loads(file.read_text())], note="seed 0", **made))
    return float(max(rows, key=lambda row: row.p50).x_value), rows


def scores_of(method: str, mode: str, out: Path) -> dict[Key, float]:
    """AP50 and AP of a training: at all its evaluations ("equal iterations") or at its end."""
    last, found = result_of(out)["iterations"], {}
    for line in read_metrics(out / METRICS_FILE):
        # The line of the last evaluation has the iteration that would come next.
        at = min(line["iteration"] + 1, last)
        where = ("iterations", at) if mode == "equal iterations" else ("minutes of", FLOW)
        keys = {metric: f"bbox/{metric}" for metric in ("AP50", "AP")}
        found |= {(method, mode, m, "%", *where): line[key] for m, key in keys.items() if key in line}
    return found


def calls_of(out: str, weights: str = "") -> tuple[str, dict[str, Callable]]:
    """The device, a step on a batch of a training ("train 8") and inference ("inference 1", ...)."""
    keep_freed_memory()  # as trainings do
    opts = ["MODEL.WEIGHTS", weights, "MODEL.DFM.SAMPLER.SCORE_THRESH", _SHOWN]
    cfg = load_config(PEERS, str(Path(out) / "config.yaml"), opts)
    PEERS.register(cfg)
    model = load_for_inference(PEERS, cfg, resolve_classes(cfg)) if weights else PEERS.build_model(cfg)
    trainer, batch = build_trainer(PEERS, cfg, model), next(iter(PEERS.train_loader(cfg, 0)))
    items = [item for items in PEERS.test_loader(cfg, cfg.DATASETS.TEST[0]) for item in items]
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # the model stays what it is

    def train() -> None:
        model.train()
        trainer.update.step(model, model.prepare(batch, 0), trainer.optimizer, trainer.autocast)

    def infer(number: int) -> None:
        model.eval()
        with torch.no_grad(), inference_autocast(cfg):
            model(items[:number])

    calls = {f"inference {number}": partial(infer, number) for number in _BATCHES}
    return cfg.MODEL.DEVICE, {f"train {cfg.SOLVER.IMS_PER_BATCH}": train, **calls}


def times_of(outs: Mapping[str, str]) -> dict[str, list[float]]:
    """{"flow train 8": seconds, ...} of trained models, in turns."""
    found = {method: calls_of(out, str(Path(out) / "model_final.pth")) for method, out in outs.items()}
    calls = {f"{method} {what}": call for method, (_, all_) in found.items() for what, call in all_.items()}
    times = harness.in_turns(calls, found[FLOW][0], repeats=5)
    return {name: [milliseconds / 1000 for milliseconds in values] for name, values in times.items()}


def peak_of(out: str, what: str) -> list[float]:
    """MiB that this process had at most, with three calls."""
    device, calls = calls_of(out)
    for _ in range(3):
        calls[what]()
    if device.startswith("cuda"):
        return [torch.cuda.max_memory_allocated() / MIB]
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def costs_of(outs: Mapping[str, Path]) -> dict[str, list[float]]:
    """{"flow train 8 s": seconds, "flow train 8 MiB": ..., "flow train 8 ratio": to flow's seconds, ...}."""
    file = outs[FLOW].parents[1] / "costs.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    done = {key.split()[0] for key in known}
    if missing := {method: str(out) for method, out in outs.items() if method not in done}:
        times = harness.alone(times_of, {FLOW: str(outs[FLOW]), **missing})
        for name, seconds in times.items():
            method, what = name.split(maxsplit=1)
            if method in missing:
                ratios = [mine / flow for mine, flow in zip(seconds, times[f"{FLOW} {what}"])]
                peak = harness.alone(peak_of, missing[method], what)
                known |= {f"{name} s": seconds, f"{name} ratio": ratios, f"{name} MiB": peak}
        file.write_text(json.dumps(known))
    return {key: values for key, values in known.items() if key.split()[0] in outs}


def rows_of(args: argparse.Namespace, rates: Mapping[str, float]) -> Iterator[list[Row]]:
    """Parts 2 to 4 of one set."""
    solver, outs = args.solver, {}
    for method, rate in rates.items():
        more = ["SOLVER.BASE_LR", rate, "TEST.EVAL_PERIOD", -(-solver.MAX_ITER // _EVALUATIONS)]
        yield STUDY.rows(args, method, partial(scores_of, method, "equal iterations"), more)
        outs[method] = STUDY.trained(args, method, 0, more=more)
    costs, of = costs_of(outs), result_of(outs[FLOW])
    memory = "allocated" if of["device"].startswith("cuda") else "process peak"
    metrics, made = (
        {"s": "time", "MiB": memory, "ratio": _RATIO},
        {"on": of["device"], "made_by": of["commit"]},
    )
    for key, values in costs.items():
        method, mode, batch, unit = key.split()
        where = (args.name, method, mode, metrics[unit], unit, "batch", batch)
        yield [measured(*where, values=values, note="seed 0, times in turns", **made)]
    for method, rate in rates.items():
        ratio = statistics.median(costs[f"{method} train {solver.IMS_PER_BATCH} ratio"])
        more = ["SOLVER.BASE_LR", rate, "SOLVER.MAX_ITER", max(round(solver.MAX_ITER / ratio), 1)]
        ways = {"more": more, "folder": "" if method == FLOW else f"{method}_minutes"}
        yield STUDY.rows(args, method, partial(scores_of, method, "equal minutes"), **ways)


def panels_of(rows: list[Row]) -> dict[str, tuple[str, dict]]:
    """AP over minutes, a panel for each set; without methods whose seconds a step are not measured yet."""
    steps = {(r.op, r.provider, r.metric): r.p50 for r in rows if r.mode == "train"}
    panels = {}
    for op in dict.fromkeys(op for op, *_ in steps):
        flow = steps[op, FLOW, "time"] / 60
        minute = {of: flow * steps[op, of, _RATIO] for name, of, _ in steps if name == op}
        curves = [r for r in rows if (r.op, r.mode, r.metric) == (op, "equal iterations", "AP")]
        timed = [(r, float(r.x_value) * minute[r.provider]) for r in curves if r.provider in minute]
        panels[op] = ("minutes", lines_of(r._replace(x_value=str(minutes)) for r, minutes in timed))
    return panels


def main() -> None:
    parser = harness.raw_parser(__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), metavar="SET")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to this, less one")
    parser.add_argument("--device", default="", help="cpu or cuda; else what there is")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.csv, .png")
    parser.add_argument("--name", default="peers", help="of the results")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides, last")
    args = parser.parse_args()
    of_sets = {subject: arguments_of(args, subject) for subject in dict.fromkeys([TUNED_ON, *args.sets])}
    rates = {}
    for method in dict.fromkeys([FLOW, *args.methods]):
        rates[method], rows = tuned_rate(of_sets[TUNED_ON], method)
        reported(rows, args.save and args.name)
    for subject in args.sets:
        for rows in rows_of(of_sets[subject], rates):
            reported(rows, args.save and args.name)
        if args.save:
            title = "AP of the test images over minutes of training"
            print(draw_panels(RESULTS / f"{args.name}.png", title, "AP (%)", panels_of(load_rows(args.name))))


if __name__ == "__main__":
    sys.exit(exit_status(main))

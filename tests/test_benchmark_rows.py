"""What the benchmarks share: rows of results, and when a training may be taken for another."""

import argparse
import contextlib
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_model import tiny_cfg
from tool_loader import ROOT

from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.engine.setup import load_config, resolve_classes
from dfm_d2.framework import get_cfg

sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import classification  # noqa: E402
import corruptions  # noqa: E402
import harness  # noqa: E402
import memory  # noqa: E402
import robustness  # noqa: E402
import robustness_detection  # noqa: E402
import runs  # noqa: E402
from harness import Row, draw_panels, lines_of, load_rows, quantiles, reported  # noqa: E402

from dfm_d2.engine.optimizer import build_block_optimizer  # noqa: E402
from dfm_d2.framework import build_model  # noqa: E402
from dfm_d2.local_update import block_optimizer, updates  # noqa: E402


def row(provider: str, value: float, x: str = "0", op: str = "a") -> Row:
    numbers = (value - 1, value, value + 1)
    return Row(op, provider, "eval", "accuracy", "%", "block", x, *numbers, "cpu", "2.8", "abc", "a, note")


def test_rows_are_printed_and_only_what_was_measured_again_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    reported([row("flow", 1.5), row("flow", 2.5, "1"), row("backprop", 3.0), row("flow", 9.0, op="b")], "x")
    assert reported([row("flow", 7.0)]) == [row("flow", 7.0)]  # without a name none is saved
    capsys.readouterr()
    assert reported(iter([row("flow", 4.0)]), "x") == [row("flow", 4.0)]
    printed = capsys.readouterr().out
    assert "flow" in printed and "accuracy 4 % [3, 5]" in printed and str(tmp_path / "x.csv") in printed
    found = {(r.op, r.provider, r.x_value): r.p50 for r in load_rows("x")}
    others = {("a", "flow", "1"): 2.5, ("a", "backprop", "0"): 3.0, ("b", "flow", "0"): 9.0}
    assert found == others | {("a", "flow", "0"): 4.0}
    assert load_rows("x")[-1] == row("flow", 4.0)


VARIANTS = [(accuracy, "--variants joint"), (classification, "--variants flow")]


@pytest.mark.parametrize("benchmark, words", [*VARIANTS, (classification, "--probe"), (robustness, "")])
def test_trainings_leave_the_rows_alone_without_save(benchmark, words, tmp_path, monkeypatch, capsys):
    found = [row("flow", 1.5)._replace(x_name="clean")]
    monkeypatch.setattr(runs.Study, "rows", lambda *args, **options: found)
    for module in (harness, classification, corruptions):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    config = str(ROOT / f"configs/{'shapes_flow_r18' if benchmark is accuracy else 'digits_flow_cnn'}.yaml")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--config", config, *words.split()])
    benchmark.main()
    assert "accuracy 1.5 %" in capsys.readouterr().out and not list(tmp_path.iterdir())
    sys.argv.append("--save")
    benchmark.main()
    assert len(list(tmp_path.glob("*.csv"))) == 1


@pytest.mark.parametrize(
    ("benchmark", "words", "said"),
    [
        ("accuracy", "--config configs/shapes_flow_r18.yaml --opts FOO.BAR 3", "FOO.BAR"),
        ("accuracy", "--config configs/shapes_flow_r18.yaml --opts DATASETS.VOC_ROOT /nope", "/nope"),
        ("classification", "--config configs/digits_flow_cnn.yaml --tune --opts FOO.BAR 3", "FOO.BAR"),
        *(
            (name, "--config /nope.yaml", "/nope.yaml")
            for name in ("robustness", "robustness_detection", "latency", "scaling")
        ),
    ],
)
def test_a_mistake_in_a_config_is_one_error_message(benchmark, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ROOT", tmp_path)  # of the trainings
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [benchmark, *words.split()])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / f"benchmarks/{benchmark}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert done.value.code == 2 and not list(tmp_path.iterdir())
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_commit_is_marked_where_more_than_results_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.commit() == "unknown"
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("benchmarks/results/a.csv", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert len(clean := harness.commit()) >= 7 and "+" not in clean
    (tmp_path / "benchmarks/results/a.csv").write_text("2")
    (tmp_path / "new.txt").write_text("2")
    assert harness.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert harness.commit() == clean + "+"


def test_quantiles_and_lines_in_the_order_of_x_and_a_picture(tmp_path):
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([0.0, 10.0]) == pytest.approx((2.0, 5.0, 8.0))
    lines = lines_of([row("flow", 2.0, "10"), row("flow", 1.0, "9"), row("backprop", 5.0)])
    flow = [(9.0, 0.0, 1.0, 2.0), (10.0, 1.0, 2.0, 3.0)]
    assert lines == {"flow": flow, "backprop": [(0.0, 4.0, 5.0, 6.0)]}
    panels = {"one": ("block", lines), "two": ("block", {})}
    picture = draw_panels(tmp_path / "a.png", "title", "accuracy (%)", panels).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_images_of_a_sorted_set_are_taken_from_all_of_it_and_variants_take_their_method_s_rate():
    loader = [[{"label": label}] * 10 for label in range(7)]
    kept = classification.spread(loader, 14)
    assert [item["label"] for batch in kept for item in batch] == [c for c in range(7) for _ in range(2)]
    assert classification.spread(loader, 100) == loader
    assert classification.tuned_as("no_readout") == classification.tuned_as("uniform_time") == "flow"
    assert classification.tuned_as("backprop_pool_2") == "backprop"


def test_a_training_of_other_values_is_not_taken(tmp_path):
    ran, study = ["OUTPUT_DIR", str(tmp_path), "MODEL.DFM.NUM_CLASSES", "10"], classification.STUDY
    config = str(ROOT / "configs/digits_flow_cnn.yaml")
    cfg = classification.load_config(study.task, config, [*ran, "MODEL.DEVICE", "cpu"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    samples = "MODEL.CLASSIFIER.SAMPLER.SAMPLES"
    same = "", f"TEST.EVAL_PERIOD 7 {samples} {cfg.MODEL.CLASSIFIER.SAMPLER.SAMPLES}"
    rate, other = "SOLVER.BASE_LR 0.5", f"{samples} 8"
    for changes in (*same, rate, other, "SOLVER.MAX_ITER 5", "UPDATE.METHOD backprop", "MODEL.DEVICE cuda"):
        taken, any_rate = changes in same, changes in (*same, rate)
        assert study.same_training(config, changes.split(), tmp_path) is taken, changes
        assert study.same_training(config, changes.split(), tmp_path, any_rate=True) is any_rate, changes


def test_a_training_that_chose_its_sizes_is_the_same(tmp_path):
    config, study = str(ROOT / "configs/photos.yaml"), accuracy.STUDY
    cfg = load_config(study.task, config, ["MODEL.DFM.NUM_PROPOSALS", "80", "INPUT.MIN_SIZE_TRAIN", "(9,)"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert study.same_training(config, [], tmp_path)
    assert not study.same_training(config, ["MODEL.DFM.NUM_PROPOSALS", "40"], tmp_path)
    assert not study.same_training(config, ["INPUT.MIN_SIZE_TRAIN", "(8,)"], tmp_path)


@pytest.mark.parametrize(
    ("objects", "batch_norm_is_frozen", "is_that_of_the_batch"),
    [((2, 2, 2), True, True), ((2, 2, 1), True, False), ((2, 2, 2), False, False)],
)
def test_accumulated_gradients_are_those_of_the_batch_only_where_its_images_are_alike(
    make_model, make_input, objects, batch_norm_is_frozen, is_that_of_the_batch
):
    """Each image has its own normaliser, and its own statistics of batch norm."""
    boxes = ((4.0, 6.0, 30.0, 40.0), (20.0, 8.0, 60.0, 44.0))
    batch, gradients = [make_input(str(i), boxes[:n]) for i, n in enumerate(objects)], []
    for accumulates in (False, True):
        model = make_model("CascadeDetector", ASSIGNMENT="path").double().train(not batch_norm_is_frozen)
        update, prepared = updates.build_update("joint"), model.prepare(batch, 0)
        if accumulates:
            update = memory.Accumulation(update)
            prepared = (model.prepare([item], 0) for item in batch)
        optimizer = build_block_optimizer(tiny_cfg(), model)
        update.backward(model, prepared, optimizer, contextlib.nullcontext)
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    expected, found = gradients
    assert expected.norm() > 0
    assert ((found - expected).norm() < 1e-9 * expected.norm()) == is_that_of_the_batch


@pytest.mark.slow
def test_a_batched_and_an_accumulating_update_can_be_simulated(monkeypatch, make_input):
    def tiny(subject, device, mode, count):
        cfg = tiny_cfg(ASSIGNMENT="path", NUM_PREDICTORS=count)
        cfg.merge_from_list(memory.DETECTOR[mode])
        return cfg, build_model(cfg), [make_input(name) for name in "abcd"]

    monkeypatch.setattr(memory, "detector", tiny)
    for module in (updates, block_optimizer):  # which a simulation replaces
        monkeypatch.setattr(module, "check_finite", module.check_finite)
    args = argparse.Namespace(subject="detector", device="simulate")
    together, alone = (memory.point(args, mode, 2) for mode in ("parallel", "sequential_accumulate"))
    assert alone["activations"][0] < 0.5 * together["activations"][0]
    assert together["feature gradients"] == [0] and alone["feature gradients"][0] > 0


def test_a_corruption_is_of_the_image_s_id_and_of_the_colours_that_the_config_names():
    cfg, generator = get_cfg(), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 20, 30), generator=generator, dtype=torch.uint8)
    batch = [{"image_id": name, "image": pixels} for name in ("a", "b")]
    for kind, severity in corruptions.CASES:
        cfg.INPUT.FORMAT = "RGB"
        (found,) = corruptions.corrupted_batches(cfg, [batch], kind, severity)
        ((again,),) = corruptions.corrupted_batches(cfg, [batch[1:]], kind, severity)
        assert torch.equal(found[1]["image"], again["image"]) and torch.equal(batch[0]["image"], pixels)
        assert torch.equal(found[0]["image"], pixels) == (kind == "clean")
        assert torch.equal(found[0]["image"], found[1]["image"]) == (kind in ("clean", "blur", "jpeg"))
        cfg.INPUT.FORMAT = "BGR"
        turned = [{"image_id": "a", "image": pixels.flip(0)}]
        ((bgr,),) = corruptions.corrupted_batches(cfg, [turned], kind, severity)
        assert kind == "noise" or torch.equal(bgr["image"].flip(0), found[0]["image"])
    grey, rng = np.full((20, 40, 3), 9, np.uint8), np.random.default_rng(0)
    assert (corruptions.corrupted(grey, "occlusion", 0.5, rng) == 0).sum() == 10 * 10 * 3


TINY = (
    "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 8 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 16 "
    "MODEL.DFM.HEAD.HIDDEN_DIM 16 MODEL.DFM.HEAD.FEEDFORWARD_DIM 32 MODEL.DFM.NUM_PREDICTORS 2 "
    "MODEL.DFM.NUM_PROPOSALS 8"
).split()


def test_detectors_are_evaluated_on_corrupted_images_and_again_only_by_what_is_missing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    for module in (harness, corruptions):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(corruptions, "SEVERITIES", {"noise": (100,), "occlusion": (0.5,)})
    monkeypatch.setattr(robustness_detection, "CASES", [("clean", 0.0), ("noise", 100), ("occlusion", 0.5)])
    write_shapes(tmp_path / "data", num_train=2, num_val=3, size=64, seed=0)
    config, study = str(ROOT / "configs/shapes_flow_r18.yaml"), robustness_detection.STUDY
    opts = [*TINY, "DATASETS.VOC_ROOT", str(tmp_path / "data")]
    for variant in ("sequential", "cascade"):
        out = tmp_path / f"output/train_net/tiny/{variant}/seed0"
        cfg = load_config(study.task, config, [*opts, *study.variants[variant], "MODEL.DFM.SEED", "0"])
        study.task.register(cfg)
        out.mkdir(parents=True)
        (out / "config.yaml").write_text(cfg.dump())
        classes = resolve_classes(cfg)
        model = study.task.build_model(cfg)
        SafeCheckpointer(model, str(out), cfg=cfg, class_names=classes).save("model_final")
        of = {"seconds": 1, "peak_mib": 1, "commit": "abc", "device": "cpu", "iterations": 0}
        (out / "result.json").write_text(json.dumps(of))

    evaluated, evaluate = [], robustness_detection.evaluate

    def watched(task, cfg, model):
        images = torch.cat([item["image"] for b in task.test_loader(cfg, cfg.DATASETS.TEST[0]) for item in b])
        evaluated.append((model.is_local, model.sampler.settings.steps, float(images.float().std())))
        return evaluate(task, cfg, model)

    monkeypatch.setattr(robustness_detection, "evaluate", watched)
    words = f"--config {config} --seeds 1 --name tiny --save --samplers steps_1 steps_4".split()
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--opts", *opts])
    robustness_detection.main()
    asked = [(local, steps) for local in (True, False) for steps in (1, 4)]
    assert [(local, steps) for local, steps, _ in evaluated] == [one for one in asked for _ in range(3)]
    deviations = [deviation for *_, deviation in evaluated]
    assert len(set(deviations[:3])) == 3 and deviations == deviations[:3] * 4
    rows = [r for r in load_rows("robustness_tiny") if r.metric == "AP50"]
    # A step asks one predictor of the chain, and both heads of the twin.
    asked = {("sequential", 1, 1), ("sequential", 4, 4)}
    asked |= {("cascade", 1, 2), ("cascade", 4, 8)}
    assert {(r.provider, r.mode, r.x_name) for r in rows} == {
        (variant, f"steps_{steps}, {number} evaluations", kind)
        for variant, steps, number in asked
        for kind in ("clean", "noise", "occlusion")
    }
    assert (tmp_path / "robustness_tiny.png").exists() and "AP50" in capsys.readouterr().out
    evaluated.clear()
    sys.argv[sys.argv.index("steps_4")] = "fresh_noise_2x1"
    robustness_detection.main()
    assert [(local, steps) for local, steps, _ in evaluated] == [(True, 1)] * 3 + [(False, 1)] * 3

"""What can be observed of a provider's models, detector_postprocess, checkpoints, evaluation and trace.

Functions as in observe_structures.
"""

import os
import tempfile
import warnings

import numpy as np
import torch
from observe_structures import raised


def observe_build_model(provider):
    class ContractModel(torch.nn.Linear):
        def __init__(self, cfg):
            super().__init__(1, len(cfg.MODEL.PIXEL_MEAN))

    registry = provider.META_ARCH_REGISTRY
    if "ContractModel" not in registry:
        registry.register(ContractModel)
    cfg, unknown = provider.get_cfg(), provider.get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "ContractModel"])
    unknown.MODEL.META_ARCHITECTURE = "NoSuchModel"
    return {
        "built": list(provider.build_model(cfg).weight.shape),
        "twice": raised(lambda: registry.register(ContractModel)),
        "unknown": raised(lambda: provider.build_model(unknown)),
    }


def observe_detector_postprocess(provider):
    rows = [[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 9.0], [-5.0, 3.0, 70.0, 60.0], [41.0, 1.0, 45.0, 9.0]]
    boxes, scores = provider.Boxes(torch.tensor(rows)), torch.tensor([0.9, 0.8, 0.7, 0.6])
    given = provider.Instances((30, 40), pred_boxes=boxes, scores=scores)
    result = provider.detector_postprocess(given, 60, 100)
    return {
        "boxes": result.pred_boxes.tensor.tolist(),
        "scores": result.scores.tolist(),
        "size": list(result.image_size),
        "given": given.pred_boxes.tensor.tolist(),
    }


_NORM = ("weight", "bias", "running_mean", "running_var")
# A model with names as a detector has them, its backbone's below `backbone`.
_SHAPES = {
    "pixel_mean": (3,),
    "backbone.stem.conv1.weight": (2, 3, 1, 1),
    **{f"backbone.stem.conv1.norm.{name}": (2,) for name in _NORM},
    "backbone.res2.0.conv1.weight": (2, 2, 1, 1),
    "backbone.res2.0.shortcut.weight": (2, 2, 1, 1),
    "head.weight": (2, 2),
    "head.bias": (2,),
}


def _loaded(provider, checkpoint: dict) -> dict:
    model = torch.nn.Module()
    for name, shape in _SHAPES.items():
        node, (*path, last) = model, name.split(".")
        for part in path:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        node.register_buffer(last, torch.zeros(shape))
    keys = provider.DetectionCheckpointer(model)._load_model(checkpoint)
    return {
        "sums": {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()},
        "missing": sorted(keys.missing_keys),
        "unexpected": sorted(keys.unexpected_keys),
        "shapes": sorted(shape[0] for shape in keys.incorrect_shapes),
    }


def observe_DetectionCheckpointer(provider):
    def filled(value, *shape):
        return np.full(shape, value, np.float32)

    ours = {"stem.conv1.weight": filled(1, 2, 3, 1, 1), "stem.fc.bias": filled(1, 1)}
    caffe2 = {
        **{"conv1_w": filled(1, 2, 3, 1, 1), "res_conv1_bn_s": filled(2, 2), "res_conv1_bn_b": filled(3, 2)},
        **{"res2_0_branch2a_w": filled(4, 2, 2, 1, 1), "res2_0_branch1_w": filled(5, 2, 2, 1, 1)},
        **{"res2_0_branch2b_bn_rm": filled(1, 2), "fc1000_w": filled(1, 2, 2)},
    }
    plain = {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(3), "other": torch.ones(1)}
    twice = {"weight": filled(1, 2, 2, 1, 1)}
    heuristics = {"matching_heuristics": True}
    with tempfile.TemporaryDirectory() as folder:
        model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        writer = provider.DetectionCheckpointer(model, folder)
        before = writer.has_checkpoint()
        writer.save("model_a")
        provider.DetectionCheckpointer(other, folder).resume_or_load("", resume=True)
        provider.DetectionCheckpointer(model, folder, save_to_disk=False).save("model_b")
        round_trip = {
            "has": [before, writer.has_checkpoint()],
            "model": torch.equal(model.weight, other.weight),
            "files": sorted(os.listdir(folder)),
            "last": os.path.basename(writer.get_checkpoint_file()),
            "nothing": provider.DetectionCheckpointer(other).load(""),
        }
    return {
        "by suffix": _loaded(provider, {"model": ours, **heuristics}),
        "caffe2": _loaded(provider, {"model": caffe2, "__author__": "Caffe2", **heuristics}),
        "plain": _loaded(provider, {"model": plain}),
        "ambiguous": raised(lambda: _loaded(provider, {"model": twice, **heuristics})),
        "round trip": round_trip,
    }


def observe_DatasetEvaluator(provider):
    evaluator = provider.DatasetEvaluator()
    return [evaluator.reset(), evaluator.process([], []), evaluator.evaluate()]


def observe_inference_on_dataset(provider):
    log = []

    class Evaluator(provider.DatasetEvaluator):
        answer = {"bbox": {"AP": 1.0}}

        def reset(self):
            log.append("reset")

        def process(self, inputs, outputs):
            log.append([inputs, outputs])

        def evaluate(self):
            log.append("evaluate")
            return self.answer

    class Model(torch.nn.Linear):
        def forward(self, batch):
            log.append([self.training, torch.is_grad_enabled()])
            return [super(Model, self).forward(torch.ones(1)).requires_grad for _ in batch]

    evaluator, model, loader = Evaluator(), Model(1, 1), [[1, 2], [3], [4]]
    first = provider.inference_on_dataset(model, loader, evaluator)
    after_training = model.training
    model.eval()
    evaluator.answer = None
    second = provider.inference_on_dataset(model, loader, evaluator)
    return [log, first, second, after_training, model.training, torch.is_grad_enabled()]


def observe_TracingAdapter(provider):
    class Halves(torch.nn.Module):
        """Dicts with an image and a number in, Instances in a dict out."""

        def forward(self, inputs):
            answers = []
            for item in inputs:
                corner = item["image"].mean(0)[:4, :4]
                found = provider.Instances((4, 6))
                found.scores = corner[:, 0] * item["a"]
                found.pred_boxes = provider.Boxes(corner + item["a"])
                answers.append({"instances": found, "also": (corner, [corner * 2])})
            return answers

    image, number, make = torch.arange(48.0).reshape(2, 4, 6), torch.tensor(0.5), provider.TracingAdapter
    inputs = [{"image": image, "a": number}]
    adapter = make(Halves(), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, adapter.flattened_inputs)
    short = make(Halves(), (inputs,), lambda model, items: model(items)[0]["instances"].scores)
    loose = make(Halves(), [{**inputs[0], "id": 7}], None, True)
    word = make(Halves(), inputs, lambda model, items: "word")
    return {
        "order of the inputs": [x.dim() for x in adapter.flattened_inputs],
        "answers": [x.flatten().tolist() for x in traced(number * 2, image + 1)],
        "function": [x.tolist() for x in short(*short.flattened_inputs)],
        "left out": [len(loose.flattened_inputs)],
        "left out, other inputs": raised(lambda: loose(number * 2, image)),
        "no tensor in": raised(lambda: make(Halves(), [{"image": 3}])),
        "no tensor out": raised(lambda: word(number, image)),
    }

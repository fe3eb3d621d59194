"""What can be observed of a provider's config, structures, models, data, checkpoints, evaluation, utilities.

A function `observe_NAME` takes a provider (of providers.py) and returns plain data, tensors and boxes about
its NAME. Equal answers of both are the contract; those of the real Detectron2 are the golden values.
"""

import os
import random
import tempfile
import warnings
from unittest import mock

import numpy as np
import torch
from providers import BUILTIN


def raised(function) -> str:
    """Name of the exception that a call raises, or "nothing"."""
    try:
        function()
    except Exception as error:  # noqa: BLE001  (any kind: its name is what is compared)
        return type(error).__name__
    return "nothing"


def leaves(cfg, prefix=""):
    """Full name and value of each key, sorted."""
    for key, value in sorted(cfg.items()):
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def observe_CfgNode(provider):
    cfg = provider.CfgNode({"A": {"NUMBER": 1, "WORD": "word", "LIST": (1, 2)}})
    copy = cfg.clone()
    copy.merge_from_list(["A.NUMBER", "3", "A.LIST", "[4, 5]", "A.WORD", "other"])
    return {"merged": [copy.A.NUMBER, copy.A.LIST, copy.A.WORD, cfg.A.NUMBER], "dump": copy.dump()}


def observe_get_cfg(provider):
    cfg = provider.get_cfg()
    found = dict(leaves(cfg))
    values = {key: [type(found[key]).__name__, found[key]] for key, _ in leaves(BUILTIN.get_cfg())}
    cfg.SEED = 7
    return {"values": values, "a new one each time": provider.get_cfg().SEED}


def observe_configurable(provider):
    def make(from_config=None):
        class Thing:
            @provider.configurable
            def __init__(self, a, b=2, *, c=3):
                self.values = [a, b, c]

        if from_config is not None:
            Thing.from_config = from_config
        return Thing

    thing = make(classmethod(lambda cls, cfg, b=20: {"a": cfg.A, "b": b}))
    no_classmethod = make(lambda self, cfg: {"a": cfg.A})
    cfg = provider.CfgNode({"A": 1})
    return {
        "explicit": thing(5, b=6).values,
        "from config": thing(cfg).values,
        "by keyword": thing(cfg=cfg).values,
        "to from_config": thing(cfg, b=30).values,
        "over from_config": thing(cfg, a=7, c=8).values,
        "without from_config": raised(lambda: make()(cfg)),
        "no classmethod": raised(lambda: no_classmethod(cfg)),
    }


def observe_Boxes(provider):
    rows = [[0.0, 1.0, 10.0, 21.0], [5.0, 5.0, 5.0, 9.0], [-4.0, 2.0, 60.0, 50.0]]
    make = provider.Boxes
    boxes = make(torch.tensor(rows, dtype=torch.float64))
    clipped, scaled = boxes[:], make(rows)
    clipped.clip((30, 40))
    scaled.scale(2.0, 0.5)
    return {
        "dtype": str(boxes.tensor.dtype),
        "from list": make(rows),
        "nonempty": [boxes.nonempty()],
        "clip": clipped,
        "scale": scaled,
        "slice": boxes[1:],
        "mask": boxes[torch.tensor([True, False, True])],
        "empty": make(torch.zeros(0)).tensor.shape,
        "to": boxes.to("cpu"),
        "wrong shape": raised(lambda: make(torch.zeros(2, 5))),
        "one number": raised(lambda: boxes[(0, 0)]),
        "clip of nan": raised(lambda: make(torch.tensor([[0.0, 0.0, float("nan"), 1.0]])).clip((2, 2))),
        "text": repr(boxes),
    }


def observe_BoxMode(provider):
    return int(provider.BoxMode.XYXY_ABS)


def observe_ImageList(provider):
    make = provider.ImageList.from_tensors
    images = [torch.ones(3, 5, 7), torch.full((3, 6, 4), 2.0)]
    both = make(images, size_divisibility=4, pad_value=-1.0)
    return {
        "shape": both.tensor.shape,
        "sizes": both.image_sizes,
        "sum": both.tensor.sum(),
        "padding": both.tensor[1, 0],
        "no divisibility": make(images).tensor.shape,
        "one image": make(images[:1], 32).tensor.shape,
        "bool": make([image > 0 for image in images], pad_value=0).tensor.sum(),
    }


def observe_Instances(provider):
    boxes, scores = provider.Boxes(torch.arange(12.0).reshape(3, 4)), torch.tensor([0.3, 0.2, 0.1])
    instances = provider.Instances((10, 20), boxes=boxes, scores=scores, names=["a", "b", "c"])
    text = repr(instances)
    instances.classes = torch.tensor([1, 2, 3])
    picked = instances[1]
    masked = provider.Instances((10, 20), boxes=boxes, scores=scores)[torch.tensor([True, False, True])]
    return {
        "size": instances.image_size,
        "length": len(instances),
        "fields": sorted(instances.get_fields()),
        "int": [picked.classes, picked.names, picked.boxes, picked.image_size],
        "mask": [masked.boxes, masked.scores],
        "to": instances.to(torch.device("cpu")).names,
        "text": text,
        "wrong length": raised(lambda: setattr(instances, "masks", torch.zeros(2))),
        "missing field": raised(lambda: instances.masks),
        "out of range": raised(lambda: instances[3]),
        "length of nothing": raised(lambda: len(provider.Instances((1, 1)))),
        "iteration": raised(lambda: list(iter(instances))),
    }


def observe_batched_nms(provider):
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [20.0, 20.0], [21.0, 20.0]])
    boxes = torch.cat([corners, corners + 10.0], dim=1)
    scores, classes = torch.tensor([0.5, 0.9, 0.4, 0.3, 0.8]), torch.tensor([0, 0, 1, 2, 2])
    nms = provider.batched_nms
    kept, half = nms(boxes, scores, classes, 0.5), nms(boxes.half(), scores, classes, 0.9)
    return {"kept": kept, "half": half, "none": nms(boxes[:0], scores[:0], classes[:0], 0.5)}


def observe_DatasetCatalog(provider):
    catalog, name = provider.DatasetCatalog, "dfm_contract_dataset"
    catalog.register(name, lambda: [{"image_id": 1}])
    seen = {
        "get": catalog.get(name),
        "twice": raised(lambda: catalog.register(name, list)),
        "unknown": raised(lambda: catalog.get("dfm_contract_other")),
    }
    catalog.remove(name)
    return {**seen, "removed": name in catalog}


def observe_MetadataCatalog(provider):
    catalog, name = provider.MetadataCatalog, "dfm_contract_metadata"
    facts = catalog.get(name).set(thing_classes=["a", "b"], evaluator_type="coco")
    seen = {
        "same object": catalog.get(name) is facts,
        "facts": [facts.name, facts.thing_classes],
        "missing": raised(lambda: facts.other),
    }
    catalog.remove(name)
    return {**seen, "removed": name in catalog, "new": getattr(catalog.get(name), "thing_classes", "gone")}


def observe_comm(provider):
    comm = provider.comm
    comm.synchronize()
    who = [comm.get_rank(), comm.get_world_size(), comm.is_main_process()]
    return [*who, comm.gather("x"), comm.all_gather({"y": 1})]


def observe_PathManager(provider):
    local = provider.PathManager.get_local_path
    handler = "iopath.common.file_io.HTTPURLHandler._get_local_path"
    with mock.patch(handler, lambda self, path, *args, **kwargs: path):
        address = local("detectron2://folder/name.pkl")
    return {"path of a local file": local(__file__) == __file__, "model zoo": address}


def observe_seed_all_rng(provider):
    """Numbers of the generators of Python and NumPy, and whether torch's repeat (its streams are its own)."""
    drawn = []
    for _ in range(2):
        provider.seed_all_rng(7)
        drawn.append([random.random(), np.random.rand(), torch.rand(2).tolist()])
    first, again = drawn
    torch.manual_seed(7)
    return {"numbers": first[:2], "repeats": first == again, "as torch": first[2] == torch.rand(2).tolist()}


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
        "built": provider.build_model(cfg).weight.shape,
        "twice": raised(lambda: registry.register(ContractModel)),
        "unknown": raised(lambda: provider.build_model(unknown)),
    }


def observe_detector_postprocess(provider):
    rows = [[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 9.0], [-5.0, 3.0, 70.0, 60.0], [41.0, 1.0, 45.0, 9.0]]
    boxes, scores = provider.Boxes(torch.tensor(rows)), torch.tensor([0.9, 0.8, 0.7, 0.6])
    given = provider.Instances((30, 40), pred_boxes=boxes, scores=scores)
    found = provider.detector_postprocess(given, 60, 100)
    answer = {"boxes": found.pred_boxes, "scores": found.scores, "size": found.image_size}
    return {**answer, "given": given.pred_boxes}


# A model with names as a detector has them, its backbone's below `backbone`.
_SHAPES = {"pixel_mean": (3,), "backbone.stem.conv1.weight": (2, 3, 1, 1)}
_SHAPES |= {f"backbone.stem.conv1.norm.{n}": (2,) for n in ("weight", "bias", "running_mean", "running_var")}
_SHAPES |= {f"backbone.res2.0.{name}.weight": (2, 2, 1, 1) for name in ("conv1", "shortcut")}
_SHAPES |= {"head.weight": (2, 2), "head.bias": (2,)}


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
        "sums": {name: tensor.double().sum() for name, tensor in model.state_dict().items()},
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
    twice, heuristics = {"weight": filled(1, 2, 2, 1, 1)}, {"matching_heuristics": True}
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
        "answers": [x.flatten() for x in traced(number * 2, image + 1)],
        "function": short(*short.flattened_inputs),
        "left out": [len(loose.flattened_inputs)],
        "left out, other inputs": raised(lambda: loose(number * 2, image)),
        "no tensor in": raised(lambda: make(Halves(), [{"image": 3}])),
        "no tensor out": raised(lambda: word(number, image)),
    }

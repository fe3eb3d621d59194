"""What can be observed of a provider's config, structures, layers, data and utilities.

A function `observe_NAME` takes a provider (of providers.py) and returns plain data about its NAME.
Equal answers of both providers are the contract; the answers of the real Detectron2 are the golden values.
"""

import random
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
        "from list": make(rows).tensor.tolist(),
        "nonempty": [boxes.nonempty().tolist()],
        "clip": clipped.tensor.tolist(),
        "scale": scaled.tensor.tolist(),
        "slice": boxes[1:].tensor.tolist(),
        "mask": boxes[torch.tensor([True, False, True])].tensor.tolist(),
        "empty": list(make(torch.zeros(0)).tensor.shape),
        "to": boxes.to("cpu").tensor.tolist(),
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
        "shape": list(both.tensor.shape),
        "sizes": [list(size) for size in both.image_sizes],
        "sum": both.tensor.sum().item(),
        "padding": both.tensor[1, 0].tolist(),
        "no divisibility": list(make(images).tensor.shape),
        "one image": list(make(images[:1], 32).tensor.shape),
        "bool": make([image > 0 for image in images], pad_value=0).tensor.sum().item(),
    }


def observe_Instances(provider):
    boxes, scores = provider.Boxes(torch.arange(12.0).reshape(3, 4)), torch.tensor([0.3, 0.2, 0.1])
    instances = provider.Instances((10, 20), boxes=boxes, scores=scores, names=["a", "b", "c"])
    text = repr(instances)
    instances.classes = torch.tensor([1, 2, 3])
    picked = instances[1]
    masked = provider.Instances((10, 20), boxes=boxes, scores=scores)[torch.tensor([True, False, True])]
    return {
        "size": list(instances.image_size),
        "length": len(instances),
        "fields": sorted(instances.get_fields()),
        "int": [picked.classes.tolist(), picked.names, picked.boxes.tensor.tolist(), list(picked.image_size)],
        "mask": [masked.boxes.tensor.tolist(), masked.scores.tolist()],
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
    scores = torch.tensor([0.5, 0.9, 0.4, 0.3, 0.8])
    classes = torch.tensor([0, 0, 1, 2, 2])
    return {
        "kept": provider.batched_nms(boxes, scores, classes, 0.5).tolist(),
        "half": provider.batched_nms(boxes.half(), scores, classes, 0.9).tolist(),
        "none": provider.batched_nms(boxes[:0], scores[:0], classes[:0], 0.5).tolist(),
    }


def observe_DatasetCatalog(provider):
    catalog = provider.DatasetCatalog
    name = "dfm_contract_dataset"
    catalog.register(name, lambda: [{"image_id": 1}])
    seen = {
        "get": catalog.get(name),
        "twice": raised(lambda: catalog.register(name, list)),
        "unknown": raised(lambda: catalog.get("dfm_contract_other")),
    }
    catalog.remove(name)
    return {**seen, "removed": name in catalog}


def observe_MetadataCatalog(provider):
    catalog = provider.MetadataCatalog
    name = "dfm_contract_metadata"
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

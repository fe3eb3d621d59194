"""Good files of every format that dfm_d2 reads, and what reads them, in the folder of the case."""

import contextlib
import gzip
import io
import itertools
import json
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from spoil import LISTS, NUMBERS, TEXTS, damaged, number_changed
from tiny_model import tiny_cfg
from toy_model import ToyModel, make_trainer, toy_config

from dfm_d2.classification.data.loader import build_class_train_loader
from dfm_d2.classification.data.registration import register_class_sets
from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.data.images import image_size, read_image
from dfm_d2.detection.data.loader import build_test_loader, build_train_loader
from dfm_d2.detection.data.overview import register_and_show
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.detection.detect_files import find_inputs
from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator
from dfm_d2.detection.loading import load_detector
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.checkpoint import SafeCheckpointer, class_names_of
from dfm_d2.engine.keys import get_key
from dfm_d2.engine.metrics import cut_back, read_metrics
from dfm_d2.engine.setup import load_config, run_tool, validate_config
from dfm_d2.engine.task import Task
from dfm_d2.engine.timm_models import build_timm_model
from dfm_d2.errors import UserError
from dfm_d2.export.formats import export_model
from dfm_d2.export.load import load_file
from dfm_d2.framework import LRScheduler
from dfm_d2.visualize.curves import draw_curves


class Target(NamedTuple):
    """Good files, {path: content}, and what must read them, of their folder. share: how often it is drawn."""

    files: dict[str, bytes]
    read: Callable[[random.Random], Any]
    share: int = 2
    spoil: bool = True  # else `read` spoils what it is given


def data_config(task: Task, root: str):
    cfg = load_config(task, "", ["DATASETS.ROOT", root, *DATA.split()])
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (24, 32), 32
    return cfg


def read_boxes(rng: random.Random) -> None:
    cfg = data_config(DETECTION, "data")
    (register_and_show if rng.random() < 0.1 else register_datasets)(cfg)
    next(iter(build_train_loader(cfg, 0)))
    list(build_test_loader(cfg, "root_test"))
    DetectionEvaluator("root_test", Path("out")).evaluate()


def read_classes(rng: random.Random) -> None:
    cfg = data_config(CLASSIFICATION, next(iter(sorted(map(str, Path("data").glob("*.tar")))), "data"))
    cfg.INPUT.IMAGE_SIZE = 8
    register_class_sets(cfg)
    next(iter(build_class_train_loader(cfg, 0)))


def read_pictures(rng: random.Random) -> None:
    with contextlib.suppress(UserError):
        list(map(read_image, find_inputs(["data"])[0]))
    for read, path in itertools.product((image_size, read_image), sorted(Path("data").iterdir())):
        with contextlib.suppress(UserError):
            read(path)


def read_foreign(rng: random.Random) -> None:
    """A picture in a format that is not read, under the name of one that is."""
    path = rng.choice(sorted(Path("data").iterdir()))
    content = path.read_bytes()
    Path("data/z.jpg").write_bytes(rng.choice([content, damaged(content, rng), number_changed(content, rng)]))
    read_pictures(rng)


def read_config(rng: random.Random) -> None:
    task = rng.choice([DETECTION, CLASSIFICATION])
    validate_config(task, load_config(task, "config.yaml", []))


def read_checkpoint(name: str, rng: random.Random) -> None:
    """As weights to start from, or as a run that continues."""
    path, model = f"data/{name}", ToyModel()
    if "weights" in path:
        SafeCheckpointer(model, cfg=toy_config()).load(path, [])
        return
    class_names_of(path)
    trainer = toy_trainer(model)
    SafeCheckpointer(model, cfg=toy_config(), class_names=["a", "b"], trainer=trainer).load(path)
    trainer.train(trainer.iter + 1, trainer.iter + 3)


def toy_trainer(model: ToyModel):
    trainer = make_trainer(model)
    trainer.register_hooks([LRScheduler()])
    return trainer


def read_detector(rng: random.Random) -> None:
    cfg = tiny_cfg(NUM_CLASSES=0)
    cfg.MODEL.WEIGHTS = "data/detector.pth"
    model, _ = load_detector(cfg)
    found = model([{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64, "image_id": "a"}])
    assert found[0]["instances"].pred_boxes.tensor.isfinite().all(), "boxes that are not finite"


def read_exported(name: str, rng: random.Random) -> None:
    run, _ = load_file(f"data/{name}")
    with contextlib.suppress(Exception):  # of a wrong graph
        run({"x": torch.ones(3, 2)})


def read_timm_weights(rng: random.Random) -> None:
    cfg = load_config(CLASSIFICATION, "", [])
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS = "test_resnet", "data/timm.pth"
    build_timm_model(cfg)


def read_last_metrics(rng: random.Random) -> None:
    cut_back("metrics.json", 3)
    if entries := read_metrics("metrics.json"):
        draw_curves("curves.png", entries)


def run_with_key(rng: random.Random) -> None:
    """A training of one step and its evaluation, with one config value spoilt, in a file or as a word."""
    task = rng.choice(list(OF_TASKS))
    words, cfg = dict(zip(*[iter(f"{DATA} {RUN} {OF_TASKS[task]}".split())] * 2)), load_config(task, "", [])
    key, file = rng.choice(leaves(cfg)), "detector.yaml" if task is DETECTION else ""
    fitting = {int: NUMBERS, float: NUMBERS, list: LISTS, tuple: LISTS}.get(type(get_key(cfg, key)), TEXTS)
    value = rng.choice(rng.choice([fitting, fitting, TEXTS]))
    print(f"{key} {ascii(value[:80])}", flush=True)
    if rng.random() < 0.5:
        words[key] = value
    else:
        words.pop(key, None)
        sections = "".join(f"\n{'  ' * depth}{name}:" for depth, name in enumerate(key.split(".")))
        text = f"_BASE_: [{file}]{sections} {value}\n"
        Path(file := "case.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    run_tool(task, ["--config-file", file, *(word for pair in words.items() for word in pair)])


DATA = "DATASETS.TRAIN ('root_train',) DATASETS.TEST ('root_test',) DATALOADER.NUM_WORKERS 0 SEED 5"
DATA += " SOLVER.IMS_PER_BATCH 2 OUTPUT_DIR out"
RUN = "SOLVER.MAX_ITER 1 SOLVER.LOG_PERIOD 1 MODEL.DEVICE cpu SOLVER.STEPS () SOLVER.WARMUP_ITERS 0"
OF_TASKS = {DETECTION: "DATASETS.ROOT data INPUT.MIN_SIZE_TRAIN (32,) INPUT.MIN_SIZE_TEST 32"}
OF_TASKS[DETECTION] += " DATASETS.TRAIN ('voc_root_train',) DATASETS.TEST ('voc_root_train',)"
OF_TASKS[CLASSIFICATION] = "DATASETS.ROOT classes INPUT.IMAGE_SIZE 8 MODEL.CLASSIFIER.CNN.CHANNELS (8,8,8)"


def leaves(node: dict, prefix: str = "") -> list[str]:
    named = [(f"{prefix}{key}", value) for key, value in node.items()]
    return [
        x for name, value in named for x in (leaves(value, f"{name}.") if isinstance(value, dict) else [name])
    ]


def image_bytes(kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    with contextlib.suppress(KeyError, OSError):  # a format that is not built in here
        Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind)
        return file.getvalue()
    return b""


def make_targets(folder: Path, in_child: Callable) -> dict[str, Target]:
    """in_child: runs a function in a child in a folder, which is to write the files of torch."""
    jpeg, png = image_bytes(), image_bytes("PNG")
    box = b"<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>25</ymax></bndbox>"
    size, label = (
        b"<size><width>40</width><height>30</height></size>",
        b"<name>cat</name><difficult>0</difficult>",
    )
    xml = b"<annotation>" + size + b"<object>" + label + box + b"</object></annotation>"
    voc = {f"data/Annotations/{name}.xml": xml for name in "ab"} | {"data/JPEGImages/a.jpg": jpeg}
    voc |= {"data/JPEGImages/b.png": png, "data/ImageSets/Main/train.txt": b"a\nb\n"}
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 40, "height": 30} for k in (1, 2)]
    boxes = [
        {"id": k, "image_id": k, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 150.0} for k in (1, 2)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "cat"}]}
    coco = {"data/annotations/instances_train.json": json.dumps(content).encode()}
    coco |= {f"data/train/{k}.jpg": jpeg for k in (1, 2)}
    yolo = {"data/images/a.jpg": jpeg, "data/images/b.png": png}
    yolo["data/data.yaml"] = b"train: images\nnames: [cat, dog]\n"
    yolo |= {f"data/labels/{name}.txt": b"0 .5 .5 .2 .3\n1 .1 .1 .2 .1 .2 .2\n" for name in "ab"}
    record = {"root": str(folder / "case/data"), "seed": 5, "held_out": ["a.jpg"]}
    yolo["out/split.json"] = json.dumps(record).encode()
    classes = {f"{split}/{c}/{k}.png": png for split in ("train", "test") for c in "ab" for k in "12"}
    with tarfile.open(fileobj=(tar := io.BytesIO()), mode="w") as packed:
        for name, data in classes.items():
            (entry := tarfile.TarInfo(name)).size = len(data)
            packed.addfile(entry, io.BytesIO(data))
    pixels = bytes((0, 0, 8, 3)) + struct.pack(">3I", 5, 2, 2) + bytes(range(20))
    labels = bytes((0, 0, 8, 1)) + struct.pack(">I", 5) + bytes((0, 1, 2, 0, 1))
    idx = {f"data/{split}-images-idx3-ubyte.gz": gzip.compress(pixels) for split in ("train", "t10k")}
    idx |= {f"data/{split}-labels-idx1-ubyte.gz": gzip.compress(labels) for split in ("train", "t10k")}
    foreign = {
        f"data/{k}": image_bytes(k) for k in "EPS DDS AVIF JPEG2000 ICO PCX TGA SGI IM PDF GIF".split()
    }
    pictures = {f"data/a.{k}": image_bytes(k) for k in ("jpeg", "png", "bmp", "webp", "tiff", "ppm")}
    detector = tiny_cfg(NUM_CLASSES=0, NUM_PREDICTORS=2).dump().encode()
    configs = {"config.yaml": b"_BASE_: base.yaml\n", "base.yaml": tiny_cfg().dump().encode()}
    keys = {f"classes/{name}": data for name, data in classes.items()} | {"detector.yaml": detector, **voc}
    lines = ({"iteration": k, "loss_cls/predictor0": 0.5, "lr": 1e-3, "bbox/AP": 1.0 * k} for k in range(4))
    metrics = "".join(json.dumps(line) + "\n" for line in lines).encode()
    targets = {
        "VOC": Target(voc, read_boxes, 3),
        "COCO": Target(coco, read_boxes, 3),
        "YOLO": Target(yolo, read_boxes, 3),
        "folders": Target({f"data/{name}": data for name, data in classes.items()}, read_classes),
        "tar": Target({"data/set.tar": tar.getvalue()}, read_classes),
        "idx": Target(idx, read_classes),
        "pictures": Target(pictures, read_pictures, 3),
        "foreign pictures": Target(foreign, read_foreign, 1, spoil=False),
        "config": Target(configs, read_config, 6),
        "metrics": Target({"metrics.json": metrics}, read_last_metrics, 1),
        "keys": Target(keys, run_with_key, 12, spoil=False),
    }
    found, said = in_child(save_files, folder / "made", random.Random(0))
    assert not found, said
    readers = {"detector.pth": read_detector, "timm.pth": read_timm_weights}
    readers |= {name: partial(read_exported, name) for name in ("model.pt2", "model.onnx")}
    for path in sorted((folder / "made").iterdir()):
        read = readers.get(path.name, partial(read_checkpoint, path.name))
        targets[path.name] = Target({f"data/{path.name}": path.read_bytes()}, read)
    return targets


def save_files(rng: random.Random) -> None:
    """In a child: a process that has computed a backward pass cannot fork one that does."""
    model, cfg = ToyModel(), tiny_cfg()
    trainer = toy_trainer(model)
    trainer.train(0, 2)
    SafeCheckpointer(model, ".", cfg=toy_config(), class_names=["a", "b"], trainer=trainer).save(
        "run", iteration=1
    )
    torch.save(torch.load("run.pth", weights_only=True), "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), "weights.pth")
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    zoo = {"model": arrays, "__author__": "me", "matching_heuristics": True}
    Path("weights_zoo.pkl").write_bytes(pickle.dumps(zoo))
    Path("weights_caffe2.pkl").write_bytes(pickle.dumps({"blobs": {**arrays, "a_momentum": np.zeros(2)}}))
    SafeCheckpointer(DETECTION.build_model(cfg), ".", cfg=cfg, class_names=["a", "b", "c"]).save("detector")
    Path("last_checkpoint").unlink()
    for format in ("pt2", "onnx"):
        export_model(Scaled().eval(), {"x": torch.ones(3, 2)}, format, ".", {"about": 1})
    torch.save(timm.create_model("test_resnet").state_dict(), "timm.pth")


class Scaled(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x):
        return torch.nn.functional.gelu(super().forward(x) * torch.tensor([1.0, 2.0]))

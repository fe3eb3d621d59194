"""Attack all that reads files and config values: damaged and hostile ones, by the thousand.

    python tests/attack/fuzz.py --seconds 600 --seed 0

A case takes good files, or a good config, spoils one place (bits flipped, pieces lost, values of another type, calls
in pickles and YAML tags, pipes and folders in the place of files) and reads it with dfm_d2 in a forked process of
limited time and memory. An answer is right, and so is an error message of one line. Code of the file that runs, a
crash, a traceback (or a message of many lines) and a hang are not: the last line counts them, the exit status is 1 if
there are any. A case is a function of its seed and number.
"""

import argparse
import contextlib
import faulthandler
import gc
import gzip
import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# ruff: noqa: E402
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
from dfm_d2.engine.setup import load_config, run_tool, validate_config
from dfm_d2.engine.task import Task
from dfm_d2.errors import UserError
from dfm_d2.export.formats import export_model
from dfm_d2.export.load import load_file
from dfm_d2.framework import LRScheduler
from dfm_d2.local_update import NonFiniteLossError

CPU_SECONDS, WALL_SECONDS, MEMORY = 10, 40, 3 * 2**30  # of a case; memory beyond what this process has
KINDS = ("code runs", "crashes", "tracebacks", "hangs")
OK, TRACEBACK, CODE = 0, 101, 102  # how a child ends
CANARY = "ran"  # the folder that payloads make
STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
)  # what nothing here has a reason to do

NUMBERS = ["-1", "0", "1", "2", "3", "0.5", "-0.5", "1e400", "1e38", "nan", "9" * 30, "9" * 400, "9" * 5000]
TEXTS = [
    "",
    "None",
    "true",
    "''",
    "()",
    "(1,)",
    "('a', 'b')",
    "x",
    "[[1]]",
    "{}",
    "{1: 2}",
    "1,2",
    "2024-01-01",
]
TEXTS += [
    "\0",
    "\ud800",
    "\\ud800",
    "\u202e",
    "'",
    '"',
    "<",
    "&a;",
    "..",
    "/dev/zero",
    "/",
    "~",
    "-",
    "$^{",
    "x" * 5000,
]
TEXTS += [
    "[" * 30_000,
    "{a: " * 3000,
    "(" * 300,
    "*a",
    "&a [*a]",
    f"!!python/object/apply:os.mkdir [{CANARY}]",
    *NUMBERS,
]
ABC = "abcdefghijklmnopqrstuvwxyz"
PAIRS = list(zip(ABC, ABC[1:]))
BOMBS = ["\n".join(["a: &a {z: 1}", *(f"{b}: &{b} {{x: *{a}, y: *{a}}}" for a, b in PAIRS), ""])]
BOMBS += ["\n".join(["a: &a [1]", *(f"{b}: &{b} [{f'*{a},' * 9}]" for a, b in PAIRS), ""])]
BOMBS += ["names: &n [*n]\n", '<!DOCTYPE a [<!ENTITY b "c">]>', "_BASE_: config.yaml\n"]
BOMBS += ["_BASE_: ./../case/./config.yaml\n"]


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


NAN = float("nan")
OBJECTS = [
    None,
    True,
    -1,
    0,
    2,
    0.5,
    NAN,
    10**30,
    "",
    "x" * 5000,
    b"x",
    [],
    [1, "a"],
    {},
    {"a": 1},
    {1: 2},
    (1, 2),
]
OBJECTS += [Payload(), np.zeros(0), np.full(2, NAN), np.ones(3, np.int64), np.float32(1), np.array(["a"])]
TENSORS = [
    torch.zeros(0),
    torch.full((2,), NAN),
    torch.ones(3, dtype=torch.int64),
    torch.tensor(1.0),
    torch.eye(2).to_sparse(),
]
TENSORS += [torch.zeros(1).expand(2**40), torch.empty(3, device="meta"), torch.ones(2, dtype=torch.cfloat)]


class Target(NamedTuple):
    """Good files, {path: content}, and what must read them, of their folder. share: how often it is drawn."""

    files: dict[str, bytes]
    read: Callable[[Path, random.Random], Any]
    share: int = 2
    spoil: bool = True  # else `read` spoils what it is given


def spoilt(name: str, content: bytes, rng: random.Random, others: list[bytes]) -> bytes | None:
    """The file, spoilt; None: something else than a file is to take its place."""
    kind, suffix = rng.randrange(12), Path(name).suffix
    if kind == 0:
        return None
    if kind == 1:
        return rng.choice([b"", b"\0" * 99, b"hello", b"\xff\xfe\xff", pickle.dumps(Payload()), *others])
    if kind < 6 or not content:
        return damaged(content, rng)
    swaps = {".pth": object_swapped, ".pkl": object_swapped, ".pt2": member_changed}
    swaps |= dict.fromkeys((".json", ".xml", ".txt", ".yaml"), token_swapped)
    return swaps.get(suffix, number_changed)(content, rng)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut short, or a piece repeated, lost or overwritten."""
    data, start, length = bytearray(content), rng.randrange(len(content) + 1), rng.choice([1, 4, 8, 200])
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        piece = rng.choice([b"", content[start : start + length] * 2, b"\xff" * length, b"\0" * length])
        return content[:start] + piece + content[start + length :]
    for _ in range(rng.choice([1, 1, 4, 64]) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def number_changed(content: bytes, rng: random.Random) -> bytes:
    """A number of 2 or 4 bytes in the header; of what is compressed by gzip, inside of it."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(number_changed(gzip.decompress(content), rng), 1)
    data = bytearray(content.ljust(64, b"\0"))
    struct.pack_into(
        rng.choice(["<H", ">H", "<I", ">I"]),
        data,
        rng.randrange(60),
        rng.choice([0, 1, 2, 255, 30_000, 65_535]),
    )
    return bytes(data)


def token_swapped(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    words = [match.span() for match in re.finditer(r'"[^"]*"|[\w.\-]+|\[.*?\]', text)]
    if rng.random() < 0.1 or not words:
        return (rng.choice(BOMBS) + text).encode()
    start, end = rng.choice(words)
    return (text[:start] + rng.choice(TEXTS) + text[end:]).encode("utf-8", "surrogatepass")


def object_swapped(content: bytes, rng: random.Random) -> bytes:
    """A pickle, or what torch saved, with something else in one place."""
    is_torch, is_zip, file = (
        b"torch" in content[:999] or content[:2] == b"PK",
        content[:2] == b"PK",
        io.BytesIO(),
    )
    tree = torch.load(io.BytesIO(content), weights_only=True) if is_torch else pickle.loads(content)  # noqa: S301
    holder, key = rng.choice(list(places(tree)))
    value = rng.choice(TENSORS if is_torch and rng.random() < 0.5 else OBJECTS)
    kind = rng.randrange(10)
    if kind > 1:
        holder[key] = value
    else:
        old = holder.pop(key)
        if kind and isinstance(holder, dict):
            holder[rng.choice([1, None, "x", ("a",)])] = old
    if is_torch:
        torch.save(tree, file, _use_new_zipfile_serialization=is_zip)
    else:
        pickle.dump(tree, file, rng.choice([2, 4]))
    return file.getvalue()


def places(tree: Any, weight: int = 12) -> Iterator[tuple[Any, Any]]:
    """Where something can be put: a dict or list and a key of it, those higher up more often."""
    for key in (
        list(tree)[:60] if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    ):
        yield from [(tree, key)] * weight
        yield from places(tree[key], max(weight - 4, 1))


def member_changed(content: bytes, rng: random.Random) -> bytes:
    """Of an archive, one member changed and packed again with the right checksum."""
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file := io.BytesIO(), "w") as target:
        chosen = rng.choice(source.namelist())
        for name in source.namelist():
            change = (
                (token_swapped if name.endswith(".json") else damaged)
                if name == chosen
                else lambda data, _: data
            )
            target.writestr(name, change(source.read(name), rng))
    return file.getvalue()


def put(path: Path, content: bytes | None, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)
        return
    make = [path.mkdir, lambda: None, lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path)]
    make += [] if path.suffix == ".yaml" else [lambda: os.mkfifo(path)]  # a config may come through a pipe
    rng.choice(make)()


# ---- what reads them, in the folder of the case


def data_config(task: Task, root: str = "data"):
    values = {"ROOT": root, "TRAIN": "('root_train',)", "TEST": "('root_test',)"}
    cfg = load_config(
        task, "", [word for key, value in values.items() for word in (f"DATASETS.{key}", value)]
    )
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.SEED, cfg.OUTPUT_DIR = (24, 32), 32, 5, "out"
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    return cfg


def read_boxes(rng: random.Random) -> None:
    cfg = data_config(DETECTION)
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
    for read in (
        lambda path: list(map(read_image, find_inputs([str(path.parent)])[0])),
        image_size,
        read_image,
    ):
        for path in sorted(Path("data").iterdir()):
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


def read_exported(rng: random.Random) -> None:
    run, _ = load_file("data/model.pt2")
    with contextlib.suppress(
        RuntimeError, AssertionError, LookupError, TypeError, ValueError
    ):  # a wrong graph
        run({"x": torch.ones(3, 2)})


RUN = "SEED 1 SOLVER.MAX_ITER 1 SOLVER.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1 DATALOADER.NUM_WORKERS 0 MODEL.DEVICE cpu"
RUN += " SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 OUTPUT_DIR out DATASETS.TEST ('root_train',) DATASETS.TRAIN ('root_train',)"
OF_TASKS = {DETECTION: "DATASETS.ROOT data INPUT.MIN_SIZE_TRAIN (32,) INPUT.MIN_SIZE_TEST 32"}
OF_TASKS[CLASSIFICATION] = "DATASETS.ROOT classes INPUT.IMAGE_SIZE 8 MODEL.CLASSIFIER.CNN.CHANNELS (8,8,8)"


def run_with_key(rng: random.Random) -> None:
    """A training of one step and its evaluation, with one value of the config spoilt, in a file or as a word."""
    task = rng.choice(list(OF_TASKS))
    words = dict(zip(*[iter(f"{RUN} {OF_TASKS[task]}".split())] * 2))
    key, value = rng.choice(leaves(load_config(task, "", []))), rng.choice(rng.choice([TEXTS, NUMBERS]))
    print(f"{key} {value[:80]!r}", flush=True)
    file = "detector.yaml" if task is DETECTION else ""
    if rng.random() < 0.5:
        words[key] = value
    else:
        words.pop(key, None)
        sections = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(key.split(".")))
        text = (f"_BASE_: {file}\n" if file else "") + f"{sections[:-1]} {value}\n"
        Path(file := "case.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    run_tool(task, ["--config-file", file, *(word for pair in words.items() for word in pair)])


def leaves(node: dict, prefix: str = "") -> list[str]:
    return [
        n
        for k, v in node.items()
        for n in (leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [prefix + k])
    ]


# ---- good files


def image_bytes(kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    with contextlib.suppress(KeyError, OSError):  # a format that is not built in here
        Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind)
        return file.getvalue()
    return b""


def make_targets(folder: Path) -> dict[str, Target]:
    jpeg, png, size = image_bytes(), image_bytes("PNG"), "<size><width>40</width><height>30</height></size>"
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>25</ymax></bndbox>"
    xml = f"<annotation>{size}<object><name>cat</name><difficult>0</difficult>{box}</object></annotation>".encode()
    voc = {f"data/Annotations/{name}.xml": xml for name in "ab"}
    voc |= {
        "data/JPEGImages/a.jpg": jpeg,
        "data/JPEGImages/b.png": png,
        "data/ImageSets/Main/train.txt": b"a\nb\n",
    }
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 40, "height": 30} for k in (1, 2)]
    boxes = [
        {"id": k, "image_id": k, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 150.0} for k in (1, 2)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "cat"}]}
    coco = {"data/annotations/instances_train.json": json.dumps(content).encode()}
    coco |= {f"data/train/{k}.jpg": jpeg for k in (1, 2)}
    yolo = {
        "data/data.yaml": b"train: images\nnames: [cat, dog]\n",
        "data/images/a.jpg": jpeg,
        "data/images/b.png": png,
    }
    yolo |= {f"data/labels/{name}.txt": b"0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.2 0.1 0.2 0.2\n" for name in "ab"}
    yolo["out/split.json"] = json.dumps(
        {"root": str(folder / "case/data"), "seed": 5, "held_out": ["a.jpg"]}
    ).encode()
    classes = {f"classes/{split}/{c}/{k}.png": png for split in ("train", "test") for c in "ab" for k in "12"}
    with tarfile.open(fileobj=(tar := io.BytesIO()), mode="w") as packed:
        for name, data in classes.items():
            (entry := tarfile.TarInfo(name)).size = len(data)
            packed.addfile(entry, io.BytesIO(data))
    pixels = bytes((0, 0, 8, 3)) + struct.pack(">3I", 5, 2, 2) + bytes(range(20))
    labels = bytes((0, 0, 8, 1)) + struct.pack(">I", 5) + bytes((0, 1, 2, 0, 1))
    idx = {"data/train-images-idx3-ubyte.gz": gzip.compress(pixels), "data/train-labels-idx1-ubyte": labels}
    foreign = {
        f"data/{k}": image_bytes(k) for k in "EPS DDS AVIF JPEG2000 ICO PCX TGA SGI IM PDF GIF".split()
    }
    pictures = {f"data/a.{k}": image_bytes(k) for k in ("jpeg", "png", "bmp", "webp", "tiff", "ppm")}
    detector = {"detector.yaml": tiny_cfg(NUM_CLASSES=0, NUM_PREDICTORS=2).dump().encode()}
    targets = {
        "VOC": Target(voc, read_boxes, 3),
        "COCO": Target(coco, read_boxes, 3),
        "YOLO": Target(yolo, read_boxes, 3),
        "class folders": Target(
            {name.replace("classes", "data"): data for name, data in classes.items()}, read_classes
        ),
        "tar": Target({"data/set.tar": tar.getvalue()}, read_classes),
        "idx": Target(idx, read_classes),
        "pictures": Target(pictures, read_pictures, 3),
        "foreign pictures": Target(foreign, read_foreign, 1, spoil=False),
        "config": Target(
            {"config.yaml": b"_BASE_: base.yaml\n", "base.yaml": tiny_cfg().dump().encode()}, read_config, 6
        ),
        "keys": Target({**classes, **voc, **detector}, run_with_key, 12, spoil=False),
    }
    found, said = in_child(save_files, folder / "made", random.Random(0))
    assert not found, said
    for path in sorted((folder / "made").iterdir()):
        read = {"detector.pth": read_detector, "model.pt2": read_exported}.get(
            path.name, partial(read_checkpoint, path.name)
        )
        targets[path.name] = Target(
            {f"data/{path.name}": path.read_bytes()}, read, 1 if read is read_exported else 2
        )
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
    export_model(Scaled().eval(), {"x": torch.ones(3, 2)}, "pt2", ".", {"about": 1})


class Scaled(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x):
        return torch.nn.functional.gelu(super().forward(x) * torch.tensor([1.0, 2.0]))


# ---- cases


def in_child(read: Callable[[random.Random], Any], folder: Path, rng: random.Random) -> tuple[str, str]:
    """Read in a child in that folder: (which of KINDS it ended in, or "", and what it printed)."""
    folder.mkdir(exist_ok=True)
    log = folder.with_suffix(".txt")
    if not (child := os.fork()):
        ended = TRACEBACK
        try:
            ended = limited(read, folder, log, rng)
        finally:
            os._exit(ended)
    deadline, pid = time.monotonic() + WALL_SECONDS, 0
    while not pid and time.monotonic() < deadline:
        time.sleep(0.002)
        pid, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what it has started
    ended = os.waitstatus_to_exitcode(status if pid else os.waitpid(child, 0)[1])
    of_exit = {OK: "", TRACEBACK: "tracebacks", CODE: "code runs"} | dict.fromkeys(
        (-signal.SIGXCPU, -signal.SIGKILL), "hangs"
    )
    return of_exit.get(ended, "crashes"), log.read_text(errors="replace")


def limited(read: Callable[[random.Random], Any], folder: Path, log: Path, rng: random.Random) -> int:
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: here + MEMORY,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_FSIZE: 2**28,
    }
    for limit, value in (limits | {resource.RLIMIT_CORE: 0}).items():
        resource.setrlimit(limit, (value, value))

    def watch(event: str, arguments: tuple) -> None:
        if event in STARTS or (event == "os.mkdir" and Path(os.fsdecode(arguments[0])).name == CANARY):
            os.write(2, f"{event} {arguments}\n".encode())
            os._exit(CODE)

    sys.addaudithook(watch)
    try:
        read(rng)
    except (UserError, NonFiniteLossError) as error:
        print(ascii(error)[:2000])
        return TRACEBACK if "\n" in str(error) or len(str(error)) > 1500 else OK
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        return OK if isinstance(error, SystemExit) else TRACEBACK
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return OK


def preload(target: Target, folder: Path) -> None:
    """Check that the good files are read, and import here what that imports."""

    def read(rng: random.Random) -> None:
        target.read(rng)
        Path("modules").write_text("\n".join(sys.modules))

    for name, content in target.files.items():
        put(folder / name, content, random.Random(0))
    found, said = in_child(read, folder, random.Random(1))
    assert not found, said
    for module in (folder / "modules").read_text().split() if (folder / "modules").exists() else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a target: VOC, keys, ...")
    parser.add_argument("--case", type=int, help="run this one, print what it prints and leave its files")
    parser.add_argument("--self-test", action="store_true", help="plant one of each kind: all must be found")
    args, counts, seen = parser.parse_args(), Counter(), set()
    folder, start = Path(tempfile.mkdtemp(prefix="fuzz")), time.monotonic()
    torch.set_num_threads(1)
    if args.self_test:
        bad = (
            lambda: pickle.loads(pickle.dumps(Payload())),
            faulthandler._sigsegv,
            lambda: {}["a"],
            signal.pause,
        )  # noqa: S301
        targets = {
            kind: Target({}, lambda _, run=run: run(), 1, spoil=False) for kind, run in zip(KINDS, bad)
        }
    else:
        targets = make_targets(folder)
        for name, target in targets.items():
            preload(target, folder / f"good {name}")
    gc.freeze()
    others = [content for target in targets.values() for content in target.files.values()]
    names = [name for name in targets for _ in range(targets[name].share) if args.only in (None, name)]
    number = args.case or 0
    while time.monotonic() < start + args.seconds and not (args.self_test and number == len(KINDS)):
        rng, name = random.Random(f"{args.seed} {number}"), names[number % len(names)]
        target, case = targets[name], folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        victim = rng.choice(sorted(target.files)) if target.spoil else ""
        for path, content in target.files.items():
            put(case / path, spoilt(path, content, rng, others) if path == victim else content, rng)
        found, said = in_child(target.read, case, rng)
        counts[found] += 1
        lines = [line.strip()[:150] for line in said.splitlines() if line.strip()] or [""]
        if found and (found, name, lines[-1]) not in seen or args.case is not None:
            seen.add((found, name, lines[-1]))
            where = [line for line in lines if line.startswith("File ")][-1:]
            print(f"{found}: case {number} ({name} {victim}): {lines[-1]} {where} {lines[0]}", flush=True)
        number += 1
        if args.case is not None:
            print(said[-5000:], f"The files are in {case}")
            return 0
    shutil.rmtree(folder)
    print(f"{number} cases: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    return int(any(counts[kind] != args.self_test for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())

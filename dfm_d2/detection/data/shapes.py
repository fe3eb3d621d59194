"""The generated VOC-format set: coloured shapes that occlude each other on textured backgrounds.

Image i of a split is a pure function of (seed, split, i, size): the same bytes every time. How a scene is
drawn is in shapes_scene.py; this file writes the folder:

    <out>/Annotations/*.xml  ImageSets/Main/{train,val}.txt  JPEGImages/*.jpg  shapes.json  samples.png
"""

import io
import json
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from dfm_d2.data.files import write_atomically, write_text_atomically
from dfm_d2.detection.data.shapes_scene import SHAPE_CLASSES, Scene, draw_scene
from dfm_d2.detection.data.voc import split_members

FORMAT_VERSION = 1  # raise it when the same parameters would give other images
_MIN_SIZE = 32  # below this, 5% of the side is not even two pixels
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 4, 6


def write_shapes(out: str | Path, num_train: int, num_val: int, size: int, seed: int) -> bool:
    """Write the set to the folder `out`, or do nothing if exactly this set is there already.

    Args:
        out: folder, made if needed. An interrupted run is taken up again.
        num_train, num_val: number of images of each split.
        size: side of the square images in pixels, at least 32.
        seed: any non-negative integer.

    Returns True if it wrote, False if the set was complete.
    Raises ValueError for bad numbers, FileExistsError if `out` holds anything else.
    """
    if num_train < 1 or num_val < 1 or size < _MIN_SIZE or seed < 0:
        raise ValueError(
            f"Cannot generate {num_train} + {num_val} images of {size} px with seed {seed}: "
            f"give at least 1 image a split, {_MIN_SIZE} px or more and a seed of 0 or more."
        )
    out = Path(out)
    splits = {"train": num_train, "val": num_val}
    parameters = {"format": FORMAT_VERSION, "splits": splits, "size": size, "seed": seed}
    if _is_complete(out, parameters):
        return False
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write_state(out, parameters, complete=False)
    samples = []
    with tqdm(total=num_train + num_val, desc="shapes", unit="image", mininterval=1.0) as bar:
        for split, number in splits.items():
            names = [image_name(split, index) for index in range(number)]
            for index, name in enumerate(names):
                scene = draw_scene(seed, split, index, size)
                _write_scene(out, name, scene)
                if split == "val" and len(samples) < _SAMPLE_ROWS * _SAMPLE_COLUMNS:
                    samples.append(scene)
                bar.update()
            write_text_atomically(out / "ImageSets" / "Main" / f"{split}.txt", "\n".join(names) + "\n")
    write_atomically(out / "samples.png", lambda file: file.write(_samples_png(samples, size)))
    _write_state(out, parameters, complete=True)
    return True


def image_name(split: str, index: int) -> str:
    """File stem (and image id) of image `index` of a split."""
    return f"{split}_{index:06d}"


def _write_state(out: Path, parameters: dict, complete: bool) -> None:
    write_text_atomically(
        out / "shapes.json", json.dumps({**parameters, "complete": complete}, indent=1) + "\n"
    )


def _is_complete(out: Path, parameters: dict) -> bool:
    """True if `out` holds exactly this set; False if it may be (re)written; FileExistsError if neither."""
    state_path = out / "shapes.json"
    if not out.exists() or not any(out.iterdir()):
        return False
    if not state_path.is_file():
        raise FileExistsError(
            f"{out} has files but no shapes.json, so it is not a shapes set: choose another folder."
        )
    try:
        state = json.loads(state_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileExistsError(f"{state_path} is not json ({error}): remove the folder {out}.") from error
    complete = state.pop("complete", False) if isinstance(state, dict) else False
    if state != parameters:
        raise FileExistsError(
            f"{out} holds a shapes set with other parameters ({json.dumps(state)}): "
            "remove the folder or choose another."
        )
    return bool(complete) and not _missing_files(out, parameters["splits"])


def _missing_files(out: Path, splits: dict[str, int]) -> bool:
    """Whether any image, annotation or split list of a complete set is gone."""
    for split, number in splits.items():
        names = [image_name(split, index) for index in range(number)]
        if not (out / "ImageSets" / "Main" / f"{split}.txt").is_file():
            return True
        if list(split_members(out, split)) != names:
            return True
        for name in names:
            if not (out / "JPEGImages" / f"{name}.jpg").is_file():
                return True
            if not (out / "Annotations" / f"{name}.xml").is_file():
                return True
    return False


def _write_scene(out: Path, name: str, scene: Scene) -> None:
    # Plain writes: shapes.json says "complete" only after the last one, and a rerun writes all again.
    Image.fromarray(scene.pixels).save(out / "JPEGImages" / f"{name}.jpg", quality=95)
    (out / "Annotations" / f"{name}.xml").write_text(_scene_xml(name, scene), encoding="utf-8")


def _scene_xml(name: str, scene: Scene) -> str:
    """The annotation in VOC's convention: pixels from 1, xmax and ymax inside the box."""
    height, width = scene.pixels.shape[:2]
    objects = "".join(
        f"<object><name>{escape(SHAPE_CLASSES[label])}</name><truncated>{int(hidden > 0.05)}</truncated>"
        f"<difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>\n"
        for label, (x0, y0, x1, y1), hidden in zip(scene.labels, scene.boxes_xyxy, scene.hidden)
    )
    return (
        f"<annotation>\n<folder>JPEGImages</folder><filename>{name}.jpg</filename>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
        f"{objects}</annotation>\n"
    )


def _samples_png(samples: list[Scene], size: int) -> bytes:
    """A grid of images with their boxes drawn, as PNG."""
    cell = size + 4
    grid = Image.new("RGB", (_SAMPLE_COLUMNS * cell, -(-len(samples) // _SAMPLE_COLUMNS) * cell), "white")
    for number, scene in enumerate(samples):
        picture = Image.fromarray(np.copy(scene.pixels))
        draw = ImageDraw.Draw(picture)
        for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes_xyxy):
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="red")
            draw.text((x0 + 2, y0), SHAPE_CLASSES[label], fill="yellow", stroke_width=1, stroke_fill="black")
        grid.paste(picture, (number % _SAMPLE_COLUMNS * cell, number // _SAMPLE_COLUMNS * cell))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()

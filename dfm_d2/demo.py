r"""Detect in images, folders and videos, and write what was found.

python -m dfm_d2.demo --config-file output/demo/config.yaml --weights output/demo/model_final.pth \
    --input a.jpg folder/ film.mp4 --output found
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import tqdm

from dfm_d2.data.files import paths_by_stem, write_atomically, write_text_atomically
from dfm_d2.data.images import ImageError, read_image
from dfm_d2.detection.flow_predictor import FlowPredictor
from dfm_d2.errors import UserError, input_errors
from dfm_d2.framework import Instances
from dfm_d2.visualize import paint_detections

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


class VideoError(ValueError):
    """A video that cannot be read; the message names it."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is no video that OpenCV can read: convert it, for example to mp4.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 some inputs could not be read, 2 something that the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m dfm_d2.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, help="checkpoint of the detector")
    parser.add_argument("--input", nargs="+", required=True, help="images, folders of images, videos")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--confidence-threshold", type=float, default=0.3, help="least score that is drawn")
    parser.add_argument("--batch-size", type=int, default=1, help="images or frames computed at once")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    args = parser.parse_args(arguments)
    try:
        with input_errors():
            images, videos = find_inputs(args.input)
            folder = Path(args.output)
            answers = list(zip(videos, answer_files(videos, folder, ".mp4")))
            pictures = answer_files(images, folder, ".png")
            predictor = FlowPredictor.from_files(args.config_file, args.weights, args.opts, args.batch_size)
            failures = _images(predictor, images, pictures, args.confidence_threshold)
            for video, answer in answers:
                try:
                    _video(predictor, video, answer, args.confidence_threshold)
                except VideoError as error:
                    failures.append(str(error))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def find_inputs(names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Image files and video files; of a folder, those with the ending of an image.

    Raises ValueError for a name that does not exist, and where nothing is left.
    """
    images, videos = [], []
    for name in names:
        path = Path(name)
        if path.is_dir():
            images += sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        elif not path.is_file():
            raise UserError(f"{name} does not exist: check the path.")
        else:
            (videos if path.suffix.lower() in VIDEOS else images).append(path)
    if not images and not videos:
        raise UserError(f"{', '.join(names)} holds no image: files must end in one of {', '.join(IMAGES)}.")
    return images, videos


def answer_files(files: Sequence[Path], folder: Path, ending: str) -> list[Path]:
    """Where the answer of each file is written: its name in `folder`, with a number where that is taken.

    Raises ValueError where that would overwrite one of the files.
    """
    found = paths_by_stem(files, folder, ending)
    inputs = {file.resolve() for file in files}
    for path in found:
        if path.resolve() in inputs:
            raise UserError(f"--output {folder} would overwrite the input {path}: choose another folder.")
    return found


def _images(
    predictor: FlowPredictor, files: Sequence[Path], pictures: Sequence[Path], threshold: float
) -> list[str]:
    """Write the picture of each file and detections.json of all; returns what could not be read."""
    failures: list[str] = []
    waiting: list[tuple[Path, Path]] = []

    def names() -> Iterator[Path]:
        for file, picture in zip(files, pictures):
            waiting.append((file, picture))
            yield file

    def fail(error: ImageError) -> None:
        waiting.pop()
        failures.append(str(error))
        bar.update()

    found: dict[str, dict] = {}
    with tqdm.tqdm(total=len(files), desc="images", unit="image", disable=not files) as bar:
        for instances in predictor.stream(names(), on_error=fail):
            file, picture = waiting.pop(0)
            painted = paint_detections(read_image(file), instances, predictor.class_names, threshold)
            _write_png(picture, painted)
            found[picture.stem] = {
                "file": str(file),
                "detections": as_dicts(instances, predictor.class_names),
            }
            bar.update()
    if files:
        write_text_atomically(pictures[0].with_name("detections.json"), json.dumps(found, indent=1) + "\n")
    return failures


def as_dicts(instances: Instances, class_names: Sequence[str]) -> list[dict]:
    """Detections as plain values: box_xyxy in pixels of the image, score, class."""
    rows = zip(
        instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
    )
    return [{"box_xyxy": box, "score": score, "class": class_names[label]} for box, score, label in rows]


def _video(predictor: FlowPredictor, file: Path, path: Path, threshold: float) -> None:
    """Write the video `path` with what was found in each frame of `file`.

    Raises VideoError where OpenCV reads no frame, ValueError where it cannot write.
    """
    source = cv2.VideoCapture(str(file))
    size = tuple(int(source.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not source.isOpened() or min(size) < 1:
        raise VideoError(file)
    rate = source.get(cv2.CAP_PROP_FPS) or 25.0
    path.parent.mkdir(parents=True, exist_ok=True)
    target = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not target.isOpened():
        raise UserError(f"{path} cannot be written: OpenCV has no mp4 encoder here.")
    swap = predictor.cfg.INPUT.FORMAT == "RGB"
    waiting: list[np.ndarray] = []

    def frames() -> Iterator[np.ndarray]:
        while True:
            there, frame = source.read()
            if not there:
                return
            waiting.append(np.ascontiguousarray(frame[:, :, ::-1]))
            yield waiting[-1] if swap else frame

    total = int(source.get(cv2.CAP_PROP_FRAME_COUNT))
    written = 0
    try:
        for instances in tqdm.tqdm(
            predictor.stream(frames()), desc=file.name, unit="frame", total=total if total > 0 else None
        ):
            painted = paint_detections(waiting.pop(0), instances, predictor.class_names, threshold)
            target.write(painted[:, :, ::-1])
            written += 1
    finally:
        source.release()
        target.release()
    if not written:
        path.unlink(missing_ok=True)
        raise VideoError(file)


def _write_png(path: Path, image: np.ndarray) -> None:
    done, content = cv2.imencode(".png", image[:, :, ::-1])
    if not done:
        raise UserError(f"{path} cannot be encoded as PNG")
    write_atomically(path, lambda file: file.write(content.tobytes()))


if __name__ == "__main__":
    sys.exit(main())

"""Detections in images, folders and videos as pictures, JSON and videos: the work of tools/detect.py."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import tqdm

from dfm_d2.data.files import paths_by_stem, write_atomically, write_text_atomically
from dfm_d2.data.images import ImageError, read_image
from dfm_d2.engine.setup import check_weights
from dfm_d2.errors import UserError
from dfm_d2.visualize.paint import paint_detections

if TYPE_CHECKING:
    from dfm_d2.detection.flow_predictor import FlowPredictor
    from dfm_d2.framework import CfgNode

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def detect_files(
    cfg: "CfgNode", inputs: Sequence[str], output: str | Path, batch_size: int, threshold: float | str
) -> list[str]:
    """Write into `output` a picture of each image, detections.json of all images, and each video.

    cfg: with MODEL.WEIGHTS. inputs: images, folders of images, videos. batch_size: images or frames that are
    computed at once. threshold: least score that is drawn, or "auto", see calibration.chosen_threshold.
    Returns an error message for each image and video that cannot be read or written.
    Raises UserError for a name that does not exist, no image at all, an input that would be overwritten, or a
    config and weights that do not work.
    """
    images, videos = find_inputs(inputs)
    pictures, films = paths_by_stem(images, Path(output), ".png"), paths_by_stem(videos, Path(output), ".mp4")
    lost = {path.resolve() for path in (*images, *videos)} & {*map(Path.resolve, (*pictures, *films))}
    if lost:
        raise UserError(f"--output {output} would overwrite the input {lost.pop()}: choose another folder.")
    check_weights(cfg.MODEL.WEIGHTS)
    # Now that the inputs are right, what brings torch.
    from dfm_d2.detection.calibration import chosen_threshold
    from dfm_d2.detection.flow_predictor import FlowPredictor

    predictor = FlowPredictor(cfg, batch_size)
    score_thresh = chosen_threshold(predictor.model, threshold)
    failures = _detect_images(predictor, images, pictures, score_thresh) if images else []
    for video, film in zip(videos, films):
        try:
            _detect_video(predictor, video, film, score_thresh)
        except UserError as error:
            failures.append(str(error))
    return failures


def find_inputs(names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Image files and video files; of a folder, those with the ending of an image.

    Raises UserError for a name that does not exist, and where nothing is left.
    """
    images, videos = [], []
    for name in names:
        path = Path(name)
        if path.is_dir():
            images += sorted(
                file for file in path.iterdir() if file.suffix.lower() in IMAGES and file.is_file()
            )
        elif not path.is_file():
            raise UserError(f"{name} does not exist: check the path.")
        else:
            (videos if path.suffix.lower() in VIDEOS else images).append(path)
    if not images and not videos:
        raise UserError(f"{', '.join(names)} holds no image: files must end in one of {', '.join(IMAGES)}.")
    return images, videos


def _detect_images(
    predictor: "FlowPredictor", files: Sequence[Path], pictures: Sequence[Path], score_thresh: float
) -> list[str]:
    """Write the picture of each file and detections.json of all; returns what could not be read."""
    failures, found = [], {}
    answers = zip(files, pictures, predictor.stream(files, return_errors=True))
    for file, picture, answer in tqdm.tqdm(answers, desc="images", unit="image", total=len(files)):
        if isinstance(answer, ImageError):
            failures.append(str(answer))
            continue
        painted = paint_detections(read_image(file), answer, predictor.class_names, score_thresh)
        _, png = cv2.imencode(".png", painted[:, :, ::-1])
        write_atomically(picture, lambda target, png=png: target.write(png.tobytes()))
        names = [predictor.class_names[label] for label in answer.pred_classes.tolist()]
        of_file = zip(answer.pred_boxes.tensor.tolist(), answer.scores.tolist(), names)
        detections = [{"box_xyxy": box, "score": score, "class": name} for box, score, name in of_file]
        found[picture.stem] = {"file": str(file), "detections": detections}
    write_text_atomically(pictures[0].with_name("detections.json"), json.dumps(found, indent=1) + "\n")
    return failures


def _detect_video(predictor: "FlowPredictor", file: Path, path: Path, score_thresh: float) -> None:
    """Write the video `path` with what was found in each frame of `file`.

    Raises UserError where OpenCV reads no frame or cannot write.
    """
    unreadable = UserError(f"{file} is no video that OpenCV can read: convert it, for example to mp4.")
    source = cv2.VideoCapture(str(file))
    size = tuple(int(source.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not source.isOpened() or min(size) < 1:
        raise unreadable
    rate = source.get(cv2.CAP_PROP_FPS) or 25.0
    path.parent.mkdir(parents=True, exist_ok=True)
    target = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not target.isOpened():
        raise UserError(f"{path} cannot be written: OpenCV has no mp4 encoder here.")
    is_rgb = predictor.cfg.INPUT.FORMAT == "RGB"
    total = max(int(source.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None  # where the file does not say
    frames, copies = itertools.tee(_rgb_frames(source))
    found = predictor.stream(frame if is_rgb else np.flip(frame, 2) for frame in frames)
    written = 0
    try:
        for frame, instances in tqdm.tqdm(zip(copies, found), file.name, total, unit="frame"):
            painted = paint_detections(frame, instances, predictor.class_names, score_thresh)
            target.write(painted[:, :, ::-1])
            written += 1
    finally:
        source.release()
        target.release()
    if not written:
        path.unlink(missing_ok=True)
        raise unreadable


def _rgb_frames(source: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while (read := source.read())[0]:
        yield np.ascontiguousarray(read[1][:, :, ::-1])

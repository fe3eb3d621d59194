"""tools/detect.py: images, folders, videos; what it writes and what it says."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from tool_loader import load_tool


@pytest.fixture
def detect(trained, tmp_path):
    """The tool's exit status for some inputs."""
    config, weights = trained
    words = ["--config-file", config, "--weights", weights, "--output", str(tmp_path / "out")]
    words += ["--confidence-threshold", "0", "--input"]
    return lambda *inputs: load_tool("detect").main([*words, *map(str, inputs)])


def write(path, size=(80, 60)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_film(path, values=(0, 100, 200)):
    path.parent.mkdir(parents=True, exist_ok=True)
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (80, 64))
    for value in values:
        film.write(np.full((64, 80, 3), value, np.uint8))
    film.release()
    return path


def frames_of(path):
    return [frame for _, frame in iter(cv2.VideoCapture(str(path)).read, (False, None))]


def test_images_and_folders(detect, tmp_path, capsys):
    one = write(tmp_path / "a.png")
    write(tmp_path / "folder/a.jpg")
    write(tmp_path / "folder/b.PNG")
    (tmp_path / "folder/notes.txt").write_text("no image")
    assert detect(one, tmp_path / "folder") == 0
    assert "3/3" in capsys.readouterr().err, "the progress bar"
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert list(found) == ["a", "a_2", "b"] and found["a_2"]["file"].endswith("folder/a.jpg")
    first = found["a"]["detections"][0]
    assert first["class"] in ("circle", "square", "star") and len(first["box_xyxy"]) == 4
    painted = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert painted.shape == (60, 80, 3) and (painted != np.asarray(Image.open(one))).any()


def test_bad_files_stop_neither_the_others_nor_what_is_said_of_them(detect, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("words")
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    assert cv2.VideoCapture(str(write_film(tmp_path / "empty.avi", ()))).isOpened()  # but holds no frame
    bad = [tmp_path / name for name in ("bad.jpg", "bad.mp4", "empty.avi")]
    assert detect(*bad, write(tmp_path / "a.png"), write_film(tmp_path / "film.avi", (0,))) == 1
    said = capsys.readouterr().err
    words = "bad.jpg cannot be decoded", "bad.mp4 is no video", "empty.avi is no video"
    assert all(part in said for part in words), said
    assert list(json.loads((tmp_path / "out/detections.json").read_text())) == ["a"]
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["film.mp4"]


def test_two_videos_of_one_name(detect, tmp_path):
    assert detect(write_film(tmp_path / "film.avi"), write_film(tmp_path / "other/film.avi", (0,))) == 0
    frames, others = (frames_of(tmp_path / "out" / name) for name in ("film.mp4", "film_2.mp4"))
    assert len(frames) == 3 and len(others) == 1 and frames[0].shape == (64, 80, 3)
    # The frames in their order, each with boxes on it.
    assert all(abs(np.median(frame) - value) < 12 for frame, value in zip(frames, (0, 100, 200)))
    assert all(frame.std() > 5 for frame in frames)


def test_what_is_not_there_or_would_be_overwritten(detect, tmp_path, capsys):
    image, film = write(tmp_path / "out/a.png"), tmp_path / "out/film.mp4"
    write_film(tmp_path / "film.avi").rename(film)
    (tmp_path / "empty").mkdir()
    before = image.read_bytes(), film.read_bytes()
    said = {path: f"would overwrite the input {path}" for path in (image, film)}
    said |= {tmp_path / "missing": "does not exist", tmp_path / "empty": "no image"}
    for path, words in said.items():
        assert detect(path) == 2 and words in capsys.readouterr().err
    assert (image.read_bytes(), film.read_bytes()) == before

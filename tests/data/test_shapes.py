"""The generated set: the same bytes every time, and what it promises about its objects."""

import hashlib

import numpy as np
import pytest
from tool_loader import load_tool

from dfm_d2.data.problems import ProblemReport
from dfm_d2.detection.data.readers import read_voc_split
from dfm_d2.detection.data.shapes import SHAPE_CLASSES, draw_scene, write_shapes
from dfm_d2.errors import UserError


def digests(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_same_parameters_same_bytes_written_once_and_repaired(tmp_path):
    out = tmp_path / "a"
    for name, train in (("a", 4), ("b", 4), ("c", 6)):
        assert write_shapes(tmp_path / name, train, 2, 48, seed=3)
    first, second, larger = (digests(tmp_path / name) for name in "abc")
    images = [name for name in first if name.endswith((".jpg", ".xml"))]
    assert first == second and len(images) == 12 and all(first[name] == larger[name] for name in images)
    assert not write_shapes(out, 4, 2, 48, seed=3)
    (out / "JPEGImages" / "train_000001.jpg").unlink()
    assert write_shapes(out, 4, 2, 48, seed=3) and digests(out) == first
    (out / "shapes.json").write_text((out / "shapes.json").read_text().replace("true", "false"))
    assert write_shapes(out, 4, 2, 48, seed=3)  # an interrupted run
    with pytest.raises(UserError, match="other parameters"):
        write_shapes(out, 4, 2, 48, seed=1)
    (out / "shapes.json").unlink()
    with pytest.raises(UserError, match="not a shapes set"):
        write_shapes(out, 4, 2, 48, seed=3)


@pytest.mark.parametrize("bad", [(0, 1, 48, 0), (1, 0, 48, 0), (1, 1, 8, 0), (1, 1, 48, -1)])
def test_bad_numbers_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match="Cannot generate"):
        write_shapes(tmp_path / "set", *bad)


def test_scenes_keep_their_promises():
    size = 96
    scenes = [draw_scene(1, "train", index, size) for index in range(150)]
    counts = [len(scene.labels) for scene in scenes]
    assert 1 <= min(counts) and max(counts) <= 10 and 3 <= np.mean(counts) <= 5
    boxes = np.array([box for scene in scenes for box in scene.boxes_xyxy])
    sides = (boxes[:, 2:] - boxes[:, :2]) / size
    assert sides.min() >= 0.05 and sides.max() <= 0.60
    assert boxes.min() >= 0 and boxes.max() <= size
    hidden = np.array([share for scene in scenes for share in scene.hidden])
    assert hidden.max() <= 0.70 and (hidden > 0.1).sum() > 20  # there is occlusion
    labels = [label for scene in scenes for label in scene.labels]
    assert set(labels) == set(range(len(SHAPE_CLASSES)))
    assert all(scene.pixels.std() > 3 for scene in scenes)


def test_the_reader_reads_the_boxes_that_were_drawn(tmp_path):
    write_shapes(tmp_path / "set", 3, 1, 64, seed=2)
    report = ProblemReport("shapes")
    entries = read_voc_split(tmp_path / "set", "train", report, decode_up_to=10)
    assert not report.problems and len(entries) == 3
    for index, entry in enumerate(entries):
        scene = draw_scene(2, "train", index, 64)
        assert [tuple(target["bbox"]) for target in entry["annotations"]] == scene.boxes_xyxy
        assert [target["category"] for target in entry["annotations"]] == [
            SHAPE_CLASSES[i] for i in scene.labels
        ]


def test_the_command_line(tmp_path, capsys):
    main = load_tool("make_shapes").main
    arguments = ["--out", str(tmp_path / "set"), "--train", "4", "--val", "3", "--size", "48"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "wrote" in first
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "remove the folder" in error

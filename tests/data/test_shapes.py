"""The generated set: the same bytes every time, and what it promises about its objects."""

import numpy as np
import pytest
from tool_loader import load_tool

from dfm_d2.data.problems import ProblemReport
from dfm_d2.detection.data.readers import read_voc_split
from dfm_d2.detection.data.shapes import SHAPE_CLASSES, draw_scene, write_shapes
from dfm_d2.errors import UserError


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_parameters_same_bytes_written_once_and_repaired(tmp_path):
    out = tmp_path / "a"
    for name, train in (("a", 4), ("b", 4), ("c", 6)):
        assert write_shapes(tmp_path / name, train, 2, 48, seed=3)
    first, second, larger = (contents(tmp_path / name) for name in "abc")
    images = [name for name in first if name.suffix in (".jpg", ".xml")]
    assert first == second and len(images) == 12 and all(first[name] == larger[name] for name in images)
    assert not write_shapes(out, 4, 2, 48, seed=3)
    (out / "JPEGImages" / "train_000001.jpg").unlink()
    assert write_shapes(out, 4, 2, 48, seed=3) and contents(out) == first
    (out / "shapes.json").write_text((out / "shapes.json").read_text().replace("true", "false"))
    assert write_shapes(out, 4, 2, 48, seed=3)  # an interrupted run
    with pytest.raises(UserError, match="other parameters"):
        write_shapes(out, 4, 2, 48, seed=1)
    (out / "shapes.json").unlink()
    with pytest.raises(UserError, match="not a shapes set"):
        write_shapes(out, 4, 2, 48, seed=3)
    for bad in ((0, 1, 48, 0), (1, 0, 48, 0), (1, 1, 8, 0), (1, 1, 48, -1)):
        with pytest.raises(UserError, match="Cannot generate"):
            write_shapes(tmp_path / "bad", *bad)


def test_scenes_keep_their_promises():
    size = 96
    scenes = [draw_scene(1, "train", index, size) for index in range(150)]
    counts = [len(scene.labels) for scene in scenes]
    assert 1 <= min(counts) and max(counts) <= 10 and 3 <= np.mean(counts) <= 5
    boxes = np.array([box for scene in scenes for box in scene.boxes_xyxy])
    sides = (boxes[:, 2:] - boxes[:, :2]) / size
    assert 0.05 <= sides.min() and sides.max() <= 0.60 and 0 <= boxes.min() and boxes.max() <= size
    hidden = np.array([share for scene in scenes for share in scene.hidden])
    assert hidden.max() <= 0.70 and (hidden > 0.1).sum() > 20  # there is occlusion
    assert {label for scene in scenes for label in scene.labels} == set(range(len(SHAPE_CLASSES)))
    assert all(scene.pixels.std() > 3 for scene in scenes)


def test_the_command_line_writes_what_the_reader_reads_as_it_was_drawn(tmp_path, capsys):
    main, folder = load_tool("make_shapes").main, tmp_path / "set"
    arguments = ["--out", str(folder), *"--train 3 --val 1 --size 64 --seed".split()]
    assert main([*arguments, "2"]) == 0 and "wrote" in capsys.readouterr().out
    assert main([*arguments, "2"]) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "remove the folder" in error
    report = ProblemReport("shapes")
    entries = read_voc_split(folder, "train", report, decode_up_to=10)
    assert not report.problems and len(entries) == 3
    for index, entry in enumerate(entries):
        scene, targets = draw_scene(2, "train", index, 64), entry["annotations"]
        assert [tuple(target["bbox"]) for target in targets] == scene.boxes_xyxy
        assert [target["category"] for target in targets] == [SHAPE_CLASSES[i] for i in scene.labels]

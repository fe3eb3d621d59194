"""The pictures of a detector: they are written and have content; a record is what the model did; the tool."""

import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from tool_loader import ROOT, load_tool

from dfm_d2.detection import flow_pictures
from dfm_d2.detection.flow_pictures import FlowRun, record_flow
from dfm_d2.errors import UserError
from dfm_d2.visualize.boxes import draw_box, draw_flow, draw_predictions, place_labels
from dfm_d2.visualize.curves import draw_curves
from dfm_d2.visualize.page import write_page

CLASSES = ["circle", "square", "star"]
IMAGE = np.full((96, 128, 3), 255, dtype=np.uint8)


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_both_pictures_and_a_page_that_needs_nothing_else(tmp_path, make_model, make_input, monkeypatch):
    monkeypatch.setattr(flow_pictures, "_FIELD_POINTS", 1)  # a field takes most of the time of a record
    record = record_flow(make_model().eval(), make_input())
    truths, found = [[((10, 10, 60, 50), 1)], []], [record.detections] * 2
    for score_thresh in (0.0, 2.0):
        path = tmp_path / f"new{score_thresh}" / "predictions.png"
        predictions = pixels_of(draw_predictions(path, [IMAGE] * 2, truths, found, CLASSES, score_thresh))
        flow = pixels_of(draw_flow(path.with_name("flow.png"), record, IMAGE, CLASSES, score_thresh))
        without = pixels_of(draw_predictions(path, [IMAGE] * 2, [[], []], found, CLASSES, score_thresh))
        assert without.shape[0] < 0.7 * predictions.shape[0], "an empty row of ground truth"
        assert min(*predictions.shape[:2], *flow.shape[:2]) > 200 and (flow < 200).sum() > 1000
        assert (predictions.std(axis=2) > 10).any(), "no coloured box was drawn"
    names = ["</script><b>", "square", "star"]
    text = write_page(tmp_path / "a.html", record, IMAGE, names, "a.jpg").read_text()
    assert "__FLOW_DATA__" not in text and "</script><b>" not in text and text.count("</script>") == 2
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a namespace, which is not fetched"
    empty = replace(record, detections=record.detections[:0])
    assert write_page(tmp_path / "b.html", empty, IMAGE, names).is_file()


def test_labels_can_be_read():
    """Boxes on top of each other, at the upper and at the right edge: no label is cut or covered."""
    figure, (panel, _) = plt.subplots(1, 2, figsize=(5, 2.5), layout="constrained")
    panel.imshow(IMAGE)
    for box in [(5, 1, 40, 50), (5, 1, 40, 50), (7, 3, 40, 50), (120, 40, 127, 60), (118, 41, 127, 60)]:
        draw_box(panel, box, "red", "triangle 0.55")
    place_labels(figure)
    figure.canvas.draw()
    picture = panel.get_window_extent()
    labels = [text.get_bbox_patch().get_window_extent() for text in panel.texts]
    for i, label in enumerate(labels):
        assert label.x1 <= picture.x1 + 1 and picture.y0 - 1 <= label.y0 and label.y1 <= picture.y1 + 1
        for other in labels[:i]:
            overlap = min(label.x1, other.x1) - max(label.x0, other.x0)
            assert overlap < 1 or min(label.y1, other.y1) - max(label.y0, other.y0) < 1
    plt.close(figure)


@pytest.mark.parametrize("architecture", ["FlowDetector", "CascadeDetector"])
@pytest.mark.parametrize("intervals", [0, 1])
def test_a_record_is_the_trajectory(make_model, make_input, monkeypatch, architecture, intervals):
    monkeypatch.setattr(flow_pictures, "_FIELD_POINTS", 1)
    model, item = make_model(architecture, INTERVALS=intervals, SAMPLER__STEPS=3).eval(), make_input()
    record = record_flow(model, item)
    trajectory, sizes, _ = model.trajectory([item])
    assert len(record.states) == len(record.times) == 4 and len(record.answers) == 3
    expected = model.space.decode(trajectory.states[2], sizes)[0] * 2  # the original is twice as large
    torch.testing.assert_close(record.states[2], expected)
    everybody = [0, 1, 2] if intervals == 1 else None
    by = [[answer.predictor for answer in answers] for answers in record.answers]
    assert by == ([[2]] * 3 if architecture == "CascadeDetector" else [everybody or [k] for k in range(3)])
    if len(by[0]) == 1:
        torch.testing.assert_close(record.answers[1][0].scores, record.scores[1])
    else:
        ends = torch.stack([answer.endpoints_xyxy for answer in record.answers[1]]).mean(0)
        expected = model.space.decode(trajectory.steps[1].x_1_hat, sizes)[0] * 2
        torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-3)
        surest = torch.stack([answer.scores for answer in record.answers[1]]).argmax(0)
        assert torch.equal(record.leader(1), surest)
    assert model.sampler.settings.members == ()


def test_the_field_is_that_of_the_followed_box(make_model, make_input):
    """At the place where the box is, the arrow is the one that the solver follows."""
    model, item = make_model().eval(), make_input()
    record = record_flow(model, item)
    assert {values.shape for values in (record.field_points, *record.field)} == {(9 * 12, 2)}
    assert len(record.field) == 3 and record.followed == int(record.scores[-1].argmax())
    run = FlowRun(model, item)
    box = model.space.decode(run.trajectory.states[1], run.image_sizes)[0, record.followed]
    center = (box[:2] + box[2:]) / 2
    moved = run.field(1, record.followed, center[None])[0]
    end = model.space.decode(run.trajectory.steps[1].x_1_hat, run.image_sizes)[0, record.followed]
    torch.testing.assert_close(moved, (end[:2] + end[2:]) / 2 - center, rtol=1e-3, atol=1e-2)


def test_curves(tmp_path):
    losses = {"loss_cls/p0": 1.0, "loss_cls/p1": 2.0, "loss_giou/p0": 0.5}
    entries = [{"iteration": i, "lr": 0.1, **losses} for i in (1, 2, 3)]
    without = pixels_of(draw_curves(tmp_path / "a.png", entries))
    entries.append({"iteration": 3, "bbox/AP50": 40.0, "bbox/AP": 20.0})
    assert (without != pixels_of(draw_curves(tmp_path / "a.png", entries))).any()
    with pytest.raises(UserError, match="no iteration"):
        draw_curves(tmp_path / "b.png", [])


@pytest.fixture
def visualize(monkeypatch):
    """The tool's exit status, and in `visualize.asked` what it was asked for instead of doing it."""

    def run(*words):
        config = str(ROOT / "configs/shapes_flow_r18.yaml")
        return load_tool("visualize_flow").main(["--config-file", config, *words])

    def write_pictures(cfg, model, classes, folder, images, number, score):
        run.asked = cfg.MODEL.WEIGHTS, images, folder
        return []

    monkeypatch.setattr("dfm_d2.engine.setup.setup_run", lambda cfg, args: pytest.fail("a data set"))
    monkeypatch.setattr("dfm_d2.detection.loading.load_detector", lambda cfg, explicit_device: (None, ["a"]))
    monkeypatch.setattr("dfm_d2.detection.flow_pictures.write_pictures", write_pictures)
    return run


def test_overrides_may_follow_an_option_of_several_words(visualize, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "B.JPG", "TEST.jpg"):
        Image.fromarray(IMAGE).save(name)
    (tmp_path / "w.pth").touch()
    assert visualize("--image", "a.jpg", "B.JPG", "MODEL.WEIGHTS", "w.pth", "OUTPUT_DIR", "out") == 0
    assert visualize.asked == ("w.pth", ["a.jpg", "B.JPG"], "out")
    # A file may be called like a section of the config.
    assert visualize("--image", "TEST.jpg", "--out", "out", "MODEL.WEIGHTS", "w.pth") == 0
    assert visualize.asked == ("w.pth", ["TEST.jpg"], "out")


def test_what_is_wrong_is_one_error_message(visualize, capsys):
    assert visualize("DATASETS.TEST", "()") == 2
    said = "error: DATASETS.TEST is empty: name a data set, or give files with --image.\n"
    assert capsys.readouterr().err == said
    assert visualize("--image", "missing.jpg") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: missing.jpg is not a readable image") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        visualize("--number", "0")
    assert "--number is 0" in capsys.readouterr().err

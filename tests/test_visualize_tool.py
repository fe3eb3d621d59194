"""tools/visualize_flow.py: its command line."""

import pytest
from tool_loader import ROOT, load_tool

from dfm_d2.data.images import ImageError

CONFIG = str(ROOT / "configs/shapes_flow_r18.yaml")


@pytest.fixture
def visualize(monkeypatch):
    """The tool's exit status, and in `visualize.asked` what it was asked for instead of doing it."""

    def run(*words):
        return load_tool("visualize_flow").main(["--config-file", CONFIG, *words])

    def write_pictures(cfg, model, classes, folder, images, number, score, kinds, color):
        run.asked = {"weights": cfg.MODEL.WEIGHTS, "images": images, "folder": folder, "kinds": kinds}
        if "missing.jpg" in images:
            raise ImageError("missing.jpg: no image")
        return []

    monkeypatch.setattr("dfm_d2.engine.setup.setup_run", lambda cfg, args: pytest.fail("a data set"))
    monkeypatch.setattr("dfm_d2.detection.loading.load_detector", lambda cfg, explicit_device: (None, ["a"]))
    monkeypatch.setattr("dfm_d2.detection.flow_pictures.write_pictures", write_pictures)
    return run


def test_overrides_may_follow_any_option_of_several_words(visualize, tmp_path, monkeypatch):
    assert visualize("--image", "a.jpg", "B.JPG", "MODEL.WEIGHTS", "w.pth", "OUTPUT_DIR", "out") == 0
    assert visualize.asked.pop("kinds") == ["predictions", "strip", "html"]
    assert visualize.asked == {"weights": "w.pth", "images": ["a.jpg", "B.JPG"], "folder": "out"}
    words = ["--image", "a.jpg", "--kinds", "strip", "html", "MODEL.WEIGHTS", "w.pth", "SEED", "1"]
    assert visualize(*words) == 0
    assert visualize.asked["kinds"] == ["strip", "html"] and visualize.asked["weights"] == "w.pth"
    # A file may be called like a section of the config.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEST.jpg").touch()
    assert visualize("--image", "TEST.jpg", "--out", "out") == 0
    assert visualize.asked["images"] == ["TEST.jpg"]


def test_what_is_wrong_is_one_error_message(visualize, capsys):
    assert visualize("DATASETS.TEST", "()") == 2
    said = "error: DATASETS.TEST is empty: name a data set, or give files with --image.\n"
    assert capsys.readouterr().err == said
    assert visualize("--image", "missing.jpg") == 2
    assert capsys.readouterr().err == "error: missing.jpg: no image\n"
    with pytest.raises(SystemExit):
        visualize("--number", "0")
    assert "--number is 0" in capsys.readouterr().err

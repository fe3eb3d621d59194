"""tools/visualize_flow.py: its command line."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs/shapes_flow_r18.yaml")


@pytest.fixture
def tool(monkeypatch):
    """tools/visualize_flow.py as a module that remembers what it was asked for instead of doing it."""
    spec = importlib.util.spec_from_file_location("visualize_flow", ROOT / "tools/visualize_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.asked = {}
    monkeypatch.setattr(module, "setup_run", lambda cfg, args: ["a"])
    monkeypatch.setattr(module, "load_for_inference", lambda cfg, classes: None)
    monkeypatch.setattr(module, "load_detector", lambda cfg, explicit_device: (None, ["a"]))

    def write_pictures(cfg, model, classes, folder, images, number, score, kinds, color):
        module.asked.update(weights=cfg.MODEL.WEIGHTS, images=images, folder=folder, kinds=kinds)
        if "missing.jpg" in images:
            raise ValueError("missing.jpg cannot be decoded")
        return []

    monkeypatch.setattr(module, "write_pictures", write_pictures)
    return module


def test_overrides_may_follow_the_images(tool):
    words = ["--image", "a.jpg", "B.JPG", "MODEL.WEIGHTS", "w.pth", "OUTPUT_DIR", "out"]
    assert tool.main(["--config-file", CONFIG, *words]) == 0
    assert tool.asked.pop("kinds") == list(tool.KINDS)
    assert tool.asked == {"weights": "w.pth", "images": ["a.jpg", "B.JPG"], "folder": "out"}


def test_overrides_may_follow_any_option_of_several_words(tool, tmp_path, monkeypatch):
    words = ["--image", "a.jpg", "--kinds", "strip", "gif", "MODEL.WEIGHTS", "w.pth", "SEED", "1"]
    assert tool.main(["--config-file", CONFIG, *words]) == 0
    assert tool.asked["kinds"] == ["strip", "gif"] and tool.asked["weights"] == "w.pth"
    # A file may be called like a section of the config.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEST.jpg").touch()
    assert tool.main(["--config-file", CONFIG, "--image", "TEST.jpg", "--out", "out"]) == 0
    assert tool.asked["images"] == ["TEST.jpg"]


def test_image_files_need_no_data_set(tool, monkeypatch):
    monkeypatch.setattr(tool, "setup_run", lambda cfg, args: pytest.fail("the data set was asked for"))
    assert tool.main(["--config-file", CONFIG, "--image", "a.jpg", "DATASETS.VOC_ROOT", "nowhere"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metrics", "nowhere.json"], "--metrics nowhere.json does not exist"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: name a data set, or give files with --image"),
    ],
)
def test_what_is_not_there_is_one_sentence(tool, capsys, words, said):
    assert tool.main(["--config-file", CONFIG, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_image_is_one_sentence(tool, capsys):
    assert tool.main(["--config-file", CONFIG, "--image", "missing.jpg"]) == 2
    assert capsys.readouterr().err == "error: missing.jpg cannot be decoded\n"


def test_no_images_at_all_are_refused(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--config-file", CONFIG, "--number", "0"])
    assert "--number is 0" in capsys.readouterr().err

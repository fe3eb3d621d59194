"""A tiny detector exported once a session, and photographs to compare on."""

from pathlib import Path

import pytest
import torch
from tiny_model import spread, tiny_cfg

from dfm_d2.data.images import read_image
from dfm_d2.detection.data.loader import resized_item
from dfm_d2.engine.run import build_checkpointer
from dfm_d2.export import ExportSettings, export_model, load_artefact
from dfm_d2.export.formats import Preparation
from dfm_d2.framework import build_model

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CLASSES = ("RBC", "WBC", "Platelets")
# Photograph: its shortest side before the detector. Three sizes and both orientations.
PHOTOGRAPHS = {
    "bccd/JPEGImages/BloodImage_00007.jpg": 192,
    "voc2012_subset/JPEGImages/2008_000008.jpg": 160,
    "voc2012_subset/JPEGImages/2008_000099.jpg": 128,
}


def export_cfg():
    cfg = tiny_cfg(
        NUM_PREDICTORS=2, NUM_PROPOSALS=24, SAMPLER__SCORE_THRESH=0.05, HEAD__POOLER_SAMPLING_RATIO=1
    )
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 192, 640
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


@pytest.fixture(scope="session")
def detector():
    torch.manual_seed(0)
    return spread(build_model(export_cfg())).eval()


@pytest.fixture(scope="session")
def preparation(detector):
    return Preparation.from_config(export_cfg(), detector, CLASSES)


class _Made(dict):
    """{format: what `make` answers for it}, made when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, format):
        self[format] = self._make(format)
        return self[format]


@pytest.fixture(scope="session")
def files(detector, preparation, tmp_path_factory):
    """{format: path}, the noise an input."""
    folder = tmp_path_factory.mktemp("exported")
    sample = torch.zeros(3, 96, 128)
    return _Made(lambda name: export_model(detector, name, folder, preparation, ExportSettings(), sample))


@pytest.fixture(scope="session")
def runs(files):
    """{format: the detector of its file}"""
    return _Made(lambda name: load_artefact(files[name]))


@pytest.fixture(scope="session")
def photographs():
    if not SHARED.is_dir():
        pytest.skip("needs the photographs of ../shared/data")
    items = []
    for name, side in PHOTOGRAPHS.items():
        cfg = export_cfg()
        cfg.INPUT.MIN_SIZE_TEST = side
        entry = {"file_name": str(SHARED / name), "image_id": name}
        items.append(resized_item(entry, read_image(entry["file_name"], "RGB"), cfg))
    return items


@pytest.fixture
def checkpoint(detector, tmp_path):
    """A weight file as training writes it, and its config file."""
    cfg = export_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    build_checkpointer(cfg, detector, CLASSES).save("model_final")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path / "config.yaml", tmp_path / "model_final.pth"

"""A tiny detector exported once a session, and photographs to compare on."""

from pathlib import Path

import pytest
import torch
from detections import CLASSES
from tiny_model import spread, tiny_cfg

from dfm_d2.data.images import read_image
from dfm_d2.detection.data.loader import resized_item
from dfm_d2.detection.exportable import export_detector
from dfm_d2.detection.exported_detector import ExportedDetector
from dfm_d2.framework import build_model

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# Photograph: its shortest side before the detector. Three sizes and both orientations.
PHOTOGRAPHS = {
    "bccd/JPEGImages/BloodImage_00007.jpg": 192,
    "voc2012_subset/JPEGImages/2008_000008.jpg": 160,
    "voc2012_subset/JPEGImages/2008_000099.jpg": 128,
}


@pytest.fixture(scope="session")
def cfg():
    """Two stages of the backbone, of a third of its graph."""
    cfg = tiny_cfg(
        NUM_PREDICTORS=2, NUM_PROPOSALS=24, SAMPLER__SCORE_THRESH=0.05, HEAD__POOLER_SAMPLING_RATIO=1
    )
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    cfg.MODEL.DFM.HEAD.IN_FEATURES = ["p2", "p3"]
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 192, 640
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


@pytest.fixture(scope="session")
def detector(cfg):
    torch.manual_seed(1)  # one whose detections are many
    return spread(build_model(cfg)).eval()


class _Made(dict):
    """{format: what `make` answers for it}, made when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, format):
        self[format] = self._make(format)
        return self[format]


@pytest.fixture(scope="session")
def files(detector, cfg, tmp_path_factory):
    """{format: path}, the noise an input."""
    folder, image = tmp_path_factory.mktemp("exported"), torch.zeros(3, 96, 128)
    return _Made(lambda name: export_detector(detector, name, folder, cfg, CLASSES, image))


@pytest.fixture(scope="session")
def runs(files):
    """{format: the detector of its file}"""
    return _Made(lambda name: ExportedDetector(files[name]))


@pytest.fixture(scope="session")
def photographs(cfg):
    if not SHARED.is_dir():
        pytest.skip("needs the photographs of ../shared/data")
    items, sized = [], cfg.clone()
    for name, sized.INPUT.MIN_SIZE_TEST in PHOTOGRAPHS.items():
        entry = {"file_name": str(SHARED / name), "image_id": name}
        items.append(resized_item(entry, read_image(entry["file_name"], "RGB"), sized))
    return items

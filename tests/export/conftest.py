"""A tiny detector exported once a session, and photographs to compare on."""

import functools
from pathlib import Path

import pytest
import torch
from small_detector import CLASSES, small_cfg, small_detector

from dfm_d2.data.images import read_image
from dfm_d2.detection.data.loader import resized_item
from dfm_d2.detection.exportable import ExportedDetector, export_detector

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# Photograph: its shortest side before the detector. Three sizes and both orientations.
PHOTOGRAPHS = {
    "bccd/JPEGImages/BloodImage_00007.jpg": 192,
    "voc2012_subset/JPEGImages/2008_000008.jpg": 160,
    "voc2012_subset/JPEGImages/2008_000099.jpg": 128,
}


@pytest.fixture(scope="session")
def cfg():
    cfg = small_cfg(SAMPLER__SCORE_THRESH=0.05, HEAD__POOLER_SAMPLING_RATIO=1)
    cfg.INPUT.FORMAT, cfg.TEST.DETECTIONS_PER_IMAGE = "RGB", 20
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 192, 640
    return cfg


@pytest.fixture(scope="session")
def detector(cfg):
    detector = small_detector(cfg)
    detector.temperature.fill_(1.5)
    return detector


@pytest.fixture(scope="session")
def files(detector, cfg, tmp_path_factory):
    """Of a format, the path of its file, written when it is first asked for; the noise is an input."""
    folder, image = tmp_path_factory.mktemp("exported"), torch.zeros(3, 96, 128)
    return functools.cache(lambda name: export_detector(detector, name, folder, cfg, CLASSES, image))


@pytest.fixture(scope="session")
def runs(files):
    """Of a format, the detector of its file."""
    return functools.cache(lambda name: ExportedDetector(files(name)))


@pytest.fixture(scope="session")
def photographs(cfg):
    if not SHARED.is_dir():
        pytest.skip("needs the photographs of ../shared/data")
    items, sized = [], cfg.clone()
    for name, sized.INPUT.MIN_SIZE_TEST in PHOTOGRAPHS.items():
        entry = {"file_name": str(SHARED / name), "image_id": name}
        items.append(resized_item(entry, read_image(entry["file_name"], "RGB"), sized))
    return items

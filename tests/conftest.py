"""A detector small enough for tests."""

# ruff: noqa: E402
import os

import torch

# Where there is no GPU, Triton's interpreter runs the kernels. Triton reads this when it is first imported,
# which other packages than ours do, too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
from tiny_model import spread, tiny_cfg

from dfm_d2.framework import Boxes, Instances, build_model

# The same examples in every run: a rare one that fails is to be found by looking for it, not by chance.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def make_model():
    def make(meta_architecture="FlowDetector", seed=0, **dfm):
        cfg = tiny_cfg(**dfm)
        cfg.MODEL.META_ARCHITECTURE = meta_architecture
        torch.manual_seed(seed)
        return spread(build_model(cfg))

    return make


@pytest.fixture
def make_input():
    def make(image_id="a", boxes=((4.0, 6.0, 30.0, 40.0), (20.0, 8.0, 60.0, 44.0)), size=(48, 64), seed=None):
        generator = torch.Generator().manual_seed(sum(map(ord, str(image_id))) if seed is None else seed)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(boxes)) % 3
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        item = {"file_name": f"{image_id}.jpg", "image_id": image_id, "image": image, "instances": instances}
        return item | {"height": size[0] * 2, "width": size[1] * 2}

    return make

"""Import Detectron2's provider for a test, or skip, or fail where DFM_REQUIRE_D2=1 demands it."""

import importlib.util
import os

import pytest


def detectron2_provider():
    if importlib.util.find_spec("detectron2") is None:
        if os.environ.get("DFM_REQUIRE_D2") == "1":
            pytest.fail("DFM_REQUIRE_D2=1, but Detectron2 is not installed (requirements-detectron2.txt)")
        pytest.skip("needs the real Detectron2 (requirements-detectron2.txt)")
    from dfm_d2.framework import _detectron2

    return _detectron2

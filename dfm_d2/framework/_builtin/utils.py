"""PathManager (local paths, http(s) addresses and `detectron2://`, Detectron2's model zoo), and seeds."""

import logging
import os
import random

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as _PathManager


class _ModelZooHandler(PathHandler):
    """Resolve `detectron2://name` to the model zoo's address; a download that fails raises OSError."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["detectron2://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        url = path.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/", 1)
        return PathManager.get_local_path(url, force=force, **kwargs)


PathManager = _PathManager()
PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(_ModelZooHandler())


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the generators of Python, NumPy and torch (all devices); None: with a random seed, logged."""
    import numpy as np
    import torch

    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big") % 2**31
        logging.getLogger(__name__).info("Using the random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)

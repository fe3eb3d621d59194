"""PathManager: local paths, http(s) addresses and `detectron2://`, the prefix of Detectron2's model zoo."""

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as _PathManager

MODEL_ZOO = "https://dl.fbaipublicfiles.com/detectron2/"


class _ModelZooHandler(PathHandler):
    """Resolve `detectron2://name` to the model zoo's address; a download that fails raises OSError."""

    PREFIX = "detectron2://"

    def _address(self, path: str) -> str:
        return MODEL_ZOO + path.removeprefix(self.PREFIX)

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        return PathManager.get_local_path(self._address(path), force=force, **kwargs)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return PathManager.open(self._address(path), mode, buffering=buffering, **kwargs)


PathManager = _PathManager()
PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(_ModelZooHandler())

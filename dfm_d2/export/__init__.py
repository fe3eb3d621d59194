"""A trained detector as one file: TorchScript, ONNX, pt2 or pt2 compiled, and the means to run it."""

from dfm_d2.export.artefact import ExportedDetector, load_artefact
from dfm_d2.export.formats import FORMATS, ExportSettings, export_model

__all__ = ["FORMATS", "ExportSettings", "ExportedDetector", "export_model", "load_artefact"]

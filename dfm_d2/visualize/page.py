"""One HTML page of one image's flow: everything inside of the file, nothing fetched.

Shapes: N proposals, K solver steps, M field points.
"""

import base64
import json
from collections.abc import Sequence
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from dfm_d2.data.files import write_text_atomically
from dfm_d2.visualize.boxes import FlowRecord
from dfm_d2.visualize.figures import class_color, predictor_color


def write_page(
    path: str | Path, record: FlowRecord, image: np.ndarray, class_names: Sequence[str], title: str = ""
) -> Path:
    """Write the page: a slider over the solver's steps, toggles of predictors and classes, a threshold.

    image: uint8 RGB `(H, W, 3)` of the original size. title: shown above, for example the file's name.
    Returns the path written.
    """
    path = Path(path)
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # In the script element that the data stands in, "</script" and "<!--" mean something.
    data = json.dumps(_page_data(record, image, class_names, title)).replace("<", "\\u003c")
    write_text_atomically(path, template.replace("__FLOW_DATA__", data))
    return path


def _page_data(
    record: FlowRecord, image: np.ndarray, class_names: Sequence[str], title: str
) -> dict[str, Any]:
    predictors = sorted({answer.predictor for answers in record.answers for answer in answers})
    found, jpeg = record.detections, BytesIO()
    boxes, scores = _rounded(found.pred_boxes.tensor), _rounded(found.scores, 3)
    detections = zip(boxes, scores, found.pred_classes.tolist())
    Image.fromarray(image).save(jpeg, "JPEG", quality=90)
    return {
        "title": title,
        "image": "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode(),
        "width": image.shape[1],
        "height": image.shape[0],
        "times": [round(t, 5) for t in record.times],
        "classes": [{"name": str(n), "color": to_hex(class_color(i))} for i, n in enumerate(class_names)],
        "predictors": [{"index": d, "color": to_hex(predictor_color(d))} for d in predictors],
        "states": [_rounded(boxes) for boxes in record.states],
        "steps": [_step(record, k) for k in range(len(record.answers))],
        "detections": [{"box": box, "score": score, "class": label} for box, score, label in detections],
        "followed": record.followed,
        "points": _rounded(record.field_points),
        "field": [_rounded(moved) for moved in record.field],
    }


def _step(record: FlowRecord, k: int) -> dict[str, Any]:
    return {
        **_of_all(record.classes[k], record.scores[k]),
        "leaders": record.leader(k).tolist(),
        "answers": [
            {"predictor": d, "boxes": _rounded(endpoints), **_of_all(classes, scores)}
            for d, endpoints, classes, scores in record.answers[k]
        ],
    }


def _of_all(classes: Tensor, scores: Tensor) -> dict[str, list]:
    return {"classes": classes.tolist(), "scores": _rounded(scores, 3)}


def _rounded(values: Tensor, digits: int = 1) -> list:
    return np.round(values.double().numpy(), digits).tolist()

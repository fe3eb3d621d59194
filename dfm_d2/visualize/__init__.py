"""Pictures of detections, of boxes on their way from noise to the answer, and of a training run."""

from dfm_d2.visualize.animation import write_gif
from dfm_d2.visualize.curves import draw_curves
from dfm_d2.visualize.page import write_page
from dfm_d2.visualize.pictures import class_color, draw_flow, draw_predictions, paint_detections
from dfm_d2.visualize.record import FlowRecord, record_flow

__all__ = [
    "FlowRecord",
    "class_color",
    "draw_curves",
    "draw_flow",
    "draw_predictions",
    "paint_detections",
    "record_flow",
    "write_gif",
    "write_page",
]

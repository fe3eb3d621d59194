"""Pictures of detections, of boxes on their way from noise to the answer, and of a training run."""

# Pictures of a detector: ground truth beside detections; the flow as strip, as animation and as a page.
KINDS = ("predictions", "strip", "gif", "html")

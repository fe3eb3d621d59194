"""Pictures of detections, of boxes on their way from noise to the answer, and of a training run."""

# Pictures of a detector: ground truth beside detections; the flow as strip and as a page that plays it.
KINDS = ("predictions", "strip", "html")

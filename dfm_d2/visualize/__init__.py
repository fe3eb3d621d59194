"""Pictures of detections, of boxes on their way from noise to the answer, and of a training run."""

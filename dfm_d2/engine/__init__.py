"""The engine: local updates, the optimizer per block, the trainer, its hooks and its checkpoints."""

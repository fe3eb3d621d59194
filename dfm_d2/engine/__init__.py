"""The engine: the setup of a run, its processes, the trainer, its hooks and its checkpoints."""

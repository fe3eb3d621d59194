"""Training a model block by block: blocks, update modes, one optimizer a block, processes. Torch only."""

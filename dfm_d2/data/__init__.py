"""Data: readers that report what is broken, deterministic sample streams, the generated shapes set."""

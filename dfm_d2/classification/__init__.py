"""Classification: flow classifiers by local updates, their baselines, data and evaluation."""

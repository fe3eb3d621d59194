"""The flow detector, its end-to-end twin, their data and evaluation."""

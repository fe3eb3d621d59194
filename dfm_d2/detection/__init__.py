"""The flow detector, its end-to-end twin, their data and evaluation.

`from dfm_d2.detection import FlowPredictor` gives the trained detector for use in programs.
"""


def __getattr__(name: str):
    # Imported when it is asked for: it brings torch.
    if name == "FlowPredictor":
        from dfm_d2.detection.flow_predictor import FlowPredictor

        return FlowPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

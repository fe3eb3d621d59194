"""The flow detector, its end-to-end twin, their data and evaluation.

`from dfm_d2.detection import FlowPredictor` gives a trained detector for use in programs.
"""


def register(cfg) -> list[str]:
    """Make a config's detector and data known to Detectron2; after it, DefaultTrainer trains them.

    Registers the meta-architectures and the data sets that `DATASETS.{TRAIN, TEST}` name, and fills in
    `MODEL.DFM.NUM_CLASSES`. Returns the class names, in the order of their indices.

    Raises:
        UserError: a data set that cannot be read, or another number of classes.
    """
    import dfm_d2.detection.cascade  # noqa: F401  (it and what it is built on register themselves)
    from dfm_d2.detection.data.registration import register_datasets
    from dfm_d2.engine.setup import resolve_classes

    register_datasets(cfg)
    return resolve_classes(cfg)


def __getattr__(name: str):
    # Imported when it is asked for: it brings torch.
    if name == "FlowPredictor":
        from dfm_d2.detection.flow_predictor import FlowPredictor

        return FlowPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

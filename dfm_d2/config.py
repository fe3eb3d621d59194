"""The config keys that dfm_d2 adds to Detectron2's, for programs that embed it.

They are documented where they are declared: dfm_d2/engine/config.py has those of any training,
dfm_d2/detection/config.py and dfm_d2/classification/config.py those of detectors and of classifiers.
"""

from collections.abc import Sequence
from pathlib import Path

from dfm_d2.classification.config import KEYS as CLASSIFIER_KEYS
from dfm_d2.detection.config import KEYS as DETECTOR_KEYS
from dfm_d2.engine.config import KEYS
from dfm_d2.engine.keys import add_keys


def add_dfm_config(cfg) -> None:
    """Add the keys of dfm_d2, those of detectors and of classifiers, to a Detectron2 config, in place.

    For those who embed us: ``cfg = get_cfg(); add_dfm_config(cfg); cfg.merge_from_file(path)``.
    """
    add_keys(cfg, (*KEYS, *DETECTOR_KEYS, *CLASSIFIER_KEYS))


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line before the first word that is a config key, and from there on: KEY VALUE KEY VALUE ...

    An option that takes several words would take the overrides after it, too. A file that is there is no key.
    """
    cfg = None
    for place, word in enumerate(words):
        if word[:1].isupper() and not Path(word).exists():
            if cfg is None:  # not for --help, which has no time for it
                from dfm_d2.framework import get_cfg

                cfg = get_cfg()
                add_dfm_config(cfg)
            if word.split(".")[0] in cfg:
                return list(words[:place]), list(words[place:])
    return list(words), []

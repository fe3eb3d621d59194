"""The closed list of what dfm_d2 uses of Detectron2, from Detectron2 itself or from the builtin subset.

The environment variable DFM_FRAMEWORK (auto, detectron2 or builtin; default auto) is read once, here, at the
first import; PROVIDER says what was chosen. A name is imported when it is first used: the builtin config and
the argument parser need no torch.
"""

import logging
import os

from dfm_d2.framework import _providers

# Ours, the same on both providers. The parser has Detectron2's options and does not wait for its import.
from dfm_d2.framework._builtin.arguments import default_argument_parser
from dfm_d2.framework._config_files import merge_config_file, merge_config_opts

PROVIDER = _providers.choose_provider(os.environ.get("DFM_FRAMEWORK", "auto"))
_provider = _providers.Provider(PROVIDER)
__all__ = ["PROVIDER", "default_argument_parser", "merge_config_file", "merge_config_opts"]
__all__ += sorted(_providers.PLACES.keys() - __all__)

logging.getLogger(__name__).info("dfm_d2.framework: provider %s", PROVIDER)


def __getattr__(name: str):
    return getattr(_provider, name)

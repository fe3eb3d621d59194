"""The registry of models, and the model that a config names."""

from fvcore.common.registry import Registry

# Called as (cfg) and returning an nn.Module, the whole model.
META_ARCH_REGISTRY = Registry("META_ARCH")


def build_model(cfg):
    """Build the model called `cfg.MODEL.META_ARCHITECTURE`, on `cfg.MODEL.DEVICE`; loads no weights."""
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).to(cfg.MODEL.DEVICE)

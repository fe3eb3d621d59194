"""The table of observations: every exported name, and what about it has golden values.

`python tests/framework/observations.py` writes the golden values, numbers only: what the real Detectron2
answers, and the names and defaults of its keys that the builtin subset reads but does not honour.
"""

import json
from pathlib import Path

import observe_backbones
import observe_structures
import observe_training
from observe_backbones import BACKBONES, LIVE_ONLY, POOLER
from observe_structures import leaves
from providers import BUILTIN, detectron2_provider

# One observation for each name of dfm_d2.framework that a provider supplies.
BY_NAME = {
    name.removeprefix("observe_"): observe
    for module in (observe_backbones, observe_structures, observe_training)
    for name, observe in sorted(vars(module).items())
    if name.startswith("observe_")
}
BY_NAME["META_ARCH_REGISTRY"] = BY_NAME["build_model"]
# By the file of golden values.
GOLDEN = {"names": dict(sorted(BY_NAME.items())), "backbones": BACKBONES, "pooler": POOLER}
WITH_GOLDEN = {name: observe for table in GOLDEN.values() for name, observe in table.items()}
# The pooler of the builtin provider is our own kernel's reference, which rounds in another order.
LIVE = {**BY_NAME, **BACKBONES, **LIVE_ONLY}

# Keys that a Detectron2 older than the given commit has not; April 2024 is the oldest that is tested.
LATER_KEYS = {"FLOAT32_PRECISION": "5b72c27a (August 2024)"}


def unused_config_keys(detectron2) -> dict:
    """Full name and default of each key of Detectron2's config that the builtin subset does not honour."""
    honoured = dict(leaves(BUILTIN.get_cfg()))
    return {name: value for name, value in leaves(detectron2.get_cfg()) if name not in honoured}


def as_json(value, parse_float=float):
    """An observation after a trip through JSON: tuples, tensors and boxes are lists, NaN is None."""
    text = json.dumps(value, default=lambda tensor: getattr(tensor, "tensor", tensor).tolist())
    return json.loads(text, parse_constant=lambda name: None, parse_float=parse_float)


def differences(seen, wanted, tolerance: float, path: str = "") -> list[str]:
    """Where two observations differ; floats may differ by `tolerance`, relative and absolute."""
    if type(seen) is type(wanted) and isinstance(seen, (dict, list)):
        keys, wanted_keys = (list(x) if isinstance(x, dict) else list(range(len(x))) for x in (seen, wanted))
        if keys != wanted_keys:
            return [f"{path}: keys or their order differ: {sorted(set(keys) ^ set(wanted_keys)) or 'order'}"]
        return [d for key in keys for d in differences(seen[key], wanted[key], tolerance, f"{path}/{key}")]
    if type(seen) is float and type(wanted) in (int, float):
        same = abs(seen - wanted) <= tolerance * max(1.0, abs(wanted))
    else:
        same = seen == wanted and type(seen) is type(wanted)
    return [] if same else [f"{path}: {seen!r}, wanted {wanted!r}"]


def _seven_digits(text: str) -> float:
    """What float32 holds."""
    return float(f"{float(text):.7g}")


def _write(path: Path, values: dict) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    theirs, here = detectron2_provider(), Path(__file__).resolve().parent
    for file, table in GOLDEN.items():
        values = {name: as_json(observe(theirs), _seven_digits) for name, observe in table.items()}
        _write(here / "golden" / f"{file}.json", values)
    builtin = here.parents[1] / "dfm_d2" / "framework" / "_builtin"
    _write(builtin / "unused_keys.json", unused_config_keys(theirs))

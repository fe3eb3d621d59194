"""Write the golden values from the real Detectron2: `python tests/framework/make_golden.py`.

Numbers only: what Detectron2 answers to the observations of this folder; and the names and defaults of its
config keys that the builtin subset does not honour, which that subset itself reads.
"""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "kernels")]

import observations  # noqa: E402
from providers import detectron2_provider  # noqa: E402


def _rounded(value):
    """Seven digits: what float32 holds."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _write(path: Path, values: dict) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    detectron2 = detectron2_provider()
    for file, table in observations.GOLDEN.items():
        values = {name: observations.as_json(observe(detectron2)) for name, observe in table.items()}
        _write(HERE / "golden" / f"{file}.json", _rounded(values))
    unused = ROOT / "dfm_d2" / "framework" / "_builtin" / "unused_keys.json"
    _write(unused, observations.unused_config_keys(detectron2))

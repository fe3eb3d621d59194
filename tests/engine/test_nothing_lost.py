"""What a run has made stays: through kills, signals, used folders, other runs, bad steps and bit rot."""

import random

import torch
from toy_model import ToyModel

from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.engine.weights import load_tensors
from dfm_d2.errors import CheckpointError


def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    path, moments = tmp_path / "model.pth", random.Random(0)
    SafeCheckpointer(ToyModel(), str(tmp_path)).save("model", iteration=3)
    content, saved = path.read_bytes(), load_tensors(str(path))
    weights = saved.pop("model")
    places = [
        content.index(weights["predictors.0.0.weight"].numpy().tobytes()) + 5,
        *moments.sample(range(len(content)), 80),
    ]
    errors = []
    for place in places:
        flipped = bytes([content[place] ^ 1 << moments.randrange(8)])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        try:
            found = load_tensors(str(path))
        except CheckpointError as error:
            errors.append(str(error))
            continue
        torch.testing.assert_close(found.pop("model"), weights, rtol=0, atol=0)
        assert found == saved
    assert f"{path} is damaged or not of torch.save (the checksum of its archive/data/" in errors[0]
    assert len(errors) > 20

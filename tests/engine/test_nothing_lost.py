"""What a run has made stays: through kills, signals, used folders, other runs, bad steps and bit rot."""

import random

import pytest
import torch
from toy_model import UPDATES, ToyModel, make_toy, make_trainer, toy_loader

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.weights import load_tensors
from dfm_d2.errors import CheckpointError
from dfm_d2.local_update import NonFiniteLossError


@pytest.mark.parametrize("update", UPDATES)
def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, update):
    def loader(start: int):
        for number, batch in enumerate(toy_loader(start)):
            for group in trainer.optimizer.param_groups if number == 3 else ():
                group["lr"] = 1e38
            yield batch

    model = make_toy()
    trainer = make_trainer(model, loader, update)
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([CheckpointHook(checkpointer, 1, 0)])
    said = "at iteration 3, .*: weights of block .* = (inf|nan).*The last checkpoint is intact"
    with pytest.raises(NonFiniteLossError, match=said):
        trainer.train(0, 5)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    saved = load_tensors(str(tmp_path / "model_0000002.pth"))
    assert all(value.isfinite().all() for value in saved["model"].values())


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

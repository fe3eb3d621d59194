"""Train a plain nn.Module block by block with dfm_d2.local_update, and print what that saves.

python examples/local_updates.py [--depth 12] [--steps 200]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dfm_d2.local_update import BlockLosses, BlockOptimizer, JointUpdate, SavedActivations, SequentialUpdate


class DeepNet(nn.Module):
    """Residual layers, each a block with a read-out of its own and the detached output of the one before."""

    def __init__(self, depth: int, width: int = 256, classes: int = 10):
        super().__init__()
        self.first = nn.Linear(64, width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(depth)
        )
        self.readouts = nn.ModuleList(nn.Linear(width, classes) for _ in range(depth))

    def blocks(self):
        blocks = {f"layer{d}": [] for d in range(len(self.layers))}
        for name, parameter in self.named_parameters():
            number = "0" if name.startswith("first") else name.split(".")[1]
            blocks[f"layer{number}"].append((name, parameter))
        return blocks

    def prepare(self, batch, iteration):
        return torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch])

    def block_losses(self, prepared, hand_over):
        x, labels = prepared
        x = self.first(x)
        for d, (layer, readout) in enumerate(zip(self.layers, self.readouts)):
            x = x + layer(x)
            yield BlockLosses((f"layer{d}",), {f"loss/layer{d}": cross_entropy(readout(x), labels)})
            x = x.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    digits = load_digits()
    samples = list(zip(torch.tensor(digits.data, dtype=torch.float32) / 16, digits.target.tolist()))
    train, test = samples[:1500], samples[1500:]
    for name, update in {"one backward": JointUpdate(), "block by block": SequentialUpdate()}.items():
        torch.manual_seed(0)
        model = DeepNet(args.depth)
        optimizer = BlockOptimizer(model.blocks(), lambda named: torch.optim.AdamW(named, lr=1e-3))
        with SavedActivations(exclude=model.parameters()) as saved:
            for step in range(args.steps):
                batch = [train[i] for i in torch.randint(len(train), (64,)).tolist()]
                metrics = update.step(model, model.prepare(batch, step), optimizer)
        with torch.no_grad():
            images, labels = model.prepare(test, 0)
            x = model.first(images)
            for layer in model.layers:
                x = x + layer(x)
            right = 100 * (model.readouts[-1](x).argmax(1) == labels).float().mean()
        loss, peak = float(metrics[f"loss/layer{args.depth - 1}"]), saved.peak / 2**20
        print(f"{name:15s} last loss {loss:.3f}  test accuracy {right:.1f}%  ", end="")
        print(f"activations kept for a backward, at most: {peak:.2f} MiB")


if __name__ == "__main__":
    main()

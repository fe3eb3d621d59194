#!/usr/bin/env python
"""What frozen features of every block know: a linear probe and the nearest neighbours, per method.

python benchmarks/representation.py --config configs/digits_flow_cnn.yaml

Features are a block's output averaged over the image; the probe is scikit-learn's logistic regression on
standardised features, the neighbours are 5. "random" is the backbone before training. The trainings are those
of benchmarks/classification.py, made here where they are not there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from class_figures import draw_panels, line_of
from class_runs import batches, load, op_of, parser, result_of, trained
from rows import RESULTS, Row, quantiles, save_rows
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dfm_d2.classification.forward_forward import ForwardForwardClassifier, unit_square
from dfm_d2.classification.stochastic_forward_forward import StochasticForwardForwardClassifier
from dfm_d2.framework import build_model

METHODS = ["flow", "backprop", "forward_forward", "stochastic_ff"]
# Training images that the probe and the neighbours see at most.
_IMAGES = 5000


@torch.no_grad()
def features(model, loader: Sequence[list[dict]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Averaged outputs `(n, C)` of every block, and labels.

    Inputs of blocks are normalised where the model's own are: of Forward-Forward those after the first, of
    the stochastic variant all. Images have no label in them, and inputs no noise.
    """
    from_block = {ForwardForwardClassifier: 1, StochasticForwardForwardClassifier: 0}.get(
        type(model), model.num_blocks
    )
    found: list[list] = [[] for _ in range(model.num_blocks)]
    labels: list[int] = []
    for batch in loader:
        x = model.normalised(batch)
        for d in range(model.num_blocks):
            x = model.backbone.forward_block(d, unit_square(x) if d >= from_block else x)
            found[d].append(model.backbone.grid(x).mean((2, 3)).cpu().numpy())
        labels += [item["label"] for item in batch]
    return [np.concatenate(parts) for parts in found], np.array(labels)


def spread(loader: Sequence[list[dict]], limit: int) -> list[list[dict]]:
    """At most `limit` of the images, evenly from the whole set, which may be sorted by class."""
    number = sum(len(batch) for batch in loader)
    chosen = set(np.linspace(0, number - 1, min(limit, number)).round().astype(int).tolist())
    kept, index = [], 0
    for batch in loader:
        kept.append([item for place, item in enumerate(batch, index) if place in chosen])
        index += len(batch)
    return [batch for batch in kept if batch]


def scores(model, cfg) -> dict[tuple[str, int], float]:
    """{(probe, block): accuracy in percent}."""
    train, train_labels = features(model, spread(batches(cfg, cfg.DATASETS.TRAIN[0]), _IMAGES))
    test, test_labels = features(model, batches(cfg, cfg.DATASETS.TEST[0]))
    found = {}
    for d, (seen, unseen) in enumerate(zip(train, test)):
        probes = {"linear probe": LogisticRegression(max_iter=2000), "5 neighbours": KNeighborsClassifier(5)}
        for name, probe in probes.items():
            fitted = make_pipeline(StandardScaler(), probe).fit(seen, train_labels)
            found[name, d] = 100 * float(fitted.score(unseen, test_labels))
    return found


def main() -> None:
    args = parser(__doc__).parse_args()
    found: dict[tuple, list[float]] = {}
    for seed in range(args.seeds):
        for variant in args.variants or METHODS:
            out = trained(args, variant, seed, any_rate=True)
            cfg, model = load(out)
            models = {variant: model}
            if variant == "backprop":
                torch.manual_seed(seed)
                models["random"] = build_model(cfg).eval()
            for name, model in models.items():
                for (probe, d), value in scores(model, cfg).items():
                    found.setdefault((name, probe, d), []).append(value)
    first = result_of(out)
    rows = [
        Row(op_of(args), name, probe, "accuracy", "%", "block", str(d), *quantiles(values),
            first["device"], torch.__version__, first["commit"], f"seeds 0-{args.seeds - 1}")
        for (name, probe, d), values in found.items()
    ]  # fmt: skip
    print(save_rows(f"representation_{op_of(args)}", rows))
    panels = {
        probe: ("block", {name: line_of([r for r in rows if (r.provider, r.mode) == (name, probe)])
                          for name in dict.fromkeys(row.provider for row in rows)})
        for probe in dict.fromkeys(row.mode for row in rows)
    }  # fmt: skip
    title = f"{op_of(args)}: frozen features of each block, {rows[0].note}"
    print(draw_panels(RESULTS / f"representation_{op_of(args)}.png", title, panels))


if __name__ == "__main__":
    main()

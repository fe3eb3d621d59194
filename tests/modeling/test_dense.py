"""The dense predictor: its targets by hand, and that its loss is the shared block's alone."""

import itertools

import pytest
import torch
from tiny_model import tiny_cfg
from toy_model import moved, train_steps

from dfm_d2.detection.coupling import GroundTruth
from dfm_d2.detection.dense import DensePredictor
from dfm_d2.detection.exportable import prepared_model
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.flow import BoxSpace
from dfm_d2.framework import build_model
from dfm_d2.local_update import HandOver, Leaves, SavedActivations, attached_losses, sum_losses

DENSE = {"DENSE_WEIGHT": 2.0}
LOSSES = {"loss_cls/shared", "loss_giou/shared"}
SPACE = BoxSpace()
SIZES = torch.tensor([[32.0, 40.0], [32.0, 24.0]])  # height, width; padded to 32 x 48
# Centre (10, 10), side 16: of the finer level. Centre (18, 16), sides 36 and 32: of the coarser, as its side
# is at least 32. Centre (14, 10), side 8: of the finer, smaller than the first.
BOXES = torch.tensor([[2.0, 2.0, 18.0, 18.0], [0.0, 0.0, 36.0, 32.0], [10.0, 6.0, 18.0, 14.0]])


@pytest.fixture
def inputs(make_input):
    """A batch, one image of which has no object."""
    return [make_input("a"), make_input("b", boxes=((1.0, 1.0, 9.0, 30.0),)), make_input("c", boxes=())]


def dense() -> DensePredictor:
    """Of levels of the strides 4 and 8: 8 x 12 and 4 x 6 cells."""
    sizes = {"dim": 8, "num_classes": 3, "strides": (4, 8), "canonical_size": 64.0}
    return DensePredictor(**sizes, space=SPACE, criterion=BlockLoss(2.0, l1_weight=0.0))


def ground_truth(boxes=BOXES) -> GroundTruth:
    """Of two images, the second without objects."""
    encoded, classes = SPACE.encode(boxes, SIZES[0]), torch.arange(len(boxes))
    return GroundTruth.pad([encoded, encoded[:0]], [classes, classes[:0]])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_targets_by_hand(order):
    """Cells within 1.5 strides of the centre of an object of their level; of two the smaller object."""
    cells = dense().cells((32, 48), SIZES, ground_truth(BOXES[order]))
    assert cells.gt_index.shape == (2, 8 * 12 + 4 * 6)
    fine, coarse = (part.view(2, rows, -1) for part, rows in zip(cells.gt_index.split([96, 24], 1), (8, 4)))
    expected = torch.full((2, 8, 12), -1), torch.full((2, 4, 6), -1)
    expected[0][0, 1:4, 1] = order.index(0)
    expected[0][0, 1:4, 2:5] = order.index(2)
    expected[1][0, 1:3, 1:4] = order.index(1)
    assert torch.equal(fine, expected[0]) and torch.equal(coarse, expected[1])
    assert cells.inside[0, :96].view(8, 12).all(0).tolist() == [True] * 10 + [False] * 2
    assert cells.inside[1, 96:].view(4, 6).all(0).tolist() == [True] * 3 + [False] * 3
    # A cell's own box is one of the level's middle side, 24 and 48, around its centre.
    boxes = SPACE.decode(cells.boxes, SIZES)[0]
    torch.testing.assert_close(boxes[2 * 12 + 2], torch.tensor([-2.0, -2.0, 22.0, 22.0]))
    torch.testing.assert_close(boxes[96 + 1 * 6 + 2], torch.tensor([-4.0, -12.0, 44.0, 36.0]))
    # A centre at the border belongs to cells of the image: the last one is at 39.5.
    border = ground_truth(torch.tensor([[32.0, 8.0, 40.0, 16.0], [20.0, 20.0, 59.0, 31.0]]))
    cells = dense().cells((32, 48), SIZES, border)
    assert set(cells.gt_index[0].tolist()) == {-1, 0, 1}
    assert (cells.gt_index[~cells.inside] == -1).all()


@pytest.mark.parametrize("backbone", ["accumulate", "local"])
def test_its_loss_reaches_the_shared_block_alone(make_model, inputs, backbone):
    model = make_model(**DENSE, BACKBONE_UPDATE=backbone).train()
    assert {n.split(".")[0] for n, _ in model.blocks()["shared"]} == {"backbone", "dense_predictor"}
    for hand_over in (HandOver(), Leaves()):
        for item in model.block_losses(model.prepare(inputs, 7), hand_over):
            model.zero_grad(set_to_none=True)
            sum_losses(item.losses).backward(retain_graph=True)
            touched = {name for name, p in model.named_parameters() if p.grad is not None}
            assert any(n.startswith("dense_predictor.") for n in touched) == (item.blocks == ("shared",))
        assert item.blocks == ("shared",) and set(item.losses) == LOSSES
        assert (item.carried is not None) == isinstance(hand_over, Leaves)
        own = {name for name, _ in model.blocks()["shared"]}
        assert touched == {n for n in own if backbone == "accumulate" or "bottom_up" not in n}


@pytest.mark.parametrize("options", [{}, {"BACKBONE_UPDATE": "local"}, {"INTERVALS": 1}], ids=str)
@pytest.mark.parametrize("update", ["sequential", "in backward"])
def test_sequential_equals_joint_after_adamw_in_float64(make_model, inputs, update, options):
    joint, local, untrained = (make_model(**DENSE, **options).double().train() for _ in range(3))
    calls = []
    for part in (local.backbone, local.dense_predictor):
        part.register_forward_hook(lambda part, *_: calls.append(part))
    _, expected = train_steps(joint, "joint", inputs, steps=3)
    _, metrics = train_steps(local, update, inputs, steps=3)
    changed = moved(joint, untrained.state_dict())
    assert {"dense_predictor.box_answer.weight", "dense_predictor.tower.0.weight"} <= changed
    torch.testing.assert_close(local.state_dict(), joint.state_dict(), rtol=0, atol=1e-6)
    assert metrics.keys() == expected.keys() and metrics.keys() >= LOSSES
    assert calls == [local.backbone, local.dense_predictor] * 3  # forward once a step


@pytest.mark.parametrize("architecture", ["FlowDetector", "CascadeDetector"])
def test_a_batch_of_two_is_two_batches_of_one(make_model, inputs, architecture):
    """Each loss is a sum over the cells with an object; an image without objects has only background."""
    model, (a, b, empty) = make_model(architecture, **DENSE).eval(), inputs
    sums = []
    for batch in ([a, b], [a], [b]):
        prepared = model.prepare(batch, 2)
        losses, count = attached_losses(model, prepared), (prepared.cells.gt_index >= 0).sum()
        sums.append(torch.stack([losses[key] * count for key in sorted(LOSSES)]))
    torch.testing.assert_close(sums[0], sums[1] + sums[2], rtol=1e-5, atol=1e-5)
    losses = attached_losses(model, model.prepare([empty], 0))
    assert losses["loss_giou/shared"] == 0 and 0 < losses["loss_cls/shared"] < torch.inf


def test_cells_beyond_an_image_lose_nothing():
    predictor, truth = dense(), ground_truth()
    cells = predictor.cells((32, 48), SIZES, truth)
    features = [torch.randn(2, 8, rows, columns) for rows, columns in ((8, 12), (4, 6))]
    torch.nn.init.constant_(predictor.class_logits.bias, 3.0)  # every cell says that it has an object
    losses = predictor.losses(features, cells, truth)
    everywhere = predictor.losses(features, cells._replace(inside=torch.ones_like(cells.inside)), truth)
    assert everywhere["loss_cls/shared"] > losses["loss_cls/shared"] > 0
    assert torch.autograd.grad(losses["loss_cls/shared"], predictor.class_logits.bias)[0].isfinite().all()
    assert torch.equal(everywhere["loss_giou/shared"], losses["loss_giou/shared"])


def test_a_short_training_learns_the_cells(make_model, inputs):
    """The loss falls on one batch, so that targets and answers belong to the same cells."""
    model = make_model(**DENSE).train()
    optimizer, first = train_steps(model, "sequential", inputs)
    _, last = train_steps(model, "sequential", inputs, steps=40, optimizer=optimizer)
    assert all(last[key] < 0.7 * first[key] for key in LOSSES)


def test_by_default_there_is_none_and_its_weight_is_that_of_both_terms(inputs):
    """Weights and losses of all other blocks are those without it."""
    models = []
    for options in ({}, DENSE, {"DENSE_WEIGHT": 6.0}):
        torch.manual_seed(0)
        models.append(build_model(tiny_cfg(**options)).train())
    none, with_it, _ = (model.state_dict() for model in models)
    extra = {name for name in with_it if name.startswith("dense_predictor.")}
    assert none.keys() == with_it.keys() - extra and extra
    assert all(torch.equal(value, with_it[name]) for name, value in none.items())
    without, once, thrice = (attached_losses(model, model.prepare(inputs, 1)) for model in models)
    assert without.keys() == once.keys() - LOSSES
    assert all(torch.equal(without[key], once[key]) for key in without)
    for key, value in once.items():
        torch.testing.assert_close(thrice[key], value * (3 if key in LOSSES else 1))


def test_inference_export_and_other_checkpoints_do_without_it(make_model, make_input, tmp_path):
    model, other = make_model(**DENSE).eval(), make_model(seed=1).eval()
    model.dense_predictor.forward = lambda *_: pytest.fail("asked at inference")
    SafeCheckpointer(model, str(tmp_path)).save("model")
    SafeCheckpointer(other).load(str(tmp_path / "model.pth"))
    SafeCheckpointer(other, str(tmp_path)).save("without")
    exported, names = prepared_model(model), model.state_dict().keys()
    assert exported.state_dict().keys() == other.state_dict().keys() < names
    assert model.dense_predictor is not None
    SafeCheckpointer(model).load(str(tmp_path / "without.pth"))
    expected, *found = (m([make_input("a")])[0]["instances"].scores for m in (model, other, exported))
    assert len(expected) > 0 and all(torch.equal(scores, expected) for scores in found)


def test_its_memory_is_there_once(make_model, inputs):
    """What is held for the backward grows with the number of predictors as little as without it."""
    peaks = []
    for update, count in itertools.product(("sequential", "joint"), (1, 8)):
        model = make_model(NUM_PREDICTORS=count, NUM_PROPOSALS=40, **DENSE).train()
        with SavedActivations(model.parameters()) as saved:
            train_steps(model, update, inputs)
        peaks.append(saved.peak)
    assert peaks[1] - peaks[0] <= 0.03 * (peaks[3] - peaks[2]) and peaks[3] > peaks[2]

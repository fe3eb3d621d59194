"""The Forward-Forward baselines: local losses, labels in images, dimensions, inference."""

import pytest
import torch
from tiny_classifier import VIT, class_inputs, make_classifier

from dfm_d2.classification.forward_forward import unit_square
from dfm_d2.classification.stochastic_forward_forward import effective_dimension
from dfm_d2.local_update import HandOver, check_blocks, sum_losses

METHODS = ("forward_forward", "stochastic_forward_forward")


@pytest.mark.parametrize("backbone", [[], VIT], ids=["cnn", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_block_s_loss_has_gradients_in_its_own_block_only(method, backbone):
    model = make_classifier(*backbone, method=method).train()
    check_blocks(model.blocks(), [(n, p) for n, p in model.named_parameters() if p.requires_grad])
    for index in range(model.num_blocks):
        model.zero_grad(set_to_none=True)
        items = model.block_losses(model.prepare(class_inputs(), 3), HandOver())
        losses = {item.blocks[0]: item.losses for item in items}
        sum_losses(losses[f"block{index}"]).backward()
        for block, named in model.blocks().items():
            touched = [p.grad is not None for _, p in named]
            assert all(touched) if block == f"block{index}" else not any(touched), block


def test_goodness_is_compared_with_the_threshold():
    model = make_classifier("MODEL.CLASSIFIER.FF.SHARPNESS", "2.0", method="forward_forward")
    found = model._losses(0, torch.tensor([1.5, 0.5, 1.0, 2.0]))
    own, wrong = torch.tensor([0.5, -0.5]) * 2, torch.tensor([0.0, 1.0]) * 2
    expected = -(own.sigmoid().log().mean() + (1 - wrong.sigmoid()).log().mean())
    torch.testing.assert_close(found["loss_goodness/block0"], expected)
    assert float(found["right/block0"]) == 0.5


def test_labels_are_seen_in_the_image_and_the_negative_one_is_wrong():
    model, inputs = make_classifier(method="forward_forward"), class_inputs(6)
    images = model.normalised(inputs)
    waves = torch.stack([model.labelled(images[:1], torch.tensor([k]))[0] - images[0] for k in range(3)])
    gram = torch.corrcoef(waves.flatten(1))
    assert float((gram - torch.eye(3)).abs().max()) < 0.5
    pair = model.prepare(inputs, 0).images
    labels = torch.tensor([item["label"] for item in inputs])
    torch.testing.assert_close(pair[:6], model.labelled(images, labels))
    for index in range(6):
        candidates = [k for k in range(3) if k != inputs[index]["label"]]
        drawn = [torch.allclose(pair[6 + index], images[index] + waves[k], atol=1e-5) for k in candidates]
        assert sum(drawn) == 1
    assert torch.equal(model.prepare(inputs[2:3], 0).images[1], pair[8])


def test_a_block_hands_on_no_goodness():
    x = torch.rand(3, 4, 5, 5) * torch.tensor([1.0, 10.0, 100.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(unit_square(x).square().flatten(1).mean(1), torch.ones(3))


def test_the_effective_dimension_counts_directions():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(50, 1, generator=generator) @ torch.randn(1, 8, generator=generator)
    assert float(effective_dimension(line)) == pytest.approx(1, rel=1e-4)
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    assert float(effective_dimension(axes)) == pytest.approx(4)
    batch = effective_dimension(torch.stack([axes, 3 * axes]))
    torch.testing.assert_close(batch, torch.tensor([4.0, 4.0]))
    x = torch.randn(30, 5, generator=generator).double()
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    torch.testing.assert_close(effective_dimension(x), values.sum() ** 2 / values.square().sum())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_the_effective_dimension_is_of_any_scale(scale):
    """Small answers, of a pooled map for example, must not count as fewer directions than they have."""
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    assert float(effective_dimension(scale * axes)) == pytest.approx(4)


def test_answers_without_a_direction_leave_the_loss_finite():
    """Dead units answer all copies of an image with zeros."""
    x = torch.zeros(2, 4, 5)
    x[1] = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    found = effective_dimension(x)
    found.log().sum().backward()
    assert found[0].item() == 1 and found[1].item() > 1
    assert x.grad.isfinite().all() and x.grad[0].eq(0).all() and x.grad[1].ne(0).any()
    assert float(effective_dimension(x.detach()[:1, :1])) == 1  # one point


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_two_is_two_batches_of_one(method):
    model, inputs = make_classifier(method=method).double().eval(), class_inputs(2)
    for together, x in zip(model(inputs), inputs):
        torch.testing.assert_close(together["probs"], model([x])[0]["probs"], rtol=1e-9, atol=1e-12)


def test_the_first_block_does_not_vote():
    """Hinton leaves the first layer out: the label in the image alone decides about it."""
    model = make_classifier(method="forward_forward").eval()
    images = model.normalised(class_inputs(2))
    found = model.class_logits(images, ["0", "1"])
    with torch.no_grad():
        goodness = list(model._goodness(model.labelled(images, torch.tensor([1, 1]))))
    torch.testing.assert_close(found[:, 0, 1], model.sharpness * (goodness[1] + goodness[2]))

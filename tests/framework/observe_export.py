"""What can be observed of a provider's TracingAdapter."""

import warnings

import torch
from observe_structures import raised


class Halves(torch.nn.Module):
    """Dicts with an image and a number in, Instances in a dict out."""

    def __init__(self, provider):
        super().__init__()
        self.provider = provider

    def forward(self, inputs):
        answers = []
        for item in inputs:
            corner = item["image"].mean(0)[:4, :4]
            found = self.provider.Instances((4, 6))
            found.scores = corner[:, 0] * item["a"]
            found.pred_boxes = self.provider.Boxes(corner + item["a"])
            answers.append({"instances": found, "also": (corner, [corner * 2])})
        return answers


def observe_tracing_adapter(provider):
    image, number = torch.arange(48.0).reshape(2, 4, 6), torch.tensor(0.5)
    inputs = [{"image": image, "a": number}]
    adapter = provider.TracingAdapter(Halves(provider), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, adapter.flattened_inputs)
    order = [x.dim() for x in adapter.flattened_inputs]
    answers = traced(number * 2, image + 1)
    rebuilt = adapter.outputs_schema(answers)
    found = rebuilt[0]["instances"]
    nested = rebuilt[0]["also"]
    short = provider.TracingAdapter(
        Halves(provider), (inputs,), lambda model, items: model(items)[0]["instances"].scores
    )
    loose = provider.TracingAdapter(Halves(provider), [{**inputs[0], "id": 7}], None, True)
    return {
        "order of the inputs": order,
        "answers": [x.flatten().tolist() for x in answers],
        "rebuilt": [type(found.pred_boxes).__name__, found.scores.tolist(), found.image_size.tolist()],
        "nested": [type(nested).__name__, type(nested[1]).__name__, nested[1][0].flatten().tolist()],
        "function": [x.tolist() for x in short(*short.flattened_inputs)],
        "left out": [len(loose.flattened_inputs), loose.inputs_schema is None],
        "left out, other inputs": raised(lambda: loose(number * 2, image)),
        "no tensor in": raised(lambda: provider.TracingAdapter(Halves(provider), [{"image": 3}])),
        "no tensor out": raised(
            lambda: provider.TracingAdapter(Halves(provider), inputs, lambda model, items: "word")(
                number, image
            )
        ),
    }

"""Networks that return a tuple, a mapping or an object: the class scores and the loss."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedtan_hpc.models.outputs import OutputReader
from fedtan_hpc.tasks.objective import Objective

SCORES, FIRST, SECOND = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 4, 2, 2])
GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])
InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


@dataclass
class Plain:
    hidden: Tensor
    logits: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As of Hugging Face's networks: a mapping with attributes."""


OUTPUTS = {
    "tensor": (SCORES, {}),
    "tuple": ((SCORES, FIRST), {}),
    "list": ([SCORES], {}),
    "logits are not the first": ({"hidden": FIRST, "logits": SCORES}, {}),
    "out": ({"features": FIRST, "out": SCORES, "aux": SECOND}, {"aux": 0.5}),
    "no usual name": ({"scores": SCORES, "hidden": FIRST}, {}),
    "dataclass": (Plain(FIRST, SCORES), {}),
    "model output": (ModelOutput(logits=SCORES, hidden_states=(FIRST, SECOND)), {}),
    "googlenet": (
        GoogLeNetOutputs(SCORES, SECOND, FIRST),
        {"aux_logits1": 0.3, "aux_logits2": 0.3},
    ),
    "inception": (InceptionOutputs(SCORES, FIRST), {"aux_logits": 0.4}),
    "without auxiliary": (InceptionOutputs(SCORES, None), {}),
    "auxiliary of another shape": ({"logits": SCORES, "aux": FIRST[:, :2]}, {}),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_scores_and_loss(case: str) -> None:
    output, weights = OUTPUTS[case]
    reader = OutputReader()
    assert reader.scores(output) is SCORES
    assert reader.auxiliary(output) == weights
    auxiliary = {"aux": SECOND, "aux_logits": FIRST, "aux_logits1": FIRST, "aux_logits2": SECOND}
    expected = cross_entropy(SCORES, LABELS, reduction="none")
    for name, weight in weights.items():
        expected += weight * cross_entropy(auxiliary[name], LABELS, reduction="none")
    torch.testing.assert_close(Objective().losses(output, LABELS), expected)


def test_a_named_output_counts_alone() -> None:
    output = GoogLeNetOutputs(SCORES, SECOND, FIRST)
    for name, scores in (("logits", SCORES), ("aux_logits1", FIRST)):
        reader = OutputReader(name)
        assert reader.scores(output) is scores
        losses = Objective(outputs=reader).losses(output, LABELS)
        torch.testing.assert_close(losses, cross_entropy(scores, LABELS, reduction="none"))
    assert OutputReader("1").scores((FIRST, SCORES)) is SCORES
    assert OutputReader("logits").scores(SCORES) is SCORES  # as GoogLeNet returns in evaluation


@pytest.mark.parametrize(
    ("name", "output", "part"),
    [
        ("scores", {"logits": SCORES}, "a dict with logits, and not with scores"),
        ("3", (SCORES, FIRST), "a tuple with 0, 1, and not with 3"),
        (None, {"logits": None}, "a dict with logits, and not with a tensor"),
        (None, (), "a tuple with nothing, and not with a tensor"),
        (None, None, "a NoneType with nothing, and not with a tensor"),
    ],
)
def test_an_output_without_scores_says_what_it_has(name: str, output: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        OutputReader(name).scores(output)


def test_a_description_says_what_is_used() -> None:
    assert OutputReader().describe(SCORES) == ""
    assert OutputReader().describe(GoogLeNetOutputs(SCORES, SECOND, FIRST)) == (
        "the network returns a GoogLeNetOutputs: its class scores are logits, its loss is that of "
        "logits + 0.3 x aux_logits1 + 0.3 x aux_logits2 (model.output)"
    )
    assert OutputReader("1").describe((FIRST, SCORES)) == (
        "the network returns a tuple: its class scores are 1, and 0 is not used (model.output)"
    )

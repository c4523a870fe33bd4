"""The scores in what a network returns: a tensor, a tuple, or a mapping such as a dict.

``tasks`` uses it for losses and metrics, ``job.dry_run`` for its checks.

Shapes: N samples, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_USUAL_NAMES = ("logits", "out")
_AUXILIARY = {"aux_logits1": 0.3, "aux_logits2": 0.3, "aux_logits": 0.4, "aux": 0.5}
"""Weights of the losses of auxiliary outputs, by name.

GoogLeNet's two: Szegedy et al. 2015, section 5.  Inception v3's: PyTorch's fine-tuning tutorial.
aux: torchvision's reference training of networks that return out and aux.
"""


@dataclass(frozen=True)
class OutputReader:
    """Finds the scores, or other values that a task is about, in the output of a network.

    They are the output itself if it is a tensor, else its element ``name``.  Without a name they
    are its element ``logits`` or ``out``, or else its first one; then each auxiliary output, an
    element of a known name and the same shape, has a part in the loss.
    """

    name: str | None = None

    def scores(self, output: Any) -> Tensor:
        """Returns the scores, such as (N, C); raises ``ValueError`` if there is no such element."""
        if isinstance(output, Tensor):
            return output
        elements = _elements(output)
        scores = elements.get(self._name(elements))
        if not isinstance(scores, Tensor):
            names = ", ".join(elements) or "nothing"
            wanted = self.name or "a tensor"
            raise ValueError(f"a {type(output).__name__} with {names}, and not with {wanted}")
        return scores

    def auxiliary(self, output: Any) -> dict[str, float]:
        """Returns the weights of the auxiliary losses by the name of their outputs."""
        if self.name is not None or isinstance(output, Tensor):
            return {}
        elements, shape = _elements(output), self.scores(output).shape
        present = {name: elements[name] for name in _AUXILIARY if name in elements}
        return {
            name: _AUXILIARY[name]
            for name, value in present.items()
            if isinstance(value, Tensor) and value.shape == shape
        }

    def auxiliary_values(self, output: Any) -> list[tuple[Tensor, float]]:
        """Returns the auxiliary outputs, each with the weight of its loss."""
        weights = self.auxiliary(output)
        elements = _elements(output) if weights else {}
        return [(elements[name], weight) for name, weight in weights.items()]

    def describe(self, output: Any) -> str:
        """Returns in words which elements of ``output`` are used; empty for a tensor."""
        if isinstance(output, Tensor):
            return ""
        elements = _elements(output)
        used = self._name(elements)
        losses = [f"{weight} x {name}" for name, weight in self.auxiliary(output).items()]
        unused = [each for each in elements if each not in (used, *self.auxiliary(output))]
        text = f"the network returns a {type(output).__name__}: its class scores are {used}"
        if losses:
            text += f", its loss is that of {' + '.join([used, *losses])}"
        if unused:
            text += f", and {', '.join(unused)} is not used"
        return f"{text} (model.output)"

    def _name(self, elements: Mapping[str, Any]) -> str:
        if self.name is not None:
            return self.name
        usual = (name for name in _USUAL_NAMES if name in elements)
        return next(usual, next(iter(elements), ""))


def applied(model: nn.Module, inputs: Any) -> Any:
    """Returns what ``model`` returns for inputs, of which a dict or tuple are its arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns positional and named arguments of a model: a dict has named ones, a tuple several."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


PLAIN_READER = OutputReader()
"""The reader of networks for which ``model.output`` is not set."""


def _elements(output: Any) -> dict[str, Any]:
    """Returns the elements of ``output`` by name; those of a plain tuple by number, from 0."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return {str(number): value for number, value in enumerate(output)}
    return dict(getattr(output, "__dict__", {}))

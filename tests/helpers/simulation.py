"""FedTAN and FedAvg re-stated in one process: clients of an mlp, plain operations and autograd.

Each client has a copy of every parameter.  A synchronised step differentiates one loss
sum_k p_k F_k; client k's gradient is the derivative with respect to its copy, divided by p_k.
``restated`` has all methods, with momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

State = dict[str, Tensor]

EPS, MOMENTUM = 1e-5, 0.1
HIDDEN = (("1", "2"), ("4", "5"))
"""Names of the linear and the BN layer of each hidden layer; the last linear layer is "7"."""


def forward(states: list[State], inputs: list[Tensor], p: list[float] | None) -> list[Tensor]:
    """The scores of each client; BN is over all clients weighted with ``p``, or over each batch.

    It moves the running statistics in ``states``.
    """
    h = [x.flatten(1) for x in inputs]
    for linear, bn in HIDDEN:
        terms = zip(states, h, strict=True)
        h = [x @ s[f"{linear}.weight"].T + s[f"{linear}.bias"] for s, x in terms]
        groups = [range(len(h))] if p else [range(k, k + 1) for k in range(len(h))]
        for group in groups:
            shares = {k: p[k] if p else 1.0 for k in group}
            mean = torch.stack([shares[k] * h[k].mean(0) for k in group]).sum(0)
            squares = [shares[k] * (h[k] - mean).square().mean(0) for k in group]
            variance = torch.stack(squares).sum(0)
            count = sum(len(h[k]) for k in group)
            for k in group:
                s = states[k]
                _move(s, f"{bn}.running_mean", mean)
                _move(s, f"{bn}.running_var", variance * count / (count - 1))
                y = (h[k] - mean) / torch.sqrt(variance + EPS)
                h[k] = torch.relu(y * s[f"{bn}.weight"] + s[f"{bn}.bias"])
    return [x @ s["7.weight"].T + s["7.bias"] for s, x in zip(states, h, strict=True)]


def local_step(
    states: list[State],
    batches: list[tuple[Tensor, Tensor]],
    p: list[float],
    synchronised: bool,
    learning_rate: float,
) -> list[float]:
    """Changes ``states`` by one SGD step of every client; returns the clients' losses."""
    trained = [[v for v in state.values() if v.requires_grad] for state in states]
    scores = forward(states, [x for x, _ in batches], p if synchronised else None)
    losses = [cross_entropy(s, y) for s, (_, y) in zip(scores, batches, strict=True)]
    total = torch.stack([p_k * loss for p_k, loss in zip(p, losses, strict=True)]).sum()
    gradients = [torch.autograd.grad(total, values, retain_graph=True) for values in trained]
    for p_k, values, changes in zip(p, trained, gradients, strict=True):
        for value, change in zip(values, changes, strict=True):
            value.data -= learning_rate * change / p_k
    return [float(loss.detach()) for loss in losses]


def average(states: list[State], p: list[float]) -> State:
    """sum_k p_k state_k of all values that are not counters."""
    return {
        name: torch.stack([p_k * s[name].detach() for p_k, s in zip(p, states, strict=True)]).sum(0)
        for name, value in states[0].items()
        if value.is_floating_point()
    }


def copy(state: State) -> State:
    """A copy of the global model for a client; parameters require gradients."""
    return {
        name: value.detach().clone().requires_grad_("running" not in name)
        for name, value in state.items()
    }


def _move(state: State, name: str, value: Tensor) -> None:
    state[name] = (1 - MOMENTUM) * state[name] + MOMENTUM * value.detach()

"""Every method re-stated in one process: clients of an mlp, plain operations and autograd.

Each client has a copy of every value.  A synchronised step differentiates one loss sum_k p_k F_k;
client k's gradient is the derivative with respect to its copy, divided by p_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

EPS, MOMENTUM = 1e-5, 0.1
HIDDEN = (("1", "2"), ("4", "5"))
"""Names of the linear and the normalization layer of each hidden layer; the last layer is "7"."""
STATISTICS = ("running_mean", "running_var")


@dataclass
class Method:
    """What a method normalises with, what it averages, and what stays with the clients."""

    synchronised: int = 0
    pooled_gradients: bool = False
    normaliser: str = "batch"
    """batch, frozen, fixed (constants; running statistics move), mixed (HBN), groups or none."""
    private: Sequence[str] = ()
    """Endings of the names of private values; "" stands for all."""
    unaveraged: Sequence[str] = ()
    groups: int = 1


@dataclass
class Server:
    """FedOpt, tensor by tensor."""

    kind: str = "none"
    lr: float = 1.0
    beta: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    mean: State = field(default_factory=dict)
    squared: State = field(default_factory=dict)

    def step(self, before: State, average: State) -> State:
        if self.kind == "none":
            return average
        after = dict(average)
        for name in [n for n in average if not n.endswith(STATISTICS)]:
            delta = average[name] - before[name]
            m = self.mean.get(name, torch.zeros_like(delta))
            v = self.squared.get(name, torch.full_like(delta, self.tau**2))
            if self.kind == "momentum":
                m = self.beta * m + delta
                change = m
            else:
                m = self.beta * m + (1 - self.beta) * delta
                if self.kind == "adam":
                    v = self.beta2 * v + (1 - self.beta2) * delta**2
                else:
                    v = v - (1 - self.beta2) * delta**2 * torch.sign(v - delta**2)
                change = m / (torch.sqrt(v) + self.tau)
            self.mean[name], self.squared[name] = m, v
            after[name] = before[name] + self.lr * change
        return after


def hidden(
    h: list[Tensor],
    states: list[State],
    bn: str,
    method: Method,
    p: list[float] | None,
    first: State,
) -> list[Tensor]:
    """One normalization layer of all clients; with ``p``, statistics are over all of them."""
    if p is not None and method.normaliser != "none":
        mean = torch.stack([p_k * x.mean(0) for p_k, x in zip(p, h, strict=True)]).sum(0)
        squares = [p_k * (x - mean).square().mean(0) for p_k, x in zip(p, h, strict=True)]
        variance, n = torch.stack(squares).sum(0), sum(len(x) for x in h)
        for state in states:
            move(state, bn, mean, variance * n / (n - 1))
        return [
            affine((x - mean) / torch.sqrt(variance + EPS), s, bn)
            for x, s in zip(h, states, strict=True)
        ]
    return [alone(x, s, bn, method, first) for x, s in zip(h, states, strict=True)]


def alone(x: Tensor, state: State, bn: str, method: Method, first: State) -> Tensor:
    """One normalization layer of one client; ``first`` has the round's global values."""
    if method.normaliser == "none":
        return x
    if method.normaliser == "groups":
        parts = x.reshape(len(x), method.groups, -1)
        deviation = torch.sqrt(parts.var(2, correction=0, keepdim=True) + EPS)
        return affine(
            ((parts - parts.mean(2, keepdim=True)) / deviation).reshape(x.shape), state, bn
        )
    mean, variance, n = x.mean(0), x.var(0, correction=0), len(x)
    constant = first[f"{bn}.running_mean"], first[f"{bn}.running_var"]
    if method.normaliser == "batch":
        move(state, bn, mean, variance * n / (n - 1))
    if method.normaliser in ("fixed", "mixed"):
        move(state, bn, mean, variance + (mean - constant[0]) ** 2)
    if method.normaliser in ("fixed", "frozen"):
        mean, variance = constant
    if method.normaliser == "mixed":
        a = torch.sigmoid(state[f"{bn}.mix"])
        mean = a * constant[0] + (1 - a) * mean
        variance = a * constant[1] + (1 - a) * variance
    return affine((x - mean) / torch.sqrt(variance + EPS), state, bn)


def affine(y: Tensor, state: State, bn: str) -> Tensor:
    return y * state[f"{bn}.weight"] + state[f"{bn}.bias"]


def move(state: State, bn: str, mean: Tensor, variance: Tensor) -> None:
    for name, value in zip(STATISTICS, (mean, variance), strict=True):
        key = f"{bn}.{name}"
        state[key] = (1 - MOMENTUM) * state[key] + MOMENTUM * value.detach()


def local_step(
    states: list[State],
    batches: list[Batch],
    p: list[float],
    method: Method,
    synchronised: bool,
    first: State,
    velocity: list[State],
    lr: float,
    momentum: float,
    mu: float,
    starts: list[State],
) -> list[float]:
    """Changes ``states`` by one SGD step of every client; returns the clients' losses."""
    trained = [{n: v for n, v in s.items() if v.requires_grad} for s in states]
    h = [x.flatten(1) for x, _ in batches]
    for linear, bn in HIDDEN:
        h = [
            x @ s[f"{linear}.weight"].T + s[f"{linear}.bias"]
            for s, x in zip(states, h, strict=True)
        ]
        h = [
            torch.relu(x) for x in hidden(h, states, bn, method, p if synchronised else None, first)
        ]
    scores = [x @ s["7.weight"].T + s["7.bias"] for s, x in zip(states, h, strict=True)]
    losses = [cross_entropy(s, y) for s, (_, y) in zip(scores, batches, strict=True)]
    total = torch.stack([p_k * loss for p_k, loss in zip(p, losses, strict=True)]).sum()
    gradients = [
        dict(
            zip(
                t,
                torch.autograd.grad(
                    total, list(t.values()), retain_graph=True, materialize_grads=True
                ),
                strict=True,
            )
        )
        for t in trained
    ]
    for k, values in enumerate(trained):
        for name, value in values.items():
            g = gradients[k][name] / p[k]
            if synchronised and method.pooled_gradients:
                g = torch.stack([gradient[name] for gradient in gradients]).sum(0)
            g = g + mu * (value.detach() - starts[k][name])
            velocity[k][name] = momentum * velocity[k].get(name, torch.zeros_like(g)) + g
            value.data -= lr * velocity[k][name]
    return [float(loss.detach()) for loss in losses]


def client_copy(state: State) -> State:
    return {
        name: value.detach().clone().requires_grad_(not name.endswith(STATISTICS))
        for name, value in state.items()
    }


def is_private(name: str, method: Method) -> bool:
    return any(name.endswith(end) for end in method.private)

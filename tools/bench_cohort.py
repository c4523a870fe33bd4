"""What hosting several clients on a rank costs, against clients that each have a rank.

    python tools/bench_cohort.py --clients 1 4 --device cpu
    python tools/bench_cohort.py --clients 1 4 16 64 --device cuda

One process.  For each algorithm and number of clients a round of local steps is timed: every client
by itself, one round after another (the floor: what ranks of their own would take in all), the
rank's clients in sequential mode, and stacked.  Variants alternate; the figures are medians over
the repeats, and ratios are taken to the clients by themselves in the same repeat.  JSON on standard
output, a table on standard error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import AlgorithmName, CohortMode, ModelName
from fedtan_hpc.config.schema import (
    AlgorithmConfig,
    CohortConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
)
from fedtan_hpc.data.batching import Samples
from fedtan_hpc.data.client_store import Client
from fedtan_hpc.job.setup import host, network
from fedtan_hpc.runtime.device import allow_tensor_float
from fedtan_hpc.training.local_training import RoundContext


def main() -> None:
    """Time all variants and print."""
    arguments = parse()
    torch.set_num_threads(1)
    allow_tensor_float(False)
    variants = {
        (algorithm, mode, clients): round_of(arguments, algorithm, mode, clients)
        for algorithm in ("fedtan", "fedavg")
        for clients in arguments.clients
        for mode in ("alone", "sequential", "stacked")
    }
    seconds = alternating(list(variants.values()), arguments.repeats, arguments.device)
    results = []
    for (algorithm, mode, clients), times in zip(variants, seconds, strict=True):
        alone = seconds[list(variants).index((algorithm, "alone", clients))]
        per_step = statistics.median(times) / (clients * arguments.local_steps)
        results.append(
            {
                "algorithm": algorithm,
                "mode": mode,
                "clients": clients,
                "client_steps_per_second": 1 / per_step,
                "ratio_to_alone": statistics.median(
                    t / a for t, a in zip(times, alone, strict=True)
                ),
                "round_seconds": {"median": statistics.median(times), "all": times},
            }
        )
    show(results)
    print(json.dumps({"setting": setting(arguments), "results": results}, indent=2))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4], help="clients of the rank")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="resnet20", choices=[str(name) for name in ModelName])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def round_of(
    arguments: argparse.Namespace, algorithm: str, mode: str, clients: int
) -> Callable[[], object]:
    """A function that runs a round of the variant, on random 3x32x32 images."""
    device, batch = torch.device(arguments.device), arguments.batch_size
    inputs = torch.randn(clients, batch, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (clients, batch), device=device)
    hosted = [Client(k, 1 / clients, Samples(inputs[k], labels[k])) for k in range(clients)]
    way = CohortMode.stacked if mode == "stacked" else CohortMode.sequential
    config = Config(
        model=ModelConfig(name=ModelName(arguments.model)),
        algorithm=AlgorithmConfig(name=AlgorithmName(algorithm)),
        optimizer=OptimizerConfig(momentum=0.9, weight_decay=1e-4),
        cohort=CohortConfig(mode=way, max_stacked=max(arguments.clients)),
        local_steps=arguments.local_steps,
        batch_size=batch,
    )
    model = network(config, (3, 32, 32), 10).to(device)
    cohort = host(config, model, hosted[0].samples[:1])
    now = RoundContext(1, 0.01, plan(config, 1))
    if mode == "alone":
        by_itself = [[replace(client, weight=1.0)] for client in hosted]
        return lambda: [cohort.train(clients, now) for clients in by_itself]
    return lambda: cohort.train(hosted, now)


def alternating(
    variants: list[Callable[[], object]], repeats: int, device: str
) -> list[list[float]]:
    """Seconds of each variant in each repeat, after one of each that does not count."""
    found: list[list[float]] = [[] for _ in variants]
    for repeat in range(repeats + 1):
        for times, variant in zip(found, variants, strict=True):
            start = time.perf_counter()
            variant()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        print(f"repeat {repeat} of {repeats}", end="\r", file=sys.stderr, flush=True)
    return [times[1:] for times in found]


def show(results: list[dict[str, object]]) -> None:
    """The table."""
    print("| algorithm | mode | clients | client-steps a second | time to alone |", file=sys.stderr)
    print("| --- | --- | --- | --- | --- |", file=sys.stderr)
    for row in results:
        print(
            f"| {row['algorithm']} | {row['mode']} | {row['clients']} "
            f"| {row['client_steps_per_second']:.1f} | {row['ratio_to_alone']:.2f} |",
            file=sys.stderr,
        )


def setting(arguments: argparse.Namespace) -> dict[str, object]:
    """What was run, on what."""
    device = platform.processor() or platform.machine()
    if arguments.device == "cuda":
        device = torch.cuda.get_device_name()
    return {
        **vars(arguments),
        "threads": torch.get_num_threads(),
        "machine": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()

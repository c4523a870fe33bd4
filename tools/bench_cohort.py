"""Cost of several clients on one rank, against each of these clients on its own rank.

    python tools/bench_cohort.py --clients 1 4 --device cpu
    python tools/bench_cohort.py --clients 1 4 16 64 --device cuda

One process.  For each algorithm and number of clients it times a round of local steps in three
modes: alone (one client after another, each in its own round: the sum of what separate ranks would
take), sequential and stacked (the job's cohort modes).  Modes alternate; figures are medians over
the repeats, ratios are taken to alone in the same repeat.  Prints JSON, and a table on standard
error.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bench import benchmark, rounds, timing
from fedtan_hpc.config.algorithms import plan
from fedtan_hpc.config.enums import AlgorithmName, CohortMode, DeviceName, ModelName
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
from fedtan_hpc.training.local_step import RoundContext

COLUMNS = {
    "algorithm": "{algorithm}",
    "mode": "{mode}",
    "clients": "{clients}",
    "client-steps a second": "{client_steps_per_second:.1f}",
    "time to alone": "{ratio_to_alone:.2f}",
}


def main() -> None:
    """Times all variants and prints."""
    arguments = parse()
    torch.set_num_threads(1)
    allow_tensor_float(False)
    variants = {
        (algorithm, mode, clients): round_of(arguments, algorithm, mode, clients)
        for algorithm in ("fedtan", "fedavg")
        for clients in arguments.clients
        for mode in ("alone", "sequential", "stacked")
    }
    times = alternate(list(variants.values()), arguments.repeats, torch.device(arguments.device))
    seconds = dict(zip(variants, times, strict=True))
    results = []
    for (algorithm, mode, clients), times_of_mode in seconds.items():
        alone = seconds[algorithm, "alone", clients]
        median = statistics.median(times_of_mode)
        ratios = [t / a for t, a in zip(times_of_mode, alone, strict=True)]
        results.append(
            {
                "algorithm": algorithm,
                "mode": mode,
                "clients": clients,
                "client_steps_per_second": clients * arguments.local_steps / median,
                "ratio_to_alone": statistics.median(ratios),
                "round_seconds": {"median": median, "all": times_of_mode},
            }
        )
    benchmark.print_table(results, COLUMNS)
    setting = benchmark.setting(Config(device=DeviceName(arguments.device)), **vars(arguments))
    print(json.dumps({"setting": setting, "results": results}, indent=2))


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    count = benchmark.count
    parser.add_argument("--clients", type=count, nargs="+", default=[4], help="clients of the rank")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="resnet20", choices=[str(name) for name in ModelName])
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--local-steps", type=count, default=5)
    parser.add_argument("--repeats", type=count, default=7)
    return parser.parse_args()


def round_of(
    arguments: argparse.Namespace, algorithm: str, mode: str, clients: int
) -> Callable[[], object]:
    """Returns a function that runs a round of the variant, on random 3x32x32 images."""
    device, batch_size = torch.device(arguments.device), arguments.batch_size
    inputs = torch.randn(clients, batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (clients, batch_size), device=device)
    hosted = [Client(k, 1 / clients, Samples(inputs[k], labels[k])) for k in range(clients)]
    cohort_mode = CohortMode.stacked if mode == "stacked" else CohortMode.sequential
    config = Config(
        model=ModelConfig(name=ModelName(arguments.model)),
        algorithm=AlgorithmConfig(name=AlgorithmName(algorithm)),
        optimizer=OptimizerConfig(momentum=0.9, weight_decay=1e-4),
        cohort=CohortConfig(mode=cohort_mode, max_stacked=max(arguments.clients)),
        local_steps=arguments.local_steps,
        batch_size=batch_size,
    )
    model = network(config, (3, 32, 32), 10).to(device)
    cohort = host(config, model, Samples(inputs[0, :1], labels[0, :1]))
    context = RoundContext(1, 0.01, plan(config, 1))
    if mode == "alone":
        alone = [[replace(client, weight=1.0)] for client in hosted]
        return lambda: [rounds.train_round(cohort, clients, context) for clients in alone]
    return lambda: rounds.train_round(cohort, hosted, context)


def alternate(
    variants: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Returns the seconds of each variant in each repeat, after one round of each to warm up."""
    seconds: list[list[float]] = [[] for _ in variants]
    for repeat in range(repeats + 1):
        for times, variant in zip(seconds, variants, strict=True):
            times.append(timing.seconds(variant, device))
        print(f"repeat {repeat} of {repeats}", end="\r", file=sys.stderr, flush=True)
    return [times[1:] for times in seconds]


if __name__ == "__main__":
    main()

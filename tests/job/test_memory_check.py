"""What cannot fit into memory is refused before work begins, by sizes that the options tell."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

import fedtan_hpc
from fedtan_hpc.config.enums import AlgorithmName, DataName, ModelName, SamplingName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config, DataConfig
from fedtan_hpc.data import memory_need
from fedtan_hpc.distributed import process_group
from fedtan_hpc.job import run, setup
from fedtan_hpc.models import factory
from fedtan_hpc.runtime import free_memory
from tests.helpers.ranks import on_ranks
from tests.helpers.rounds import CPU

FREE = 10**10


def job(**options: Any) -> Config:
    data = {name[5:]: options.pop(name) for name in list(options) if name.startswith("data_")}
    config = Config(**options)
    config.data = DataConfig(name=DataName.synthetic, **data)
    return config


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (job(data_samples=10**9, clients=10**6), "data.samples=1000000000: "),
        (job(data_samples=4 * 10**8, clients=10**8), "clients=100000000: "),
        (job(data_samples=10**7, data_classes=10**6), "data.classes=1000000: "),
        (job(data_shape=[1, 9000, 9000]), "data.shape=[1, 9000, 9000]: "),
        (job(data_shape=[1, 5000, 5000]), "model.name=mlp: "),
        (job(batch_size=10**9, sampling=SamplingName.replacement), "batch_size=1000000000: "),
    ],
)
def test_what_does_not_fit_is_refused(
    config: Config, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "host_bytes", lambda ranks: FREE)
    with pytest.raises(ConfigError) as caught:
        setup.check_memory(config, CPU, 1)
    [line] = caught.value.mistakes
    assert line.startswith(option)
    assert "and 10.0 GB are free for it; use less" in line


def refused_with_less_memory_on_rank_1(folder: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free_memory, "host_bytes", memory_of_rank)
        with pytest.raises(ConfigError) as caught:
            fedtan_hpc.run(job(data_samples=1000, clients=2, run_dir=folder), callbacks=[])
    return f"{caught.value.on_all_ranks} {caught.value}"


def memory_of_rank(ranks: int) -> int:
    return 10**3 if process_group.rank() == 1 else FREE


def test_ranks_agree_although_their_memory_differs(tmp_path: Path) -> None:
    for text in on_ranks(2, refused_with_less_memory_on_rank_1, str(tmp_path / "run")):
        assert text.startswith("True ")
        assert "what fits in memory" in text
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_checked_before_its_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each run once, for this process then keeps memory."""
    seen: list[int] = []

    def noted(config: Config, *_: object) -> None:
        seen.append(config.seed)
        if config.seed == 2:
            raise ConfigError("too large")

    monkeypatch.setattr(run, "check_memory", noted)
    configs = [Config(rounds=1, seed=seed, run_dir=str(tmp_path / f"{seed}")) for seed in range(3)]
    with pytest.raises(ConfigError, match="too large"):
        run.run_all(configs)
    assert seen == [0, 1, 2]
    assert not list(tmp_path.iterdir())
    seen.clear()
    run.run_all(configs[:2])
    assert seen == [0, 1]


def test_states_of_clients_count_by_rank_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "host_bytes", lambda ranks: FREE)
    config = job(data_samples=10**6, clients=10**5)
    config.algorithm.name = AlgorithmName.singleset
    with pytest.raises(ConfigError, match=r"^clients=100000: "):
        setup.check_memory(config, CPU, 1)
    setup.check_memory(config, CPU, 100)
    config.ranks_per_client = 100
    with pytest.raises(ConfigError, match=r"^clients=100000: "):
        setup.check_memory(config, CPU, 100)
    config.ranks_per_client = 1
    config.clients_per_round, config.rounds = 10, 100
    setup.check_memory(config, CPU, 1)


def test_long_work_is_announced() -> None:
    assert [*memory_need.long_work(Config())] == []
    config = job(data_samples=10**8, clients=10**7)
    assert [line.split(",")[0] for line in memory_need.long_work(config)] == [
        "making a data set of 100000000 samples",
        "making the partition of 10000000 clients",
    ]


@pytest.mark.parametrize("name", ModelName)
def test_built_in_networks_have_fewer_values_than_are_allowed_for(name: ModelName) -> None:
    config = job(data_shape=[3, 32, 32], data_classes=1000, data_samples=10**4)
    config.model.name = str(name)
    model = factory.build(config.model, (3, 32, 32), 1000, 0)
    assert factory.parameter_count(model) < setup._most_values(config)


def test_free_memory_follows_limits_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmSize:\t 3000 kB\nVmData:\t 1 kB\n")
    assert free_memory.host_bytes(1, tmp_path) == 8000 * 1024
    assert free_memory.host_bytes(2, tmp_path) == 4000 * 1024
    limits = {resource.RLIMIT_AS: (5000 * 1024, -1), resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert free_memory.host_bytes(1, tmp_path) == 2000 * 1024

"""What cannot fit into memory is refused before work begins, by sizes that the options tell."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from fedtan_hpc.config.enums import AlgorithmName, DataName, ModelName, SamplingName
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config, DataConfig
from fedtan_hpc.data import memory_need
from fedtan_hpc.job import setup
from fedtan_hpc.models import factory
from fedtan_hpc.runtime import free_memory
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


def test_states_of_clients_count_by_rank_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "host_bytes", lambda ranks: FREE)
    config = job(data_samples=10**6, clients=10**5)
    config.algorithm.name = AlgorithmName.singleset
    with pytest.raises(ConfigError, match=r"^clients=100000: "):
        setup.check_memory(config, CPU, 1)
    setup.check_memory(config, CPU, 100)
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

"""The address at which ranks of srun meet, from SLURM's variables and `scontrol`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.distributed import rendezvous


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-07,9],login", "gpu03"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("a-[5],b", "a-5"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert rendezvous.first_node(nodes) == first


def test_a_name_that_resolves_is_the_address() -> None:
    variables = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "123456"}
    assert rendezvous.master_endpoint(variables) == ("localhost", "23456")


def test_variables_of_the_user_have_precedence() -> None:
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29999", "SLURM_JOB_ID": "5"}
    assert rendezvous.master_endpoint(given) == ("10.0.0.7", "29999")


def test_a_name_that_does_not_resolve_has_slurms_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text(
        "#!/bin/sh\necho \"NodeName=$3 Arch=x\"; echo '   NodeAddr=10.1.2.3 State=IDLE'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    variables = {"SLURM_JOB_NODELIST": "no-such-host-[1-2]", "SLURM_JOB_ID": "5"}
    assert rendezvous.master_endpoint(variables) == ("10.1.2.3", "20005")


def test_a_node_without_an_address_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no-such-host-1.*MASTER_ADDR"):
        rendezvous.master_endpoint({"SLURM_JOB_NODELIST": "no-such-host-1"})

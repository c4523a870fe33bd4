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


ONE_NODE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
OF_SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
OF_SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("variables", "is_on_one_node"),
    [
        (ONE_NODE, True),
        (OF_SRUN, True),
        ({**ONE_NODE, "LOCAL_WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),  # of a launcher that does not say where
        ({**OF_SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({}, False),
    ],
    ids=["torchrun", "srun", "two of torchrun", "unknown", "two of srun", "one process"],
)
def test_ranks_of_one_node_use_the_loopback_interface(
    variables: dict[str, str], is_on_one_node: bool
) -> None:
    chosen = dict(variables)
    rendezvous.use_loopback(chosen)
    assert (chosen.get("GLOO_SOCKET_IFNAME") == "lo") is is_on_one_node
    assert (chosen.get("NCCL_SOCKET_IFNAME") == "=lo") is is_on_one_node
    assert (chosen.get("OMPI_MCA_btl") == "^tcp") is is_on_one_node


def test_what_the_user_has_chosen_stays() -> None:
    own = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib1", "OMPI_MCA_btl": "self,tcp"}
    chosen = {**ONE_NODE, **own}
    rendezvous.use_loopback(chosen)
    assert chosen == {**ONE_NODE, **own}
    assert rendezvous.master_endpoint({**OF_SRUN, "MASTER_ADDR": "n1"})[0] == "n1"


def test_ranks_of_srun_on_one_node_meet_at_the_loopback_address() -> None:
    assert rendezvous.master_endpoint({**OF_SRUN, "SLURM_JOB_ID": "7"}) == ("127.0.0.1", "20007")

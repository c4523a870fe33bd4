"""Where the ranks that srun started meet: no host names to know, no variables to set.  No torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from ..config.errors import ConfigError, format_option_error

_FIRST_PORT, _PORTS = 20_000, 10_000
_ASKING_SECONDS = 20.0


def meeting_place(variables: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Address and port of rank 0, the same on every rank, as MASTER_ADDR and MASTER_PORT.

    The address is the first node's name if it resolves, else the address that SLURM has for it; the
    port follows from the job's number, so that it is the same after a requeue.  What the two
    variables say already stands.

    Raises ``ConfigError`` if neither name nor address can be had.
    """
    port = _FIRST_PORT + int(variables.get("SLURM_JOB_ID", "0")) % _PORTS
    given = variables.get("MASTER_ADDR")
    return given or _address(variables), variables.get("MASTER_PORT", str(port))


def first_node(nodes: str) -> str:
    """The first name of SLURM's list, such as ``gpu[03-07,9],login``: gpu03."""
    found = re.match(r"(?:[^,\[]|\[[^]]*])+", nodes)
    return re.sub(r"\[(\d+)[^]]*]", r"\1", found[0]) if found else ""


def _address(variables: Mapping[str, str]) -> str:
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    node = first_node(nodes)
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    found = re.search(r"\bNodeAddr=(\S+)", _asked_of_slurm(node))
    if not found:
        remedy = "set MASTER_ADDR to the address of the first node"
        allowed = "a name that resolves, or one whose address `scontrol show node` tells"
        raise ConfigError(format_option_error("SLURM_STEP_NODELIST", nodes, allowed, remedy))
    return found[1]


def _asked_of_slurm(node: str) -> str:
    words = ["scontrol", "show", "node", node]
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=_ASKING_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""

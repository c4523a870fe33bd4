"""Addresses at which ranks meet, from SLURM's variables or from this host's network.  No torch.

``process_group`` uses them where the launcher sets no MASTER_ADDR.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from ..config.errors import ConfigError, format_option_error

_FIRST_PORT, _PORTS = 20_000, 10_000
_SCONTROL_SECONDS = 20.0


def master_endpoint(variables: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Returns MASTER_ADDR and MASTER_PORT for a job that srun started, equal on all ranks.

    The address is the first node's name if it resolves, else the address that SLURM knows for it.
    The port follows from the job's number, so a requeued job keeps it.  Either variable, if set,
    has precedence.

    Raises ``ConfigError`` if the first node has neither a name that resolves nor an address.
    """
    port = _FIRST_PORT + int(variables.get("SLURM_JOB_ID", "0")) % _PORTS
    address = variables.get("MASTER_ADDR") or _address_of_first_node(variables)
    return address, variables.get("MASTER_PORT", str(port))


def free_endpoint() -> tuple[str, str]:
    """Returns an address of this host that other hosts reach, and a free port."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = str(listener.getsockname()[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outgoing:
        try:
            outgoing.connect(("192.0.2.1", 9))  # a documentation address; nothing is sent
            return str(outgoing.getsockname()[0]), port
        except OSError:  # this host has no route to others
            return socket.gethostbyname(socket.gethostname()), port


def first_node(nodes: str) -> str:
    """Returns the first name of SLURM's node list: gpu03 for ``gpu[03-07,9],login``."""
    first = re.match(r"(?:[^,\[]|\[[^]]*])+", nodes)
    return re.sub(r"\[(\d+)[^]]*]", r"\1", first[0]) if first else ""


def _address_of_first_node(variables: Mapping[str, str]) -> str:
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    node = first_node(nodes)
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        address = re.search(r"\bNodeAddr=(\S+)", _scontrol_show_node(node))
    if not address:
        remedy = "set MASTER_ADDR to the address of the first node"
        allowed = "a name that resolves, or one whose address `scontrol show node` tells"
        raise ConfigError(format_option_error("SLURM_STEP_NODELIST", nodes, allowed, remedy))
    return address[1]


def _scontrol_show_node(node: str) -> str:
    words = ["scontrol", "show", "node", node]
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""

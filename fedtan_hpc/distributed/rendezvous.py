"""Where ranks meet: addresses from SLURM's variables or this host's network, and the store there.

``process_group`` and ``mpi.backend`` use it.  Ranks that are all on one node use the loopback
interface alone, which other machines do not reach, wherever neither the user nor the launcher has
chosen.  No torch, except for the store.
"""

import ipaddress
import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from typing import Any

from ..config.errors import ConfigError, format_option_error
from ..runtime import launcher_env

_LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(minutes=5)
"""Longest time for a call of a store."""
_FIRST_PORT, _PORTS = 20_000, 10_000
_SCONTROL_SECONDS = 20.0


def master_endpoint(variables: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Returns MASTER_ADDR and MASTER_PORT for a job that srun started, equal on all ranks.

    On one node the address is the loopback interface's.  On several it is the first node's name if
    that resolves, else the address that SLURM knows for it.  The port follows from the job's
    number, so a requeued job keeps it.  Either variable, if set, has precedence.

    Raises ``ConfigError`` if the first node has neither a name that resolves nor an address.
    """
    port = _FIRST_PORT + int(variables.get("SLURM_JOB_ID", "0")) % _PORTS
    address = variables.get("MASTER_ADDR")
    if not address and launcher_env.detect(variables).is_on_one_node:
        address = _LOOPBACK
    return address or _address_of_first_node(variables), variables.get("MASTER_PORT", str(port))


def own_address() -> str:
    """Returns an address of this host that all ranks reach."""
    if launcher_env.detect().is_on_one_node:
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outgoing:
        try:
            outgoing.connect(("192.0.2.1", 9))  # a documentation address; nothing is sent
            return str(outgoing.getsockname()[0])
        except OSError:  # this host has no route to others
            return socket.gethostbyname(socket.gethostname())


def use_loopback(variables: MutableMapping[str, str] = os.environ) -> None:
    """Lets gloo, NCCL and Open MPI listen on the loopback interface alone, if that serves.

    It does so if all ranks are on this node; what the user has set stays.  Open MPI's TCP sockets
    listen on all interfaces, and are not needed on one node.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names and launcher_env.detect(variables).is_on_one_node:
        variables.setdefault("GLOO_SOCKET_IFNAME", names[0])
        variables.setdefault("NCCL_SOCKET_IFNAME", f"={names[0]}")
        variables.setdefault("OMPI_MCA_btl", "^tcp")


def open_store(host: str, port: int, serves: bool, timeout: timedelta = _TIMEOUT) -> Any:
    """Connects to the store at ``host`` and ``port``; the rank that ``serves`` it starts it first.

    A server with a loopback address listens there alone; torch's listens on all interfaces.  Port 0
    is any free port, for the rank that serves.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    options: dict[str, Any] = {"is_master": serves, "wait_for_workers": False, "timeout": timeout}
    if serves and (address := _loopback_address(host)):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)
        host, port = address, listener.getsockname()[1]
        options["master_listen_fd"] = listener.detach()
    return TCPStore(host, port, **options)


def _loopback_address(host: str) -> str:
    """Returns the address of ``host`` if it names the loopback interface, else an empty text."""
    address = _LOOPBACK if host == "localhost" else host
    try:
        return address if ipaddress.ip_address(address).is_loopback else ""
    except ValueError:  # the name of a host
        return ""


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

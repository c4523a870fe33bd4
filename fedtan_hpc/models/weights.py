"""Initial values from a file: those of a finished run, or of a network from elsewhere.

``job.dry_run`` checks the file on each rank, and ``job.setup`` loads it into the network.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import path_options
from ..config.errors import ConfigError, format_option_error, one_line
from ..files import reading, torch_files
from ..files.reading import FileError

_WRAPPERS = ("state_dict", "model")
"""Names under which checkpoints keep a network's tensors beside other things."""
_PREFIX = "module."
"""What DistributedDataParallel puts before each name."""
_COUNTER = "num_batches_tracked"
_MOST_NAMES = 3
"""Names that a note lists of each kind."""


@torch.no_grad()
def load(module: nn.Module, weights: str) -> str:
    """Copies the tensors of the file ``weights`` into ``module`` where name and shape agree.

    Tensors on the meta device are only compared.  Returns a line that says how many tensors were
    loaded and which were not.

    Raises ``ConfigError`` if the file cannot be read, has no tensors, or none that fits.
    """
    path = path_options.expanded(weights)
    own = {n: v for n, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    state = {n if n in own else n.removeprefix(_PREFIX): v for n, v in _read(path).items()}
    fitting = {n: value for n, value in state.items() if n in own and _fits(value, own[n])}
    other = [
        f"{n} {_described(value)}, here {_described(own[n])}"
        for n, value in state.items()
        if n in own and n not in fitting
    ]
    missing = [n for n in own if n not in state and not n.endswith(_COUNTER)]
    unexpected = [n for n in state if n not in own]
    if not any(name for name in fitting if not name.endswith(_COUNTER)):
        names = _shortened([*other, *unexpected]) or "none"
        remedy = f"those of the file are {names}, those of the network {_shortened(list(own))}"
        raise _error(path, "a file with tensors of this network", remedy)
    for name, value in fitting.items():
        if not own[name].is_meta:
            own[name].copy_(value)
    parts = (
        ("of another shape or kind", other),
        ("not in the file", missing),
        ("not here", unexpected),
    )
    told = "".join(f"; {what}: {_shortened(names)}" for what, names in parts if names)
    return f"model.weights={path}: {len(fitting)} of {len(own)} tensors loaded{told}"


def _fits(value: Tensor, own: Tensor) -> bool:
    """Whether ``own`` can take the values: not those of sparse, quantized or meta tensors."""
    has_values = value.layout is torch.strided and not (value.is_quantized or value.is_meta)
    return has_values and value.shape == own.shape and value.is_complex() == own.is_complex()


def _described(value: Tensor) -> str:
    kinds = {
        str(value.layout).removeprefix("torch."): value.layout is not torch.strided,
        "quantized": value.is_quantized,
        "complex": value.is_complex(),
    }
    return " ".join([f"{tuple(value.shape)}", *(kind for kind, is_it in kinds.items() if is_it)])


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _read(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of the file by name."""
    try:
        is_packed = path.suffix == ".safetensors"
        content = _safetensors(path) if is_packed else torch_files.load(path, is_dense=False)
    except FileNotFoundError as error:
        raise _error(path, "a file that can be read", f"{error.strerror}") from error
    except FileError as error:
        allowed, remedy = "a whole file of torch.save or safetensors", str(error)
        if isinstance(error.__cause__, pickle.UnpicklingError):
            allowed = "a file of torch.save that has only tensors"
            remedy = "save model.state_dict() in its place; "
            remedy += "a whole network would run code of the file"
        raise _error(path, allowed, remedy) from error
    except ConfigError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise _error(path, "a whole file of torch.save or safetensors", one_line(error)) from error
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(_is_named(*each) for each in content.items()):
        found = type(content).__name__
        raise _error(
            path, "a state_dict, tensors by name", f"save model.state_dict(), not a {found}"
        )
    return {name: value for name, value in content.items() if _is_named(name, value)}


def _is_named(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load as load_bytes
    except ImportError as error:
        remedy = "pip install 'fedtan_hpc[weights]'"
        allowed = "a .pt file, because safetensors is not installed"
        raise _error(path, allowed, remedy) from error
    return load_bytes(reading.read_bytes(path))


def _error(path: Path, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(format_option_error("model.weights", path, allowed, remedy))

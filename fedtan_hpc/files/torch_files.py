"""Reads files of ``torch.save``: only tensors and plain values, no code, and nothing that grows."""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.errors import one_line
from . import reading

if TYPE_CHECKING:
    from torch import Tensor

_MOST_VALUES = 10_000_000
"""In one file, tensors and plain values; a list that contains itself has more."""


def load(path: Path, is_dense: bool = True) -> Any:
    """Returns what ``torch.save`` wrote to ``path``, on the CPU.

    ``is_dense`` refuses tensors that no run writes: sparse, quantized or expanded ones.

    Loads with ``weights_only=True``, which runs no code of the file.  Raises ``FileNotFoundError``
    if there is none, ``reading.UnreadableFileError`` if the system refuses to read it, and
    ``reading.FileError`` for a file that is damaged, packed or has other objects.
    """
    import torch

    content = reading.read_bytes(path)
    try:
        _check_records(path, content)
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        for tensor in tensors(value):
            if is_dense:
                _check_dense(path, tensor)
        return value
    except reading.FileError:
        raise
    except MemoryError as error:
        line = f"{path}: it does not fit in memory; use a machine with more"
        raise reading.UnreadableFileError(line) from error
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        why = f"it is damaged ({one_line(error)})"
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run the file's code
            why = "it is damaged, or has other things than tensors"
        raise reading.unusable(path, why, "copy it again, or remove it") from error


def _check_records(path: Path, content: bytes) -> None:
    """Raises ``FileError`` for packed records, which could inflate to any size."""
    if not content.startswith(b"PK"):
        return  # damaged, or of an old version of torch, whose files are not packed
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > len(content):
                raise reading.unusable(path, "its records are packed, which torch.save does not do")


def _check_dense(path: Path, tensor: "Tensor") -> None:
    """Raises ``FileError`` for a tensor that claims more values than the file has for it."""
    import torch

    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not is_dense or tensor.is_quantized:
        raise reading.unusable(path, "it has a tensor that is not dense", "copy it again")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise reading.unusable(path, "a tensor repeats its values", "copy it again")


def tensors(value: Any) -> Iterator["Tensor"]:
    """Yields the tensors in ``value``; raises ``ValueError`` if it has more than 10^7 values."""
    import torch

    left, ahead = _MOST_VALUES, [value]
    while ahead:
        each = ahead.pop()
        if (left := left - 1) < 0:
            raise ValueError(f"it has more than {_MOST_VALUES} values")
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, dict):
            ahead += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            ahead += each

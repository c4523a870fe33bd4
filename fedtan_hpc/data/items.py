"""From items of the user's data to batches of tensors: reading, conversion and checks.

An item is read with generators that are seeded by its number alone, so that it is the same whenever
and wherever it is read; random transforms are seeded by their ``Draw`` too.  Used by ``datasets``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..config.errors import one_line
from ..runtime import global_random, random_streams
from .augmentation import ImageSteps
from .batching import Draw
from .federated_data import Piece
from .partition import Indices


class DataError(Exception):
    """A sample that cannot be read or used; the message names it."""


@dataclass(frozen=True)
class ItemKind:
    """What an input is: a tensor, or a dict or tuple of tensors, of these shapes and dtypes."""

    leaves: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    structure: Any
    is_image: bool
    """Whether it is an image of 8 bits, whose pixels are normalised."""

    @property
    def shape(self) -> Any:
        """The shape of a sample; for a dict or tuple of tensors, that of their shapes."""
        return tree_unflatten([shape for shape, _ in self.leaves], self.structure)

    @property
    def nbytes(self) -> int:
        """Bytes of a sample, with pixels as float32."""
        return sum(
            int(np.prod(shape)) * (4 if self.is_image else dtype.itemsize)
            for shape, dtype in self.leaves
        )

    def __str__(self) -> str:
        text = " and ".join(f"{list(shape)} {str(dtype)[6:]}" for shape, dtype in self.leaves)
        return f"an image {text}" if self.is_image else text


class ItemReader:
    """Reads items of ``pieces``, whose samples are numbered one piece after another."""

    def __init__(self, pieces: Sequence[Piece], steps: ImageSteps, seed: int) -> None:
        self._pieces, self._steps, self._seed = pieces, steps, seed
        self._ends = np.cumsum([len(piece.items) for piece in pieces])
        self._kept: dict[int, Any] = {}
        self.kind: ItemKind | None = None
        """What all inputs must be; None until the first one is known."""

    def keep(self, indices: Indices) -> None:
        """Reads items that then stay in memory, as they are before any transform."""
        with global_random.preserved():
            for index in indices.tolist():
                if index not in self._kept:
                    self._kept[index] = self._input(index)

    def name(self, index: int) -> str:
        """Returns the name of a sample in messages: its file, or its number in its data set."""
        piece, local = self._locate(index)
        files = getattr(piece.items, "samples", None)
        if isinstance(files, list) and local < len(files) and isinstance(files[local], tuple):
            return str(files[local][0])
        return f"sample {local} of {piece.name}"

    def class_numbers(self) -> Indices | None:
        """Returns the targets of all samples if the data sets list them as whole numbers."""
        parts = [_known_targets(piece.items) for piece in self._pieces]
        if any(part is None for part in parts):
            return None
        arrays = [np.asarray(part) for part in parts]
        if any(array.ndim != 1 or array.dtype.kind not in "iu" for array in arrays):
            return None
        return np.concatenate(arrays).astype(np.int64)

    def targets(self, indices: Indices) -> list[Any]:
        """Returns the targets of samples: those in ``targets`` of their data set, or as read."""
        known = {id(piece): _known_targets(piece.items) for piece in self._pieces}
        values = []
        with global_random.preserved():
            for index in indices.tolist():
                piece, local = self._locate(index)
                targets = known[id(piece)]
                values.append(self._read(index)[1] if targets is None else targets[local])
        return values

    def find_kind(self, index: int) -> ItemKind:
        """Reads a sample, which says what the inputs of all samples must be."""
        with global_random.preserved():
            value = self._steps.evaluated(_without_array(self._kept_or_read(index)))
            value = self._converted(index, value)
        leaves, structure = tree_flatten(value)
        if not leaves:
            raise DataError(f"{self.name(index)}: the input is empty")
        kinds = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        is_image = isinstance(value, Tensor) and value.dtype is torch.uint8 and value.dim() == 3
        self.kind = ItemKind(kinds, structure, is_image)
        return self.kind

    def batch(self, indices: Indices, draw: Draw | None) -> Any:
        """Returns inputs of samples, one tensor or a dict or tuple of tensors, pixels in uint8.

        With a ``draw`` they are those of a training step, with random transforms; without one they
        are for evaluation.
        """
        with global_random.preserved():
            values = [self._sample(int(index), draw) for index in indices]
        if not values:
            assert self.kind is not None
            empty = [torch.empty(0, *shape, dtype=dtype) for shape, dtype in self.kind.leaves]
            return tree_unflatten(empty, self.kind.structure)
        return tree_map(lambda *leaves: torch.stack(leaves), *values)

    def _sample(self, index: int, draw: Draw | None) -> Any:
        value, steps = self._kept_or_read(index), self._steps
        try:
            if draw is None:
                value = steps.evaluated(_without_array(value))
            else:
                key = self._seed, draw.client, draw.round, draw.step, index
                global_random.seed(random_streams.number(random_streams.TRANSFORMS, *key))
                value = steps.trained(_without_array(steps.transformed(value)))
        except Exception as error:  # the user's transform may raise anything
            raise DataError(f"{self.name(index)}: a transform raised {one_line(error)}") from error
        value = self._converted(index, value)
        self._check(index, value)
        return value

    def _kept_or_read(self, index: int) -> Any:
        return self._kept[index] if index in self._kept else self._input(index)

    def _input(self, index: int) -> Any:
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Any, Any]:
        piece, local = self._locate(index)
        global_random.seed(random_streams.number(random_streams.ITEMS, self._seed, index))
        try:
            item = piece.items[local]
            if isinstance(item, tuple | list) and item and hasattr(item[0], "getbands"):
                item[0].load()  # a PIL image; it is not decoded before
        except (Exception, SystemExit) as error:  # the user's data set may raise anything
            raise DataError(f"{self.name(index)} cannot be read: {one_line(error)}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{self.name(index)} is a {type(item).__name__}, not (input, target)")
        return item[0], item[1]

    def _locate(self, index: int) -> tuple[Piece, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        piece = self._pieces[number]
        return piece, index - int(self._ends[number]) + len(piece.items)

    def _converted(self, index: int, value: Any) -> Any:
        try:
            return _as_tensors(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.name(index)}: {error}") from error

    def _check(self, index: int, value: Any) -> None:
        """Raises ``DataError`` unless the input is like the first one, with finite values."""
        kind = self.kind
        assert kind is not None
        leaves, structure = tree_flatten(value)
        kinds = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        if kinds != kind.leaves or structure != kind.structure:
            found = ItemKind(kinds, structure, kind.is_image and leaves[0].dtype is torch.uint8)
            remedy = "; data.image_size=N makes images of one size" if kind.is_image else ""
            raise DataError(
                f"{self.name(index)}: the input is {found}, and the first is {kind}{remedy}"
            )
        for leaf in leaves:
            if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise DataError(f"{self.name(index)}: the input has a value that is not finite")


def class_number(target: Any) -> int | None:
    """Returns a target as a class number; None if it is not a whole number >= 0."""
    if isinstance(target, Tensor | np.ndarray | np.generic):
        if target.ndim or not np.issubdtype(np.asarray(target).dtype, np.integer):
            return None
        target = target.item()
    return (
        target if isinstance(target, int) and not isinstance(target, bool) and target >= 0 else None
    )


def _known_targets(items: Any) -> Any:
    """Returns the targets of a data set by index; None if it does not tell them.

    A subset and a concatenation of torch do, if what they are made of does.
    """
    if isinstance(items, torch.utils.data.Subset):
        whole = _known_targets(items.dataset)
        return None if whole is None else [whole[index] for index in items.indices]
    if isinstance(items, torch.utils.data.ConcatDataset):
        parts = [_known_targets(part) for part in items.datasets]
        return None if any(part is None for part in parts) else [t for part in parts for t in part]
    targets = getattr(items, "targets", None)
    if targets is None or not hasattr(targets, "__len__") or len(targets) != len(items):
        return None
    return targets.tolist() if isinstance(targets, Tensor | np.ndarray) else targets


def _without_array(value: Any) -> Any:
    """Returns an array as a tensor, because torchvision's transforms leave arrays as they are."""
    return _as_tensors(value) if isinstance(value, np.ndarray) else value


def _as_tensors(value: Any) -> Any:
    """Returns a tensor, or a dict or tuple of tensors; images as uint8 (C, H, W).

    Arrays of bytes, (H, W) or (H, W, C), are images as in torchvision.
    """
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)
    if hasattr(value, "getbands"):  # a PIL image
        if value.mode not in ("L", "RGB"):
            value = value.convert("RGB")
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            return torch.from_numpy(np.ascontiguousarray(value))
        pixels = value[:, :, np.newaxis] if value.ndim == 2 else value
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    if isinstance(value, dict):
        return {name: _as_tensors(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_as_tensors(each) for each in value)
    if isinstance(value, int | float | np.generic) and not isinstance(value, bool):
        return torch.as_tensor(value)
    raise TypeError(
        f"the input has a {type(value).__name__}: allowed are tensors, arrays, PIL images, "
        "and dicts and tuples of these"
    )

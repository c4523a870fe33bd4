"""From items of the user's data to batches of tensors: reading, conversion and checks.

An item is read with generators that are seeded by its number alone, so that it is the same whenever
and wherever it is read; random transforms are seeded by their ``Draw`` too.  Used by ``datasets``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..config.errors import one_line
from ..runtime import global_random, random_streams
from .augmentation import ImageSteps, as_tensors, raw_bytes, without_array
from .batching import Draw
from .federated_data import Piece
from .partition import Indices


class DataError(Exception):
    """A sample that cannot be read or used; the message names it."""


@dataclass(frozen=True)
class ItemKind:
    """The kind of an input: a tensor, or a dict or tuple of tensors, of these shapes and dtypes."""

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
        """Bytes of an input, with pixels as float32."""
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
        self._here = [_copied(piece.items) for piece in pieces]
        """Copies for reading in the rank: a file that one opens is not open in forked workers,
        which would share its position."""
        self._listed = [_listed_targets(piece.items) for piece in pieces]
        self._ends = np.cumsum([len(piece.items) for piece in pieces])
        self._kept: dict[int, Any] = {}
        self.kind: ItemKind | None = None
        """What all inputs must be; None until the first one is known."""
        self.raw_bytes = 0
        """Bytes of the first input before any step."""

    def keep(self, indices: Indices) -> None:
        """Reads items that then stay in memory, as they are before any transform."""
        with global_random.preserved():
            for index in indices.tolist():
                if index not in self._kept:
                    self._kept[index] = self._input(index)

    def drop(self, indices: Indices) -> None:
        """Drops items that ``keep`` has read."""
        for index in indices.tolist():
            self._kept.pop(index, None)

    def name(self, index: int) -> str:
        """Returns the name of a sample in messages: its file, or its number in its data set."""
        number, local = self._locate(index)
        piece = self._pieces[number]
        files = getattr(piece.items, "samples", None)
        if isinstance(files, list) and local < len(files) and isinstance(files[local], tuple):
            return str(files[local][0])
        return f"sample {local} of {piece.name}"

    def class_numbers(self) -> Indices | None:
        """Returns the targets of all samples if the data sets list them as whole numbers."""
        if any(part is None for part in self._listed):
            return None
        try:
            arrays = [np.asarray(part) for part in self._listed]
        except ValueError:  # lists of different lengths
            return None
        if any(array.ndim != 1 or array.dtype.kind not in "iu" for array in arrays):
            return None
        return np.concatenate(arrays).astype(np.int64)

    def targets(self, indices: Indices) -> list[Any]:
        """Returns the targets of samples: those in ``targets`` of their data set, or as read."""
        values = []
        with global_random.preserved():
            for index in indices.tolist():
                number, local = self._locate(index)
                listed = self._listed[number]
                values.append(self._read(index)[1] if listed is None else listed[local])
        return values

    def find_kind(self, index: int) -> ItemKind:
        """Reads a sample, which says what the inputs of all samples must be.

        Raises ``DataError`` also if its target is not the listed one.
        """
        with global_random.preserved():
            item, target = self._read(index)
            value = self._stepped(index, item, None)
        [listed] = self.targets(np.array([index]))
        if class_number(target) != class_number(listed):
            raise DataError(
                f"{self.name(index)}: its target is {target}, and targets lists {listed}"
            )
        leaves, structure = tree_flatten(value)
        if not leaves:
            raise DataError(f"{self.name(index)}: the input is empty")
        kinds = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        is_image = isinstance(value, Tensor) and value.dtype is torch.uint8 and value.dim() == 3
        self.kind = ItemKind(kinds, structure, is_image)
        self.raw_bytes = raw_bytes(item)
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
        item = self._kept[index] if index in self._kept else self._input(index)
        value = self._stepped(index, item, draw)
        self._check(index, value)
        return value

    def _stepped(self, index: int, value: Any, draw: Draw | None) -> Any:
        """Returns the tensors of an input after the steps of training or evaluation."""
        steps = self._steps
        try:
            if draw is None:
                value = steps.evaluated(without_array(value))
            else:
                key = self._seed, draw.client, draw.round, draw.step, index
                global_random.seed(random_streams.number(random_streams.TRANSFORMS, *key))
                value = steps.trained(without_array(steps.transformed(value)))
        except Exception as error:  # the user's transform may raise anything
            raise DataError(f"{self.name(index)}: a transform raised {one_line(error)}") from error
        try:
            return as_tensors(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.name(index)}: {error}") from error

    def _input(self, index: int) -> Any:
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Any, Any]:
        number, local = self._locate(index)
        is_here = torch.utils.data.get_worker_info() is None
        items = self._here[number] if is_here else self._pieces[number].items
        global_random.seed(random_streams.number(random_streams.ITEMS, self._seed, index))
        try:
            item = items[local]
            if isinstance(item, tuple | list) and item and hasattr(item[0], "getbands"):
                item[0].load()  # a PIL image; it is not decoded before
        except (Exception, SystemExit) as error:  # the user's data set may raise anything
            raise DataError(f"{self.name(index)} cannot be read: {one_line(error)}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{self.name(index)} is a {type(item).__name__}, not (input, target)")
        return item[0], item[1]

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the number of the piece that has a sample, and the sample's number in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + len(self._pieces[number].items)

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


def _copied(items: Any) -> Any:
    """Returns a copy that shares all data, and so do the data sets in it."""
    try:
        copied = copy.copy(items)
        attributes = vars(copied)
    except TypeError:  # a list, for example
        return items
    for name, value in attributes.items():
        if isinstance(value, torch.utils.data.Dataset):
            attributes[name] = _copied(value)
        elif isinstance(value, list) and value and isinstance(value[0], torch.utils.data.Dataset):
            attributes[name] = [_copied(each) for each in value]
    return copied


def _listed_targets(items: Any) -> Any:
    """Returns the targets of a data set by index; None if it does not tell those of its items.

    A subset and a concatenation of torch do, if what they are made of does.
    """
    if getattr(items, "target_transform", None) is not None:
        return None
    if isinstance(items, torch.utils.data.Subset):
        whole = _listed_targets(items.dataset)
        return None if whole is None else [whole[index] for index in items.indices]
    if isinstance(items, torch.utils.data.ConcatDataset):
        parts = [_listed_targets(part) for part in items.datasets]
        return None if any(part is None for part in parts) else [t for part in parts for t in part]
    targets = getattr(items, "targets", None)
    if targets is None or not hasattr(targets, "__len__") or len(targets) != len(items):
        return None
    return targets.tolist() if isinstance(targets, Tensor | np.ndarray) else targets

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

from ...config.enums import TaskName
from ...config.errors import one_line
from ...runtime import global_random, random_streams
from ...runtime.signals import Interrupted
from ..augmentation import ImageSteps, as_tensors, raw_bytes, without_array
from ..batching import Draw
from ..federated_data import Piece
from ..partition import Indices
from .targets import TargetRule, class_number, listed_targets

_ANYTHING = (Exception, SystemExit, KeyboardInterrupt)
"""What the user's code may raise."""


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

    def __init__(
        self,
        pieces: Sequence[Piece],
        steps: ImageSteps,
        seed: int,
        rule: TargetRule | None = None,
    ) -> None:
        self._pieces, self._steps, self._seed, self._rule = pieces, steps, seed, rule
        self._here = [_copied(piece.items) for piece in pieces]
        """Copies for reading in the rank: a file that one opens is not open in forked workers,
        which would share its position."""
        self._listed = [listed_targets(piece.items) for piece in pieces]
        self._ends = np.cumsum([len(piece.items) for piece in pieces])
        self._kept: dict[int, tuple[Any, Any]] = {}
        self.kind: ItemKind | None = None
        """What all inputs must be; None until the first one is known."""
        self.target_shape: tuple[int, ...] | None = None
        """The shape of all targets that are no class numbers; None until the first is known."""
        self.target_dtype: torch.dtype | None = None
        self.target_bytes = 0
        self.outputs: int | None = None
        """Number of a network's outputs, as far as the first target tells it."""
        self.raw_bytes = 0
        """Bytes of the first input before any step."""

    def keep(self, indices: Indices) -> None:
        """Reads items that then stay in memory, as they are before any transform."""
        with global_random.preserved():
            for index in indices.tolist():
                if index not in self._kept:
                    self._kept[index] = self._read(index)

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
        """Reads a sample, which says what the inputs and targets of all samples must be.

        Raises ``DataError`` also if its target is not the listed one.
        """
        with global_random.preserved():
            item, target = self._read(index)
            value, stepped_target = self._stepped(index, (item, target), None)
        if self._rule is not None:
            self.target_shape = tuple(stepped_target.shape)
            self.target_dtype = stepped_target.dtype
            self.target_bytes = stepped_target.nbytes
            self.outputs = self._rule.classes_of(stepped_target)
        else:
            self._check_listed(index, target)
        leaves, structure = tree_flatten(value)
        if not leaves:
            raise DataError(f"{self.name(index)}: the input is empty")
        kinds = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        is_image = isinstance(value, Tensor) and value.dtype is torch.uint8 and value.dim() == 3
        self.kind = ItemKind(kinds, structure, is_image)
        self.raw_bytes = raw_bytes(item)
        return self.kind

    def _check_listed(self, index: int, target: Any) -> None:
        [listed] = self.targets(np.array([index]))
        if class_number(target) != class_number(listed):
            raise DataError(
                f"{self.name(index)}: its target is {target}, and targets lists {listed}"
            )

    def batch(self, indices: Indices, draw: Draw | None) -> Any:
        """Returns inputs of samples, one tensor or a dict or tuple of tensors, pixels in uint8.

        With a ``draw`` they are those of a training step, with random transforms; without one they
        are for evaluation.
        """
        return self.pairs(indices, draw)[0]

    def pairs(self, indices: Indices, draw: Draw | None) -> tuple[Any, Tensor]:
        """Returns inputs as ``batch`` does, and targets that are no class numbers, (N, ...)."""
        with global_random.preserved():
            items = [self._sample(int(index), draw) for index in indices]
        if not items:
            assert self.kind is not None
            empty = [torch.empty(0, *shape, dtype=dtype) for shape, dtype in self.kind.leaves]
            targets = torch.empty(0, *(self.target_shape or ()))
            return tree_unflatten(empty, self.kind.structure), targets
        inputs = tree_map(lambda *leaves: torch.stack(leaves), *(value for value, _ in items))
        targets = torch.empty(0)
        if self._rule is not None:
            targets = torch.stack([target for _, target in items])
        return inputs, targets

    def _sample(self, index: int, draw: Draw | None) -> tuple[Any, Tensor]:
        item = self._kept[index] if index in self._kept else self._read(index)
        value, target = self._stepped(index, item, draw)
        self._check(index, value)
        return value, target if self._rule is None else self._like_first(index, target)

    def _like_first(self, index: int, target: Tensor) -> Tensor:
        """Returns the target as fractions if the first one has such; raises for another kind."""
        dtype = self.target_dtype
        if dtype is not None and dtype.is_floating_point and not target.is_complex():
            target = target.to(dtype)
        if (tuple(target.shape), target.dtype) != (self.target_shape, dtype):
            raise DataError(
                f"{self.name(index)}: the target has the shape {tuple(target.shape)} "
                f"({target.dtype}), and the first {self.target_shape} ({dtype})"
            )
        return target

    def _stepped(self, index: int, item: tuple[Any, Any], draw: Draw | None) -> tuple[Any, Any]:
        """Returns the tensors of input and target after the steps of training or evaluation."""
        value, target = item
        steps, rule = self._steps, self._rule
        try:
            if draw is not None:
                key = self._seed, draw.client, draw.round, draw.step, index
                global_random.seed(random_streams.number(random_streams.TRANSFORMS, *key))
                value, changed = steps.transformed(value, target)
                if rule is None and class_number(changed) != class_number(target):
                    raise DataError(
                        f"{self.name(index)}: data.transform changed its target, {target}, to "
                        f"{changed}: class numbers must stay as they are"
                    )
                target = changed
            value = without_array(value)
            if rule is not None:
                target = self._target(index, rule, target)
            mask = target if rule is not None and rule.task is TaskName.segmentation else None
            value, mask = steps.stepped(value, mask, draw is not None)
        except (DataError, Interrupted):
            raise
        except _ANYTHING as error:  # of the user's transform
            raise DataError(f"{self.name(index)}: a transform raised {one_line(error)}") from error
        try:
            return as_tensors(value), target if mask is None else mask
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.name(index)}: {error}") from error

    def _target(self, index: int, rule: TargetRule, target: Any) -> Tensor:
        try:
            return rule.tensor(target)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from error

    def _read(self, index: int) -> tuple[Any, Any]:
        number, local = self._locate(index)
        is_here = torch.utils.data.get_worker_info() is None
        items = self._here[number] if is_here else self._pieces[number].items
        global_random.seed(random_streams.number(random_streams.ITEMS, self._seed, index))
        try:
            item = items[local]
            if isinstance(item, tuple | list) and item and hasattr(item[0], "getbands"):
                item[0].load()  # a PIL image; it is not decoded before
        except Interrupted:
            raise
        except _ANYTHING as error:  # of the user's data set
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

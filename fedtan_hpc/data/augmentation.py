"""Random changes of training images, and inputs as tensors.

Flips and crops of equal images are drawn for many steps and applied to batches on the device;
``training`` uses them.  ``ImageSteps`` changes single images on the CPU, before they are a batch;
``items`` and ``datasets`` use it.

Shapes: E local steps with batches of B images of C channels and H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from ..config.schema import DataConfig
from ..runtime import import_path, random_streams
from ..runtime.torchvision_import import import_torchvision
from ..runtime.transfer import send

Generators: TypeAlias = tuple[np.random.Generator, np.random.Generator]
"""Random streams of flips and of crops."""
_JITTER_PARTS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True)
class Augmentation:
    """Mirrors each image with probability 1/2, then crops it at random."""

    flip: bool
    crop_padding: int
    """Zero pixels that are added on each side before an image is cropped to its old size."""

    @staticmethod
    def generators(seed: int, client: int, round_number: int) -> Generators:
        """Returns the streams of a client's flips and crops in a round."""
        purposes = random_streams.FLIPS, random_streams.CROPS
        flips, crops = (random_streams.generator(p, seed, client, round_number) for p in purposes)
        return flips, crops

    def draw(self, generators: Generators, steps: int, batch_size: int) -> AugmentationParams:
        """Draws the random parameters of the next ``steps`` steps of a client on the CPU.

        They depend on the generators alone, neither on ranks nor on the device, nor on how many
        steps are drawn at once.
        """
        flips_EB, offsets_EB2, shape = None, None, (steps, batch_size)
        flips, crops = generators
        if self.flip:
            flips_EB = torch.from_numpy(flips.random(shape) < 0.5)
        if self.crop_padding:
            offsets = crops.integers(2 * self.crop_padding + 1, size=(*shape, 2))
            offsets_EB2 = torch.from_numpy(offsets)
        return AugmentationParams(self.crop_padding, flips_EB, offsets_EB2)


@dataclass(frozen=True)
class AugmentationParams:
    """Random parameters of one client's images in E steps; None: no such operation."""

    padding: int
    flips_EB: Tensor | None
    """Whether an image is mirrored, bool."""
    offsets_EB2: Tensor | None
    """Upper left corner (y, x) of the crop in the padded image, 0 to 2 * padding."""

    def to(self, device: torch.device) -> AugmentationParams:
        """Copies the parameters to ``device``."""
        flips = None if self.flips_EB is None else send(self.flips_EB, device)
        offsets = None if self.offsets_EB2 is None else send(self.offsets_EB2, device)
        return AugmentationParams(self.padding, flips, offsets)

    def apply(
        self, step: int, inputs_BCHW: Tensor, value: float = 0, part: slice = slice(None)
    ) -> Tensor:
        """Returns the batch of step ``step``, 0 to E - 1, flipped and cropped.

        ``value`` is that of the pixels around an image; the inputs are ``part`` of the batch.
        """
        if self.flips_EB is not None:
            inputs_BCHW = _mirrored(inputs_BCHW, self.flips_EB[step, part])
        if self.offsets_EB2 is not None:
            offsets_B2 = self.offsets_EB2[step, part]
            inputs_BCHW = crop_images(inputs_BCHW, offsets_B2, self.padding, value)
        return inputs_BCHW


def augmentation_of(config: DataConfig) -> Augmentation | None:
    """Returns the augmentation that the options describe; None if they ask for none."""
    if not config.flip and not config.crop_padding:
        return None
    return Augmentation(config.flip, config.crop_padding)


def _mirrored(inputs_BCHW: Tensor, flips_B: Tensor) -> Tensor:
    if flips_B.device.type == "cpu":  # image by image: a whole batch does not fit the CPU's cache
        pairs = zip(inputs_BCHW, flips_B.tolist(), strict=True)
        return torch.stack([image.flip(-1) if flip else image for image, flip in pairs])
    return torch.where(flips_B[:, None, None, None], inputs_BCHW.flip(-1), inputs_BCHW)


def crop_images(inputs_BCHW: Tensor, offsets_B2: Tensor, padding: int, value: float = 0) -> Tensor:
    """Pads each image with ``padding`` pixels of ``value``; cuts H x W pixels from its offset."""
    batch_size, _, height, width = inputs_BCHW.shape
    padded = pad(inputs_BCHW, (padding, padding, padding, padding), value=value)
    windows_BCyxHW = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of all crops
    samples_B = torch.arange(batch_size, device=inputs_BCHW.device)
    return windows_BCyxHW[samples_B, :, offsets_B2[:, 0], offsets_B2[:, 1]]


@dataclass(frozen=True)
class ImageSteps:
    """The steps that change one input by itself: in training, and without randomness in evaluation.

    Images are PIL images or tensors (C, H, W), which have one size afterwards if one is asked for.
    """

    transform: Callable[..., Any] | None
    """The user's, the first step in training."""
    random_steps: Callable[..., Any] | None
    fixed_steps: Callable[..., Any] | None
    """The first step in evaluation; in training, unless a random cut takes its place."""

    @property
    def are_random(self) -> bool:
        """Whether a training input may differ from step to step."""
        return self.transform is not None or self.random_steps is not None

    def transformed(self, value: Any, target: Any) -> tuple[Any, Any]:
        """Returns what the user's transform makes of an input, in training.

        A transform that takes a ``target`` changes both, and returns both.
        """
        if self.transform is None:
            return value, target
        if not import_path.accepted(self.transform, {"target": target}):
            return self.transform(value), target
        changed, target = self.transform(value, target=target)
        return changed, target

    def stepped(self, value: Any, mask: Tensor | None, is_training: bool) -> tuple[Any, Any]:
        """Returns the input for training or evaluation, with a ``mask`` (H, W) cut as it is.

        Draws from the global generators in training.
        """
        steps = self.fixed_steps
        if is_training and self.random_steps is not None:
            steps = self.random_steps
        if steps is None or mask is None:
            return value if steps is None else steps(value), mask
        from torchvision.tv_tensors import Mask  # type: ignore[import-untyped]

        value, cut = steps(value, Mask(mask))
        return value, cut.as_subclass(Tensor)


def image_steps_of(config: DataConfig) -> ImageSteps:
    """Returns the steps that the options describe; raises ``ConfigError`` for a wrong transform."""
    transform = None
    if config.transform is not None:
        option = "data.transform"
        transform = import_path.resolve(option, config.transform, "an input", may_be_module=True)
    wants_steps = config.random_resized_crop or config.colour_jitter or config.image_size
    if not wants_steps:
        return ImageSteps(transform, None, None)
    import_torchvision()
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    size, fixed = config.image_size, []
    if size is not None:
        fixed = [v2.Resize(config.resize or size, antialias=True), v2.CenterCrop(size)]
    drawn = list(fixed)
    if config.random_resized_crop:
        drawn = [_resized_crop(v2, size)]
    if config.colour_jitter:
        drawn.append(v2.ColorJitter(**dict.fromkeys(_JITTER_PARTS, config.colour_jitter)))
    is_random = config.random_resized_crop or config.colour_jitter
    return ImageSteps(
        transform, v2.Compose(drawn) if is_random else None, v2.Compose(fixed) if fixed else None
    )


def _resized_crop(v2: Any, size: int | None) -> Any:
    """Returns a random cut that is scaled to ``size``, or to the size of its image."""
    if size is not None:
        return v2.RandomResizedCrop(size, antialias=True)

    def to_own_size(image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        return v2.RandomResizedCrop((height, width), antialias=True)(image)

    return v2.Lambda(to_own_size)


def raw_bytes(value: Any) -> int:
    """Returns the bytes of an input as a data set gives it."""
    if hasattr(value, "getbands"):
        return int(value.width * value.height * len(value.getbands()))
    return sum(getattr(leaf, "nbytes", 8) for leaf in tree_leaves(value))


def without_array(value: Any) -> Any:
    """Returns an array as a tensor, because torchvision's transforms leave arrays as they are."""
    return as_tensors(value) if isinstance(value, np.ndarray) else value


def as_tensors(value: Any) -> Any:
    """Returns a tensor, or a dict or tuple of tensors; images as uint8 (C, H, W).

    Arrays of bytes, (H, W) or (H, W, C), are images as in torchvision.
    """
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if hasattr(value, "getbands"):  # a PIL image
        if value.mode[0] in "IF":
            raise TypeError(
                f"the image has more than 8 bits (mode {value.mode}): return a tensor of its "
                "values, for example with data=import"
            )
        if value.mode not in ("L", "RGB"):
            value = value.convert("RGB")
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            return _tensor(value)
        pixels = value[:, :, np.newaxis] if value.ndim == 2 else value
        return _tensor(pixels.transpose(2, 0, 1))
    if isinstance(value, dict):
        return {name: as_tensors(value[name]) for name in sorted(value)}
    if isinstance(value, tuple | list):
        return tuple(as_tensors(each) for each in value)
    if isinstance(value, int | float | np.generic) and not isinstance(value, bool):
        return torch.as_tensor(value)
    raise TypeError(
        f"the input has a {type(value).__name__}: allowed are tensors, arrays, PIL images, "
        "and dicts and tuples of these"
    )


def _tensor(values: np.ndarray) -> Tensor:
    """Returns an array as a tensor; copies one that is read-only, which torch would warn of."""
    return torch.from_numpy(np.require(values, requirements=("C", "W")))

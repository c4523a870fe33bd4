"""Make images of three clients whose scanners differ, for ``experiment=scanners``.

python tools/make_scanners.py data/scanners --strength 0.8

The images are scikit-learn's handwritten digits, 16x16 pixels, a third of them for each client.
All clients have the same labels.  Scanner k = 0, 1, 2 shows a grey value v, 0 to 1, as
brightness + contrast * v, with contrast = 1 - strength * k / 2, brightness = 0.9 * (1 - contrast)
and noise.  A fifth of each client's images are its test images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ("north", "south", "west")
SIDE = 16
"""In pixels."""
NOISE = 0.03
"""Standard deviation of the noise, where black is 0 and white is 1."""


def write(folder: Path, strength: float, seed: int) -> int:
    """Writes CLIENT/train/CLASS/*.png and CLIENT/test/CLASS/*.png; returns the number of images."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(digits.target)), len(NAMES))
    for number, (name, part) in enumerate(zip(NAMES, parts, strict=True)):
        labels = digits.target[part]
        train, _ = train_test_split(part, test_size=0.2, stratify=labels, random_state=seed)
        for index in part.tolist():
            half = "train" if index in train else "test"
            file = folder / name / half / str(digits.target[index]) / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            scanned(digits.images[index] / 16, number, strength, rng).save(file)
    return len(digits.target)


def scanned(
    values: np.ndarray, number: int, strength: float, rng: np.random.Generator
) -> Image.Image:
    """Returns what scanner ``number``, 0 to 2, makes of an image (H, W) with values 0 to 1."""
    large = Image.fromarray(values.astype(np.float32)).resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR
    )
    contrast = 1 - strength * number / (len(NAMES) - 1)
    grey = 0.9 * (1 - contrast) + contrast * np.asarray(large)
    grey += NOISE * rng.standard_normal(grey.shape)
    return Image.fromarray((255 * grey).round().clip(0, 255).astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--strength", type=float, default=0.8, help="0 (no difference) to 0.95")
    parser.add_argument("--seed", type=int, default=0, help="who gets which digit, and the noise")
    words = parser.parse_args(arguments)
    if words.folder.exists():
        parser.error(f"folder={words.folder}: it exists; name another, or delete it")
    if not 0 <= words.strength <= 0.95:
        parser.error(f"--strength={words.strength}: allowed is 0 to 0.95; try 0.8")
    if not 0 <= words.seed < 2**32:
        parser.error(f"--seed={words.seed}: allowed is 0 to {2**32 - 1}; try 0")
    count = write(words.folder, words.strength, words.seed)
    print(f"{count} images of {len(NAMES)} clients in {words.folder}")


if __name__ == "__main__":
    main()

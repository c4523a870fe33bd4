"""The images of three scanners: who has which, and what differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import make_scanners


def pixels(folder: Path) -> np.ndarray:
    """All pixels of a client's training images, 0 to 1."""
    return np.array([np.asarray(Image.open(file)) for file in folder.glob("train/*/*.png")]) / 255


def test_clients_have_the_same_labels_and_other_brightness_and_contrast(tmp_path: Path) -> None:
    assert make_scanners.write(tmp_path, 0.8, seed=0) == 1797
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*.png")]
    assert len({file.name for file in files}) == len(files) == 1797
    for client in make_scanners.NAMES:
        sizes = [len(list((tmp_path / client / half).glob("*/*"))) for half in ("train", "test")]
        assert sizes == [479, 120]
        for half in ("train", "test"):
            names = {folder.name for folder in (tmp_path / client / half).iterdir()}
            assert names == set("0123456789")
    images = [pixels(tmp_path / client) for client in make_scanners.NAMES]
    assert images[0].shape[1:] == (make_scanners.SIDE, make_scanners.SIDE)
    means = [each.mean() for each in images]
    assert means == sorted(means)
    contrasts = [each.std() / images[0].std() for each in images]
    assert contrasts == pytest.approx([1, 0.6, 0.2], abs=0.05)


def test_strength_0_makes_no_difference(tmp_path: Path) -> None:
    make_scanners.write(tmp_path, 0.0, seed=1)
    means = [pixels(tmp_path / client).mean() for client in make_scanners.NAMES]
    assert max(means) - min(means) < 0.01


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        ([str(tmp_path)], "it exists"),
        ([str(tmp_path / "new"), "--strength", "2"], "--strength=2.0: allowed is 0 to 0.95"),
    ):
        with pytest.raises(SystemExit) as stopped:
            make_scanners.main(words)
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err

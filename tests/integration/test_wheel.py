"""The package works from a wheel: conf/ travels inside it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.helpers import commands


def test_the_command_line_runs_from_an_unpacked_wheel(tmp_path: Path) -> None:
    words = ("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path))
    built = commands.run("python", "-m", *words, str(commands.ROOT), cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("fedtan_hpc-*.whl")
    inside = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(inside)
    code = (
        f"import sys; sys.path.insert(0, {str(inside)!r}); sys.argv = ['x', 'algorithm=fedavg']; "
        "import fedtan_hpc.cli as cli; [config] = cli.compose(); "
        "print(cli.__file__, cli._conf(), config.algorithm.name)"
    )
    done = commands.run("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    module, conf, algorithm = done.stdout.split()
    assert module.startswith(str(inside))
    assert conf.startswith(str(inside))
    assert algorithm == "fedavg"

"""Options as a dict or hydra's DictConfig, which ``run`` takes too."""

from __future__ import annotations

from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from fedtan_hpc.config import hydra_errors
from fedtan_hpc.config.errors import ConfigError
from fedtan_hpc.config.schema import Config


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 3, "optimizer": {"lr": 0.5}},
        OmegaConf.create({"rounds": 3, "optimizer": {"lr": 0.5}}),
        OmegaConf.structured(Config(rounds=3)),
        OmegaConf.create({"seed": 3, "rounds": "${seed}"}),
    ],
    ids=["dict", "plain", "structured", "interpolated"],
)
def test_options_have_the_same_meaning_in_any_form(options: Any) -> None:
    config = hydra_errors.typed(options)
    assert type(config) is Config
    assert config.rounds == 3
    assert (config.optimizer.lr, config.optimizer.name) in ((0.5, "sgd"), (0.1, "sgd"))
    if "optimizer" in options and "clients" not in options:
        assert config.optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"roundz": 1}, "roundz=1: no such option; did you mean rounds?"),
        ({"optimizer": {"rate": 1}}, "optimizer.rate=1: no such option"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr=fast: allowed is a number"),
        ({"optimizer": 3}, "optimizer=3: not understood: "),
        ({"rounds": 2, "optimizer": [1]}, "optimizer=[1]: not understood: "),
        ({"seed": 10**400, "optimizer": {"lr": 10**400}}, "optimizer={"),
        ({"seed": "${nothing}"}, "seed=${nothing}: not understood: "),
        ({1: 2}, "1="),
        ({"rounds": object()}, "rounds="),
    ],
    ids=[
        "unknown",
        "unknown-in-group",
        "text",
        "number",
        "list",
        "huge",
        "unresolved",
        "key",
        "object",
    ],
)
def test_mistakes_name_the_option(options: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hydra_errors.typed(options)
    [mistake] = caught.value.mistakes
    assert mistake.startswith(line)


def test_hydra_can_instantiate_a_run() -> None:
    """The run itself would do more; its options are wrong, so that it ends before any work."""
    call = {"_target_": "fedtan_hpc.run", "config": {"rounds": 0}, "callbacks": []}
    with pytest.raises(Exception, match="rounds=0: allowed is a whole number"):
        hydra.utils.instantiate(call)

"""Options that say from which state a job starts, and which state fits them.

Used by ``validate`` and by the room ``job``.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ..algorithms import ALGORITHMS, ParameterGroup
from ..enums import AlgorithmName
from ..errors import format_option_error
from ..schema import Config, to_dict


def resume_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake in ``resume`` and ``resume_change``."""
    if not config.resume.strip():
        allowed, remedy = "auto, never or the folder of a run", "name a folder or leave it out"
        yield format_option_error("resume", config.resume, allowed, remedy)
    if config.resume_change and config.resume == "never":
        allowed = "empty with resume=never, which begins anew"
        text = f"[{','.join(config.resume_change)}]"
        yield format_option_error("resume_change", text, allowed, "leave one of both out")
    names = list(_names())
    for name in config.resume_change:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else "--help lists all options"
            yield format_option_error("resume_change", name, "names of options or groups", remedy)


def may_change(option: str, listed: list[str]) -> bool:
    """Returns whether ``option`` or a group that has it is in the list ``resume_change``."""
    return any(option == name or option.startswith(f"{name}.") for name in listed)


def misfit(
    saved: Mapping[str, Any], config: Config, owners: Collection[int], keeps_state: bool
) -> str:
    """Returns why the state of a run with other options cannot go on with ``config``.

    Args:
        saved: the options of the run, with all defaults.
        config: those of the run that goes on.
        owners: the clients that have private parts in the state.
        keeps_state: whether the optimizer of pooled gradients has a state.

    Returns an empty text if the options fit the state.
    """
    new = to_dict(config)
    server, new_server = (options["server"]["optimizer"] for options in (saved, new))
    names = AlgorithmName(saved["algorithm"]["name"]), config.algorithm.name
    parts, new_parts = (ALGORITHMS[name].private for name in names)
    keeps_state = keeps_state and ALGORITHMS[names[1]].pooled_gradients
    steps_on = "none" not in (server, new_server)
    if owners and parts != new_parts:
        return f"algorithm={names[1]}: clients of {names[0]} have kept other parts of the model"
    if owners and max(owners) >= config.clients:
        return f"clients={config.clients}: client {max(owners)} has kept a part of the model"
    if steps_on and server != new_server:
        return f"server.optimizer={new_server}: the state is that of {server}"
    if steps_on and (parts ^ new_parts) - {ParameterGroup.statistics, ParameterGroup.buffers}:
        return f"algorithm={names[1]}: the server of {names[0]} has stepped other parts"
    has_state = owners or keeps_state or steps_on
    if has_state and saved["model"].get("freeze") != new["model"].get("freeze"):
        return "model.freeze: the state of the optimizers or clients is that of other parameters"
    if keeps_state and saved["optimizer"].get("name") != new["optimizer"].get("name"):
        return "optimizer.name: the state is that of another optimizer"
    return ""


def _names() -> Iterator[str]:
    options = to_dict(Config())
    for each in fields(Config):
        yield each.name
        if isinstance(options[each.name], dict):
            yield from (f"{each.name}.{name}" for name in options[each.name])

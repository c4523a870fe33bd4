"""Mistakes in the options that say which rounds and BN layers FedTAN synchronises.

Used by ``validate``.
"""

from collections.abc import Iterator

from ..algorithms import ALL, AUTO, CHOOSING_ROUNDS, FRACTION
from ..errors import format_option_error
from ..schema import Config

_USERS = {
    "layers": ("fraction", "choosing_rounds", "probe_run"),
    "synchronise_every": ("deviation_limit",),
}
"""Options that need another one to be auto."""


def synchronising_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each mistake."""
    options = config.algorithm
    every, layers = options.synchronise_every, options.layers
    if every not in (None, AUTO) and type(every) is not int:
        remedy = "try algorithm.synchronise_every=5"
        allowed = "a whole number >= 1, auto or null"
        yield format_option_error("algorithm.synchronise_every", every, allowed, remedy)
    if layers not in (None, ALL, AUTO) and not _are_names(layers):
        allowed = "all, auto, or a list of names of BN layers, with * for any letters"
        example = f"[{layers}]" if isinstance(layers, str) and layers.strip() else "[layer1.*]"
        remedy = f"try algorithm.layers={example}"
        yield format_option_error("algorithm.layers", layers, allowed, remedy)
    for name, users in _USERS.items():
        for user in users:
            value = getattr(options, user)
            if value is not None and getattr(options, name) != AUTO:
                remedy = f"leave it out or use algorithm.{name}=auto"
                allowed = f"null unless algorithm.{name}=auto"
                yield format_option_error(f"algorithm.{user}", value, allowed, remedy)
    yield from _choice_mistakes(config)
    if options.probe_run is not None and not options.probe_run.strip():
        allowed, remedy = "the folder of a run, or null", "name a folder or leave it out"
        yield format_option_error("algorithm.probe_run", options.probe_run, allowed, remedy)
    elif options.probe_run is not None and options.choosing_rounds is not None:
        allowed, remedy = "null with algorithm.probe_run", "leave one of both out"
        option = "algorithm.choosing_rounds"
        yield format_option_error(option, options.choosing_rounds, allowed, remedy)


def _choice_mistakes(config: Config) -> Iterator[str]:
    """The layers must be chosen before the last round."""
    options = config.algorithm
    rounds = options.choosing_rounds or CHOOSING_ROUNDS
    fraction = FRACTION if options.fraction is None else options.fraction
    chooses = options.layers == AUTO and options.probe_run is None and 0 < fraction < 1
    if chooses and rounds >= config.rounds:
        allowed = f"fewer than rounds, {config.rounds}, for the choice comes after them"
        remedy = "set fewer, train more rounds, or name the layers"
        yield format_option_error("algorithm.choosing_rounds", rounds, allowed, remedy)


def _are_names(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(each) is int or (isinstance(each, str) and each.strip()) for each in value)

"""Mistakes in the options of the trackers.  Used by ``validate``."""

from collections.abc import Iterator
from importlib.util import find_spec

from ..enums import TrackerName
from ..errors import format_option_error
from ..schema import TrackingConfig

_PACKAGES = {
    TrackerName.wandb: ("wandb",),
    TrackerName.mlflow: ("mlflow", "sqlalchemy", "alembic"),
}
"""What each tracker imports beside this package's dependencies.

mlflow-skinny has no database of its own, and MLflow keeps runs in one where no server is named.
"""


def tracking_mistakes(tracking: TrackingConfig) -> Iterator[str]:
    """Yields a line for each tracker that is not installed, and for texts without a letter."""
    for tracker in dict.fromkeys(tracking.to):
        if missing := [each for each in _PACKAGES.get(tracker, ()) if not _is_installed(each)]:
            allowed = f"a tracker that is installed, with {' and '.join(missing)}"
            remedy = f"pip install 'fedtan_hpc[{tracker}]'"
            yield format_option_error("tracking.to", f"[{tracker}]", allowed, remedy)
    for option in ("project", "name", "tags"):
        value = getattr(tracking, option)
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or text.strip() for text in texts):
            remedy = f"leave tracking.{option} out or name one"
            yield format_option_error(f"tracking.{option}", value, "text that is not blank", remedy)


def _is_installed(package: str) -> bool:
    """Returns whether it can be imported; a folder of that name, which W&B makes, cannot."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None

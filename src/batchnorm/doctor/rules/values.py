"""What the rules about values have in common: arrays of a layer, and how numbers and channels are said."""

import math
from collections.abc import Iterable

import numpy as np

from batchnorm.doctor.checkpoint import STATISTICS, Layer
from batchnorm.doctor.rule import Subject

# what a layer has unless it was told otherwise
DEFAULT_EPS = {"torch": 1e-5, "tensorflow": 1e-3, "keras": 1e-3}
NAMES = {
    "tensorflow": {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
}
NAMES["keras"] = NAMES["tensorflow"]
# the command that measures statistics of a file
MEASURING = dict.fromkeys(DEFAULT_EPS, "batchnorm doctor --fix --unsafe-fixes --statistics") | {
    "torch": "batchnorm recalibrate"
}
LISTED = 8


def eps_of(layer: Layer) -> float:
    """The layer's, or the default of its framework where the file does not tell."""
    if layer.eps is not None and 0 <= layer.eps < math.inf:
        return layer.eps
    return DEFAULT_EPS[layer.framework]


def eps_in_words(layer: Layer) -> str:
    return f"eps {eps_of(layer):g}" + ("" if eps_of(layer) == layer.eps else ", assumed")


def gamma_of(layer: Layer) -> np.ndarray:
    """Shape (C,); ones if the layer has none."""
    return layer.values("weight") if layer.has("weight") else np.ones(layer.num_features)


def beta_of(layer: Layer) -> np.ndarray:
    """Shape (C,); zeros if the layer has none."""
    return layer.values("bias") if layer.has("bias") else np.zeros(layer.num_features)


def statistics_of(layer: Layer) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and variance, both (C,), if the layer has both and has channels."""
    if not layer.has(*STATISTICS) or not layer.num_features:
        return None
    return layer.values("running_mean"), layer.values("running_var")


def counter_of(layer: Layer) -> float | None:
    """``num_batches_tracked``; any float can stand in a file."""
    return float(layer.values("num_batches_tracked").reshape(-1)[0]) if layer.has("num_batches_tracked") else None


def counts_of(layers: Iterable[Layer]) -> dict[str, float]:
    """Path -> counter, of the layers that have one."""
    counts = ((layer.path, counter_of(layer)) for layer in layers)
    return {path: count for path, count in counts if count is not None}


def called(layer: Layer, role: str) -> str:
    """What the layer's framework calls a role."""
    return NAMES.get(layer.framework, {}).get(role, role)


def listed(names: Iterable[str]) -> str:
    """As a sentence lists them.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"])
        ('a, b and c', 'a')
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def channels(mask: np.ndarray) -> str:
    """How many channels, and which.

    Example:
        >>> channels(np.array([True, False, True])), channels(np.ones(3, bool)), channels(np.arange(20) > 4)
        ('2 of 3 channels (0, 2)', 'all 3 channels', '15 of 20 channels (5, 6, 7, 8, 9, 10, 11, 12, ...)')
    """
    indices = np.flatnonzero(mask)
    if len(indices) == len(mask):
        return f"all {len(mask)} channels" if len(mask) > 1 else "its only channel"
    some = ", ".join(map(str, indices[:LISTED])) + ", ..." * (len(indices) > LISTED)
    return f"{len(indices)} of {len(mask)} channels ({some})"


def span(values: np.ndarray) -> str:
    """From the least to the greatest.

    Example:
        >>> span(np.array([2.0, 0.51234])), span(np.ones(3))
        ('0.512 to 2', '1')
    """
    if not values.size:
        return "no values"
    least, greatest = (f"{value:.3g}" for value in (values.min(), values.max()))
    return least if least == greatest else f"{least} to {greatest}"


def plain(value: float) -> float | None:
    """For JSON: six digits, None for NaN and infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def first_channels(mask: np.ndarray) -> list[int]:
    """For JSON: the indices of the first channels of a mask."""
    return np.flatnonzero(mask)[:LISTED].tolist()


def together(subject: Subject) -> list[list[Layer]]:
    """Layers by the state dict that they lie in: a model's, and those of its moving average."""
    paths = subject.checkpoint.facts.get("state_dicts", []) if subject.checkpoint is not None else []
    groups: dict[str, list[Layer]] = {}
    for layer in subject.layers:
        inside = [path for path in paths if path and layer.path.startswith(f"{path}.")]
        groups.setdefault(max(inside, key=len, default=""), []).append(layer)
    return list(groups.values())


def are_initial(mean: np.ndarray, var: np.ndarray) -> bool:
    """Whether these are the statistics of a new layer, to the last bit."""
    return bool((mean == 0).all() and (var == 1).all())

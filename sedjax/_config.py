"""What a tracker measures: validated once, then static."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from sedjax import sketch


def _is_int(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Config:
  """What a tracker measures.

  Attributes:
    window: int >= 3, rows in the window, or a tuple of ints; kept as an ascending tuple.
    every: int >= 1, steps summed into a row.
    k_max: int, the last place where an edge is looked for; None for half of each window.
    sketch: what `sedjax.sketch.count`, `gaussian` or `exact` gave; None for `count()`.
    groups: a function from a leaf's path to a label (None: not tracked), or None for the whole model alone.
    source: "updates", or "params" for differences of the parameters.
    momentum: float in [0, 0.9999], β₁ of the optimizer.
    history: int >= 0, past reports that are kept.

  `track_spectral_edge`, which has the same arguments, says more of each.

  Raises:
    ValueError: a field is out of its range; the message names what was given and what is accepted.

  Example:
    >>> import sedjax
    >>> sedjax.core.Config(window=(10, 5)).windows
    (5, 10)
  """

  window: int | tuple[int, ...] = 10
  every: int = 1
  k_max: int | None = None
  sketch: Any = None
  groups: Callable[[str], Hashable | None] | None = None
  source: str = "updates"
  momentum: float = 0.0
  history: int = 0

  def __post_init__(self) -> None:
    windows = self.window if isinstance(self.window, tuple | list) else (self.window,)
    if not windows or not all(_is_int(w) and w >= 3 for w in windows) or len(set(windows)) < len(windows):
      raise ValueError(f"window must be an int >= 3 or a tuple of different ints >= 3, got {self.window!r}.")
    object.__setattr__(self, "window", tuple(sorted(int(w) for w in windows)))
    for name, least in (("every", 1), ("history", 0)):
      value = getattr(self, name)
      if not _is_int(value) or not least <= value < 2**31:
        raise ValueError(f"{name} must be an int >= {least} and < 2**31, got {value!r}.")
      object.__setattr__(self, name, int(value))  # of NumPy's scalars, which no file takes, Python's own
    most = max(self.windows) - 1
    if self.k_max is not None and (not _is_int(self.k_max) or not 1 <= self.k_max <= most):
      raise ValueError(f"k_max must be None or an int in 1…{most} (the largest window less one), got {self.k_max!r}.")
    object.__setattr__(self, "k_max", None if self.k_max is None else int(self.k_max))
    if self.sketch is None:
      object.__setattr__(self, "sketch", sketch.count())
    if not isinstance(self.sketch, sketch.Count | sketch.Gaussian | sketch.Exact):
      raise ValueError(f"sketch must be sedjax.sketch.count(…), gaussian(…) or exact(), got {self.sketch!r}.")
    if not self.exact and self.sketch.dim < 2 * max(self.windows):
      raise ValueError(
        f"sketch dim must be at least twice the window, got dim={self.sketch.dim} for window {max(self.windows)}; use "
        f"dim >= {10 * max(self.windows)}."
      )
    if self.groups is not None and not callable(self.groups):
      raise ValueError(f"groups must be None or a function from a path string to a label, got {self.groups!r}.")
    try:
      hash(self.groups)
    except TypeError:
      raise ValueError(
        f"groups must be hashable, since JAX compiles once for each, got {self.groups!r}; give a function, or its "
        "class a __hash__ (a frozen dataclass has one)."
      ) from None
    if self.source not in ("updates", "params"):
      raise ValueError(f"source must be 'updates' or 'params', got {self.source!r}.")
    momentum = self.momentum
    if isinstance(momentum, bool) or not isinstance(momentum, int | float | np.floating) or not 0 <= momentum <= 0.9999:
      raise ValueError(f"momentum must be a float in [0, 0.9999], the optimizer's β₁, got {momentum!r}.")
    object.__setattr__(self, "momentum", float(momentum))

  @property
  def windows(self) -> tuple[int, ...]:
    """Window sizes, ascending."""
    return self.window  # pyright: ignore[reportReturnType]

  @property
  def slots(self) -> int:
    """Rows kept: one more than the largest window, so that consecutive windows can be compared."""
    return max(self.windows) + 1

  @property
  def exact(self) -> bool:
    return isinstance(self.sketch, sketch.Exact)

"""What a tracker measures: validated once, then static."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from sedjax import sketch

_STATIC = "Inside optax.inject_hyperparams, list it in static_args."


def _is_int(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Config:
  """What a tracker measures; see `track_spectral_edge` for the meaning and the rules of each field."""

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
      raise ValueError(
        f"track_spectral_edge: window must be an int >= 3 or a tuple of different ints >= 3, got {self.window!r}. "
        + _STATIC
      )
    object.__setattr__(self, "window", tuple(sorted(int(w) for w in windows)))
    for name, least in (("every", 1), ("history", 0)):
      value = getattr(self, name)
      if not _is_int(value) or not least <= value < 2**31:
        raise ValueError(f"track_spectral_edge: {name} must be an int >= {least} and < 2**31, got {value!r}. {_STATIC}")
    if self.k_max is not None and (not _is_int(self.k_max) or not 1 <= self.k_max <= min(self.windows) - 1):
      raise ValueError(
        f"track_spectral_edge: k_max must be None or an int in 1…{min(self.windows) - 1} (the smallest window less "
        f"one), got {self.k_max!r}. {_STATIC}"
      )
    if self.sketch is None:
      object.__setattr__(self, "sketch", sketch.count())
    if not isinstance(self.sketch, sketch.Count | sketch.Gaussian | sketch.Exact):
      raise ValueError(
        f"track_spectral_edge: sketch must be sedjax.sketch.count(…), gaussian(…) or exact(), got {self.sketch!r}."
      )
    if not self.exact and self.sketch.dim < 2 * max(self.windows):
      raise ValueError(
        f"track_spectral_edge: sketch dim must be at least twice the window, got dim={self.sketch.dim} for window "
        f"{max(self.windows)}; use dim >= {10 * max(self.windows)}."
      )
    if self.groups is not None and not callable(self.groups):
      raise ValueError(
        f"track_spectral_edge: groups must be None or a function from a path string to a label, got {self.groups!r}. "
        + _STATIC
      )
    try:
      hash(self.groups)
    except TypeError:
      raise ValueError(
        f"track_spectral_edge: groups must be hashable, since JAX compiles once for each, got {self.groups!r}; give a "
        "function, or its class a __hash__ (a frozen dataclass has one)."
      ) from None
    if self.source not in ("updates", "params"):
      raise ValueError(f"track_spectral_edge: source must be 'updates' or 'params', got {self.source!r}.")
    momentum = self.momentum
    if isinstance(momentum, bool) or not isinstance(momentum, int | float | np.floating) or not 0 <= momentum <= 0.9999:
      raise ValueError(
        f"track_spectral_edge: momentum must be a float in [0, 0.9999], the optimizer's β₁, got {momentum!r}. {_STATIC}"
      )

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

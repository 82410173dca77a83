"""What ratios pure noise shows: simulated once, on the host, when a tracker is first traced."""

from __future__ import annotations

import functools
import math

import numpy as np

_DRAWS = 200
_AT_ONCE = 2**24  # numbers of draws, of which some arrays are in memory at a time
# Ratios are compared with the mean of noise plus so many standard deviations, both of the logarithm.
ENTER, LEAVE = 7.0, 4.5
# Dimensions at which noise is simulated: the fewest each, then fewer and fewer up to a window's rows; multiples of the
# window, where some more change much; and powers of two.
_EACH, _BETWEEN, _MULTIPLES, _POWERS = 12, 6, np.asarray([1.25, 1.6, 2, 2.8, 4]), 2.0 ** np.arange(6, 33, 2)
# Through d dimensions noise has no more than d singular values, and from a row's numbers d is known within a half.
_RANK, _NEVER = 1.5, np.log(1e3)  # of ratios that are held to at most 1 / FLOOR, so that this is never reached


def row_covariance(rows: int, momentum: float, every: int) -> np.ndarray:
  """float64[rows, rows]: covariance of sums of `every` steps of an AR(1) sequence with parameter `momentum`.

  An optimizer whose β₁ is `momentum`, fed with white noise, emits such a sequence.
  """
  # Geometric series, since `every` may be as large as a training run's distance of checkpoints.
  lags = np.arange(1, rows)
  mean = (1 - momentum**every) / (1 - momentum)
  own = every * (1 + momentum) / (1 - momentum) - 2 * momentum * mean / (1 - momentum)
  by_lag = np.concatenate([[own], momentum ** ((lags - 1) * float(every) + 1) * mean**2])
  index = np.arange(rows)
  return by_lag[np.abs(index[:, None] - index[None, :])]


@functools.lru_cache(maxsize=64)
def noise_ratios(window: int, momentum: float, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean and standard deviation of log(σ_k/σ_{k+1}) of noise, seen through each of a grid of dimensions.

  Args:
    window: rows in the window.
    momentum: β₁ of the optimizer.
    every: steps summed into a row.

  Returns:
    float32[D] log2 of the dimensions; float32[D, window - 1] means; float32[D, window - 1] standard deviations.
  """
  rng = np.random.default_rng(0)
  factor = np.linalg.cholesky(row_covariance(window, momentum, every))
  each = np.arange(1, min(window, _EACH))
  few = np.concatenate([each, np.geomspace(min(window, _EACH), window, _BETWEEN), [window + 1], window * _MULTIPLES])
  dims = np.unique(np.ceil([*few, *_POWERS[_POWERS > few[-1]]]))
  means, deviations = np.full((2, dims.size, window - 1), [[[_NEVER]], [[0]]])
  lower = np.tril(np.ones((window, window)), -1)

  def squares(dim: float, draws: int) -> np.ndarray:
    # Bartlett: factor·A·Aᵀ·factorᵀ/dim is the Gram matrix of Gaussian rows seen through `dim` numbers.
    size = min(window, int(dim))
    a = rng.normal(size=(draws, window, size)) * lower[:, :size]
    a[:, np.arange(size), np.arange(size)] = np.sqrt(rng.chisquare(dim - np.arange(size), (draws, size)))
    a = factor @ a
    return np.linalg.eigvalsh(a.swapaxes(1, 2) @ a)[:, ::-1]  # in half of the time of their singular values

  at_once = max(1, _AT_ONCE // window**2)
  for i, dim in enumerate(dims):
    found = np.concatenate([squares(dim, min(at_once, _DRAWS - done)) for done in range(0, _DRAWS, at_once)])
    logs = np.log(found[:, :-1] / found[:, 1:]) / 2
    known = min(window, math.ceil(dim / _RANK)) - 1
    means[i, :known], deviations[i, :known] = logs.mean(0)[:known], logs.std(0)[:known]
  return np.log2(dims).astype(np.float32), means.astype(np.float32), deviations.astype(np.float32)

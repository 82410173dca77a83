"""What ratios pure noise shows: simulated once, on the host, when a tracker is first traced."""

from __future__ import annotations

import functools

import numpy as np

_DRAWS = 200
# Ratios are compared with the mean of noise plus so many standard deviations, both of the logarithm.
ENTER, LEAVE = 7.0, 4.5
# Dimensions at which noise is simulated: multiples of the window, where a few more change much, then powers of two.
_MULTIPLES, _POWERS = (1.25, 1.6, 2, 2.8, 4), 2.0 ** np.arange(6, 33, 2)


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
  few = [window + 1, *(np.ceil(multiple * window) for multiple in _MULTIPLES)]  # through fewer no window is noise
  dims = np.unique([*few, *_POWERS[_POWERS > few[-1]]])
  means, deviations = [], []
  lower = np.tril(np.ones((window, window)), -1)
  for dim in dims:
    # Bartlett: factor·A·Aᵀ·factorᵀ/dim is the Gram matrix of Gaussian rows seen through `dim` numbers.
    a = rng.normal(size=(_DRAWS, window, window)) * lower
    a[:, np.arange(window), np.arange(window)] = np.sqrt(rng.chisquare(dim - np.arange(window), (_DRAWS, window)))
    values = np.linalg.svd(factor @ a, compute_uv=False)
    logs = np.log(values[:, :-1] / values[:, 1:])
    means.append(logs.mean(0))
    deviations.append(logs.std(0))
  return np.log2(dims).astype(np.float32), np.asarray(means, np.float32), np.asarray(deviations, np.float32)

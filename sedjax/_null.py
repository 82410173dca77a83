"""What ratios pure noise shows: simulated once, on the host, when a tracker is built."""

from __future__ import annotations

import functools

import numpy as np

_DRAWS = 200
# Ratios are compared with the mean of noise plus so many standard deviations, both of the logarithm.
ENTER, LEAVE = 7.0, 4.5
_LOG2_DIMS = np.arange(6, 33, 2)


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
  log2_dims = np.unique(np.maximum(_LOG2_DIMS, np.ceil(np.log2(4 * window))))
  means, deviations = [], []
  lower = np.tril(np.ones((window, window)), -1)
  for dim in 2.0**log2_dims:
    # Bartlett: factor·A·Aᵀ·factorᵀ/dim is the Gram matrix of Gaussian rows seen through `dim` numbers.
    a = rng.normal(size=(_DRAWS, window, window)) * lower
    a[:, np.arange(window), np.arange(window)] = np.sqrt(rng.chisquare(dim - np.arange(window), (_DRAWS, window)))
    values = np.linalg.svd(factor @ a, compute_uv=False)
    logs = np.log(values[:, :-1] / values[:, 1:])
    means.append(logs.mean(0))
    deviations.append(logs.std(0))
  return log2_dims.astype(np.float32), np.asarray(means, np.float32), np.asarray(deviations, np.float32)

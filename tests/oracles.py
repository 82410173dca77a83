"""A float64 NumPy oracle that builds the window whole and shares no code with the library."""

import numpy as np

# Undoes the quick compilation of conftest.py.
AS_USERS_COMPILE = {
  "compiler_options": {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
  }
}


def rows_with_spectrum(sigma, parameters, seed=0):
  """float64[W, parameters] with the given singular values and random orthonormal factors."""
  rng = np.random.default_rng(seed)
  sigma = np.asarray(sigma, float)
  left = np.linalg.qr(rng.normal(size=(len(sigma), len(sigma))))[0]
  right = np.linalg.qr(rng.normal(size=(parameters, len(sigma))))[0]
  return (left * sigma) @ right.T


def spectrum(rows):
  """Readings of a window of rows [W, P], by their definitions."""
  rows = np.asarray(rows, np.float64)
  left, sigma, right = np.linalg.svd(rows, full_matrices=False)
  del left
  with np.errstate(divide="ignore", invalid="ignore"):
    ratios = sigma[:-1] / sigma[1:]
  share = np.cumsum(sigma**2) / np.sum(sigma**2)
  return {
    "singular_values": sigma,
    "ratios": ratios,
    "pc1_fraction": sigma[0] ** 2 / np.sum(sigma**2),
    "k95": int(np.argmax(share >= 0.95)) + 1,
    "drift_speed": np.linalg.norm(rows.mean(0)),
    "alignment": abs(rows[-1] @ right[0]) / np.linalg.norm(rows[-1]),
    "last_update_norm": np.linalg.norm(rows[-1]),
    "direction": right[0],
  }

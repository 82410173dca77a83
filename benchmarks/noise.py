"""How often noise alone is taken for an edge: the rate of false alarms that `Report.null_ratio` stands for.

    python benchmarks/noise.py

An optimizer whose β₁ is the tracker's `momentum`, fed with white noise, emits an AR(1) sequence. Rows of it, each the
sum of `every` steps, go through the library's own path (Gram matrix, spectrum, edge, phase) as rows of a sketch of
`dim` numbers, a million for each case. In some cases their norms vary: the logarithm is normal, or the rows grow from
nothing and shrink again, as learning rates do. Counted are the rows of full windows whose gap ratio exceeds the null's,
and those with a phase other than NO_EDGE. Neighbouring windows share rows, so that alarms come in clusters: the
intervals are of clusters, in which alarms are less than two windows apart.

The result goes to `benchmarks/results/noise.json`; with `--smoke`, of few rows, to `out/benchmarks/`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import provenance
import scipy.stats

import sedjax
from sedjax import core
from sedjax._push import push_row

# (window, momentum, every, dim, how norms vary: standard deviation of their logarithm, or "schedule")
CASES = (
  (3, 0.0, 1, 1024, 0.0),
  (5, 0.0, 1, 1024, 0.0),
  (10, 0.0, 1, 1024, 0.0),
  (10, 0.0, 1, 16384, 0.0),
  (20, 0.0, 1, 1024, 0.0),
  (10, 0.9, 1, 1024, 0.0),
  (10, 0.99, 1, 1024, 0.0),
  (10, 0.9, 10, 1024, 0.0),
  (32, 0.9, 1, 1024, 0.0),
  (3, 0.0, 1, 1024, 0.05),
  (5, 0.0, 1, 1024, 0.05),
  (10, 0.0, 1, 1024, 0.02),
  (10, 0.0, 1, 1024, 0.05),
  (10, 0.0, 1, 16384, 0.05),
  (10, 0.0, 1, 1024, 0.5),
  (20, 0.0, 1, 1024, 0.05),
  (10, 0.9, 1, 1024, 0.05),
  (10, 0.9, 1, 1024, 0.5),
  (10, 0.0, 1, 1024, "schedule"),
  (10, 0.9, 1, 1024, "schedule"),
)
ROWS, TRACKERS, AT_ONCE = 1_000_000, 200, 100
SMOKE_CASES, SMOKE_ROWS = (CASES[1], CASES[12]), 40_000


def norms(spread: float | str, rows: int) -> np.ndarray:
  """float32[rows, trackers]: what rows are multiplied with."""
  if spread == "schedule":
    rise = np.minimum(1, np.arange(1, rows + 1) / (rows // 10))
    return np.tile((rise * (1 + np.cos(np.pi * np.arange(rows) / rows)) / 2)[:, None], TRACKERS).astype(np.float32)
  assert not isinstance(spread, str)
  return np.exp(spread * np.random.default_rng(1).normal(size=(rows, TRACKERS))).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def more_rows(
  config: core.Config, norms: jax.Array, carry: Any, key: jax.Array
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
  """Takes rows of these norms [rows, trackers] into each tracker; bool[rows, trackers] alarms, and phases."""
  decay = np.float32(config.momentum)

  def step(velocity: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    velocity = decay * velocity + jax.random.normal(key, velocity.shape)
    return velocity, velocity

  def push(carry: Any, norm_and_key: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    (states, velocity), (norm, key) = carry, norm_and_key
    velocity, steps = jax.lax.scan(step, velocity, jax.random.split(key, config.every))
    row = norm[:, None, None] * steps.sum(0)[:, None]
    states = jax.vmap(lambda state, row: push_row(config, state, row, np.inf, np.int32(config.every)))(states, row)
    report = jax.vmap(core.report)(states)
    full = report.count >= config.windows[-1]
    alarm = full & (report.gap_ratio > report.null_ratio)
    quiet = (report.phase == sedjax.Phase.NO_EDGE) | (report.phase == sedjax.Phase.WARMUP)
    return (states, velocity), (alarm, full & ~quiet)

  return jax.lax.scan(push, carry, (norms, jax.random.split(key, len(norms))))


def clusters(alarms: np.ndarray, apart: int) -> int:
  """How many runs of alarms, bool[rows, trackers], are at least so many rows apart."""
  found = 0
  for column in alarms.T:
    at = np.flatnonzero(column)
    found += int(np.sum(np.diff(at) >= apart)) + bool(at.size)
  return found


def measure(case: tuple[int, float, int, int, float | str], rows: int) -> dict[str, Any]:
  """One line of the result."""
  window, momentum, every, dim, spread = case
  config = core.Config(window, every, sketch=sedjax.sketch.count(dim), momentum=momentum)
  state = core.init(config, {"w": jax.ShapeDtypeStruct((dim,), np.float32)})
  states = jax.tree.map(lambda x: jnp.broadcast_to(x, (TRACKERS, *x.shape)), state)
  key = jax.random.key(window)
  # The sequence as it is after many steps.
  scale = (1 - momentum**2) ** -0.5
  carry = states, scale * jax.random.normal(key, (TRACKERS, dim))
  alarms, phases = [], []
  start = time.perf_counter()
  times = -(-(rows // TRACKERS + window) // AT_ONCE)
  for i, some in enumerate(np.split(norms(spread, times * AT_ONCE), times)):
    carry, (alarm, phase) = more_rows(config, some, carry, jax.random.fold_in(key, i))
    alarms.append(np.asarray(alarm))
    phases.append(np.asarray(phase))
  every_alarm = np.concatenate(alarms)[window - 1 :]
  number = clusters(every_alarm, 2 * window)
  low, high = (scipy.stats.chi2.ppf(p, 2 * n) / 2 if n else 0.0 for p, n in ((0.025, number), (0.975, number + 1)))
  return {
    "window": window,
    "momentum": momentum,
    "every": every,
    "dim": dim,
    "norms": spread,
    "rows": every_alarm.size,
    "alarms": int(every_alarm.sum()),
    "clusters": number,
    "clusters_interval_95": [low, high],
    "rows_in_a_phase": int(np.concatenate(phases)[window - 1 :].sum()),
    "seconds": time.perf_counter() - start,
  }


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Counts how often noise alone is taken for an edge.")
  parser.add_argument("--smoke", action="store_true", help="few cases and rows, to see that it works; not stored")
  args = parser.parse_args(argv)
  made_by = provenance.made_by("noise.py", argv, provenance.begin())
  lines = []
  for case in SMOKE_CASES if args.smoke else CASES:
    lines.append(measure(case, SMOKE_ROWS if args.smoke else ROWS))
    print(json.dumps(lines[-1]), flush=True)
  folder = provenance.SMOKE if args.smoke else provenance.RESULTS
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "noise.json").write_text(json.dumps({"made_by": made_by, "lines": lines}, indent=1) + "\n")
  print(f"Wrote {(folder / 'noise.json').relative_to(provenance.ROOT)}.")


if __name__ == "__main__":
  main(sys.argv[1:])

"""A record of planted phases, made by the real tracker: vmapped seeds, groups, two windows, series and events."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import sedjax
from sedjax import core, record

WINDOWS = (5, 10)
GROUPS = ("all", "body", "head")
# Rows at which the planted direction begins to grow, is at its strongest, begins to fade, and is gone.
RISE, PLATEAU, COLLAPSE, GONE = 40, 60, 120, 140
ROWS, EVERY = 200, 20


@functools.cache
def reports(seeds=3, rows=ROWS, size=20000):
  """Reports [rows, seeds, group, window] of noise with a direction that rises, stays and fades in the body alone."""
  config = core.Config(WINDOWS, sketch=sedjax.sketch.count(4096), groups=lambda path: path.split("/")[0])
  times = np.arange(rows)
  rises = np.clip((times - RISE + 1) / (PLATEAU - RISE), 0, 1)
  falls = np.clip((times - COLLAPSE + 1) / (GONE - COLLAPSE), 0, 1)
  strengths = jnp.asarray(2 * np.minimum(rises, 1 - falls), jnp.float32)

  def run(seed):
    key = jax.random.key(seed)
    direction = jax.random.normal(key, (size // 50, 50))
    direction = direction / jnp.linalg.norm(direction)

    def row(at):
      noise = jax.random.normal(jax.random.fold_in(key, at + 1), (2, size // 50, 50)) / np.sqrt(size)
      return {"body": {"w": noise[0] + strengths[at] * direction}, "head": {"w": noise[1]}}

    def step(state, at):
      state = core.observe(config, state, row(at))
      return state, core.reports(state)

    return jax.lax.scan(step, core.init(config, row(jnp.int32(0))), jnp.arange(rows, dtype=jnp.int32))[1]

  found = jax.jit(jax.vmap(run, out_axes=1))(jnp.arange(seeds))
  return jax.tree.map(np.asarray, found)


def dataset(seeds=3, rows=ROWS, **attrs):
  """The same as a record; row r ends at step (r + 1)·EVERY."""
  attrs = {"sketch": "count, dim 4096, seed 0", "every": EVERY, "momentum": 0.0, "source": "updates",
           "windows": list(WINDOWS), "device": "cpu", "command": "python planted.py"} | attrs  # fmt: skip
  steps = EVERY * np.arange(1, rows + 1)
  part = jax.tree.map(lambda x: x[:rows], reports(seeds))
  return record.to_dataset(part, steps=steps, windows=WINDOWS, groups=GROUPS, seeds=range(7, 7 + seeds), attrs=attrs)


def with_series(made):
  """Adds a loss of all seeds on steps of its own, an accuracy of one number, and two events."""
  steps = np.unique(np.geomspace(20, made.step.values[-1], 30).astype(int))
  loss = 3 * np.exp(-steps / 1500)[:, None] + 0.3 + 0.05 * np.arange(made.sizes["seed"])
  return made.assign(
    loss=(("loss_step", "seed"), loss, {"long_name": "validation loss", "units": "nats"}),
    accuracy=("accuracy_step", [0.1, 0.4, 0.9], {"long_name": "accuracy", "units": "1"}),
    event=("event_step", np.asarray(["data shift", "learning rate halved"], object)),
  ).assign_coords(loss_step=steps, accuracy_step=[100, 1500, 3900], event_step=[1000, 2600])

"""The phase on noise, where there is none, and on planted phases, where each has its place."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.signal
from conftest import slow

import sedjax
from sedjax import Phase, core

SKETCHES = {"exact": sedjax.sketch.exact(), "count": sedjax.sketch.count(16384)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), **oracles.AS_USERS_COMPILE)
def noise_phases(config, length, size, beta, seed):
  """Phases along AR(1) noise with parameter beta, stationary, made row by row."""

  def step(carry, key):
    state, noise = carry
    noise = beta * noise + np.sqrt(1 - beta**2) * jax.random.normal(key, noise.shape)
    state = core.observe(config, state, {"w": noise})
    return (state, noise), core.report(state).phase

  keys = jax.random.split(jax.random.key(seed), length + 1)
  start = jax.random.normal(keys[0], (size // 50, 50))
  return jax.lax.scan(step, (core.init(config, {"w": start}), start), keys[1:])[1]


# Of the twelve combinations two in which each sketch occurs; the others take six times as long.
QUICK = (("exact", 5, 0.0), ("count", 10, 0.9))
NOISE = [case if case in QUICK else slow(*case) for case in itertools.product(SKETCHES, (5, 10, 20), (0.0, 0.9))]


@pytest.mark.parametrize(("sketch", "window", "beta"), NOISE)
def test_noise_has_no_edge(sketch, window, beta):
  config = core.Config(window, sketch=SKETCHES[sketch], momentum=beta)
  length = 2000
  phases = np.asarray(noise_phases(config, length, 2000 if sketch == "exact" else 20000, beta, 0))
  assert np.all(phases[: window - 1] == Phase.WARMUP)
  assert np.all(phases[window - 1 :] == Phase.NO_EDGE)


@pytest.mark.parametrize(
  ("sketch", "size"), [(sedjax.sketch.exact(), 12), (sedjax.sketch.exact(), 40), (sedjax.sketch.gaussian(20), 5000)]
)
def test_noise_of_few_dimensions_has_no_edge(sketch, size):
  """Down to about as many dimensions as rows, where noise's ratios are largest and vary most."""
  config = core.Config(10, sketch=sketch)
  rows = jax.random.normal(jax.random.key(1), (3000, size))
  phases = np.asarray(phases_of(config, rows))
  assert np.all(phases[9:] == Phase.NO_EDGE)


@pytest.mark.parametrize("sketch", [sedjax.sketch.exact(), sedjax.sketch.count()], ids=["exact", "count"])
@pytest.mark.parametrize("k_max", [None, slow(9)])
def test_noise_of_fewer_dimensions_than_rows_seldom_has_an_edge(sketch, k_max):
  """Though a ratio is infinite: that of the last direction there is to nothing. Parameters at 0 add no dimension."""
  config = core.Config(10, k_max=k_max, sketch=sketch)
  for size in range(1, 11):
    rows = jax.random.normal(jax.random.key(size), (1000, 10)) * (jnp.arange(10) < size)
    phases = np.asarray(phases_of(config, rows))[9:]
    assert np.mean(phases == Phase.NO_EDGE) >= 0.97, size


def test_momentum_that_is_not_told_is_taken_for_an_edge():
  """So that the null is seen to do something."""
  config = core.Config(10, sketch=SKETCHES["count"], momentum=0.0)
  phases = np.asarray(noise_phases(config, 300, 20000, 0.9, 0))
  assert np.mean(phases == Phase.NO_EDGE) < 0.1


def test_momentum_of_summed_steps():
  """The null of rows of `every` steps: AR(1) noise summed over 5 steps stays without an edge."""
  config = core.Config(10, every=5, sketch=SKETCHES["count"], momentum=0.9)
  phases = np.asarray(noise_phases(config, 2500, 20000, 0.9, 1))
  assert np.all(phases[49:] == Phase.NO_EDGE)
  unaware = core.Config(10, every=5, sketch=SKETCHES["count"])
  assert np.mean(np.asarray(noise_phases(unaware, 500, 20000, 0.9, 1))[50:] == Phase.NO_EDGE) < 0.1


def plant(strengths, size, seed=0):
  """Rows of unit noise and, with a strength that changes from row to row, one fixed direction."""
  rng = np.random.default_rng(seed)
  direction = rng.normal(size=size)
  noise = rng.normal(size=(len(strengths), size)) / np.sqrt(size)
  return noise + np.asarray(strengths)[:, None] * direction / np.linalg.norm(direction)


@functools.partial(jax.jit, static_argnums=0, **oracles.AS_USERS_COMPILE)
def phases_of(config, rows):
  state = core.init(config, {"w": rows[0]})

  def step(state, row):
    state = core.observe(config, state, {"w": row})
    return state, core.report(state).phase

  return jax.lax.scan(step, state, rows)[1]


# Of 1,000 rows.
NORMS = {
  "2 %": lambda rng: np.exp(0.02 * rng.normal(size=1000)),
  "5 %": lambda rng: np.exp(0.05 * rng.normal(size=1000)),
  "50 %": lambda rng: np.exp(0.5 * rng.normal(size=1000)),
  "warm-up": lambda _: np.arange(1, 1001) / 1000,
  "cosine": lambda _: 0.51 + 0.49 * np.cos(np.pi * np.arange(1000) / 1000),
  "drop": lambda _: np.where(np.arange(1000) < 500, 1, 0.1),
  "one large row": lambda _: np.where(np.arange(1000) == 500, 10, 1),
}


# Each of the norms once; the other combinations take twice as long.
UNEQUAL = {
  ("exact", 0.0): ("2 %", "cosine"),
  ("count", 0.9): ("warm-up", "drop"),
  ("count", 0.0): ("5 %", "50 %", "one large row"),
}


@pytest.mark.parametrize(
  ("sketch", "beta", "norms"),
  [(*case, norms) if norms in quick else slow(*case, norms) for case, quick in UNEQUAL.items() for norms in NORMS],
)
def test_noise_of_unequal_norms_has_no_edge(sketch, beta, norms):
  """Rows of noise are all but orthogonal, and their singular values as unequal as their norms."""
  rng = np.random.default_rng(0)
  size = 2000 if sketch == "exact" else 20000
  rows = rng.normal(size=(1000, size)).astype(np.float32)
  if beta:
    rows = scipy.signal.lfilter([1], [1, -beta], rows, axis=0)
  rows *= NORMS[norms](rng)[:, None]
  config = core.Config(10, sketch=SKETCHES[sketch], momentum=beta)
  phases = np.asarray(phases_of(config, jnp.asarray(rows, jnp.float32)))[20:]
  assert np.mean(phases == Phase.NO_EDGE) >= 0.995


@pytest.mark.parametrize(
  ("sketch", "size"),
  [slow(sedjax.sketch.exact(), 3000), (sedjax.sketch.count(), 2000), slow(sedjax.sketch.count(), 200)],
)
def test_noise_of_signs_has_no_edge(sketch, size):
  """As some optimizers' updates are: their fourth powers do not tell how many there are."""
  rows = jnp.sign(jax.random.normal(jax.random.key(0), (4000, size)))
  phases = np.asarray(phases_of(core.Config(10, sketch=sketch), rows))[9:]
  assert np.all(phases == Phase.NO_EDGE)


# Rows of rise, plateau and collapse in multiples of the window, and the planted strength against noise of norm 1.
SHAPES = [(0.2, 4, 0.2, 1.5), (1, 4, 1, 1.5), (2, 4, 2, 1.5), (5, 5, 1, 1.5), (3, 6, 1, 3.0), (10, 10, 2, 2.0)]


@pytest.mark.parametrize("window", [10, slow(20)])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_planted_phases(sketch, window):
  """Each phase is entered within a window of where it was planted, in this order and no other."""
  config = core.Config(window, sketch=SKETCHES[sketch])
  for seed, (rise, plateau, collapse, strength) in enumerate(SHAPES):
    starts = (window * np.cumsum([4, rise, plateau, collapse])).astype(int)
    times = np.arange(window * 40)
    rises = np.clip((times - starts[0] + 1) / max(1, starts[1] - starts[0]), 0, 1)
    falls = np.clip((times - starts[2] + 1) / max(1, starts[3] - starts[2]), 0, 1)
    rows = plant(strength * np.minimum(rises, 1 - falls), 4000 if sketch == "exact" else 20000, seed)
    rows = jnp.asarray(rows, jnp.float32).reshape(len(rows), -1, 50)
    phases = np.asarray(phases_of(config, rows))
    changes = np.flatnonzero(np.diff(phases)) + 1
    expected = [Phase.NO_EDGE, Phase.RISE, Phase.PLATEAU, Phase.COLLAPSE, Phase.NO_EDGE]
    assert phases[changes].tolist() == expected
    assert changes[0] == window - 1
    for change, start in zip(changes[1:4], starts[:3], strict=True):
      assert abs(change - start) <= window
    assert changes[4] <= starts[3] + 2 * window


def test_a_second_rise_follows_a_collapse():
  strengths = np.concatenate([np.zeros(40), np.full(60, 2.0), np.full(60, 0.9), np.full(60, 3.0)])
  config = core.Config(10, sketch=SKETCHES["count"])
  rows = jnp.asarray(plant(strengths, 20000), jnp.float32).reshape(len(strengths), -1, 50)
  phases = np.asarray(phases_of(config, rows))
  order = phases[np.flatnonzero(np.diff(phases)) + 1].tolist()
  assert order == [Phase.NO_EDGE, Phase.RISE, Phase.PLATEAU, Phase.COLLAPSE, Phase.RISE, Phase.PLATEAU]

"""Exact reports against the float64 oracle, on prescribed spectra."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sedjax
from sedjax import _eigen, core


def spectra(window):
  k = np.arange(window)
  return {
    "sharp edge": np.where(k < max(2, window // 3), 1.0, 0.05) * (1 - 0.3 * k / window),
    "ties": np.where(k < window // 2, 1.0, 1 / 30),
    "geometric": np.geomspace(1, 1 / 250, window),
    "flat": np.ones(window),
  }


@functools.cache
def trainer(window, sketch):
  """A jitted scan over stacked updates, compiled once for each shape."""
  tx = sedjax.track_spectral_edge(window=window, sketch=sketch)

  def step(state, updates):
    _, state = tx.update(updates, state)
    return state, sedjax.get_report(state)

  scan = lambda stack: jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], stack)), stack)[1]  # noqa: E731
  return jax.jit(scan, **oracles.AS_USERS_COMPILE)


def run(rows, window, sketch, shape=(-1,)):
  """The reports after each of the rows, as updates of one leaf of the given shape."""
  return trainer(window, sketch)({"w": jnp.asarray(rows, jnp.float32).reshape(len(rows), *shape)})


ORACLE_CASES = [(3, 1.0), (10, 1.0), (64, 1.0), (3, 1e-20), (10, 1e-20), (10, 1e20)]


@pytest.mark.parametrize(
  ("window", "scale"),
  # A group compiles for its window once.
  [pytest.param(*case, marks=pytest.mark.xdist_group(f"spectra of {case[0]} rows")) for case in ORACLE_CASES],
)
@pytest.mark.parametrize("kind", list(spectra(10)))
def test_exact_agrees_with_the_oracle(window, scale, kind):
  rows = scale * oracles.rows_with_spectrum(spectra(window)[kind], 700)
  reports = run(rows, window, sedjax.sketch.exact(), (70, 10))
  report = jax.tree.map(lambda x: x[-1], reports)
  truth = oracles.spectrum(rows.astype(np.float32).astype(np.float64))
  sigma = truth["singular_values"]
  error = np.abs(np.asarray(report.singular_values, np.float64) / sigma - 1)
  assert np.all(error[sigma > sigma[0] / 31] <= 2e-5)
  assert np.all(error[sigma > sigma[0] / 300] <= 1e-2)
  k_max = window // 2
  ordered = np.sort(truth["ratios"][:k_max])[::-1]
  if k_max == 1 or ordered[0] / ordered[1] > 1.001:
    assert int(report.k_star) == int(np.argmax(truth["ratios"][:k_max])) + 1
  for name in ("pc1_fraction", "k95", "drift_speed", "last_update_norm"):
    np.testing.assert_allclose(getattr(report, name), truth[name], rtol=1e-4)


def test_the_papers_definition_with_several_windows():
  """k_max = W - 1 of the largest window: each looks at all of its ratios."""
  norms = [1, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.02]  # of orthogonal rows, which are the spectrum
  rows = np.linalg.qr(np.random.default_rng(0).normal(size=(700, 10)))[0].T * np.array(norms)[:, None]
  tx = sedjax.track_spectral_edge(window=(4, 10), k_max=9, sketch=sedjax.sketch.exact())
  state = tx.init({"w": jnp.zeros(700)})
  update = jax.jit(tx.update, **oracles.AS_USERS_COMPILE)
  for row in rows:
    _, state = update({"w": jnp.asarray(row, jnp.float32)}, state)
  for window in (4, 10):
    report = sedjax.get_report(state, window=window)
    assert report.k_star == window - 1 == 1 + np.argmax(oracles.spectrum(rows[-window:])["ratios"])


def test_turning_and_alignment():
  """Directions of consecutive windows, where the leading one is well separated."""
  rng = np.random.default_rng(3)
  drift = np.cumsum(rng.normal(size=(16, 200)), 0)
  rows = drift / np.linalg.norm(drift, axis=1, keepdims=True)
  reports = run(rows, 5, sedjax.sketch.exact())
  for last in range(5, 16):
    now, before = (oracles.spectrum(rows[i - 4 : i + 1]) for i in (last, last - 1))
    turning = 1 - abs(now["direction"] @ before["direction"])
    np.testing.assert_allclose(reports.turning[last], turning, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(reports.alignment[last], now["alignment"], rtol=1e-3)
  assert np.all(np.asarray(reports.turning[:5]) == 0)
  assert np.all(np.asarray(reports.k_star[:4]) == 0)
  assert np.all(np.asarray(reports.k_star[4:]) > 0)


def test_while_the_window_fills_reports_are_of_the_rows_so_far():
  rows = oracles.rows_with_spectrum([4, 3, 2, 1.5, 1], 200)
  reports = run(rows, 5, sedjax.sketch.exact())
  for count in range(1, 5):
    report, truth = jax.tree.map(lambda x, i=count - 1: x[i], reports), oracles.spectrum(rows[:count])
    np.testing.assert_allclose(report.singular_values[:count], truth["singular_values"], rtol=1e-4)
    assert np.all(report.singular_values[count:] == 0)
    for name in ("pc1_fraction", "k95", "drift_speed", "last_update_norm", "alignment"):
      np.testing.assert_allclose(getattr(report, name), truth[name], rtol=1e-4)
    for name in ("k_star", "gap_ratio", "null_ratio", "turning", "edge_ambiguous"):
      assert not getattr(report, name)


def test_a_group_that_is_frozen_has_no_edge():
  """Rows of zeros beside others leave fewer directions than rows, at whose end any ratio is without bounds."""
  config = sedjax.core.Config(4, groups=lambda path: path)
  rows = {
    name: jax.random.normal(key, (20, 60)) for name, key in zip("ab", jax.random.split(jax.random.key(0)), strict=True)
  }
  rows["b"] = rows["b"].at[8:14].set(0)  # frozen, then not

  def step(state, row):
    state = sedjax.core.observe(config, state, row)
    return state, sedjax.core.report(state, group="b")

  state = sedjax.core.init(config, jax.tree.map(lambda x: x[0], rows))
  reports = jax.jit(lambda: jax.lax.scan(step, state, rows)[1])()
  full = np.asarray([3 <= i < 8 or i >= 17 for i in range(20)])
  assert np.array_equal(reports.k_star > 0, full)
  assert np.array_equal(reports.gap_ratio > 0, full)
  assert np.array_equal(reports.phase != sedjax.Phase.WARMUP, full)
  assert np.array_equal(reports.status & sedjax.Status.WINDOW_FILLING == 0, full)


@pytest.mark.parametrize("make", [sedjax.sketch.exact, sedjax.sketch.count])
def test_rank_one_and_zeros(make):
  rows = np.ones((6, 1)) * np.random.default_rng(0).normal(size=(1, 400))
  reports = run(rows, 5, make())
  report = jax.tree.map(lambda x: x[-1], reports)
  assert int(report.k_star) == 1
  assert float(report.gap_ratio) == pytest.approx(300, rel=1e-3)
  assert int(report.status) & sedjax.Status.BELOW_FLOOR
  assert float(report.pc1_fraction) == pytest.approx(1, abs=1e-5)
  reports = run(0 * rows, 5, make())
  report = jax.tree.map(lambda x: x[-1], reports)
  assert int(report.count) == 0
  assert int(report.k_star) == 0
  assert all(bool(jnp.all(jnp.isfinite(field))) for field in report)


def matrices(size):
  """Rows whose Gram matrices are awkward for eigensolvers, by name: float64[rows, 300], the largest about 1 long."""
  generator = np.random.default_rng(size)
  noise = generator.normal(size=(size, 300)) / 300**0.5
  return {
    "noise": noise,
    "zeros": 0 * noise,
    "one row": noise * (np.arange(size) == 1)[:, None],
    "rank one": np.ones((size, 1)) * noise[:1],
    "twins": noise[np.arange(size) // 2],
    "ties": np.linalg.qr(noise.T)[0].T,
    "a diagonal": np.eye(size, 300) * (np.arange(size) % 3)[:, None],
    "drift": np.cumsum(noise, 0) / size,
    "long and short": noise * 10.0 ** -np.linspace(0, 12, size)[:, None],
  }


@pytest.mark.parametrize("size", [3, 4, 10, 33, 64, 100])
def test_eigenvalues_and_leading_vector_of_gram_matrices(size):
  check_solver(_eigen.solve, size)


@pytest.mark.parametrize("size", [3, 11, 33])
def test_the_gpu_kernel_by_interpretation(size):
  check_solver(lambda gram: [x[0] for x in _eigen.solve_in_kernel(gram[None], interpret=True)], size)


def check_solver(solve, size):
  solve = jax.jit(solve)
  for name, rows in matrices(size).items():
    gram = rows @ rows.T
    values, vector = (np.asarray(x, np.float64) for x in solve(jnp.asarray(gram, jnp.float32)))
    exact = np.linalg.eigvalsh(gram)
    assert np.all(np.diff(values) >= -1e-7 * exact[-1]), name
    np.testing.assert_allclose(values, exact, rtol=0, atol=4e-6 * exact[-1] + 1e-30, err_msg=name)
    if name == "zeros":
      assert not np.any(vector)
    else:
      assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6), name
      assert vector @ gram @ vector == pytest.approx(exact[-1], rel=2e-6), name


def test_one_kernel_on_gpu_and_the_library_in_exports():
  """As far as a machine without a GPU can tell: the kernel is lowered, once for all seeds, and exports have none."""
  config = core.Config(10, sketch=sedjax.sketch.count(128))
  params = {"w": jnp.ones((64, 8))}
  observe = functools.partial(core.observe, config)
  lowered = jax.jit(observe).trace(core.init(config, params), params).lower(lowering_platforms=("cuda",)).as_text()
  assert lowered.count('name = "sedjax_eigen"') == 1
  assert "cusolver" not in lowered
  states, many = jax.tree.map(lambda x: jnp.stack([x] * 3), (core.init(config, params), params))
  lowered = jax.jit(jax.vmap(observe)).trace(states, many).lower(lowering_platforms=("cuda",)).as_text()
  assert lowered.count('name = "sedjax_eigen"') == 1
  assert "grid_x = 3" in lowered
  exported = jax.export.export(jax.jit(observe), platforms=["cuda"])(core.init(config, params), params)
  assert "sedjax_eigen" not in exported.mlir_module()
  assert "cusolver" in exported.mlir_module()


@pytest.mark.parametrize(("size", "kernels"), [(5, False), (129, True)])
def test_the_library_solves_large_problems_and_where_jax_has_no_kernels(monkeypatch, size, kernels):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if kernels else None)
  lowered = jax.jit(_eigen.solve_on_gpu).trace(jnp.eye(size)[None]).lower(lowering_platforms=("cuda",)).as_text()
  assert "cusolver" in lowered
  assert "triton" not in lowered


def test_the_form_for_gpus_with_jit_disabled_and_in_derivatives():
  """Reports are constants to whoever differentiates through a step."""
  with jax.disable_jit():
    values, _ = _eigen.solve_on_gpu(jnp.eye(3)[None] * 4)
  np.testing.assert_allclose(values[0], [4, 4, 4])
  _, tangent = jax.eval_shape(lambda x: jax.jvp(lambda g: _eigen.solve_on_gpu(g)[0], (x,), (x,)), jnp.eye(3)[None])
  assert tangent.shape == (1, 3)


@pytest.mark.parametrize(("window", "library"), [(10, True), (64, False)])
def test_large_windows_wake_no_threads(window, library):
  """From 64 rows on, LAPACK's would slow down whatever comes after a report."""
  config = core.Config(window, sketch=sedjax.sketch.count(128))
  params = {"w": jnp.ones((64, 8))}
  text = jax.jit(functools.partial(core.observe, config)).lower(core.init(config, params), params).compile().as_text()
  assert ("lapack" in text) == library

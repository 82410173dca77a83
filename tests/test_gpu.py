"""What only a GPU can tell; skipped without one.

JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu -n 0 tests/test_gpu.py
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sedjax
from sedjax import _eigen, core

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU as JAX's default device"),
]

# Many rows, few rows, a vector, a number, wider than the sketch, rows that do not divide, four axes, axes of size 1.
SHAPES = {
  "embedding": (50257, 96),
  "dense": (768, 3072),
  "odd": (1003, 77),
  "few": (7, 50304),
  "vector": (4097,),
  "bias": (12,),
  "number": (),
  "kernel": (5, 5, 24, 160),
  "thin": (33000, 1),
  "flat": (1, 1, 70000),
}


def random_tree(dtype, seed=0, largest=10**7):
  generator = np.random.default_rng(seed)
  shapes = {name: shape for name, shape in SHAPES.items() if np.prod(shape) < largest}
  return {name: jnp.asarray(generator.standard_normal(shape), dtype) for name, shape in shapes.items()}


def on_cpu(tree):
  return jax.device_put(tree, jax.devices("cpu")[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("dim", [1000, 16384])
def test_the_sketch_of_each_leaf_is_that_of_the_cpu(dtype, dim):
  sketch = sedjax.sketch.count(dim, seed=3)
  rows = jax.jit(lambda tree: {name: sketch.apply(name, leaf) for name, leaf in tree.items()})
  tree = random_tree(dtype)
  expected = rows(on_cpu(tree))
  for name, row in rows(tree).items():
    np.testing.assert_allclose(row, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max(), err_msg=name)


@pytest.mark.parametrize("source", ["updates", "params"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [3, 10, 64])
def test_reports_are_those_of_the_cpu(source, dtype, window):
  groups = (lambda path: path[0]) if window == 3 else None
  config = core.Config(window, sketch=sedjax.sketch.count(4096), source=source, groups=groups)
  observe = jax.jit(functools.partial(core.observe, config))
  reports = []
  for place in (lambda tree: tree, on_cpu):
    tree = place(random_tree(dtype, largest=10**5))
    state = core.init(config, tree)
    for i in range(window + 3):
      tree = place(random_tree(dtype, 1 + i // 2, 10**5))
      state = observe(state, tree, tree if source == "params" else None)
    reports.append(jax.tree.map(np.asarray, core.report(state, window=window)))
  mine, expected = reports
  np.testing.assert_array_equal(mine.count, expected.count)
  np.testing.assert_array_equal(mine.status, expected.status)
  largest = expected.singular_values.max()
  np.testing.assert_allclose(mine.singular_values**2, expected.singular_values**2, rtol=0, atol=4e-6 * largest**2)


@pytest.mark.parametrize("seeds", [1, 5])
def test_vmapped_seeds_are_single_runs(seeds):
  config = core.Config(4)
  trees = [random_tree("float32", seed) for seed in range(seeds)]
  states = [core.init(config, tree) for tree in trees]
  single = jax.jit(functools.partial(core.observe, config))
  together = jax.jit(jax.vmap(functools.partial(core.observe, config)))
  stacked, stack = (jax.tree.map(lambda *x: jnp.stack(x), *many) for many in (states, trees))
  for factor in (1, 2, -1):
    scaled = functools.partial(jax.tree.map, lambda x, factor=factor: factor * x)
    stacked = together(stacked, scaled(stack))
    states = [single(state, scaled(tree)) for state, tree in zip(states, trees, strict=True)]
  for seed, state in enumerate(states):
    np.testing.assert_allclose(stacked.rows[seed], state.rows, rtol=0, atol=1e-5 * np.abs(state.rows).max())


def test_exact_rows_are_as_precise_as_on_cpu():
  sigma = 30.0 ** -np.linspace(0, 1, 10)
  rows = oracles.rows_with_spectrum(sigma, 5000)
  config = core.Config(10, sketch=sedjax.sketch.exact())
  state = core.init(config, {"w": jnp.zeros(5000)})
  observe = jax.jit(functools.partial(core.observe, config))
  for row in rows:
    state = observe(state, {"w": jnp.asarray(row, jnp.float32)})
  np.testing.assert_allclose(core.report(state).singular_values, sigma, rtol=2e-5)


@pytest.mark.parametrize("size", [3, 10, 11, 17, 33, 65])
def test_the_eigenvalue_kernel(size):
  rows = np.random.default_rng(size).standard_normal((7, size, 300)) * 10.0 ** -np.linspace(0, 3, size)[:, None]
  grams = rows @ rows.transpose(0, 2, 1)
  values, vectors = jax.jit(_eigen.solve_on_gpu)(jnp.asarray(grams, jnp.float32))
  expected = np.linalg.eigvalsh(grams)
  np.testing.assert_allclose(values, expected, rtol=0, atol=4e-6 * expected.max())
  products = np.einsum("bi,bij,bj->b", *(np.asarray(x, np.float64) for x in (vectors, grams, vectors)))
  np.testing.assert_allclose(products, expected[:, -1], rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seeds", [None, 4])
def test_no_copy_of_the_updates_and_no_library_that_waits(dtype, seeds):
  lead = () if seeds is None else (seeds,)
  params = {f"layer{i}": jax.ShapeDtypeStruct((*lead, 4096, 1024), dtype) for i in range(8)}
  config = core.Config(10)
  init, observe = functools.partial(core.init, config), functools.partial(core.observe, config)
  if seeds is not None:
    init, observe = jax.vmap(init), jax.vmap(observe)
  compiled = jax.jit(observe, donate_argnums=0).lower(jax.eval_shape(init, params), params).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= (seeds or 1) * 16 * 2**20
  text = compiled.as_text()
  assert "cusolver" not in text
  assert "callback" not in text


@pytest.mark.parametrize("source", ["updates", "params"])
def test_a_step_copies_no_parameters(source):
  """AdamW's step stores each leaf's updates while they are looked at, and nothing where parameters are."""
  params = {f"layer{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(24)}
  tx = optax.chain(optax.adamw(1e-3), sedjax.track_spectral_edge(10, source=source, every=20))

  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()
  assert not re.findall(r"= f32\[1024,1024\]\S* copy\(", compiled.as_text())
  assert compiled.memory_analysis().temp_size_in_bytes <= 48 * 2**20  # half of the updates

"""The sketches: unbiased, of the stated variance, and the same numbers everywhere."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sedjax


def test_count_matches_a_scalar_definition():
  """The vectorised map equals one written number by number from its definition."""
  from sedjax._count import mix as _mix
  from sedjax._count import path_key as _path_key

  def mix(value):
    with np.errstate(over="ignore"):
      return _mix(np.asarray([value], np.uint32))[0]

  rows, columns, dim = 400, 5, 16
  x = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
  key = _path_key("a/b", 3)
  groups = 3  # 16 // 5 bucket rows, which leave one place in 16 empty
  offset = int(mix(key)) % dim
  expected = np.zeros(dim)
  with np.errstate(over="ignore"):
    for i in range(rows):
      row_key = mix(mix(np.uint32(i // 32) + np.uint32(0x9E3779B9)) + ~key)
      for j in range(columns):
        column_key = mix(mix(np.uint32(j) + np.uint32(0x9E3779B9)) + key)
        sign = 1 - 2 * (int(mix(row_key ^ column_key)) >> (i % 32) & 1)
        expected[(((i // 32) % groups) * columns + j + offset) % dim] += sign * float(x[i, j])
  got = sedjax.sketch.count(dim, seed=3).apply("a/b", jnp.asarray(x))
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (97, 128), (3, 3, 5, 8), (2100, 64)])
@pytest.mark.parametrize("make", [sedjax.sketch.count, sedjax.sketch.gaussian])
def test_inner_products_are_unbiased(make, shape):
  """Over seeds the mean of ⟨Sx, Sy⟩ is ⟨x, y⟩ within four standard errors, and its variance is bounded."""
  dim, draws = 512, 8 if make is sedjax.sketch.gaussian else 24
  x, y = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
  if len(shape) == 2 and shape[0] == 2100 and make is sedjax.sketch.gaussian:
    x, y = x[:50], y[:50]
  apply = jax.jit(lambda s, v: s.apply("w", v), static_argnums=0)
  products = []
  for seed in range(draws):
    s = make(dim, seed=seed)
    products.append(float(jnp.vdot(apply(s, jnp.asarray(x)), apply(s, jnp.asarray(y)))))
  spread = np.sqrt(2 * np.vdot(x, x) * np.vdot(y, y) / dim)
  error = np.mean(products) - float(np.vdot(x, y))
  assert abs(error) <= 4 * spread / np.sqrt(draws)
  assert np.std(products) <= 1.5 * spread


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, "16"])
def test_bad_dimension(dim):
  with pytest.raises(ValueError, match="dim must be an int >= 1"):
    sedjax.sketch.count(dim)


def integers(shape):
  """Whole numbers, whose float32 sums are exact in any order."""
  count = int(np.prod(shape, dtype=int))
  return jnp.asarray((np.arange(count) * 7919 % 13 - 6).reshape(shape), jnp.float32)


# (path, shape, dim, seed): CRC-32 of the row as int32. A change here breaks every stored record: raise the version.
GOLDEN = {
  ("gain", (), 64, 0): 137005846,
  ("layer/bias", (5,), 64, 0): 488302957,
  ("layer/bias", (5,), 64, 1): 3839971566,
  ("conv/kernel", (3, 3, 5, 8), 1024, 0): 1671832382,
  ("embed", (97, 128), 16384, 0): 2572435157,
  ("head", (1, 97), 16384, 0): 2292596027,
  ("column", (97, 1), 64, 0): 3512441778,
  ("embed", (5025, 64), 1024, 0): 3106386469,
  ("wide", (7, 50257), 16384, 0): 703340416,
}


@pytest.mark.parametrize(("case", "checksum"), GOLDEN.items(), ids=str)
def test_golden_values_of_count(case, checksum):
  path, shape, dim, seed = case
  row = sedjax.sketch.count(dim, seed=seed).apply(path, integers(shape))
  assert zlib.crc32(np.asarray(row).astype("<i4").tobytes()) == checksum


def test_golden_values_of_gaussian():
  row = sedjax.sketch.gaussian(5, seed=2).apply("a/b", integers((4, 3)))
  np.testing.assert_allclose(row, [-7.246063, 5.108191, -0.7574011, 2.376313, 0.6011324], rtol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (3, 0, 2)])
@pytest.mark.parametrize("make", [sedjax.sketch.count, sedjax.sketch.gaussian])
def test_an_empty_leaf_counts_for_nothing(make, shape):
  assert not np.any(make(64).apply("w", jnp.zeros(shape)))

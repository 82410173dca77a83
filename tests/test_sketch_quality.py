"""The count sketch over thousands of draws: bias, variance, and what its effective dimension promises.

The draws come from the map written again in NumPy, which is first held to the library's, bit for bit. Inner products
are compared with exact ones; nothing here is drawn twice, so a test that passes passes always.
"""

import functools
import hashlib
import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow

import sedjax
from sedjax._rows import sketch_column

# The cases share their draws.
pytestmark = pytest.mark.xdist_group("quality of the sketch")

# ---- the map, in NumPy ----

U = np.uint32


def mix(x):
  with np.errstate(over="ignore"):
    x = (x ^ (x >> U(16))) * U(0x7FEB352D)
    x = (x ^ (x >> U(15))) * U(0x846CA68B)
    return x ^ (x >> U(16))


def index_hash(size, salt):
  with np.errstate(over="ignore"):
    return mix(mix(np.arange(size, dtype=U) + U(0x9E3779B9)) + salt)


def key_of(path, seed):
  return U(int.from_bytes(hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=4).digest(), "little"))


class Layout(NamedTuple):
  """How a leaf's numbers fall into buckets, but for the hashed place of the first of them."""

  rows: int
  columns: int
  per_bucket: int
  buckets: int


def layout_of(shape, dim):
  rows, columns = math.prod(shape[:-1]), shape[-1]
  laps = 1 if 9 * (dim // columns * columns) >= 8 * dim else 2
  capacity = max(1, laps * dim // columns)
  per_bucket = next((p for p in (32, 16, 8, 4, 2) if -(-rows // p) >= 2 * capacity), 1)
  return Layout(rows, columns, per_bucket, min(-(-rows // per_bucket), capacity))


def bucket_sums(x, layout, dim):
  """[k, dim]: each of k leaves [k, m, n], already signed, summed into buckets, the first of them in place 0."""
  rows, columns, per_bucket, buckets = layout
  laps = -(-rows // (per_bucket * buckets))
  padded = np.zeros((len(x), laps * buckets * per_bucket, columns), x.dtype)
  padded[:, :rows] = x
  sums = padded.reshape(len(x), laps, buckets, per_bucket, columns).sum((1, 3)).reshape(len(x), -1)
  flat = np.zeros((len(x), -(-sums.shape[1] // dim) * dim))
  flat[:, : sums.shape[1]] = sums
  return flat.reshape(len(x), -1, dim).sum(1)


def place_of(key, dim):
  return int(mix(key)) % dim


def numpy_sketch(key, x, layout, dim):
  """float64[k, dim]: the sketches of k leaves float32[k, m, n]."""
  row_keys = index_hash(-(-layout.rows // 32), ~key)
  bits = mix(row_keys[:, None] ^ index_hash(layout.columns, key))[:, None]
  signs = bits << np.arange(31, -1, -1, dtype=U)[:, None] & U(2**31)
  signed = (x.view(U) ^ signs.reshape(-1, layout.columns)[: layout.rows]).view(np.float32)
  return np.roll(bucket_sums(signed, layout, dim), place_of(key, dim), 1)


# ---- the updates ----


def normal(rng, *shape):
  return rng.normal(size=shape)


def spread(rng, m, n):
  return normal(rng, m, n)


def rank_one(rng, m, n):
  return np.outer(normal(rng, m), normal(rng, n))


def only_a_row(rng, m, n):
  return np.where(np.arange(m)[:, None] == m // 3, normal(rng, m, n), 0)


def heavy_row(rng, m, n):
  """Half of the energy in one row."""
  return np.where(np.arange(m)[:, None] == m // 3, math.sqrt(m), 1) * normal(rng, m, n)


def only_a_column(rng, m, n):
  return only_a_row(rng, n, m).T


def hot_column(rng, m, n):
  return heavy_row(rng, n, m).T


def only_ten_columns(rng, m, n):
  return np.where(np.isin(np.arange(n), rng.choice(n, 10, False)), normal(rng, m, n), 0)


ENERGIES = (spread, rank_one, only_a_row, heavy_row, only_a_column, hot_column, only_ten_columns)
SHAPES = [(97, 101), (127, 509), (1009, 61), (64, 1021), (768, 768)]
# name: (energy, shapes of the leaves); all but the first leaf of "one of several leaves" are zero.
CASES = {f"{energy.__name__} {m}x{n}": (energy, [(m, n)]) for energy in ENERGIES for m, n in SHAPES}
CASES |= {f"spread {m}x{n}": (spread, [(m, n)]) for m, n in ((291, 54), (400, 64), (512, 64))}
# Widths of 0.55 d, 0.7 d, 1.5 d and d/3 + 1 at d = 1024.
CASES |= {f"spread {m}x{n}": (spread, [(m, n)]) for m in (40, 96) for n in (563, 716, 1536, 342)}
CASES |= dict.fromkeys(
  ("several leaves", "one of several leaves"), (spread, [(512, 61), (100, 300), (1, 77), (500, 33)])
)


class Draws(NamedTuple):
  """What a case gave: numbers by draw, relative to the norms of x and y."""

  squares: np.ndarray  # |Sx|² / |x|²
  products: np.ndarray  # (⟨Sx, Sy⟩ - ⟨x, y⟩) / |x||y|
  expected: np.ndarray  # the variance of `squares` that the layout implies, if signs are independent
  dims: np.ndarray  # the library's effective dimension of Sx


@jax.jit
def library_dims(rows):
  """float32[n]: the effective dimensions that the library gives to n rows of single leaves."""

  def one(row):
    ring, scales = jnp.zeros((1, 1, row.size), jnp.float32), jnp.zeros((1, 1), jnp.float32)
    return sketch_column(ring, row[None], jnp.int32(0), scales)[2][0]

  return jax.vmap(one)(rows)


@functools.cache
def draw(name, dim, draws):
  energy, shapes = CASES[name]
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  layouts = [layout_of(shape, dim) for shape in shapes]

  def fresh():
    pairs = []
    for i, shape in enumerate(shapes):
      x = energy(rng, *shape) * (name != "one of several leaves" or i == 0)
      # y has its energy where x has it, or is of rank one too.
      y = rank_one(rng, *shape) if energy is rank_one else np.abs(x) * normal(rng, *shape)
      pairs.append(np.stack([x, x / 2 + y]).astype(np.float32))
    exact = np.sum([np.einsum("imn,jmn->ij", pair, pair, dtype=np.float64) for pair in pairs], 0)
    squares = [pair[:1].astype(np.float64) ** 2 for pair in pairs]
    energies = [bucket_sums(square, layout, dim)[0] for square, layout in zip(squares, layouts, strict=True)]
    alone = sum((square**2).sum() for square in squares)
    return pairs, exact, energies, alone

  pairs, exact, energies, alone = fresh()
  squares, products, expected = np.zeros((3, draws))
  rows = np.zeros((draws, dim), np.float32)
  for seed in range(draws):
    if energy is rank_one and seed % 4 == 3:  # two vectors alone decide much, so there are many
      pairs, exact, energies, alone = fresh()
    keys = [key_of(f"leaf{i}", seed) for i in range(len(shapes))]
    s = np.sum([numpy_sketch(k, x, layout, dim) for k, x, layout in zip(keys, pairs, layouts, strict=True)], 0)
    e = np.sum([np.roll(e, place_of(key, dim)) for e, key in zip(energies, keys, strict=True)], 0)
    squares[seed] = (s[0] ** 2).sum() / exact[0, 0]
    products[seed] = ((s[0] * s[1]).sum() - exact[0, 1]) / math.sqrt(exact[0, 0] * exact[1, 1])
    expected[seed] = 2 * max(0, (e**2).sum() - alone) / exact[0, 0] ** 2
    rows[seed] = s[0] / math.sqrt(exact[0, 0])
  return Draws(squares, products, expected, np.asarray(library_dims(rows)))


def variance_and_error(values):
  """The variance of draws, and its standard error."""
  deviations = (values - values.mean()) ** 2
  return deviations.mean(), deviations.std() / math.sqrt(len(values))


# ---- the tests ----

LARGE = [f"{energy.__name__} {m}x{n}" for energy in ENERGIES for m, n in ((1009, 61), (768, 768))]
QUICK = [(name, 1024, 1000) for name in CASES if "768x768" not in name]
QUICK += [("spread 1009x61", 16384, 1000), ("only_ten_columns 1009x61", 16384, 1000)]
SLOW = [(name, 1024, 8000) for name in CASES if "768x768" not in name] + [(name, 16384, 2000) for name in LARGE]


def cases(of=lambda _: True, known=lambda *_: None):
  """Parameters of a test: the cases that `of` accepts; `known(name, dim)` says why one fails today."""
  params = []
  for name, dim, draws in filter(lambda case: of(case[0]), [*QUICK, *SLOW]):
    marks = [pytest.mark.slow] if (name, dim, draws) in SLOW else []
    if known(name, dim):
      marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=known(name, dim)))
    params.append(pytest.param(name, dim, draws, marks=marks, id=f"{name}, d={dim}, {draws} draws"))
  return pytest.mark.parametrize(("name", "dim", "draws"), params)


@pytest.mark.parametrize(
  ("shape", "dim"), sorted({(shape, dim) for name, dim, _ in [*QUICK, *SLOW] for shape in CASES[name][1]}), ids=str
)
def test_the_map_in_numpy_is_the_librarys(shape, dim):
  count = math.prod(shape)
  x = (np.arange(count) * 7919 % 13 - 6).reshape(1, *shape).astype(np.float32)  # whole numbers, summed exactly
  for seed in range(2):
    expected = sedjax.sketch.count(dim, seed=seed).apply("leaf0", jnp.asarray(x[0]))
    np.testing.assert_array_equal(numpy_sketch(key_of("leaf0", seed), x, layout_of(shape, dim), dim)[0], expected)


@cases()
def test_inner_products_are_unbiased(name, dim, draws):
  """Within four standard errors; within rounding where nothing collides."""
  got = draw(name, dim, draws)
  for errors in (got.squares - 1, got.products):
    assert abs(errors.mean()) <= 4 * errors.std() / math.sqrt(draws) + 1e-7


@cases()
def test_variance_is_that_of_independent_signs(name, dim, draws):
  """The measured one is what the numbers that share a bucket imply, within four standard errors."""
  got = draw(name, dim, draws)
  measured, error = variance_and_error(got.squares)
  assert abs(measured - got.expected.mean()) <= 4 * error + 1e-12


@cases(lambda name: CASES[name][0] in (spread, rank_one))
def test_variance_is_near_that_of_a_dense_map(name, dim, draws):
  """The contract: 1.2 times 2|x|²|y|²/d for evenly spread energy, 4 times for rank one.

  For |Sx|² it is held against the variance without sampling error, to which the test above ties the measured one.
  """
  got = draw(name, dim, draws)
  bound = (1.2 if CASES[name][0] is spread else 4) * 2 / dim
  assert got.expected.mean() <= bound
  assert got.products.var() <= bound


def misjudged(name, dim):
  if CASES[name][0] in (only_a_row, heavy_row) and (dim > 1024 or name != "heavy_row 64x1021"):
    return "sums do not tell a bucket of one large number, which has no error, from one of many; the guess is too small"
  return None


@cases(known=misjudged)
def test_effective_dimension_predicts_the_variance(name, dim, draws):
  """The relative variance of |Sx|² is 2/d_eff, within half as much again."""
  got = draw(name, dim, draws)
  predicted = (2 / got.dims).mean()
  assert predicted / 1.5 <= got.squares.var() <= 1.5 * predicted


@pytest.mark.parametrize("hot", [1, 2, 3, 5, 10, 30])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.97, 1])
def test_effective_dimension_of_few_hot_buckets(hot, share):
  """One over it has the right mean over draws, whatever share of the energy some buckets have, the others the rest."""
  energies = np.concatenate([np.full(hot, share / hot), np.full(500, (1 - share) / 500)])
  sums = np.random.default_rng(hot).normal(size=(4000, energies.size)) * np.sqrt(energies)
  inverse = np.mean(1 / library_dims(sums.astype(np.float32)))
  truth = (energies**2).sum()
  assert 0.72 * truth <= inverse <= 1.4 * truth


@cases(lambda name: CASES[name][0] in (only_a_row, heavy_row))
def test_effective_dimension_promises_no_more_than_there_is(name, dim, draws):
  """Also where one number outweighs its bucket."""
  got = draw(name, dim, draws)
  assert got.squares.var() <= 1.5 * (2 / got.dims).mean()


@pytest.mark.parametrize(("shape", "draws"), [((97, 101), 4000), ((512, 64), 4000), slow((97, 101), 40000)])
def test_equal_leaves_are_sketched_independently(shape, draws):
  """Two leaves of equal values: neither their inner product nor their errors go together."""
  dim = 1024
  layout = layout_of(shape, dim)
  x = normal(np.random.default_rng(0), 1, *shape).astype(np.float32)
  x /= np.linalg.norm(x)
  pairs = [[numpy_sketch(key_of(path, seed), x, layout, dim)[0] for path in ("a", "b")] for seed in range(draws)]
  a, b = np.moveaxis(np.asarray(pairs), 1, 0)
  products = (a * b).sum(1)
  assert abs(products.mean()) <= 4 * products.std() / math.sqrt(draws)
  # Independent sketches have inner products of variance near 1/d.
  assert 0.8 / dim <= products.var() <= 1.2 / dim
  errors = ((a**2).sum(1) - 1) * ((b**2).sum(1) - 1)
  assert abs(errors.mean()) <= 4 * errors.std() / math.sqrt(draws)
  for sums in (a, b):
    assert abs(np.mean(sums)) <= 4 * np.std(sums) / math.sqrt(sums.size)

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
  lot: int
  pairs: int
  buckets: int

  @property
  def shared(self):
    return self.buckets > self.pairs > 1 and self.lot > 1


def layout_of(shape, dim):
  rows, columns = math.prod(shape[:-1]), shape[-1]
  most = dim // columns
  full = [g for g in (most // 2 * 2, *({5, 7} & {most})) if 9 * g * columns >= 8 * dim]
  buckets = full[0] if full else 2 * (dim // 2 // columns + 1)
  pairs = buckets // 2
  lots = {p: -(-rows // p) for p in (32, 16, 8, 4, 2) if rows * columns > 2**17}
  lot = next((p for p, count in lots.items() if count >= buckets or 2 * count == buckets), 1)
  return Layout(rows, columns, lot, *((pairs, buckets) if rows > pairs else (rows, rows)))


class Place(NamedTuple):
  """Where a leaf's buckets lie."""

  first: int
  turn: int
  shift: int


def place_of(key, layout, seed, dim):
  first = mix(np.asarray([key]))
  with np.errstate(over="ignore"):
    second = mix(first + U(0x9E3779B9))
  if not layout.shared:
    return Place(int(first[0]) % dim, 0, 0)
  with np.errstate(over="ignore"):
    shared = mix(mix(mix(U([layout.columns]) + U(0x9E3779B9)) + key_of("", seed)))
  return Place(int(shared[0]) % dim, int(first[0]) % layout.buckets, int(second[0]) % layout.columns)


def bucket_sums(x, layout, place, dim):
  """[k, dim]: each of k leaves [k, m, n], already signed, summed into buckets."""
  rows, columns, lot, pairs, buckets = layout
  lots = -(-rows // lot)
  turns = (np.arange(lots) + place.turn) % buckets
  padded = np.zeros((len(x), lots * lot, columns))
  padded[:, :rows] = x
  padded = np.roll(padded.reshape(len(x), lots, lot, columns), place.shift, 3)
  numbers = np.arange(lots * lot).reshape(lots, lot)
  odd = np.vectorize(lambda i: int(i).bit_count() % 2)(numbers % lot if lot > 1 else numbers // buckets)[..., None]
  by_parity = [np.where(odd == parity, padded, 0).sum(2) for parity in (0, 1)]  # [k, lots, n] each
  found = np.zeros((len(x), dim))

  def add(sums, at):
    np.add.at(found, (slice(None), (place.first + at + np.arange(columns)) % dim), sums)

  for turn in range(buckets):
    even_sum, odd_sum = [each[:, turns == turn].sum(1) for each in by_parity]
    if turn < 2 * pairs:
      at, second = turn % pairs * columns, turn // pairs
      add(even_sum, at + second * (dim // 2))
      add(odd_sum, at + (1 - second) * (dim // 2))
    else:
      gap = dim // 2 - pairs * columns
      cut = np.arange(columns) < gap
      add(np.where(cut, even_sum + odd_sum, 0), pairs * columns)
      add(np.where(cut, 0, even_sum + odd_sum), pairs * columns + dim // 2 - gap)
  return found


def numpy_sketch(key, x, layout, place, dim):
  """float64[k, dim]: the sketches of k leaves float32[k, m, n]."""
  row_keys = index_hash(-(-layout.rows // 32), ~key)
  bits = mix(row_keys[:, None] ^ index_hash(layout.columns, key))[:, None]
  signs = bits << np.arange(31, -1, -1, dtype=U)[:, None] & U(2**31)
  signed = (x.view(U) ^ signs.reshape(-1, layout.columns)[: layout.rows]).view(np.float32)
  return bucket_sums(signed, layout, place, dim)


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


def some_rows(rng, m, n):
  """Most of the energy in one row of thirty."""
  return np.where(rng.random(m)[:, None] < 1 / 30, math.sqrt(60), 1) * normal(rng, m, n)


def every_32nd_row(rng, m, n):
  """Likewise, as in one head of attention."""
  return np.where(np.arange(m)[:, None] % 32 == 5, math.sqrt(60), 1) * normal(rng, m, n)


def first_rows(rng, m, n):
  """The less energy in a row the later it comes, as in embeddings of frequent and of rare words."""
  return normal(rng, m, n) / np.sqrt(1 + np.arange(m)[:, None])


ENERGIES = (spread, rank_one, only_a_row, heavy_row, only_a_column, hot_column, only_ten_columns)
SHAPES = [(97, 101), (127, 509), (1009, 61), (64, 1021), (768, 768)]
# name: (energy, shapes of the leaves); all but the first leaf of "one of several leaves" are zero.
CASES = {f"{energy.__name__} {m}x{n}": (energy, [(m, n)]) for energy in ENERGIES for m, n in SHAPES}
CASES |= {f"spread {m}x{n}": (spread, [(m, n)]) for m, n in ((291, 54), (400, 64), (512, 64))}
CASES |= {f"{energy.__name__} 1009x61": (energy, [(1009, 61)]) for energy in (some_rows, every_32nd_row, first_rows)}
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
  """float32[n, 2]: the effective dimensions that the library gives to n rows of single leaves, and those of noise."""

  def one(row):
    ring, scales = jnp.zeros((1, 1, row.size), jnp.float32), jnp.zeros((1, 1), jnp.float32)
    return sketch_column(ring, row[None], jnp.int32(0), scales)[2]

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
    alone = sum((square**2).sum() for square in squares)
    return pairs, exact, squares, alone

  pairs, exact, energies, alone = fresh()
  squares, products, expected = np.zeros((3, draws))
  rows = np.zeros((draws, dim), np.float32)
  for seed in range(draws):
    if energy is rank_one and seed % 4 == 3:  # two vectors alone decide much, so there are many
      pairs, exact, energies, alone = fresh()
    keys = [key_of(f"leaf{i}", seed) for i in range(len(shapes))]
    places = [place_of(key, layout, seed, dim) for key, layout in zip(keys, layouts, strict=True)]
    leaves = list(zip(keys, pairs, layouts, places, strict=True))
    s = np.sum([numpy_sketch(key, x, layout, place, dim) for key, x, layout, place in leaves], 0)
    e = np.sum([bucket_sums(e, *where, dim)[0] for e, *where in zip(energies, layouts, places, strict=True)], 0)
    squares[seed] = (s[0] ** 2).sum() / exact[0, 0]
    products[seed] = ((s[0] * s[1]).sum() - exact[0, 1]) / math.sqrt(exact[0, 0] * exact[1, 1])
    expected[seed] = 2 * max(0, (e**2).sum() - alone) / exact[0, 0] ** 2
    rows[seed] = s[0] / math.sqrt(exact[0, 0])
  return Draws(squares, products, expected, np.asarray(library_dims(rows))[:, 0, 0])


def variance_and_error(values):
  """The variance of draws, and its standard error."""
  deviations = (values - values.mean()) ** 2
  return deviations.mean(), deviations.std() / math.sqrt(len(values))


# ---- the tests ----

LARGE = [f"{energy.__name__} {m}x{n}" for energy in ENERGIES for m, n in ((1009, 61), (768, 768))]
# Those of few hot buckets have a skewed distribution, of which a thousand draws tell the standard error badly.
QUICK = [(name, 1024, 4000 if "only_ten_columns 127" in name else 1000) for name in CASES if "768x768" not in name]
QUICK += [("spread 1009x61", 16384, 1000), ("only_ten_columns 1009x61", 16384, 1000)]
SLOW = [(name, 1024, 8000) for name in CASES if "768x768" not in name] + [(name, 16384, 2000) for name in LARGE]


def cases(of=lambda _: True, known=lambda _: None):
  """Parameters of a test: the cases that `of` accepts; `known(name)` says why one fails today."""
  params = []
  for name, dim, draws in filter(lambda case: of(case[0]), [*QUICK, *SLOW]):
    marks = [pytest.mark.slow] if (name, dim, draws) in SLOW else []
    if known(name):
      marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=known(name)))
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
    layout, key = layout_of(shape, dim), key_of("leaf0", seed)
    np.testing.assert_array_equal(numpy_sketch(key, x, layout, place_of(key, layout, seed, dim), dim)[0], expected)


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


def misjudged(name):
  if name == "only_a_row 64x1021":
    return (
      "numbers of one row that lie half a sketch apart seem to be those that share a bucket; the guess is too small"
    )
  return None


@cases(known=misjudged)
def test_effective_dimension_predicts_the_variance(name, dim, draws):
  """The relative variance of |Sx|² is 2/d_eff, within half as much again."""
  got = draw(name, dim, draws)
  predicted = (2 / got.dims).mean()
  assert predicted / 1.5 <= got.squares.var() + 1e-12
  assert got.squares.var() <= 1.5 * predicted + 1e-12


FEW = pytest.mark.parametrize("hot", [1, 2, 3, 5, 10, 30])
SHARES = pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.97, 1])


@FEW
@SHARES
def test_effective_dimension_of_few_hot_pairs_of_buckets(hot, share):
  """One over it has the right mean over draws, whatever share of the energy some pairs have, the others the rest."""
  energies = np.tile(np.concatenate([np.full(hot, share / hot), np.full(250, (1 - share) / 250)]) / 2, 2)
  sums = np.random.default_rng(hot).normal(size=(4000, energies.size)) * np.sqrt(energies)
  inverse = np.mean(1 / library_dims(sums.astype(np.float32))[:, 0, 0])
  truth = (energies**2).sum()
  assert 0.85 * truth <= inverse <= 1.18 * truth


@FEW
@SHARES
def test_dimension_of_noise_in_few_hot_buckets(hot, share):
  """Likewise the one of noise, of buckets."""
  energies = np.concatenate([np.full(hot, share / hot), np.full(500, (1 - share) / 500)])
  sums = np.random.default_rng(hot).normal(size=(4000, energies.size)) * np.sqrt(energies)
  inverse = np.mean(1 / library_dims(sums.astype(np.float32))[:, 1, 0])
  truth = (energies**2).sum()
  assert 0.72 * truth <= inverse <= 1.4 * truth


@pytest.mark.parametrize(("shape", "draws"), [((97, 101), 4000), ((512, 64), 4000), slow((97, 101), 40000)])
def test_equal_leaves_are_sketched_independently(shape, draws):
  """Two leaves of equal values: neither their inner product nor their errors go together."""
  dim = 1024
  layout = layout_of(shape, dim)
  x = normal(np.random.default_rng(0), 1, *shape).astype(np.float32)
  x /= np.linalg.norm(x)
  pairs = []
  for seed in range(draws):
    keys = [key_of(path, seed) for path in ("a", "b")]
    pairs.append([numpy_sketch(key, x, layout, place_of(key, layout, seed, dim), dim)[0] for key in keys])
  a, b = np.moveaxis(np.asarray(pairs), 1, 0)
  products = (a * b).sum(1)
  assert abs(products.mean()) <= 4 * products.std() / math.sqrt(draws)
  # Independent sketches have inner products of variance near 1/d.
  assert 0.8 / dim <= products.var() <= 1.2 / dim
  errors = ((a**2).sum(1) - 1) * ((b**2).sum(1) - 1)
  assert abs(errors.mean()) <= 4 * errors.std() / math.sqrt(draws)
  for sums in (a, b):
    assert abs(np.mean(sums)) <= 4 * np.std(sums) / math.sqrt(sums.size)

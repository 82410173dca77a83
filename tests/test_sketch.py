"""The sketches: unbiased, of the stated variance, and the same numbers everywhere."""

import functools
import hashlib
import itertools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow

import sedjax
from sedjax import _count, _indexed, _long, _small, _strided
from sedjax._count import Piece
from sedjax._indexed import indexed_terms
from sedjax._strided import strided_rows
from sedjax._terms import sum_terms_elsewhere, sum_terms_on_tpu


def scalar_definition(path, x, dim, seed, start=None, shape=None):
  """The count sketch of a leaf, or of the block at `start` of a leaf of `shape`, number by number in Python's ints."""

  def mix(value):
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ value >> 16

  def index_hash(index, salt):
    return mix((mix((index + 0x9E3779B9) % 2**32) + salt) % 2**32)

  shape = shape or x.shape
  start = start or (0,) * len(shape)
  columns = shape[-1] if shape else 1
  rows = math.prod(shape[:-1])
  ring = dim - dim % 2 if dim > 1 else 1
  half = ring // 2
  # Rows of buckets: an even number that fills eight ninths, or five or seven that do, or an even one that is too much.
  even = ring // columns // 2 * 2
  if 9 * even * columns >= 8 * ring:
    buckets = even
  elif ring // columns in (5, 7) and 9 * (ring // columns) * columns >= 8 * ring:
    buckets = ring // columns
  else:
    buckets = 2 * (half // columns) + 2
  pairs = buckets // 2
  lots = {p: -(-rows // p) for p in (32, 16, 8, 4, 2) if rows * columns > 2**17}
  lot = next((p for p, count in lots.items() if count >= buckets or 2 * count == buckets), 1)
  if rows <= pairs:
    pairs = buckets = rows
  key = int.from_bytes(hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=4).digest(), "little")
  first = mix(key)
  second = mix((first + 0x9E3779B9) % 2**32)
  begin, turned, shift = first % ring, 0, 0
  if buckets > pairs > 1 and lot > 1:  # such leaves of as many columns begin in one place
    none = int.from_bytes(hashlib.blake2b(f"{seed}/".encode(), digest_size=4).digest(), "little")
    begin, turned, shift = mix(index_hash(columns, none)) % ring, first % buckets, second % columns
  sketch = [0.0] * dim
  for at, value in np.ndenumerate(np.asarray(x, np.float32)):
    index = [first + i for first, i in zip(start, at, strict=True)] or [0]
    row, column = 0, index[-1]
    for size, i in zip(shape[:-1], index[:-1], strict=True):
      row = row * size + i
    bits = mix(index_hash(row // 32, 2**32 - 1 - key) ^ index_hash(column, key))
    column = (column + shift) % columns
    turn, odd = (row // lot + turned) % buckets, (row % lot if lot > 1 else row // buckets).bit_count() % 2
    if buckets == pairs:
      place = turn * columns + column
    elif turn < 2 * pairs:
      place = turn % pairs * columns + column + (half if odd != turn // pairs else 0)
    else:  # in what the pairs leave of either half
      gap = half - pairs * columns
      place = pairs * columns + column + (half - gap if column >= gap else 0)
    sketch[(begin + place) % ring] += float(-value if bits >> row % 32 & 1 else value)
  return np.asarray(sketch)


@pytest.mark.parametrize(
  ("shape", "dim"),
  [
    ((400, 5), 16),
    ((3, 3, 5, 8), 64),
    ((97, 1), 64),
    ((5,), 64),
    ((5,), 3),
    ((), 7),
    ((50, 90), 128),
    ((700, 5), 64),
    ((400, 9), 64),
    ((100, 9), 64),
    ((9, 3), 1),
    ((90, 4), 2),
    ((300, 13), 64),
    ((7, 200), 64),
  ],
)
def test_count_matches_a_scalar_definition(shape, dim):
  """The vectorised map equals one written number by number from its definition."""
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  got = sedjax.sketch.count(dim, seed=3).apply("a/b", jnp.asarray(x))
  np.testing.assert_allclose(got, scalar_definition("a/b", x, dim, 3), atol=1e-5)


@pytest.mark.parametrize(
  ("make", "shape"),
  [  # for the count sketch test_sketch_quality has thousands of draws
    (sedjax.sketch.count, (97, 128)),
    (sedjax.sketch.gaussian, ()),
    (sedjax.sketch.gaussian, (3, 3, 5, 8)),
    (sedjax.sketch.gaussian, (50, 64)),
  ],
)
def test_inner_products_are_unbiased(make, shape):
  """Over seeds the mean of ⟨Sx, Sy⟩ is ⟨x, y⟩ within four standard errors, and its variance is bounded."""
  dim, draws = 512, 8 if make is sedjax.sketch.gaussian else 24
  x, y = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
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
  with pytest.raises(ValueError, match="dim must be an int in"):
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
  ("column", (97, 1), 64, 0): 2829807418,
  ("embed", (5025, 64), 1024, 0): 1289189543,
  ("wide", (7, 50257), 16384, 0): 1541545080,
  ("wide", (50, 9000), 16384, 0): 3349299551,
  ("one", (1, 1, 7), 64, 0): 129804456,
  ("up", (768, 3072), 16384, 0): 824709827,
  ("wte", (50257, 768), 16384, 0): 3671884801,
  ("wte", (50304, 768), 16384, 0): 1216987160,
}


@pytest.mark.parametrize(("case", "checksum"), GOLDEN.items(), ids=str)
def test_golden_values_of_count(case, checksum):
  path, shape, dim, seed = case
  row = sedjax.sketch.count(dim, seed=seed).apply(path, integers(shape))
  assert zlib.crc32(np.asarray(row).astype("<i4").tobytes()) == checksum


def strided(path, x, dim, gpu=False):
  """The form of one CPU or GPU."""
  return strided_rows([Piece(path, x)], [0], 1, dim, 0, None, jnp.float32(1), gpu)[0]


def indexed(pieces, dim, alone=False, tpu=False):
  """The form of TPUs and of shards."""
  grid = jnp.float32(1)
  terms = [indexed_terms(piece, dim, 0, None, grid, alone)[0] for piece in pieces]
  return (sum_terms_on_tpu if tpu else sum_terms_elsewhere)(terms, dim, None, grid)


def blocks(path, x, axes):
  """The leaf cut along `axes` into unequal blocks, none of them a multiple of 32 rows."""
  cuts = []
  for axis, size in enumerate(x.shape):
    inner = {min(37, size // 3), size * 2 // 3 + 1} if axis in axes else set()
    cuts.append(list(itertools.pairwise(sorted({0, size, *(cut for cut in inner if cut < size)}))))
  for ranges in itertools.product(*cuts):
    start, stop = [first for first, _ in ranges], [last for _, last in ranges]
    yield Piece(path, x[tuple(slice(*ends) for ends in ranges)], tuple(start), x.shape)
    assert all(first < last for first, last in zip(start, stop, strict=True))


SHAPES = [(), (5,), (97, 128), (3, 3, 5, 8), (5025, 64), (1, 97), (97, 1), (7, 50257), (50, 9000), (400, 5)]
SHAPES += [(150, 200), (300_007,)]


def all_forms(shape, dim, x):
  """The row of one leaf in every form."""
  axes = {"leading": (0,), "trailing": (len(shape) - 1,), "every": tuple(range(len(shape)))}
  rows = {"indexed": indexed([Piece("w", x)], dim), "indexed, alone": indexed([Piece("w", x)], dim, alone=True)}
  rows["on a TPU"] = indexed([Piece("w", x)], dim, alone=True, tpu=True)
  for name in axes:
    some = list(blocks("w", x, axes[name]))
    rows[f"blocks of {name} axis"] = indexed(some, dim)
    rows[f"blocks of {name} axis on a TPU"] = indexed(some, dim, tpu=True)
    some = [piece._replace(start=tuple(map(jnp.uint32, piece.start))) for piece in some]  # as devices know theirs
    rows[f"blocks of {name} axis, traced, on a TPU"] = indexed(some, dim, tpu=True)
  return rows | {"strided": strided("w", x, dim), "strided on GPU": strided("w", x, dim, gpu=True)}


def assert_all_equal(rows):
  expected = np.asarray(rows["indexed"])
  assert np.any(expected)
  for form, row in rows.items():
    assert np.array_equal(row, expected), form


@pytest.mark.parametrize("dim", [64, slow(1024), 16384])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", [_count._SMALL, 0])
def test_all_forms_of_count_agree_bit_for_bit(small, shape, dim, monkeypatch):
  """Also where small leaves would be summed as large ones are."""
  monkeypatch.setattr(_count, "_SMALL", small)
  x = integers(shape)
  rows = jax.jit(functools.partial(all_forms, shape, dim))(x + (x == 0))
  assert_all_equal(rows)


@pytest.mark.parametrize("shape", [(4, 300_000), (2**20 + 1,)], ids=str)
def test_long_rows_with_64_bits(shape):
  x = integers(shape)
  expected = strided("w", x, 16384)
  assert np.any(expected)
  with jax.enable_x64(True):
    np.testing.assert_array_equal(strided("w", x, 16384), expected)


@pytest.mark.slow
def test_a_vector_of_more_than_2_31_numbers():
  """Its places are told apart beyond what 31 bits count, in the rounds of the loop and in what they leave."""
  x, dim = np.zeros(2**31 + 2**19 + 5, "float8_e4m3fn"), 16384
  places = [5, 2**30, 2**31 - 1, 2**31 + 100, 2**31 + 2**18 + 77, 2**31 + 2**19 + 4]
  x[places] = np.arange(1, 7)
  row = np.abs(jax.jit(functools.partial(strided, "w", dim=dim))(x))
  expected = np.zeros(dim)
  offset = sedjax.sketch.count(dim).plan("w", x.shape).offset
  expected[(offset + np.array(places)) % dim] = np.arange(1, 7)
  np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("part", [None, 0, 1])
@pytest.mark.parametrize("dim", [130, 1024])
def test_many_vectors_on_a_tpu_are_sketched_as_each_alone(dim, part):
  """In more layers than a number has bits, of two dtypes, whole and in blocks, some of which other devices add."""
  grid, silent, expected, terms = jnp.float32(4), jnp.bool_(False), 0, []
  leaves = {f"b{i}": integers((dim - i,)).astype(("float32", "bfloat16")[i % 2]) for i in range(100)}
  leaves |= {"w": integers((70, 20)), "tied": integers((70, 20))}
  for i, (path, x) in enumerate(leaves.items()):
    start = (0,) * x.ndim if i % 3 or x.ndim > 1 else (jnp.uint32(0),)
    cut = x.shape[-1] // 2 if i % 5 == 0 and x.ndim == 1 else x.shape[-1]
    for first, last in itertools.pairwise(sorted({0, cut, x.shape[-1]})):
      piece = Piece(path, x[..., first:last], (*start[:-1], start[-1] + first), x.shape)
      term, _ = indexed_terms(piece, dim, 0, part, grid, False)
      terms.append(term.where(True if i % 7 else silent))
    if i % 7:
      expected = expected + strided_rows([Piece(path, x)], [0], 1, dim, 0, part, grid)[0]
  row = jax.jit(lambda: sum_terms_on_tpu(terms, dim, part, grid))()
  assert np.any(row)
  np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_many_small_leaves_are_sketched_as_each_alone(dtype):
  """In as many lots as it takes, of which one waits for the other."""
  leaves = {f"b{i}": integers((3 + i % 2,)).astype(dtype) for i in range(300)}
  sketch = sedjax.sketch.count(64)

  def together(leaves):
    pieces = [Piece(path, x) for path, x in leaves.items()]
    return strided_rows(pieces, [0] * len(pieces), 1, sketch.dim, 0, None, jnp.float32(1))[0]

  expected = sum(sketch.apply(path, x) for path, x in leaves.items())
  assert np.any(expected)
  np.testing.assert_array_equal(jax.jit(together)(leaves), expected)
  seeds = jax.jit(jax.vmap(together))(jax.tree.map(lambda x: jnp.stack([x, -x]), leaves))
  np.testing.assert_array_equal(seeds, [expected, -expected])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_forms_of_count_agree_when_they_work_in_small_parts(shape, monkeypatch):
  """As they do for large leaves: in chunks, with hashes made at run time, and after earlier work; and from bfloat16."""
  small = [
    (_indexed, "_CHUNK", 500),
    (_count, "TABLE", 16),
    (_strided, "TABLE", 16),
    (_strided, "_ALIVE", 1000),
    (_long, "_LEAST", 16),
  ]
  for module, name, value in small:
    assert getattr(module, name) >= 2**18
    monkeypatch.setattr(module, name, value if math.prod(shape) < 10**5 else 64 * value)
  monkeypatch.setattr(_small, "MOST", 0)
  x = integers(shape)
  x = x + (x == 0)
  rows = jax.jit(functools.partial(all_forms, shape, 1024))(x.astype(jnp.bfloat16))
  monkeypatch.undo()
  assert_all_equal(rows | {"indexed": indexed([Piece("w", x)], 1024)})


@pytest.mark.parametrize(
  ("shape", "split", "dim"),
  [
    ((3072, 96), (8, 1), 16384),
    ((6048, 24), (3, 2), 1024),
    ((256, 3072), (1, 8), 16384),
    ((64, 4, 32, 20), (4, 1, 1, 2), 500),
    ((256, 5000), (2, 2), 4096),
    ((128, 6), (4, 1), 100000),
  ],
  ids=str,
)
def test_blocks_of_whole_hashes_agree_bit_for_bit(shape, split, dim):
  """In the form that a GPU takes for such blocks, and no others."""
  plan = _count.plan_of("w", None, shape, dim, 0)
  x = integers(shape)
  size = tuple(n // parts for n, parts in zip(shape, split, strict=True))
  for place in np.ndindex(*split):
    start = tuple(i * n for i, n in zip(place, size, strict=True))
    block = Piece("w", jax.lax.dynamic_slice(x, start, size), start, shape)
    assert _strided.aligned(block)
    expected = _indexed._bucket_sums(block, plan, plan.buckets, None, jnp.float32(1))
    np.testing.assert_array_equal(_strided.block_sums(block, plan, None, jnp.float32(1)), expected)


@pytest.mark.parametrize(
  ("block", "shape"), [((40, 8), (80, 8)), ((32, 2, 8), (32, 4, 8)), ((8,), (16,)), ((0, 8), (32, 8))], ids=str
)
def test_blocks_that_share_a_hash_with_others_are_not_aligned(block, shape):
  assert not _strided.aligned(Piece("w", jnp.zeros(block), (0,) * len(shape), shape))


def test_small_leaves_are_added_as_one(monkeypatch):
  """Of several groups, dtypes and shapes, in lots, beside a large one: to the sum of what each adds alone."""
  monkeypatch.setattr(_small, "_LEAVES", 3)
  shapes = [(5,), (), (97, 12), (300, 40), (3, 1, 5), (4096,), (65, 64), (7,), (1, 1)] * 2
  pieces = [Piece(f"leaf {i}", integers(shape) + 1) for i, shape in enumerate(shapes)]
  pieces = [
    piece._replace(array=piece.array.astype(jnp.bfloat16)) if i % 4 == 1 else piece for i, piece in enumerate(pieces)
  ]
  groups = [i // 2 % 3 for i in range(len(pieces))]
  rows = jax.jit(
    lambda arrays: strided_rows(
      [piece._replace(array=x) for piece, x in zip(pieces, arrays, strict=True)],
      groups,
      3,
      1024,
      0,
      None,
      jnp.float32(1),
    )
  )([piece.array for piece in pieces])
  for label, row in enumerate(rows):
    mine = [piece for piece, group in zip(pieces, groups, strict=True) if group == label]
    np.testing.assert_array_equal(row, sum(np.asarray(indexed([piece], 1024)) for piece in mine))
  lots = list(_small.lots(pieces, [_count.plan_of(p.path, None, p.array.shape, 1024, 0) for p in pieces], groups))
  assert max(len(found) for _, found, _ in lots) == 3
  assert sum(len(found) for _, found, _ in lots) == len(pieces) - shapes.count((300, 40)) - shapes.count((65, 64))


@pytest.mark.parametrize("dim", [1, 16, 1000])
def test_small_leaves_are_gathered_where_scatters_add_in_any_order(dim):
  at = np.random.default_rng(0).integers(dim, size=700)
  x = integers((700,))
  expected = np.zeros(dim, np.float32)
  np.add.at(expected, at, np.asarray(x))
  np.testing.assert_array_equal(_small.gathered_row(x, at, dim), expected)


HUGE = (2**19, 2**13, 8)


@pytest.mark.parametrize(
  ("start", "block"),
  [
    ((2**16, 5, 0), (1, 40, 8)),  # flat index 2**32 + 40
    ((2**18, 8000, 0), (1, 40, 8)),  # row 2**31 + 8000
    ((2**18 + 1, 13, 5), (1, 40, 3)),
    ((2**19 - 2, 2**13 - 40, 0), (2, 40, 8)),  # to the last row before 2**32
  ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_a_block_far_inside_a_huge_leaf(start, block, traced):
  """Each axis is hashed in turn: flat indices beyond 2**32 do not wrap."""
  x = integers(block)

  def row(x, start):
    return indexed([Piece("w", x, start, HUGE)], 1024)

  got = jax.jit(row)(x, start) if traced else row(x, start)
  np.testing.assert_array_equal(got, scalar_definition("w", x, 1024, 0, start, HUGE))
  wrapped = (start[0] % 2**16, *start[1:])
  assert not np.array_equal(got, row(x, wrapped))


@pytest.mark.parametrize("form", ["chosen", "strided", "indexed"])
@pytest.mark.parametrize("shape", [(5,), (97, 12), (3, 3, 5, 8)], ids=str)
def test_same_numbers_under_every_transformation(form, shape):
  def row(x):
    if form == "chosen":
      return sedjax.sketch.count(64).apply("w", x)
    return strided("w", x, 64) if form == "strided" else indexed([Piece("w", x)], 64)

  batch = jnp.stack([integers(shape) + i for i in range(3)])
  eager = np.stack([row(x) for x in batch])
  np.testing.assert_array_equal(eager, [scalar_definition("w", x, 64, 0) for x in batch])
  np.testing.assert_array_equal(eager, jnp.stack([jax.jit(row)(x) for x in batch]))
  np.testing.assert_array_equal(eager, jax.vmap(row)(batch))
  np.testing.assert_array_equal(eager, jax.jit(jax.vmap(row, in_axes=-1))(jnp.moveaxis(batch, 0, -1)))
  np.testing.assert_array_equal(eager, jax.lax.scan(lambda carry, x: (carry, row(x)), 0, batch)[1])

  @jax.jit
  def total(batch):
    return jax.lax.scan(lambda sums, x: (sums + row(x), None), jnp.zeros((64,)), batch)[0]

  np.testing.assert_array_equal(eager.sum(0), total(batch))


def test_golden_values_of_gaussian():
  row = sedjax.sketch.gaussian(5, seed=2).apply("a/b", integers((4, 3)))
  np.testing.assert_allclose(row, [-7.246063, 5.108191, -0.7574011, 2.376313, 0.6011324], rtol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (3, 0, 2)])
@pytest.mark.parametrize("make", [sedjax.sketch.count, sedjax.sketch.gaussian])
def test_an_empty_leaf_counts_for_nothing(make, shape):
  assert not np.any(make(64).apply("w", jnp.zeros(shape)))

"""Where the blocks of sharded leaves lie, and computing on them without moving them.

Shardings are known while tracing in two cases: over mesh axes of *explicit* type, which arrays carry in their types,
and inside the user's own `jax.shard_map`, of which the user gives the axes (`axis_name`). Then each device works on its
blocks, and what they give is summed over the mesh once. Over *automatic* axes at most the mesh is known, and XLA's
partitioner does what it finds best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sedjax._paths import normalised_paths

Spec = tuple[tuple[str, ...], ...]  # by dimension, the mesh axes over which it is split


def _entries(spec: Any) -> Any:
  """Those of a `PartitionSpec`, which newer JAX wants to be asked for by name where it is (un)reduced besides."""
  return getattr(spec, "partitions", spec)


def normalised(spec: Any, ndim: int) -> Spec:
  """A `PartitionSpec` with a tuple of names for each of `ndim` dimensions."""
  entries = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in _entries(spec)]
  return tuple(entries + [()] * (ndim - len(entries)))


def mesh_of(x: jax.Array) -> Any:
  """The abstract mesh that an array lies on, as far as that is known while tracing; else an empty one."""
  return getattr(jax.typeof(x).sharding, "mesh", jax.sharding.AbstractMesh((), ()))


def _explicit_axes(mesh: Any) -> set[str]:
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit}


def explicit_spec(leaf: Any) -> tuple[Spec, Any]:
  """How a leaf is split over explicit mesh axes, and their abstract mesh; ((), None) where it is not."""
  kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
  sharding = getattr(kind, "sharding", None)
  if not isinstance(sharding, jax.NamedSharding):
    return (), None
  mesh = sharding.mesh.abstract_mesh
  spec = normalised(sharding.spec, len(leaf.shape))
  if not any(_explicit_axes(mesh).intersection(names) for names in spec):
    return (), None
  return spec, mesh


def reduced_axes(leaf: Any) -> set[str]:
  """The mesh axes over which an array's type says that it is reduced, or is yet to be."""
  spec = getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", None)
  return {*getattr(spec, "reduced", ()), *getattr(spec, "unreduced", ())}


def explicit_mesh(leaves: Sequence[Any]) -> Any:
  """The mesh of explicit axes on which leaves lie, split or not; None where there is none."""
  for leaf in leaves:
    sharding = getattr(leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf), "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and _explicit_axes(sharding.mesh):
      own = getattr(leaf, "sharding", None)  # of an array outside of jit, which names the devices
      return own.mesh if isinstance(own, jax.NamedSharding) else sharding.mesh
  return None


def on_mesh(tree: Any, mesh: Any) -> Any:
  """Puts the arrays that lie on no mesh on every device of `mesh`, if there is one, as arrays made of the leaves do."""

  def put(x: Any) -> Any:
    if not jax.typeof(x).sharding.mesh.empty:
      return x
    to = jax.NamedSharding(mesh, jax.P())
    return jax.sharding.reshard(x, to) if isinstance(mesh, jax.sharding.AbstractMesh) else jax.device_put(x, to)

  return tree if mesh is None else jax.tree.map(put, tree)


def manual_axes() -> tuple[str, ...]:
  """The mesh axes of the surrounding `jax.shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Manual)


def varying_axes(*arrays: Any) -> frozenset[str]:
  """The mesh axes along which arrays may differ, which inside a `jax.shard_map` are a part of types."""
  kinds = [jax.typeof(x) for x in arrays]
  names = [getattr(getattr(kind, "manual_axis_type", None), "varying", getattr(kind, "vma", ())) for kind in kinds]
  return frozenset().union(*names)


def varying_as(tree: Any, leaves: Sequence[Any]) -> Any:
  """Arrays that inside a `jax.shard_map` may differ between devices wherever one of the leaves may.

  There that is a part of types, which the carry of a loop has to keep.
  """
  manual = jax.sharding.AxisType.Manual
  leaves = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and manual in mesh_of(leaf).axis_types]
  if not leaves:
    return tree
  zero = sum(jnp.zeros_like(leaf, jnp.int32, shape=()) for leaf in leaves)
  return jax.tree.map(lambda x: x + jnp.asarray(zero).astype(x.dtype), tree)


def axis_sizes(names: Sequence[str]) -> dict[str, int]:
  """Sizes of mesh axes.

  Raises:
    ValueError: a name is not an axis of a surrounding `jax.shard_map`.
  """
  sizes = {}
  for name in names:
    try:
      sizes[name] = jax.lax.axis_size(name)
    except NameError as error:
      raise ValueError(
        f"track_spectral_edge: axis_name={name!r} is not a mesh axis here; call update inside a jax.shard_map over a "
        "mesh with that axis, or leave axis_name out."
      ) from error
  return sizes


def whole_shape(shape: tuple[int, ...], spec: Spec) -> tuple[int, ...]:
  """The shape of the leaf of which a block of this shape is a device's share."""
  return tuple(
    size * math.prod(axis_sizes(names).values()) for size, names in zip(shape, spec or ((),) * len(shape), strict=True)
  )


def _split(block: tuple[int, ...], whole: tuple[int, ...], sizes: Mapping[str, int]) -> list[Spec]:
  """All ways to split a leaf of shape `whole` into blocks of shape `block` over different axes of these sizes.

  Where a dimension is split over several axes their order decides which block is whose, and shapes do not tell it.
  """
  if len(block) != len(whole):
    return []
  if not block:
    return [()]
  found = []
  several = [name for name, size in sizes.items() if size > 1]
  for names in (names for count in range(len(several) + 1) for names in itertools.permutations(several, count)):
    if math.prod(sizes[name] for name in names) * block[0] == whole[0]:
      left = {name: size for name, size in sizes.items() if name not in names}
      found += [(names, *rest) for rest in _split(block[1:], whole[1:], left)]
  return found


def _is_known(spec: Any) -> bool:
  """Whether a PartitionSpec says of each dimension how it is split."""
  return all(entry is not jax.P.UNCONSTRAINED for entry in _entries(spec))


class Blocks:
  """How the blocks that `update` is given inside a `jax.shard_map` lie in the parameters: the option `axis_name`."""

  def __init__(self, axis_name: Any):
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    self._names: tuple[str, ...] = ()
    self._specs: dict[str, Any] | None = None
    self._wholes: dict[frozenset[str], list[dict[str, tuple[int, ...]]]] = {}  # as tx.init saw them, by their paths
    if isinstance(names, tuple) and names and all(isinstance(name, str) and name for name in names):
      self._names = names
      return
    with_paths = jax.tree_util.tree_leaves_with_path(axis_name, is_leaf=lambda x: isinstance(x, jax.P))
    if not with_paths or not all(path and isinstance(spec, jax.P) and _is_known(spec) for path, spec in with_paths):
      raise ValueError(
        "track_spectral_edge: axis_name must be None, the name of a mesh axis, a tuple of names or the tree of the "
        f"parameters' PartitionSpecs (of names and None), got {axis_name!r}."
      )
    self._specs = dict(zip(normalised_paths([path for path, _ in with_paths]), (s for _, s in with_paths), strict=True))
    axes = (name for spec in self._specs.values() for names in normalised(spec, len(spec)) for name in names)
    self._names = tuple(dict.fromkeys(axes))

  def _given(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Spec]:
    specs = self._specs or {}
    missing = sorted(shapes.keys() - specs.keys())
    if missing:
      raise ValueError(
        f"track_spectral_edge: axis_name has no PartitionSpec for leaf {missing[0]!r}; its leaves are "
        f"{sorted(specs)[:4]}…, give the tree of the parameters' PartitionSpecs."
      )
    for path, shape in shapes.items():
      if len(specs[path]) > len(shape):
        raise ValueError(
          f"track_spectral_edge: axis_name has {specs[path]} for leaf {path!r} of shape {shape}; give the mesh axes of "
          "no more dimensions than there are."
        )
    return {path: normalised(specs[path], len(shape)) for path, shape in shapes.items()}

  def specs_at_init(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Spec] | None:
    """None where whole parameters are given, outside of a shard_map; remembers their shapes."""
    try:
      axis_sizes(self._names)
    except ValueError:
      seen = self._wholes.setdefault(frozenset(shapes), [])
      if dict(shapes) not in seen:
        seen.append(dict(shapes))
      return None
    if self._specs is None:
      raise ValueError(
        f"track_spectral_edge: tx.init was called inside a shard_map over {self._names}, where axis_name={self._names} "
        "does not tell the parameters' shapes; call it outside, or give axis_name=specs, the tree of PartitionSpecs."
      )
    return self._given(shapes)

  def specs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Spec]:
    """How the blocks of these shapes are split.

    Raises:
      ValueError: outside of a shard_map over the axes; or the shapes fit no split of the leaves that init saw, or
        several.
    """
    sizes = axis_sizes(self._names)
    if self._specs is not None:
      return self._given(shapes)
    seen = self._wholes.get(frozenset(shapes))
    if seen is None:
      raise ValueError(
        "track_spectral_edge: with axis_name, call tx.init with the whole parameters first (jax.eval_shape will do), "
        "or give axis_name=specs, the tree of their PartitionSpecs."
      )
    splits = [{path: _split(block, wholes[path], sizes) for path, block in shapes.items()} for wholes in seen]
    fitting = [found for found in splits if all(found.values())] or splits[-1:]
    if len(fitting) > 1:
      raise ValueError(
        f"track_spectral_edge: the blocks fit splits over the mesh axes {sizes} of {len(fitting)} models that tx.init "
        "saw; make an optimizer for each, or give axis_name=specs, the tree of PartitionSpecs."
      )
    for path, found in fitting[0].items():
      if len(found) != 1:
        whole = seen[splits.index(fitting[0])][path]
        raise ValueError(
          f"track_spectral_edge: the block {shapes[path]} of leaf {path!r} of shape {whole} (as tx.init saw it) fits "
          f"{len(found) or 'no'} splits over the mesh axes {sizes}; give axis_name=specs, the tree of PartitionSpecs."
        )
    return {path: spec for path, (spec,) in fitting[0].items()}


def block_starts(shapes: Sequence[tuple[int, ...]], specs: Sequence[Spec]) -> list[tuple[Any, ...]]:
  """By leaf: index in it of the first number of this device's block, of such a shape, by dimension.

  Those that are alike are one object.
  """
  seen: dict[Any, Any] = {}

  def start(size: int, names: tuple[str, ...]) -> Any:
    if names and (size, names) not in seen:
      seen[size, names] = jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(size)
    return seen[size, names] if names else 0

  return [tuple(map(start, shape, spec or ((),) * len(shape))) for shape, spec in zip(shapes, specs, strict=True)]


def is_first(axes: Sequence[str]) -> Any:
  """bool[]: whether this device is the first along all of `axes`; one that speaks for all that hold the same."""
  first: Any = True
  for axis in axes:
    first = first & (jax.lax.axis_index(axis) == 0)
  return first


def psum(x: Any, axes: Sequence[str]) -> Any:
  """A tree's sums over the devices along `axes`; the tree itself where there are none."""
  return jax.lax.psum(x, tuple(axes)) if axes else x


def pmax(x: Any, axes: Sequence[str]) -> Any:
  """Likewise the largest."""
  return jax.lax.pmax(x, tuple(axes)) if axes else x


def locally(function: Callable[..., Any], mesh: Any, axes: Sequence[str], arrays: Any, specs: Any, *others: Any) -> Any:
  """function(*lists of blocks, *others), on each device, for a function whose result is equal on all of them.

  Args:
    function: takes as many lists of blocks as `arrays` has lists, and others.
    mesh: the abstract mesh of explicit axes; None where blocks is what `arrays` are.
    axes: the axes over which any array is split.
    arrays, specs: lists of lists of the same lengths.
    others: arrays that are the same on all devices.
  """
  if mesh is None or not axes:
    return function(*arrays, *others)
  split = [[jax.P(*(names or None for names in spec)) for spec in one] for one in specs]
  in_specs = (*split, *(jax.P() for _ in others))
  names = _explicit_axes(mesh)
  # Of none JAX makes all but those over which a surrounding vmap has its seeds.
  names = set() if names == set(mesh.axis_names) else names
  run = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=jax.P(), axis_names=names, check_vma=False)
  return run(*arrays, *others)

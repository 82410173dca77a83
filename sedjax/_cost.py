"""What a tracker costs on a given mesh, read off the compiled program."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from typing import Any

import jax
import optax

from sedjax import _placement
from sedjax._transform import SpectralEdgeState

_MIB = 2**20
_TEMPORARIES = 16 * _MIB
# Bytes that one read of the updates may cost: the sketch and the ring are read and written as well.
_READS = 1.05
# So often these may be touched where the updates are so few that this is more.
_RING_PASSES = 8
# On a mesh each device has its share of the leaves' numbers, but all of their sketches: so often these may be touched.
_SKETCH_PASSES = 4
_COLLECTIVES = (
  "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|ragged-all-to-all"
)
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?\S+ = (.*?) ({_COLLECTIVES})(?:-start)?\(", re.MULTILINE)
_HOST = re.compile(r" (infeed|outfeed|send|recv)\(|custom_call_target=\"([^\"]*callback[^\"]*)\"")


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one update of a tracker costs each device, from `check_cost`; `print` says it in words.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    update_bytes: bytes of the device's share of the updates (of the parameters, where those are read).
    bytes_accessed: bytes that the compiler counts as read and written, in caches or memory; None where it counts none.
    bytes_allowed: bytes that may be: 1.05 times the updates' (of parameters, which are read in three passes, 3.15
      times) or, where that is more, once the updates' (three times the parameters') and eight times the window's rows;
      on a mesh also four times the sketch of each leaf. Held against those accessed for a TPU alone, since other
      compilers do not tell what stays in caches.
    temporaries: bytes of temporary arrays alive at once.
    temporaries_allowed: bytes that these may take, 16 MiB; None for exact rows, of which nothing is promised.
    state_bytes: bytes of the device's share of the tracker's state.
    state_allowed: bytes that the state may take: (W + 3)·d·4 and (W + 3)²·4 for each group, its history and 64 KiB; for
      exact rows (W + 3) times the updates in float32 instead of the first.
    collectives: (kind, numbers that it gives) of every array that a collective communicates; one in a loop counts once.
    largest_allowed: numbers that one collective may give: the sketch's dimension d; for exact rows as `total_allowed`.
    total_allowed: numbers that all collectives together may give, where shardings are known while tracing; else None.
    host_calls: what calls the host.
  """

  platform: str
  update_bytes: int
  bytes_accessed: float | None
  bytes_allowed: float
  temporaries: int
  temporaries_allowed: int | None
  state_bytes: int
  state_allowed: int
  collectives: tuple[tuple[str, int], ...]
  largest_allowed: int
  total_allowed: int | None
  host_calls: tuple[str, ...]

  def broken(self) -> tuple[str, ...]:
    """The promises that do not hold, one sentence each."""
    largest = max((numbers for _, numbers in self.collectives), default=0)
    total = sum(numbers for _, numbers in self.collectives)
    found = []
    if self.platform == "tpu" and (self.bytes_accessed or 0) > self.bytes_allowed:
      allowed = self.bytes_allowed / max(self.update_bytes, 1)
      found.append(f"It accesses {self._reads():.3f} times the bytes of the updates, more than {allowed:.3f}.")
    if self.temporaries_allowed is not None and self.temporaries > self.temporaries_allowed:
      allowed = self.temporaries_allowed // _MIB
      found.append(f"Its temporaries take {self.temporaries / _MIB:.1f} MiB, more than {allowed}.")
    if self.state_bytes > self.state_allowed:
      found.append(f"The state takes {self.state_bytes} bytes, more than {self.state_allowed}.")
    if largest > self.largest_allowed:
      found.append(f"A collective moves {largest} numbers, more than {self.largest_allowed}.")
    if self.total_allowed is not None and total > self.total_allowed:
      found.append(f"All collectives together move {total} numbers, more than {self.total_allowed}.")
    if self.host_calls:
      found.append(f"It calls the host: {', '.join(self.host_calls)}.")
    return tuple(found)

  def _reads(self) -> float:
    return (self.bytes_accessed or 0) / max(self.update_bytes, 1)

  def __str__(self) -> str:
    kinds = {kind: [n for k, n in self.collectives if k == kind] for kind, _ in self.collectives}
    moved = ", ".join(f"{len(n)} {kind} of {max(n)} numbers at most" for kind, n in kinds.items()) or "none"
    kept = f"The promise holds: nothing large is moved{'' if self.temporaries_allowed is None else ' or kept'}"
    few = _RING_PASSES * self.state_bytes > self.update_bytes
    # Other compilers count what goes through caches too, which is no measure of how often memory is read.
    if self.platform == "tpu" and few:
      kept += "; with updates as few as these, what is read is mostly the state."
    elif self.platform == "tpu":
      times = max(round(self._reads()), 1)
      kept += f", and the updates are read about {'once' if times == 1 else f'{times} times'}"
      kept += ", beside sums of them." if self.collectives else "."
    else:
      kept += "; to know the time, measure it."
    lines = [
      f"On each {self.platform} device, one update of {self.update_bytes / _MIB:.1f} MiB:",
      f"  accesses {self._reads():.3f} times its bytes, as the compiler counts"
      if self.platform == "tpu"
      else "  bytes accessed: only a TPU's compiler tells",
      f"  temporaries {self.temporaries / _MIB:.2f} MiB, state {self.state_bytes / _MIB:.2f} MiB",
      f"  collectives: {moved}",
      *(self.broken() or (kept,)),
    ]
    return "\n".join(lines)


def _share(leaf: Any) -> int:
  """Numbers of a leaf that one device holds."""
  sharding = getattr(leaf, "sharding", None)
  shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, jax.sharding.Sharding) else leaf.shape
  return math.prod(shape)


def _nbytes(tree: Any) -> int:
  return sum(_share(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def collectives_of(program: str) -> tuple[tuple[str, int], ...]:
  """(kind, numbers) of every array that a collective of an HLO text gives."""
  found = []
  for shapes, kind in _COLLECTIVE.findall(program):
    sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
    found += [(kind, math.prod(int(d) for d in dims.split(",") if d)) for dims in sizes]
  return tuple(found)


def check_cost(tx: Any, params: Any, *, specs: Any = None) -> Cost:
  """Compiles one update of a tracker for given parameters, and says whether it costs what it should.

  Args:
    tx: a `track_spectral_edge(…)`, by itself.
    params: tree of arrays, or of `jax.ShapeDtypeStruct` with shardings; nothing is allocated or run. Devices may be
      those of `jax.experimental.topologies`, such as TPUs that are not there.
    specs: the tree of the parameters' PartitionSpecs, for a tracker with `axis_name`: update is then compiled inside
      a `jax.shard_map` over the mesh of `params`.

  Returns:
    A `Cost`.

  Raises:
    ValueError: `tx` is no tracker by itself, a leaf is no array, or `specs` is given for parameters without a mesh.

  Cost: one compilation, some seconds.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax
    >>> params = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    >>> cost = sedjax.check_cost(sedjax.track_spectral_edge(window=10), params)
    >>> cost.broken()
    ()
  """
  params = jax.tree.map(_abstract, params)
  meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(leaf.sharding, jax.NamedSharding)]
  mesh: Any = meshes[0] if meshes else None
  if specs is not None and mesh is None:
    raise ValueError("sedjax.check_cost: specs needs params with NamedShardings, got none; give them their shardings.")
  with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    return _check(tx, params, mesh, specs)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  if not hasattr(leaf, "shape"):
    raise ValueError(f"sedjax.check_cost: params must hold arrays or jax.ShapeDtypeStructs, got a leaf {leaf!r}.")
  return _with_sharding(leaf, getattr(leaf, "sharding", None))


def _ring_spec(leaf: Any, ring: Any) -> jax.P:
  """How the exact rows of a leaf are split; those of a leaf that is not tracked are not."""
  tracked = ring.shape[ring.ndim - leaf.ndim :] == leaf.shape
  if not tracked or not isinstance(leaf.sharding, jax.NamedSharding):
    return jax.P()
  return jax.P(*(None,) * (ring.ndim - leaf.ndim), *leaf.sharding.spec)


def _state_of(tx: Any, params: Any) -> SpectralEdgeState:
  """The abstract state of a tracker by itself."""
  transformation = isinstance(tx, optax.GradientTransformation)
  state = jax.eval_shape(tx.init, params) if transformation else None
  if not isinstance(state, SpectralEdgeState):
    given = f"a transformation whose state is {type(state).__name__}" if transformation else repr(tx)
    raise ValueError(
      f"sedjax.check_cost: expected track_spectral_edge(…) by itself, got {given}; check the tracker without the chain "
      "around it."
    )
  return state


def _placed(state: SpectralEdgeState, params: Any, mesh: Any) -> SpectralEdgeState:
  """The state where `tx.init` leaves it: exact rows split as the parameters are, all else on every device."""
  if mesh is None:
    single = {leaf.sharding for leaf in jax.tree.leaves(params)} - {None}
    return jax.tree.map(lambda leaf: _with_sharding(leaf, next(iter(single), None)), state)
  specs = jax.tree.map(lambda _: jax.P(), state)
  for name, tracker in state.trackers.items():
    if not isinstance(tracker.rows, jax.ShapeDtypeStruct):
      rows = jax.tree.map(_ring_spec, params, tracker.rows)
      specs.trackers[name] = specs.trackers[name]._replace(rows=rows, base=rows if tracker.base else ())
  return jax.tree.map(lambda leaf, spec: _with_sharding(leaf, jax.NamedSharding(mesh, spec)), state, specs)


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check(tx: Any, params: Any, mesh: Any, specs: Any) -> Cost:
  state = _placed(_state_of(tx, params), params, mesh)

  def update(updates: Any, state: Any, params: Any) -> Any:
    return tx.update(updates, state, params)[1]  # the updates pass untouched, in place where they are donated

  if specs is not None:
    state_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    in_specs = (specs, state_specs, specs)
    update = jax.shard_map(update, mesh=mesh, in_specs=in_specs, out_specs=state_specs, check_vma=False)
  lowered = jax.jit(update, donate_argnums=1).lower(params, state, params)
  devices = {device for leaf in jax.tree.leaves(params) if leaf.sharding for device in leaf.sharding.device_set}
  platform = next(iter(devices or set(jax.devices()))).platform
  # Prefetches are copies between memories of one device, which would be counted as accesses.
  compiled = lowered.compile({"xla_msa_max_outstanding_prefetches": "0"} if platform == "tpu" else None)
  analysis: Any = compiled.cost_analysis() or {}
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  memory: Any = compiled.memory_analysis()
  program = compiled.as_text() or ""
  (tracker,) = state.trackers.values()
  exact = not isinstance(tracker.rows, jax.ShapeDtypeStruct)
  slots, groups = tracker.facts.shape[-2], tracker.facts.shape[-3]
  dim = 0 if exact else tracker.rows.shape[-1]
  labels = 0 if exact else tracker.rows.shape[-2]
  known = specs is not None or any(_placement.explicit_spec(leaf)[1] for leaf in jax.tree.leaves(params))
  row = sum(4 * _share(leaf) for leaf in jax.tree.leaves(params)) if exact else 4 * dim * labels
  # Of exact rows: a Gram column in three parts, two sums and a largest number for each group, and three numbers more.
  moved = (3 * slots + 3) * groups + 3 if exact else 2 * dim * labels + slots**2 * groups
  once = (3 if tracker.base else 1) * _nbytes(params)
  passes = 0 if mesh is None else _SKETCH_PASSES * 4 * dim * len(jax.tree.leaves(params))
  return Cost(
    platform=platform,
    update_bytes=_nbytes(params),
    bytes_accessed=analysis.get("bytes accessed"),
    bytes_allowed=max(_READS * once, once + _RING_PASSES * slots * 4 * dim * labels) + passes,
    temporaries=int(memory.temp_size_in_bytes),
    temporaries_allowed=None if exact else _TEMPORARIES,
    state_bytes=_nbytes(state),
    state_allowed=(slots + 2) * row + (slots + 2) ** 2 * 4 * groups + _nbytes(tracker.history) + 2**16,
    collectives=collectives_of(program),
    largest_allowed=moved if exact else dim,
    total_allowed=moved if known else None,
    host_calls=tuple(sorted({a or b for a, b in _HOST.findall(program)})),
  )

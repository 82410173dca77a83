"""What a tracker remembers: as few arrays as possible in optimizer state, many named ones while it is worked on.

Each array of a jitted step's arguments and results costs some microseconds of every step, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax._phase import PhaseState
from sedjax._spectrum import Rows, WindowState
from sedjax._types import VECTOR_FIELDS, Report


class Packed(NamedTuple):
  """Numbers of one window size, side by side: those of its report, then (not in a history) those of its phase."""

  floats: jax.Array  # float32[..., G, ·]
  ints: jax.Array  # int32[..., G, ·]


class TrackerState(NamedTuple):
  """A tracker's state: arrays only; n = W + 1 slots, G groups (the whole model first, then the labels in tree order).

  `core.report`, `core.reports` and `core.history` read it; the order of the numbers inside the arrays is private.
  """

  rows: Any  # float32[n, labels, dim]; for exact sketches a tree of float32[n, *leaf.shape]
  base: Any  # source="params": the row of the parameters last read, twice (coarse and fine part); else ()
  facts: jax.Array  # float32[G, n, parts · n + 2]: Gram matrix, scale and effective dimension by slot
  counters: jax.Array  # int32[n + 12]: steps by slot, the counters, the map's id
  windows: tuple[Packed, ...]  # by window, ascending
  history: tuple[Packed, ...]  # by window, with a leading axis [history], a ring by count
  labels: jax.Array  # int32[1 + labels, 16]: the groups' names in UTF-8 behind an empty one for the whole model


class Parts(NamedTuple):
  """The same by name.

  The slot under the cursor holds the row that is being summed up; it enters the window when it is complete.
  """

  rows: Any
  base: Any
  facts: Rows
  cursor: jax.Array  # int32[], slot being filled
  pushed: jax.Array  # int32[], rows pushed since the tracker began
  filled: jax.Array  # int32[], rows that the ring holds
  elapsed: jax.Array  # int32[], steps in the row so far; of parameters since they were read, 0 before that
  nonfinite: jax.Array  # int32[], steps left out
  zero: jax.Array  # int32[], steps of exactly zero update
  flags: jax.Array  # int32[], status bits that hold for all reports
  map_id: jax.Array  # int32[5], which sketch (kind, version, seed, dim) of which tree made the rows
  windows: tuple[WindowState, ...]  # by window, ascending
  history: tuple[Packed, ...]  # as in the state
  labels: jax.Array


COUNTERS = ("cursor", "pushed", "filled", "elapsed", "nonfinite", "zero", "flags")
_MAP_ID = 5
INTEGERS = (
  "k_star",
  "edge_ambiguous",
  "k95",
  "phase",
  "count",
  "row_steps",
  "skipped_nonfinite",
  "skipped_zero",
  "status",
)
_FLOATS = tuple(name for name in Report._fields if name not in (*INTEGERS, *VECTOR_FIELDS))
_PHASE_INTS = ("phase", "peak_age", "age")
_PHASE_FLOATS = tuple(name for name in PhaseState._fields if name not in _PHASE_INTS)


@jax.jit  # so that no table is an operand of a `cond` (see `_gram`)
def _side_by_side(arrays: list[jax.Array]) -> jax.Array:
  """Concatenates along the last axis, in one kernel; XLA stores each operand of a concatenation on its own."""
  shape = (*arrays[0].shape[:-1], sum(x.shape[-1] for x in arrays))
  index = np.arange(shape[-1])
  zero = arrays[0].dtype.type(0)
  total, at = lax.full(shape, zero), 0
  for x in arrays:
    end = at + x.shape[-1]
    if end > at + 1:
      x = lax.pad(x, zero, [(0, 0, 0)] * (x.ndim - 1) + [(at, shape[-1] - end, 0)])
    total = jnp.where(index >= at, x, total)  # comparisons of its own XLA would store under vmap, each in a kernel
    at = end
  return total


def _columns(x: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
  """The first entries along the last axis by name."""
  x = jnp.asarray(x)  # flax.nnx wraps the arrays of a state
  return {name: lax.index_in_dim(x, i, -1, keepdims=False) for i, name in enumerate(names)}


def pack_report(report: Report, state: WindowState | None = None) -> Packed:
  """A report, and what its window remembers, as they lie in the state."""
  ints = [getattr(report, name).astype(jnp.int32)[..., None] for name in INTEGERS]
  floats = [getattr(report, name)[..., None] for name in _FLOATS] + [getattr(report, name) for name in VECTOR_FIELDS]
  if state is not None:
    ints += [getattr(state.phase, name)[..., None] for name in _PHASE_INTS]
    floats += [getattr(state.phase, name)[..., None] for name in _PHASE_FLOATS] + [state.direction]
  return Packed(_side_by_side(floats), _side_by_side(ints))


def unpack_report(packed: Packed, window: int) -> Report:
  """The inverse of `pack_report`, for a window of this size."""
  fields = _columns(packed.ints, INTEGERS)
  fields["edge_ambiguous"] = fields["edge_ambiguous"] != 0
  fields |= _columns(packed.floats, _FLOATS)
  vectors = packed.floats[..., len(_FLOATS) :]
  return Report(singular_values=vectors[..., :window], ratios=vectors[..., window : 2 * window - 1], **fields)


def _unpack_window(packed: Packed, slots: int) -> WindowState:
  ints, floats = packed.ints[..., len(INTEGERS) :], packed.floats[..., -slots - len(_PHASE_FLOATS) :]
  fields = _columns(ints, _PHASE_INTS) | _columns(floats, _PHASE_FLOATS)
  return WindowState(PhaseState(**fields), floats[..., len(_PHASE_FLOATS) :])


def window_sizes(state: TrackerState) -> tuple[int, ...]:
  """The tracker's window sizes.

  Args:
    state: a tracker's state, also a vmapped one, or one of `jax.ShapeDtypeStruct`.

  Returns:
    Whole numbers, ascending; known while tracing.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> sedjax.core.window_sizes(sedjax.core.init(sedjax.core.Config(window=(3, 5)), {"w": jnp.ones(3)}))
    (3, 5)
  """
  other = len(_FLOATS) - 1 + len(_PHASE_FLOATS) + state.facts.shape[-2]
  return tuple((packed.floats.shape[-1] - other) // 2 for packed in state.windows)


def map_id_of(state: TrackerState) -> jax.Array:
  """int32[..., 5]: `Parts.map_id`."""
  return state.counters[..., -_MAP_ID:]


def of_one_seed(x: Any, ndim: int) -> np.ndarray:
  """An array of `ndim` axes in which all seeds agree, in NumPy; other processes may hold some of the seeds."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = x.addressable_shards[0].data
  x = np.asarray(jax.device_get(x))
  return x.reshape(-1, *x.shape[x.ndim - ndim :])[0]


def pack_counters(parts: Parts) -> jax.Array:
  """`TrackerState.counters`."""
  return _side_by_side([parts.facts.steps, *(getattr(parts, name)[..., None] for name in COUNTERS), parts.map_id])


def pack(parts: Parts, reports: Sequence[Report]) -> TrackerState:
  """Puts the small arrays side by side, with the reports by window, of fields [G, …]; leading axes are kept."""
  gram = parts.facts.gram
  facts = [gram[..., i, :, :, :] for i in range(gram.shape[-4])] + [
    parts.facts.scale[..., None],
    parts.facts.dims[..., None],
    parts.facts.noise_dims[..., None],
  ]
  return TrackerState(
    parts.rows,
    parts.base,
    _side_by_side(facts),
    pack_counters(parts),
    tuple(pack_report(report, state) for report, state in zip(reports, parts.windows, strict=True)),
    parts.history,
    parts.labels,
  )


def unpack(state: TrackerState) -> Parts:
  """The inverse of `pack`, but for the reports."""
  slots = state.facts.shape[-2]
  starts = range(0, state.facts.shape[-1] - 3, slots)
  gram = jnp.stack([state.facts[..., start : start + slots] for start in starts], -4)
  steps, counters = state.counters[..., :slots], state.counters[..., slots:]
  return Parts(
    rows=state.rows,
    base=state.base,
    facts=Rows(gram, state.facts[..., -3], state.facts[..., -2], state.facts[..., -1], steps),
    **_columns(counters, COUNTERS),
    map_id=map_id_of(state),
    windows=tuple(_unpack_window(packed, slots) for packed in state.windows),
    history=state.history,
    labels=state.labels,
  )


def unpack_reports(state: TrackerState) -> tuple[Report, ...]:
  """The reports that `pack` took."""
  return tuple(unpack_report(*each) for each in zip(state.windows, window_sizes(state), strict=True))


def expect_state(state: Any) -> None:
  """Refuses anything else, such as the state of an optimizer."""
  if not isinstance(state, TrackerState):
    raise TypeError(
      f"sedjax.core: expected a state from core.init or core.observe, got {type(state).__name__}; for the state of an "
      "optimizer there are sedjax.get_report and its like."
    )


def without_rows(state: Any) -> Any:
  """For branches and selections, which would copy the rows, and for reports, which need none."""
  expect_state(state)
  return state._replace(rows=())

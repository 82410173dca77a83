"""Keeps XLA from copying parameters, where updates are made, looked at and applied in one program.

Updates are a few operations on gradients, moments and parameters, and XLA rather makes them anew for whatever uses them
than store them: also for what looks at them, from a copy of parameters that are overwritten meanwhile. Storing them
once, leaf by leaf, is what looking at them has to cost. On a CPU, that gives back what XLA pays without a tracker: of
parameters that may be overwritten before backward all has read them, it makes a copy in the beginning of each step.

Nothing here changes a number (but a program in which XLA fuses other operations than without a tracker may round
otherwise when it makes them), and where updates or parameters come from elsewhere, as arguments of the program, there
is nothing to do.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax import _small
from sedjax._order import shared_zero_of, zero_of
from sedjax._primitives import devices_of, lower, maker, makers_before, new_primitive

# An update is applied when so many of the large ones made after it are stored: as many as matrices lie side by side,
# such as those of queries, keys and values, of which one's update may be made before what another one's is made of.
_TURNS = 3


def ranks_of(arrays: Iterable[Any]) -> tuple[int, ...]:
  """In which order a traced function makes arrays: by the operations that come one after the other before each.

  XLA makes them in an order of its own, but can make none before those that it is made of: backward, the last layers'
  gradients come first.
  """
  depths: dict[int, int] = {}  # by the operations' ids

  def depth(operation: Any) -> int:
    if operation is None:
      return 0
    waiting = [operation]  # instead of recursion, which is not deep enough
    while waiting:
      last = waiting[-1]
      before = makers_before(last)
      unknown = [each for each in before if id(each) not in depths]
      waiting.extend(unknown)
      if not unknown:
        depths[id(last)] = 1 + max((depths[id(each)] for each in before), default=0)
        waiting.pop()
    return depths[id(operation)]

  found = [depth(maker(x)) for x in arrays]
  ranks = {each: rank for rank, each in enumerate(sorted(set(found)))}
  return tuple(ranks[each] for each in found)


def _made_here(x: Any) -> bool:
  return maker(x) is not None


def _has_bits(x: Any) -> bool:
  """Whether an array holds floats of whole bytes, which `_xor` knows."""
  return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits == 8 * x.dtype.itemsize


def _xor(x: jax.Array, bits: jax.Array) -> jax.Array:
  kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, kind) ^ bits.astype(kind), x.dtype)


def _after_no_rounds(x: jax.Array, zero: jax.Array) -> jax.Array:
  """Returns x unchanged, behind a loop of `zero` rounds that XLA cannot remove: on CPU it drops its own barriers."""

  def one_more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    done, x = carry
    return done + np.uint32(1), _xor(x, done)

  return lax.while_loop(lambda carry: carry[0] < zero, one_more, (jnp.uint32(0), x))[1]


def _stored_on_cpu(x: jax.Array, zero: jax.Array) -> list[jax.Array]:
  if x.size <= _small.MOST or not _has_bits(x):
    return [x, x]
  # Both, since XLA on CPU makes no two arrays in one kernel: what is applied would be made again.
  return [_after_no_rounds(x, jnp.max(zero))] * 2


def _stored_elsewhere(x: jax.Array, zero: jax.Array) -> list[jax.Array]:
  del zero
  return [lax.optimization_barrier(x), x]


def _later(x: jax.Array, zero: jax.Array) -> list[jax.Array]:
  return [_xor(x, zero.reshape(zero.shape + (1,) * (x.ndim - zero.ndim)))]


def _after_on_cpu(x: jax.Array, other: jax.Array) -> list[jax.Array]:
  return _later(x, zero_of(other.reshape(-1)[:1].astype(jnp.float32)))


def _as_it_is(x: jax.Array, other: jax.Array) -> list[jax.Array]:
  del other
  return [x]


def _seeds_in_front(args: Any, axes: Any) -> tuple[Any, int]:
  (x, zero), (x_axis, zero_axis) = args, axes
  zero = zero if zero_axis is None else jnp.moveaxis(zero, zero_axis, 0)
  if x_axis is None:
    x = jnp.broadcast_to(x, (zero.shape[0], *x.shape))
  else:
    x = jnp.moveaxis(x, x_axis, 0)
    zero = zero[None] if zero_axis is None and zero.ndim else zero  # its axes are x's first ones
  return (x, zero), 0


def _as_they_are(args: Any, axes: Any) -> tuple[Any, int]:
  return args, axes[0]


class _Pass(NamedTuple):
  """A primitive of an array x and another that gives x itself."""

  copies: int  # of x
  batched: Any  # how `vmap` hands x and the other on, and at which axis of x its own then is
  forms: dict[str | None, tuple[Any, Any]]  # by platform (None: all others), in programs of one device and of several


_PASSES = {
  "stored": _Pass(
    2, _seeds_in_front, {"cpu": (_stored_on_cpu, _stored_on_cpu), None: (_stored_elsewhere, _stored_elsewhere)}
  ),
  # Of an array on several devices no element is known to all.
  "after": _Pass(1, _as_they_are, {"cpu": (_after_on_cpu, _as_it_is), None: (_as_it_is, _as_it_is)}),
  "later": _Pass(1, _seeds_in_front, {None: (_later, _later)}),
}


@functools.cache
def _passing(name: str) -> Any:
  """One of these primitives; its derivatives are those of x.

  A `jax.custom_jvp` would do, but for second derivatives through a `jax.lax.scan`, where JAX forgets its rule.
  """
  copies, batched_as, forms = _PASSES[name]

  def eager(x: Any, other: Any) -> list[Any]:
    del other
    return [x] * copies

  def differentiated(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return primitive.bind(*primals), [tangents[0]] * copies

  def batched(args: Any, axes: Any) -> tuple[Any, Any]:
    args, axis = batched_as(args, axes)
    return primitive.bind(*args), [axis] * copies

  def lowering(alone: Any, several: Any) -> Any:
    alone, several = (jax.jit(form, inline=True) for form in (alone, several))  # each shape is traced once
    return lambda context, *args: lower(context, alone if devices_of(context) == 1 else several, *args)

  lowered = {platform: lowering(*pair) for platform, pair in forms.items()}
  primitive = new_primitive(
    name, eager=eager, results=eager, batched=batched, lowered=lowered, differentiated=differentiated
  )
  return primitive


def stored(updates: list[Any], state: jax.Array) -> tuple[list[Any], list[Any]]:
  """Updates to look at, and the same to hand on, so that XLA stores each leaf once.

  Args:
    updates: arrays of floats or complex floats.
    state: any numbers of which XLA knows nothing.
  """
  if not any(map(_made_here, updates)):
    return updates, updates
  zero = shared_zero_of(state)  # one for all seeds: else vmap would select in each round of the loop
  pairs = [_passing("stored").bind(x, zero) if _made_here(x) else (x, x) for x in updates]
  return [seen for seen, _ in pairs], _in_turn(updates, *map(list, zip(*pairs, strict=True)))


def _in_turn(updates: list[Any], seen: list[Any], passed: list[Any]) -> list[Any]:
  """The updates to hand on, of which XLA applies large ones on a CPU only when others made after them are stored.

  By then backward all has been multiplied with the parameters, and XLA knows that they can be overwritten.
  """
  large = [i for i, x in enumerate(updates) if x.size > _small.MOST and _made_here(x) and _has_bits(x)]
  in_turn = sorted(zip(ranks_of(updates[i] for i in large), large, strict=True))
  ranks = [rank for rank, _ in in_turn]
  for rank, i in in_turn:
    first = bisect.bisect_right(ranks, rank)
    if others := in_turn[first : first + _TURNS]:
      (passed[i],) = _passing("after").bind(passed[i], seen[others[-1][1]])
  return passed


def later(updates: list[Any], state: jax.Array) -> list[Any]:
  """Updates to hand on when `state` is known, so that what it was made of is read before it is overwritten.

  Args:
    updates: arrays; those of floats wait (complex ones do not).
    state: any numbers.
  """
  waits = [_made_here(x) and _has_bits(x) for x in updates]
  if not any(waits):
    return updates
  zero = zero_of(lax.stop_gradient(state))
  return [_passing("later").bind(x, zero)[0] if wait else x for x, wait in zip(updates, waits, strict=True)]

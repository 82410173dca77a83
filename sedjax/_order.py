"""What XLA is to make first, where it would choose another order, or make a thing anew wherever it is used.

On CPU it drops optimization barriers. What is made of a zero of which it cannot know that it is one waits for whatever
that zero is made of.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sedjax import _placement


def _as_uint(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


def zero_of(x: jax.Array) -> jax.Array:
  """uint32[]: 0, made of x in a way that XLA does not see through."""
  return (_as_uint(x[(0,) * x.ndim]) << 1) & np.uint32(1) if x.size else jnp.uint32(0)


def shared_zero_of(x: jax.Array) -> jax.Array:
  """`zero_of`, and one for all under vmap, where a place of its own for each would make scatters of slices."""
  return _first_zero_of(lax.stop_gradient(x))


_first_zero_of = jax.custom_batching.custom_vmap(zero_of)


@_first_zero_of.def_vmap
def _(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
  del in_batched
  split, _ = _placement.explicit_spec(x)
  # Where each lies on another device there is no first that all know; then XLA may see that it is 0.
  return (_first_zero_of(x[0]) if axis_size and not any(split) else jnp.uint32(0)), False


def zero_of_each(x: jax.Array) -> jax.Array:
  """0; under vmap one of each x, without which XLA stores what is made of indices alone, for all of them to read."""
  return _zero_of_each(lax.stop_gradient(x))


_zero_of_each = jax.custom_batching.custom_vmap(lambda x: jnp.uint32(0))  # noqa: ARG005
_zero_of_each.def_vmap(lambda axis_size, in_batched, x: (jax.vmap(zero_of)(x), True))  # noqa: ARG005


def later_than(x: jax.Array, other: jax.Array) -> jax.Array:
  """x (float32) unchanged, but on paper dependent on `other` (float32)."""
  return lax.bitcast_convert_type(_as_uint(x) ^ zero_of(other), jnp.float32)

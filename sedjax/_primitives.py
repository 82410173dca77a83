"""New primitives, and what else of JAX is not promised to stay: all of it is used here only.

A primitive's form is traced when a program is lowered: only then it is known for which platform and for how many
devices it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_promotion(function: Any) -> Any:
  """The function under JAX's usual rules of promotion, whichever stricter ones hold where it is called."""

  @functools.wraps(function)
  def promoting(*args: Any, **kwargs: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      return function(*args, **kwargs)

  return promoting


def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
  """What a primitive's results are before there are any."""
  return ShapedArray(shape, dtype)


def lower(context: Any, function: Callable[..., Any], *args: Any) -> Any:
  """Lowers a function of arrays in a primitive's place; by then the caller's rules of promotion hold again."""
  return mlir.lower_fun(with_promotion(function), multiple_results=True)(context, *args)


def devices_of(context: Any) -> int:
  """The number of devices that the program being lowered is for; inside a `shard_map` that is 1."""
  return getattr(context.module_context.axis_context, "num_devices", None) or 1


def is_exported(context: Any) -> bool:
  """Whether the program being lowered is to be exported."""
  return context.module_context.lowering_parameters.for_export


def new_primitive(
  name: str,
  *,
  eager: Callable[..., Any],
  results: Callable[..., Sequence[Any]],
  batched: Callable[..., tuple[Any, Any]],
  lowered: Mapping[str | None, Callable[..., Any]],
  differentiated: Callable[..., tuple[Any, Any]] | None = None,
) -> Any:
  """A primitive of several results.

  Args:
    name: without "sedjax_", which is put before it.
    eager: what it is where jit is disabled.
    results: from shapes and dtypes of what it is given to those of its results, see `shaped`.
    batched: JAX's rule for `vmap`, from the arguments and their axes.
    lowered: by platform (None: all others), from JAX's context and operands to what `lower` returns.
    differentiated: JAX's rule for derivatives, from primals and tangents; None where they have been stopped.
  """
  primitive = Primitive(f"sedjax_{name}")
  primitive.multiple_results = True
  primitive.def_impl(eager)
  primitive.def_abstract_eval(results)
  batching.primitive_batchers[primitive] = batched
  if differentiated is not None:
    ad.primitive_jvps[primitive] = differentiated
  for platform, rule in lowered.items():
    mlir.register_lowering(primitive, rule, platform=platform)
  return primitive


def maker(x: Any) -> Any:
  """The operation, in the function that is traced, of which an array is a result; None for arguments and numbers."""
  while isinstance(x, Tracer) and not hasattr(x, "parent"):
    x = getattr(x, "val", getattr(x, "primal", None))  # of those that vmap and differentiation put around another
  return getattr(x, "parent", None)


def makers_before(operation: Any) -> list[Any]:
  """The operations of whose results an operation is made."""
  return [each for each in map(maker, getattr(operation, "in_tracers", ())) if each is not None]

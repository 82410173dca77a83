"""What is traced when a program is lowered: only then it is known for how many devices it is.

By then the caller's stricter rules of promotion hold again, which `with_promotion` puts aside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


def with_promotion(function: Any) -> Any:
  """The function under JAX's usual rules of promotion, whichever stricter ones hold where it is called."""

  @functools.wraps(function)
  def promoting(*args: Any, **kwargs: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      return function(*args, **kwargs)

  return promoting


def devices_of(context: Any) -> int:
  """The number of devices that the program being lowered is for; inside a `shard_map` that is 1."""
  return getattr(context.module_context.axis_context, "num_devices", None) or 1


@functools.cache
def _primitive() -> Any:
  """Applies to its operands the function that `choose` returns for the number of devices, known when lowered."""
  from jax.core import ShapedArray
  from jax.extend.core import Primitive
  from jax.interpreters import batching, mlir

  primitive = Primitive("sedjax_late")
  primitive.multiple_results = True

  def eager(*args: Any, choose: Any, like: Any) -> Any:  # where jit is disabled
    del like
    return choose(jax.device_count())(*args)

  def results(*_: Any, choose: Any, like: Any) -> list[Any]:
    del choose
    return [ShapedArray(shape, dtype) for shape, dtype in like]

  def batched(args: Any, axes: Any, *, choose: Any, like: Any) -> tuple[Any, Any]:
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)

    def chosen(devices: int) -> Callable[..., Any]:
      return jax.vmap(choose(devices), axes, axis_size=size)

    more = tuple(((size, *shape), dtype) for shape, dtype in like)
    return primitive.bind(*args, choose=chosen, like=more), [0] * len(like)

  def lowered(context: Any, *args: Any, choose: Any, like: Any) -> Any:
    del like
    form = with_promotion(choose(devices_of(context)))
    return mlir.lower_fun(form, multiple_results=True)(context, *args)

  primitive.def_impl(eager)
  primitive.def_abstract_eval(results)
  batching.primitive_batchers[primitive] = batched
  mlir.register_lowering(primitive, lowered)
  return primitive


def by_devices(
  alone: Callable[..., Sequence[jax.Array]],
  several: Callable[..., Sequence[jax.Array]],
  like: Sequence[tuple[tuple[int, ...], Any]],
  arrays: Sequence[jax.Array],
) -> list[jax.Array]:
  """What one of two functions of arrays makes: `alone` in programs of one device, `several` in others.

  Args:
    alone, several: they have no other traced inputs; derivatives stop here.
    like: shape and dtype of each array that they make.
    arrays: what they are given.
  """

  def choose(devices: int) -> Callable[..., Any]:
    return alone if devices == 1 else several

  arrays = [lax.stop_gradient(array) for array in arrays]
  return _primitive().bind(*arrays, choose=choose, like=tuple(like))

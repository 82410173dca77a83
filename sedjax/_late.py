"""What depends on how many devices a program is for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from sedjax._primitives import devices_of, lower, new_primitive, shaped


@functools.cache
def _primitive() -> Any:
  """Applies to its operands the function that `choose` returns for the number of devices, known when lowered."""

  def eager(*args: Any, choose: Any, like: Any) -> Any:  # where jit is disabled
    del like
    return choose(jax.device_count())(*args)

  def results(*_: Any, choose: Any, like: Any) -> list[Any]:
    del choose
    return [shaped(shape, dtype) for shape, dtype in like]

  def batched(args: Any, axes: Any, *, choose: Any, like: Any) -> tuple[Any, Any]:
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)

    def chosen(devices: int) -> Callable[..., Any]:
      return jax.vmap(choose(devices), axes, axis_size=size)

    more = tuple(((size, *shape), dtype) for shape, dtype in like)
    return primitive.bind(*args, choose=chosen, like=more), [0] * len(like)

  def lowered(context: Any, *args: Any, choose: Any, like: Any) -> Any:
    del like
    return lower(context, choose(devices_of(context)), *args)

  primitive = new_primitive("late", eager=eager, results=results, batched=batched, lowered={None: lowered})
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

"""Programs that an analysis of checkpoints compiles while it already reads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from typing import Any

import jax
import scipy.linalg  # noqa: F401 - which JAX would import in the middle of compiling an eigensolver for a CPU

from sedjax import core
from sedjax._primitives import with_promotion

_COMPILERS = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="sedjax-compiler")
# For XLA's CPU compiler, whose newer way to make loops takes twice as long, and gives none that are faster here.
ROW_OPTIONS = {"xla_cpu_use_fusion_emitters": False}
# It takes seconds, too, over the many small operations of a report, which take no time to run.
REPORT_OPTIONS = {**ROW_OPTIONS, "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def as_usual(function: Any) -> Any:
  """The function in a JAX as it is by default, whatever the caller has set, in whichever thread it runs."""
  promoting = with_promotion(function)

  @functools.wraps(function)
  def calling(*args: Any, **kwargs: Any) -> Any:
    with jax.disable_jit(False), jax.transfer_guard("allow"), jax.debug_nans(False), jax.debug_infs(False):
      return promoting(*args, **kwargs)

  return calling


def compiling(function: Any, *args: Any) -> concurrent.futures.Future[Any]:
  """Calls the function in a thread of the compilers'."""
  return _COMPILERS.submit(as_usual(function), *args)


@functools.lru_cache(maxsize=8)
def known(**options: Any) -> dict[str, Any] | None:
  """Compiler options where programs are for a CPU and its compiler has these; None elsewhere."""
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda: 0).lower().compile(options)
  except jax.errors.JaxRuntimeError:
    return None
  return options


def lowered_init(config: core.Config, tree: Any) -> Any:
  """The program that makes a tracker's first state, to be compiled with `REPORT_OPTIONS`."""
  return jax.jit(lambda: core.init(config, tree)).lower()


def _grouped(path: str) -> str:
  return path


def with_any_groups(config: core.Config) -> core.Config:
  """The same for all groups, which differ from call to call, in what is compiled after the first state."""
  return dataclasses.replace(config, groups=None if config.groups is None else _grouped)

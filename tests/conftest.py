"""Eight virtual CPU devices, and quick compilation, which is where the suite's time goes.

What depends on how a program is compiled (the accuracy of exact rows) says `jax.jit(..., **oracles.AS_USERS_COMPILE)`.
"""

import gc
import os

# Tracing makes many objects that stay: to look for garbage among them took a tenth of the time.
gc.set_threshold(200_000)

QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1"
)
# Eight devices on a busy machine of few cores may wait long for each other.
PATIENT = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=60 --xla_cpu_collective_call_terminate_timeout_seconds=200"
)
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":  # not for test_gpu.py, which compares with CPUs as users have them
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK} {PATIENT}"
# XLA's thread pool for CPU devices. With fewer threads than devices times programs in flight, devices that wait for
# each other hold every thread that the others need.
os.environ.setdefault("NPROC", "32")

# Where libtpu is installed it would be asked for devices, and take the flags above for errors.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - reads the environment
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# One program at a time over the eight devices, for the same reason.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def slow(*values):
  """A case of a parametrized test that runs with `-m slow` only."""
  return pytest.param(*values, marks=pytest.mark.slow)

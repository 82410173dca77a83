"""Eight virtual CPU devices, set before anything asks for one; compiled programs are dropped after each file."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
  yield
  jax.clear_caches()

"""Eight virtual CPU devices, set before anything asks for one."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

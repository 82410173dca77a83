"""sedjax: spectral edge dynamics of training trajectories, measured inside the jitted step."""

from sedjax import sketch

__version__ = "0.1.0"
__all__ = ["sketch"]

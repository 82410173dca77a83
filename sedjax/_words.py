"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
  """A number of things, in words."""
  return f"{count:,} {what}{'' if count == 1 else 's'}"

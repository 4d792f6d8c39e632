"""Cuts a model into a chain of blocks.

blocks.py   follows module lists, keeps the module's own forward (the usual way)
trace.py    which values depend on which block
export.py   torch.export for models with skip connections or no module lists
"""

from dora.partition.blocks import Chain, UnitCall, partition

__all__ = ["Chain", "UnitCall", "partition"]

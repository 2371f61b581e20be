"""Compiles every Triton kernel as its launcher would start it, for GPUs that need not be there: `python -m gate`.

`record.py` runs launchers on fake tensors and notes what they start; `build.py` compiles it and reads registers, shared
memory, spills and tensor-core instructions from the result; `budget.py` compares with `budget.json`.
"""

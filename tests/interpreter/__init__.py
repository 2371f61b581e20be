"""Runs `@triton.jit` kernels on CPU tensors, program by program, with every memory access checked.

It builds on Triton's own NumPy interpreter, which cannot be chosen per launch, treats bfloat16 as integers, and reads and
writes raw addresses. `builder.py` has the arithmetic, `memory.py` the checks, `twins.py` makes an interpreted twin of a
kernel, `runner.py` puts it in place of the GPU.
"""

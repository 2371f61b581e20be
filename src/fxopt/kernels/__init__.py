"""What the machine can do: fused ops with a reference, an ATen body and (later) Triton kernels."""

"""What the machine can do: fused ops with a reference, a CPU body and (later) Triton kernels."""

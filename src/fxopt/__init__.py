"""fxopt: a compiler-style model-transform library for PyTorch."""

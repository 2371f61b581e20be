"""Tests of training; `kills.py` is also a command."""

"""The model zoo: tiny models of many architectures with random weights, and one command that trains them all.

    python -m tests.zoo [--only PATTERN] [--jobs N]     (`make zoo`)

`table.py` lists the entries; most are rows of configuration values. `examine.py` optimizes one and compares its training steps
with eager ones; `pool.py` does so in processes of their own; `page.py` writes docs/architectures.md.
"""

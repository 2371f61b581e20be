"""Settings of the whole test run."""

from __future__ import annotations

import logging

import torch

# The tests' tensors are tiny: a second thread only waits, three times as long when processes share the cores.
torch.set_num_threads(1)

# torch.export logs whole graphs here; pytest would record and keep every one of them.
logging.getLogger("torch.__trace").propagate = False

"""The tensors of these tests are tiny: a second thread only adds waiting, 20-fold on a busy machine."""

import torch

torch.set_num_threads(1)

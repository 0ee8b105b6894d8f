"""One torch op per file: schema, fake and autograd together. The kernels live in csrc, the twins in reference."""

import torch

#: dtypes that the ops calculate in
FLOATS = (torch.float32, torch.float64)

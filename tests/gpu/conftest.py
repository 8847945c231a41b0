"""Collected only where there is a CUDA device: `make test-gpu`, at most ten minutes."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]

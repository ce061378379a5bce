"""Tests run from the repository root or anywhere else, on one thread, without a network."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

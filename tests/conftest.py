<<<<<<< HEAD
"""Tests run from the repository root or anywhere else, on one thread, without a network."""
=======
"""The repository's root is importable, and tests leave the machine a core."""
>>>>>>> images

import sys
from pathlib import Path

import torch

<<<<<<< HEAD
sys.path.insert(0, str(Path(__file__).parent.parent))
=======
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
>>>>>>> images
torch.set_num_threads(1)

"""Where the tests of this folder run: on the CPU under Triton's interpreter, or on a GPU."""

import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

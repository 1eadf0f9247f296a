"""Settings of every test: one thread, since with tiny clouds threads would wait for one another."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("few", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("few")

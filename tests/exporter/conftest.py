# SPDX-License-Identifier: Apache-2.0
import torch

from support.exports import exports  # noqa: F401 - a fixture

# The networks are so small that more threads only wait for each other, and the tests run in several processes.
torch.set_num_threads(1)

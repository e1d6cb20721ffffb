// SPDX-License-Identifier: Apache-2.0
// PyTorch dropped this header in 1.11; what it held is here.
#pragma once
#include <ATen/cuda/Atomic.cuh>

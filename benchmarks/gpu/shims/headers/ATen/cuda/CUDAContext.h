// SPDX-License-Identifier: Apache-2.0
// In the place of PyTorch's: kernels need nothing of it, and it includes the headers of cuBLAS, cuSPARSE and cuSOLVER,
// which a compiler from PyPI comes without.
#pragma once
#include <cuda_runtime.h>

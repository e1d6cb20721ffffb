// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_kernel.cuh"

DCNV3_DEFINE_LAUNCH(DCNV3_VARIANTS_16, internimage::BFloat16)

// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn_kernel.cuh"

MS_DEFORM_ATTN_DEFINE_LAUNCH(MS_DEFORM_ATTN_VARIANTS_16, internimage::BFloat16)

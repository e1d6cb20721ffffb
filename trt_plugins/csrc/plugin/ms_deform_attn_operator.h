// SPDX-License-Identifier: Apache-2.0
// MSDeformAttn in TensorRT's vocabulary.
#pragma once

#include "operator.h"

namespace internimage {

extern const OperatorType kMsDeformAttn;

}  // namespace internimage

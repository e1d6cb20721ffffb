// SPDX-License-Identifier: Apache-2.0
// UpsampleArgmax in TensorRT's vocabulary.
#pragma once

#include "operator.h"

namespace internimage {

extern const OperatorType kUpsampleArgmax;

}  // namespace internimage

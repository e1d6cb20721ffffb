// SPDX-License-Identifier: Apache-2.0
// DCNv3 in TensorRT's vocabulary.
#pragma once

#include "operator.h"

namespace internimage {

extern const OperatorType kDcnv3;
extern const OperatorType kPackedDcnv3;    // offsets and mask in one tensor, as one product computes them
extern const OperatorType kOfficialDcnv3;  // under the name that InternImage's own exporter writes

}  // namespace internimage

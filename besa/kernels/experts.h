// The experts of a layer, of the tokens that chose them. See grouped.h.

#pragma once

#include "abi.h"

namespace besa {

// By the instruction set that the jobs name; returns a Status.
int sparse_experts(const Experts& experts);

}  // namespace besa

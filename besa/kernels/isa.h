// Which instruction sets this CPU has. Their order and names are in abi.h.

#pragma once

namespace besa {

// Whether this CPU has an instruction set.
bool has_isa(int isa);

// The one that this CPU is fastest with.
int best_isa();

}  // namespace besa

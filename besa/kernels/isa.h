// Which instruction sets this CPU has. Their order and names are in abi.h.

#pragma once

namespace besa {

// This CPU has the instruction sets up to this one.
int last_isa();

// The one that this CPU is fastest with.
int best_isa();

}  // namespace besa

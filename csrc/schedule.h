// Who does what when: blocks in waves of bounded memory, strands on threads, sums in one order.
#pragma once

#include "problem.h"

namespace idrm {

// Unweighted means over the examples of the losses of blocks x = y and x != y; for Task::loss.
struct Losses {
  double intra = 0, inter = 0;
};

// Fills problem.distances and, where asked for, dq and dk, which must be zero.
Losses run(const Problem& problem);

// Hands back the memory that the process keeps for the next call.
void release_memory();

}  // namespace idrm

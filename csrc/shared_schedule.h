// The schedule of examples whose segments share a prefix.
#pragma once

#include <vector>

#include "kernels.h"
#include "schedule.h"

namespace idrm {

struct SharedExample {
  int64_t index, first_row, shared_units;
  int64_t bytes;  // that it may take
};

// As `run` does for the whole problem, for these examples; their part of the losses.
Losses run_shared(
    const Problem& problem, const Kernels& kernels, int64_t threads, const std::vector<SharedExample>& examples);

}  // namespace idrm

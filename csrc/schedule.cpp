// Results depend on no thread count: a strand's rows and order follow from its example, its dk is its own, and the
// strands' parts are added in the order of the blocks, whichever wave they were in.
#include "schedule.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <memory>
#include <vector>

#include "example_state.h"
#include "shared_schedule.h"

namespace idrm {
namespace {

// Of what is kept from call to call. Beyond it, that would weigh more than what it saves: memory grows with the tokens,
// arithmetic with their square.
constexpr int64_t kKeptBytes = 256 << 20;

// An example that shares nothing.
struct WholeExample : ExampleState {
  std::vector<std::vector<int64_t>> chunks;  // per query segment: bounds in units
  int64_t blocks_left = 0;                   // that no wave has taken yet

  WholeExample(const Problem& problem, int64_t index, int64_t first_row)
      : ExampleState(problem, index, first_row, 0) {
    const int64_t heads = problem.student.num_heads / problem.num_head_groups;
    const int64_t row_bytes = heads * tokens.column.back() * compute_bytes(problem);
    view.chunk_rows = kMostChunkRows;
    while (view.chunk_rows > kLeastChunkRows && view.chunk_rows * row_bytes > kNumeratorBytes) view.chunk_rows /= 2;
    for (int64_t x = 0; x < problem.segments; ++x) {
      chunks.push_back(cut(problem, units.first[x], units.first[x] + units.count[x]));
      blocks_left += units.count[x] > 0 ? problem.num_head_groups : 0;
    }
  }
};

struct BlockState {
  Block view;
  WholeExample* example;
  std::vector<Strand> strands;
  std::vector<double> factors;  // of every key segment, once its loss is known
  int64_t dq_bytes = 0, dk_bytes = 0;

  BlockState(const Problem& problem, WholeExample& state, int64_t group, int64_t x) : example(&state) {
    const Columns& tokens = state.view.student.tokens;
    const bool apart = problem.apart();
    view = {};
    view.example = &state.view;
    view.group = group;
    view.x = x;
    view.first_token = tokens.first[x];
    view.num_rows = tokens.count[x];
    view.query_components = apart ? problem.segments : 1;
    view.key_components = apart && problem.joint ? problem.segments : 1;
    for (int64_t y = 0; y < problem.segments; ++y)
      view.needs_grad |= problem.needs_grad && problem.block_weight(x, y) != 0;
    factors.assign(problem.segments, 1.0);
    view.total_weight = state.total_weight(problem, x);
    const std::vector<int64_t>& chunks = state.chunks[x];
    const int64_t num_chunks = static_cast<int64_t>(chunks.size()) - 1;
    int64_t num_strands = (view.num_rows + kStrandRows - 1) / kStrandRows;
    if (view.needs_grad) {
      const int64_t row_bytes = aligned(problem.student.head_dim) * compute_bytes(problem);
      const int64_t heads = problem.student.num_heads / problem.num_head_groups;
      dq_bytes = view.query_components * view.num_rows * heads * row_bytes;
      dk_bytes = view.key_components * kv_heads(problem, group).count * tokens.width * row_bytes;
      num_strands = std::clamp<int64_t>(kStrandBytes / std::max<int64_t>(dk_bytes, 1), 1, num_strands);
    }
    num_strands = std::min(num_strands, num_chunks);
    for (int64_t i = 0; i < num_strands; ++i) {
      const int64_t begin = num_chunks * i / num_strands, end = num_chunks * (i + 1) / num_strands;
      strands.push_back({nullptr, chunks.data() + begin, end - begin, nullptr});
    }
  }

  int64_t bytes() const { return dq_bytes + dk_bytes * static_cast<int64_t>(strands.size()); }

  // To be called when the object has its final place.
  void want_memory(Parts& memory) {
    for (Strand& strand : strands) strand.block = &view;
    if (!view.needs_grad) return;
    memory.want(view.dq, dq_bytes);
    for (Strand& strand : strands) memory.want(strand.dk, dk_bytes);
  }
};

template <class T>
class Run {
 public:
  explicit Run(const Problem& problem)
      : problem_(problem), kernels_(choose_kernels(problem)), threads_(torch::stable::get_num_threads()) {
    const Side& side = problem.student;
    const int64_t numbers = (side.num_heads + side.num_kv_heads) * side.head_dim;
    input_bytes_ = tokens() * numbers * element_bytes(side.element);
    bytes_ = problem.workspace_bytes + 8 * input_bytes_ - problem.num_head_groups * problem.total_units *
             problem.segments * static_cast<int64_t>(sizeof(T));
    if (problem.needs_grad) {
      gradient_bytes_ = problem.total_rows * numbers * element_bytes(problem.gradient_element);
      bytes_ -= gradient_bytes_;
    }
  }

  // What may stay of the call's memory beside the gradients, their multiples and copies that a backward pass makes, and
  // what other allocations round up to.
  int64_t bytes_to_keep() const { return bytes_ - gradient_bytes_ - input_bytes_ - problem_.workspace_bytes / 4; }

  Losses run() {
    std::vector<std::unique_ptr<WholeExample>> wave_examples;
    std::vector<SharedExample> shared;
    std::vector<std::unique_ptr<BlockState>> wave;
    int64_t size = 0, strands = 0;
    auto finish = [&] {
      if (!wave.empty()) run_wave(wave);
      wave.clear();
      strands = 0;
      while (wave_examples.size() > 1 || (wave_examples.size() == 1 && wave_examples[0]->blocks_left == 0))
        wave_examples.erase(wave_examples.begin());
    };
    int64_t first_row = 0;
    for (int64_t index = 0; index < problem_.num_examples; ++index) {
      const int64_t own_row = first_row, shared_units = problem_.shared_units[index];
      first_row += rows_of(index, shared_units);
      if (shared_units > 0) {
        shared.push_back({index, own_row, shared_units, bytes_allowed(index)});
        continue;
      }
      auto example = std::make_unique<WholeExample>(problem_, index, own_row);
      if (example->blocks_left == 0) continue;
      example->want_memory(problem_, kernels_);
      size += example->memory.size();
      WholeExample& state = *example;
      wave_examples.push_back(std::move(example));
      for (int64_t group = 0; group < problem_.num_head_groups; ++group)
        for (int64_t x = 0; x < problem_.segments; ++x) {
          if (state.units.count[x] == 0) continue;
          auto block = std::make_unique<BlockState>(problem_, state, group, x);
          const int64_t more = block->bytes();
          if (!wave.empty() && is_full(size + more, strands)) {
            finish();
            size = state.memory.size();
          }
          size += more;
          strands += static_cast<int64_t>(block->strands.size());
          --state.blocks_left;
          wave.push_back(std::move(block));
        }
    }
    finish();
    wave_examples.clear();
    const Losses of_shared = run_shared(problem_, kernels_, threads_, shared);
    return {losses_.intra + of_shared.intra, losses_.inter + of_shared.inter};
  }

 private:
  // Whether a wave of so many strands is to be run before another block makes it this large.
  bool is_full(int64_t size, int64_t strands) const {
    const bool enough = size > problem_.workspace_bytes / 2 && strands >= threads_;
    return enough || size > bytes_ - input_bytes_ - problem_.workspace_bytes / 2;
  }

  int64_t rows_of(int64_t example, int64_t shared_units) const {
    const int64_t* bounds = problem_.cu_units + example * problem_.segments;
    const int64_t* offsets = problem_.student.unit_offsets;
    const int64_t prefix = offsets[bounds[0] + shared_units] - offsets[bounds[0]];
    return offsets[bounds[problem_.segments]] - offsets[bounds[0]] - (problem_.segments - 1) * prefix;
  }

  // What an example with a shared prefix may take for its peak to be no higher than if q and k had it once a segment.
  int64_t bytes_allowed(int64_t index) const {
    WholeExample example(problem_, index, 0);
    example.want_memory(problem_, kernels_);
    const int64_t keys = example.memory.size(), arena = kernels_.arena_bytes(problem_, example.view);
    int64_t most = 0, blocks = 0, strands = 0, arenas = 0;
    auto finish = [&] {
      arenas = std::min(threads_, strands) * arena;
      most = std::max(most, keys + blocks + arenas);
    };
    for (int64_t block = 0; block < problem_.num_head_groups * problem_.segments; ++block) {
      const BlockState state(problem_, example, block / problem_.segments, block % problem_.segments);
      if (strands > 0 && is_full(keys + blocks + state.bytes(), strands)) {
        finish();
        blocks = strands = 0;
      }
      blocks += state.bytes();
      strands += static_cast<int64_t>(state.strands.size());
    }
    finish();
    // At its end, or in a backward pass beside multiples and copies of the gradients.
    const int64_t gradients = gradient_bytes_ / problem_.total_rows * tokens();
    const int64_t to_keep = std::min(bytes_to_keep() - 2 * (gradients - gradient_bytes_), kKeptBytes);
    int64_t kept[] = {keys, blocks, arenas}, sum = 0;
    std::sort(std::begin(kept), std::end(kept), std::greater<int64_t>());
    for (const int64_t bytes : kept) sum += sum + bytes <= to_keep ? bytes : 0;
    const int64_t peak = std::max(most + gradients, sum + 2 * gradients + input_bytes_);
    return peak - 2 * gradient_bytes_ - input_bytes_ / tokens() * problem_.total_rows;
  }

  // Of the student; a shared prefix counts in every segment.
  int64_t tokens() const { return problem_.student.unit_offsets[problem_.total_units]; }

  // The threads' arenas get what the wave's blocks and examples leave. No other example has memory meanwhile.
  void run_wave(std::vector<std::unique_ptr<BlockState>>& wave) {
    Parts memory, arena_memory;
    std::vector<WholeExample*> examples;
    std::vector<const Strand*> strands;
    int64_t arena_bytes = 0;
    for (auto& block : wave) {
      block->want_memory(memory);
      if (examples.empty() || examples.back() != block->example) {
        examples.push_back(block->example);
        arena_bytes = std::max(arena_bytes, kernels_.arena_bytes(problem_, block->example->view));
      }
      for (const Strand& strand : block->strands) strands.push_back(&strand);
    }
    memory.allocate();
    pack(problem_, kernels_, {examples.begin(), examples.end()}, threads_);
    int64_t left = bytes_ - memory.allocated_bytes();
    for (const WholeExample* example : examples) left -= example->memory.allocated_bytes();
    const int64_t most = std::min<int64_t>(threads_, strands.size());
    // A kept block may be a quarter larger than what they need.
    const int64_t workers = std::clamp<int64_t>(left / std::max<int64_t>(arena_bytes + arena_bytes / 4, 1), 1, most);
    std::vector<char*> arenas(workers);
    for (char*& arena : arenas) arena_memory.want(arena, arena_bytes);
    arena_memory.allocate();
    Reserve::of_process().release(0);  // what an earlier wave, or call, needed beyond this
    in_parallel(strands.size(), workers, [&](int64_t task, int64_t thread) {
      kernels_.run_strand(problem_, *strands[task], arenas[thread]);
    });
    if (problem_.task == Task::loss)
      for (auto& block : wave) add_losses(*block);
    if (problem_.needs_grad) write_gradients(wave, examples);
  }

  // The losses of a block's key segments, and what its gradients are still to be multiplied with.
  void add_losses(BlockState& block) {
    const double averaged = static_cast<double>(problem_.num_head_groups * problem_.num_examples);
    const Columns& units = block.view.example->units;
    for (int64_t y = 0; y < problem_.segments; ++y) {
      if (units.count[y] == 0) continue;
      const BlockLoss found =
          block_loss<T>(problem_, units, block.view.group, block.view.x, y, block.view.total_weight);
      block.factors[y] = found.factor;
      (y == block.view.x ? losses_.intra : losses_.inter) += found.loss / averaged;
    }
  }

  void write_gradients(std::vector<std::unique_ptr<BlockState>>& wave, const std::vector<WholeExample*>& examples) {
    constexpr int64_t kRows = 128;
    struct Piece {
      BlockState* block;  // rows of dq from `index` on; or where it is null
      WholeExample* example;
      int64_t index;  // a kv head of dk
    };
    std::vector<Piece> pieces;
    for (auto& block : wave)
      for (int64_t row = 0; block->view.needs_grad && row < block->view.num_rows; row += kRows)
        pieces.push_back({block.get(), nullptr, row});
    for (WholeExample* example : examples)
      for (int64_t head = 0; head < problem_.student.num_kv_heads; ++head) pieces.push_back({nullptr, example, head});
    in_parallel(pieces.size(), threads_, [&](int64_t task, int64_t) {
      const Piece& piece = pieces[task];
      if (piece.block != nullptr) {
        const int64_t end = std::min(piece.index + kRows, piece.block->view.num_rows);
        kernels_.write_queries(problem_, piece.block->view, piece.block->factors.data(), piece.index, end);
        return;
      }
      char* sum = piece.example->key_sum(problem_, 0, piece.index);
      for (auto& block : wave) {
        if (block->example != piece.example || !block->view.needs_grad) continue;
        for (const Strand& strand : block->strands)
          kernels_.add_keys(problem_, strand, block->factors.data(), piece.index, sum);
      }
      if (piece.example->blocks_left == 0) kernels_.write_keys(problem_, piece.example->view, piece.index, sum);
    });
  }

  const Problem& problem_;
  const Kernels& kernels_;
  const int64_t threads_;
  int64_t input_bytes_;         // of the student's q and k, a shared prefix counted in every segment
  int64_t gradient_bytes_ = 0;  // of their gradients, as the kernel writes them
  int64_t bytes_;               // bound: the workspace and, with what is returned, 8 times the student's q and k
  Losses losses_;
};

template <class T>
Losses run_as(const Problem& problem, int64_t& kept) {
  Run<T> run(problem);
  kept = run.bytes_to_keep();
  return run.run();
}

}  // namespace

Losses run(const Problem& problem) {
  int64_t kept;
  const Losses losses = problem.student.element == Element::float64 ? run_as<double>(problem, kept)
                                                                    : run_as<float>(problem, kept);
  Reserve::of_process().release(std::min(kept, kKeptBytes));
  return losses;
}

void release_memory() { Reserve::of_process().release(0); }

}  // namespace idrm

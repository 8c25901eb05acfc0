// Results depend on no thread count: a strand's rows and order follow from its example, its dk is its own, and the
// strands' parts are added in the order of the blocks, whichever wave they were in.
#include "schedule.h"

#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace idrm {
namespace {

// Every chunk of rows reads all keys and adds to all of dk once: more rows, less of that, as long as the numerators,
// which are written and read once, do not crowd out the rest of the last cache.
constexpr int64_t kMostChunkRows = 128, kLeastChunkRows = 16, kNumeratorBytes = 16 << 20;
// A strand has at least this many rows, for its dk has to be added to the others'; and these stay within these bytes.
constexpr int64_t kStrandRows = 256, kStrandBytes = 32 << 20;
// Beyond it, what is kept would weigh more than what it saves: memory grows with the tokens, arithmetic with their square.
constexpr int64_t kKeptBytes = 256 << 20;

int64_t element_bytes(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

int64_t compute_bytes(const Problem& problem) { return problem.student.element == Element::float64 ? 8 : 4; }

double row_weight(const Problem& problem, int64_t unit) {
  if (problem.row_weights == nullptr) return 1;
  return compute_bytes(problem) == 8 ? static_cast<const double*>(problem.row_weights)[unit]
                                     : static_cast<const float*>(problem.row_weights)[unit];
}

// Memory from torch's allocator that the process keeps from call to call, up to kKeptBytes: a call's buffers are several
// times as large as its inputs, and on a virtual machine the system's part of touching new pages came near the kernel's.
class Reserve {
 public:
  struct Block {
    torch::stable::Tensor tensor;
    int64_t bytes;
  };

  // Never destroyed: when static objects are, torch may be gone.
  static Reserve& of_process() {
    static Reserve* reserve = new Reserve;
    return *reserve;
  }

  // The smallest kept block that does and is at most a quarter larger, or a new one, before which all are released.
  Block take(int64_t bytes) {
    std::vector<Block> released;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = blocks_.end();
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
        if (block->bytes >= bytes && block->bytes - bytes <= bytes / 4 &&
            (best == blocks_.end() || block->bytes < best->bytes))
          best = block;
      if (best != blocks_.end()) {
        Block found = std::move(*best);
        blocks_.erase(best);
        return found;
      }
      released.swap(blocks_);
    }
    released.clear();
    Block block{torch::stable::empty({std::max<int64_t>(bytes, 1)}, torch::headeronly::ScalarType::Byte), bytes};
#ifdef __linux__
    // Huge pages: products step through it by more than a small one.
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t data = reinterpret_cast<uintptr_t>(block.tensor.mutable_data_ptr());
    const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    return block;
  }

  void give_back(Block block) {
#ifndef __SANITIZE_ADDRESS__
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(std::move(block));
#endif
  }

  // Releases all kept blocks, the smallest first, but for so many bytes.
  void release(int64_t but) {
    std::vector<Block> released;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::sort(blocks_.begin(), blocks_.end(), [](const Block& a, const Block& b) { return a.bytes > b.bytes; });
    for (Block& block : blocks_) {
      if (block.bytes > but) {
        released.push_back(std::move(block));
        block.bytes = 0;
      } else {
        but -= block.bytes;
      }
    }
    blocks_.erase(
        std::remove_if(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.bytes == 0; }),
        blocks_.end());
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

// A block of the reserve, given back with the object.
class Memory {
 public:
  explicit Memory(int64_t bytes) : block_(Reserve::of_process().take(bytes)) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { Reserve::of_process().give_back(std::move(block_)); }
  char* data() const { return static_cast<char*>(block_.tensor.mutable_data_ptr()); }
  int64_t bytes() const { return block_.bytes; }

 private:
  Reserve::Block block_;
};

// Cuts one allocation into aligned parts.
class Parts {
 public:
  void want(char*& part, int64_t bytes) {
    parts_.push_back({&part, size_});
    size_ += (bytes + 63) / 64 * 64;
  }
  int64_t size() const { return size_; }
  // What has been allocated for them, which may be more.
  int64_t allocated_bytes() const {
    int64_t bytes = 0;
    for (const auto& memory : memory_) bytes += memory->bytes();
    return bytes;
  }
  void allocate() {
#ifdef __SANITIZE_ADDRESS__
    // Apart from each other, so that a step over the end of one is found.
    for (size_t i = 0; i < parts_.size(); ++i) {
      const int64_t end = i + 1 < parts_.size() ? parts_[i + 1].second : size_;
      memory_.push_back(std::make_unique<Memory>(end - parts_[i].second));
      *parts_[i].first = memory_.back()->data();
    }
#else
    memory_.push_back(std::make_unique<Memory>(size_));
    for (const auto& [part, offset] : parts_) *part = memory_[0]->data() + offset;
#endif
  }

 private:
  std::vector<std::pair<char**, int64_t>> parts_;
  int64_t size_ = 0;
  std::vector<std::unique_ptr<Memory>> memory_;
};

// Calls work(task, thread) for every task, the next one as soon as a thread is free.
template <class Work>
void in_parallel(int64_t tasks, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t thread) {
    for (int64_t task = next++; task < tasks; task = next++) work(task, thread);
  };
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer does not see the barriers of torch's thread pool.
  std::vector<std::thread> pool;
  for (int64_t thread = 0; thread < std::min(tasks, threads); ++thread) pool.emplace_back(take, thread);
  for (std::thread& thread : pool) thread.join();
#else
  torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) take(thread);
  });
#endif
}

struct ColumnCounts {
  std::vector<int64_t> first, count, column;

  ColumnCounts(const Problem& problem, const int64_t* bounds, const int64_t* offsets) {
    column.push_back(0);
    for (int64_t y = 0; y < problem.segments; ++y) {
      const int64_t begin = offsets == nullptr ? bounds[y] : offsets[bounds[y]];
      const int64_t end = offsets == nullptr ? bounds[y + 1] : offsets[bounds[y + 1]];
      first.push_back(begin);
      count.push_back(end - begin);
      column.push_back(column.back() + aligned(end - begin));
    }
  }

  Columns view() const { return {first.data(), count.data(), column.data(), column.back()}; }
};

// An example with all that its view points to, its packed keys and the sums of its dk while blocks of it are at work.
struct ExampleState {
  ColumnCounts units, tokens, teacher_tokens;
  Example view;
  std::vector<std::vector<int64_t>> chunks;  // per query segment: bounds in units
  int64_t blocks_left = 0;  // that no wave has taken yet
  bool is_packed = false;
  Parts memory;
  char* key_sums = nullptr;  // (kv heads, columns, padded head_dim)
  int64_t key_sum_bytes = 0;

  ExampleState(const Problem& problem, int64_t index)
      : units(problem, problem.cu_units + index * problem.segments, nullptr),
        tokens(problem, problem.cu_units + index * problem.segments, problem.student.unit_offsets),
        teacher_tokens(problem, problem.cu_units + index * problem.segments, problem.teacher.unit_offsets) {
    view.index = index;
    view.units = units.view();
    view.student = side(tokens, view.units);
    view.teacher = side(teacher_tokens, view.units);
    const int64_t heads = problem.student.num_heads / problem.num_head_groups;
    const int64_t row_bytes = heads * tokens.column.back() * compute_bytes(problem);
    view.chunk_rows = kMostChunkRows;
    while (view.chunk_rows > kLeastChunkRows && view.chunk_rows * row_bytes > kNumeratorBytes) view.chunk_rows /= 2;
    for (int64_t x = 0; x < problem.segments; ++x) chunks.push_back(cut(problem, x));
  }

  static ExampleSide side(const ColumnCounts& tokens, const Columns& units) {
    ExampleSide side{};
    side.tokens = tokens.view();
    side.units_are_tokens = std::equal(tokens.count.begin(), tokens.count.end(), units.count);
    return side;
  }

  // Runs of whole units of at most chunk_rows tokens; a longer unit alone.
  std::vector<int64_t> cut(const Problem& problem, int64_t x) const {
    const int64_t* offsets = problem.student.unit_offsets;
    std::vector<int64_t> bounds{units.first[x]};
    const int64_t last = units.first[x] + units.count[x];
    while (bounds.back() < last) {
      int64_t unit = bounds.back() + 1;
      while (unit < last && offsets[unit + 1] - offsets[bounds.back()] <= view.chunk_rows) ++unit;
      bounds.push_back(unit);
    }
    return bounds;
  }

  // Packed keys, and the sums of dk where gradients are wanted.
  void want_memory(const Problem& problem, const Kernels& kernels) {
    want_keys(problem, kernels, problem.student, view.student, false);
    if (problem.packed_teacher()) want_keys(problem, kernels, problem.teacher, view.teacher, true);
    if (!problem.needs_grad) return;
    key_sum_bytes = tokens.column.back() * aligned(problem.student.head_dim) * compute_bytes(problem);
    memory.want(key_sums, key_sum_bytes * problem.student.num_kv_heads);
  }

  void want_keys(const Problem& problem, const Kernels& kernels, const Side& side, ExampleSide& keys, bool teacher) {
    keys.transposed_bytes = kernels.transposed_bytes(side, teacher, keys.tokens.width);
    memory.want(keys.transposed, keys.transposed_bytes * side.num_kv_heads);
    if (teacher || !problem.needs_grad) return;
    keys.natural_bytes = kernels.natural_bytes(side, keys.tokens.width);
    memory.want(keys.natural, keys.natural_bytes * side.num_kv_heads);
  }
};

struct BlockState {
  Block view;
  ExampleState* example;
  std::vector<Strand> strands;
  std::vector<double> factors;  // of every key segment, once its loss is known
  int64_t dq_bytes = 0, dk_bytes = 0;

  BlockState(const Problem& problem, ExampleState& state, int64_t group, int64_t x) : example(&state) {
    const Columns& tokens = state.view.student.tokens;
    const bool apart = problem.apart();
    view = {};
    view.example = &state.view;
    view.group = group;
    view.x = x;
    view.first_row = tokens.first[x];
    view.num_rows = tokens.count[x];
    view.query_components = apart ? problem.segments : 1;
    view.key_components = apart && problem.joint ? problem.segments : 1;
    for (int64_t y = 0; y < problem.segments; ++y)
      view.needs_grad |= problem.needs_grad && problem.block_weight(x, y) != 0;
    factors.assign(problem.segments, 1.0);
    const Columns& units = state.view.units;
    for (int64_t a = units.first[x]; a < units.first[x] + units.count[x]; ++a)
      view.total_weight += row_weight(problem, a);
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
    const int64_t numbers =
        side.unit_offsets[problem.total_units] * (side.num_heads + side.num_kv_heads) * side.head_dim;
    input_bytes_ = numbers * element_bytes(side.element);
    bytes_ = problem.workspace_bytes + 8 * input_bytes_ - problem.num_head_groups * problem.total_units *
             problem.segments * static_cast<int64_t>(sizeof(T));
    if (problem.needs_grad) {
      gradient_bytes_ = numbers * element_bytes(problem.gradient_element);
      bytes_ -= gradient_bytes_;
    }
  }

  // What may stay of the call's memory beside the gradients, their multiples and copies that a backward pass makes, and
  // what other allocations round up to.
  int64_t bytes_to_keep() const { return bytes_ - gradient_bytes_ - input_bytes_ - problem_.workspace_bytes / 4; }

  Losses run() {
    std::vector<std::unique_ptr<ExampleState>> wave_examples;
    std::vector<std::unique_ptr<BlockState>> wave;
    int64_t size = 0, strands = 0;
    auto finish = [&] {
      if (!wave.empty()) run_wave(wave);
      wave.clear();
      strands = 0;
      while (wave_examples.size() > 1 || (wave_examples.size() == 1 && wave_examples[0]->blocks_left == 0))
        wave_examples.erase(wave_examples.begin());
    };
    for (int64_t index = 0; index < problem_.num_examples; ++index) {
      auto example = std::make_unique<ExampleState>(problem_, index);
      for (int64_t x = 0; x < problem_.segments; ++x)
        example->blocks_left += example->units.count[x] > 0 ? problem_.num_head_groups : 0;
      if (example->blocks_left == 0) continue;
      example->want_memory(problem_, kernels_);
      size += example->memory.size();
      ExampleState& state = *example;
      wave_examples.push_back(std::move(example));
      for (int64_t group = 0; group < problem_.num_head_groups; ++group)
        for (int64_t x = 0; x < problem_.segments; ++x) {
          if (state.units.count[x] == 0) continue;
          auto block = std::make_unique<BlockState>(problem_, state, group, x);
          const int64_t more = block->bytes();
          const bool enough = size + more > problem_.workspace_bytes / 2 && strands >= threads_;
          if (!wave.empty() && (enough || size + more > bytes_ - input_bytes_ - problem_.workspace_bytes / 2)) {
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
    return losses_;
  }

 private:
  // The threads' arenas get what the wave's blocks and examples leave. No other example has memory meanwhile.
  void run_wave(std::vector<std::unique_ptr<BlockState>>& wave) {
    Parts memory, arena_memory;
    std::vector<ExampleState*> examples;
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
    pack(examples);
    int64_t left = bytes_ - memory.allocated_bytes();
    for (const ExampleState* example : examples) left -= example->memory.allocated_bytes();
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

  // Keys of the examples that a wave begins, and zeros for the sums of their dk.
  void pack(const std::vector<ExampleState*>& examples) {
    struct Piece {
      ExampleState* example;
      bool teacher;
      int64_t kv_head;
    };
    std::vector<Piece> pieces;
    for (ExampleState* example : examples) {
      if (example->is_packed) continue;
      example->is_packed = true;
      example->memory.allocate();
      for (int64_t head = 0; head < problem_.student.num_kv_heads; ++head) pieces.push_back({example, false, head});
      for (int64_t head = 0; problem_.packed_teacher() && head < problem_.teacher.num_kv_heads; ++head)
        pieces.push_back({example, true, head});
    }
    in_parallel(pieces.size(), threads_, [&](int64_t task, int64_t) {
      const Piece& piece = pieces[task];
      kernels_.pack_keys(problem_, piece.example->view, piece.teacher, piece.kv_head);
      ExampleState& example = *piece.example;
      if (!piece.teacher && example.key_sums != nullptr)
        std::fill_n(example.key_sums + piece.kv_head * example.key_sum_bytes, example.key_sum_bytes, 0);
    });
  }

  // The losses of a block's key segments, and what its gradients are still to be multiplied with.
  void add_losses(BlockState& block) {
    const Columns& units = block.view.example->units;
    const double averaged = static_cast<double>(problem_.num_head_groups * problem_.num_examples);
    for (int64_t y = 0; y < problem_.segments; ++y) {
      if (units.count[y] == 0) continue;
      double sum = 0;
      for (int64_t a = units.first[block.view.x]; a < units.first[block.view.x] + units.count[block.view.x]; ++a) {
        const int64_t row = block.view.group * problem_.total_units + a;
        const double distance = static_cast<const T*>(problem_.distances)[row * problem_.segments + y];
        const double weight = row_weight(problem_, a);
        sum += weight * (problem_.reduction == Reduction::row ? std::sqrt(distance) : distance);
      }
      double loss = sum;
      if (problem_.reduction == Reduction::frobenius) {
        loss = std::sqrt(sum);
        block.factors[y] = loss > 0 ? 0.5 / loss : 0;
      } else {
        loss = block.view.total_weight > 0 ? sum / block.view.total_weight : 0;
      }
      (y == block.view.x ? losses_.intra : losses_.inter) += loss / averaged;
    }
  }

  void write_gradients(std::vector<std::unique_ptr<BlockState>>& wave, const std::vector<ExampleState*>& examples) {
    constexpr int64_t kRows = 128;
    struct Piece {
      BlockState* block;  // rows of dq from `index` on; or where it is null
      ExampleState* example;
      int64_t index;  // a kv head of dk
    };
    std::vector<Piece> pieces;
    for (auto& block : wave)
      for (int64_t row = 0; block->view.needs_grad && row < block->view.num_rows; row += kRows)
        pieces.push_back({block.get(), nullptr, row});
    for (ExampleState* example : examples)
      for (int64_t head = 0; head < problem_.student.num_kv_heads; ++head) pieces.push_back({nullptr, example, head});
    in_parallel(pieces.size(), threads_, [&](int64_t task, int64_t) {
      const Piece& piece = pieces[task];
      if (piece.block != nullptr) {
        const int64_t end = std::min(piece.index + kRows, piece.block->view.num_rows);
        kernels_.write_queries(problem_, piece.block->view, piece.block->factors.data(), piece.index, end);
        return;
      }
      char* sum = piece.example->key_sums + piece.index * piece.example->key_sum_bytes;
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
  int64_t input_bytes_;         // of the student's q and k
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

// With frobenius, the coefficients of an example's rows are known when all of them are compared, and a prefix row has
// gradients of every block: kept apart by block, these would take as many products as without sharing. So they are
// formed in a second sweep, which reads what the first one kept and computes again, to the same bits, what memory had
// no room for. Elsewhere the coefficients of a chunk's rows are known with their distances, and one sweep does.
#include "shared_schedule.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "example_state.h"

namespace idrm {
namespace {

// Heads are shared out in the second sweep; an example with few of them is cut into strands to have as many tasks.
constexpr int64_t kLeastTasks = 16;

struct State : ExampleState {
  std::vector<SharedChunk> chunks;
  std::vector<double> total_weights;
  int64_t bytes_allowed;
  int64_t groups_left;  // that no wave has taken yet

  State(const Problem& problem, const SharedExample& example)
      : ExampleState(problem, example.index, example.first_row, example.shared_units), bytes_allowed(example.bytes),
        groups_left(problem.num_head_groups) {
    view.chunk_rows = kMostChunkRows;
    add_chunks(problem, 0, units.first[0], units.first[0] + view.shared_units);
    for (int64_t x = 0; x < problem.segments; ++x) {
      add_chunks(problem, 1 + x, units.first[x] + view.shared_units, units.first[x] + units.count[x]);
      total_weights.push_back(total_weight(problem, x));
    }
    const int64_t dk_bytes = problem.student.num_kv_heads * ranges.column.back() *
                             aligned(problem.student.head_dim) * compute_bytes(problem);
    const int64_t most = std::min<int64_t>(
        {(view.num_rows + kStrandRows - 1) / kStrandRows, kStrandBytes / dk_bytes,
         static_cast<int64_t>(chunks.size())});
    const int64_t kv_heads_of_group = kv_heads(problem, 0).count;
    strands = std::max<int64_t>(std::min((kLeastTasks + kv_heads_of_group - 1) / kv_heads_of_group, most), 1);
  }

  void add_chunks(const Problem& problem, int64_t range, int64_t first, int64_t last) {
    const std::vector<int64_t> bounds = cut(problem, first, last);
    for (size_t i = 1; i < bounds.size(); ++i) chunks.push_back({range, bounds[i - 1], bounds[i], nullptr, nullptr});
  }

  int64_t strand_begin(int64_t strand) const { return static_cast<int64_t>(chunks.size()) * strand / strands; }
};

// One head group of an example.
struct Group {
  State* state;
  SharedBlock view;
  std::vector<SharedChunk> chunks;
  std::vector<double> factors;

  Group(const Problem& problem, State& state, int64_t group)
      : state(&state), view{&state.view, group, state.total_weights.data(), nullptr, nullptr}, chunks(state.chunks),
        factors(problem.segments * problem.segments, 1.0) {
    view.factors = factors.data();
  }
  Group(const Group&) = delete;

  int64_t num_chunks() const { return static_cast<int64_t>(chunks.size()); }
};

template <class T>
class SharedRun {
 public:
  SharedRun(const Problem& problem, const Kernels& kernels, int64_t threads)
      : problem_(problem), kernels_(kernels), threads_(threads) {
    for (int64_t x = 0; x < problem.segments; ++x)
      for (int64_t y = 0; y < problem.segments; ++y)
        needs_grad_ |= problem.needs_grad && problem.block_weight(x, y) != 0;
  }

  Losses run(const std::vector<SharedExample>& examples) {
    std::vector<std::unique_ptr<State>> states;
    Wave wave;
    int64_t size = 0;
    for (const SharedExample& example : examples) {
      states.push_back(std::make_unique<State>(problem_, example));
      State& state = *states.back();
      state.want_memory(problem_, kernels_);
      size += state.memory.size();
      const int64_t more = bytes_to_keep_all(state);
      const int64_t arenas = threads_ * kernels_.shared_arena_bytes(problem_, state.view);
      for (int64_t group = 0; group < problem_.num_head_groups; ++group) {
        if (!wave.empty() && size + more + arenas > std::max(wave[0]->state->bytes_allowed, bytes_of_many())) {
          run_wave(wave);
          wave.clear();
          while (states.front()->groups_left == 0) states.erase(states.begin());
          size = state.memory.size();
        }
        size += more;
        wave.push_back(std::make_unique<Group>(problem_, state, group));
        --state.groups_left;
      }
    }
    if (!wave.empty()) run_wave(wave);
    return losses_;
  }

 private:
  using Wave = std::vector<std::unique_ptr<Group>>;

  // What a wave of several groups may take, as others do.
  int64_t bytes_of_many() const { return problem_.workspace_bytes / 2; }

  int64_t bytes_to_keep_all(const State& state) const {
    int64_t bytes = kernels_.shared_softmax_bytes(problem_, state.view);
    for (const SharedChunk& chunk : state.chunks)
      if (needs_grad_)
        bytes += kernels_.shared_map_bytes(problem_, state.view, chunk) +
                 kernels_.shared_numerator_bytes(problem_, state.view, chunk);
    return bytes;
  }

  void run_wave(Wave& wave) {
    Parts memory, arena_memory, kept;
    std::vector<State*> examples;
    int64_t arena_bytes = 0, chunks = 0;
    for (auto& group : wave) {
      memory.want(group->view.softmax, kernels_.shared_softmax_bytes(problem_, *group->view.example));
      chunks += group->num_chunks();
      if (!examples.empty() && examples.back() == group->state) continue;
      examples.push_back(group->state);
      arena_bytes = std::max(arena_bytes, kernels_.shared_arena_bytes(problem_, *group->view.example));
    }
    memory.allocate();
    pack(problem_, kernels_, {examples.begin(), examples.end()}, threads_);
    int64_t left = std::max(wave[0]->state->bytes_allowed, wave.size() > 1 ? bytes_of_many() : 0);
    left -= memory.allocated_bytes();
    for (const State* example : examples) left -= example->memory.allocated_bytes();
    // A slab has a chunk for every thread.
    int64_t maps = 0;
    for (const SharedChunk& chunk : wave[0]->chunks)
      if (needs_grad_ && wave.size() == 1)
        maps = std::max(maps, kernels_.shared_map_bytes(problem_, *wave[0]->view.example, chunk));
    const int64_t workers = std::clamp<int64_t>(left / (arena_bytes + maps), 1, std::min(threads_, chunks));
    arenas_.assign(workers, nullptr);
    for (char*& arena : arenas_) arena_memory.want(arena, arena_bytes);
    arena_memory.allocate();
    left -= arena_memory.allocated_bytes();
    int64_t slab = chunks;  // so many chunks of a group have their maps kept at a time
    if (needs_grad_) slab = wave.size() > 1 ? keep_all(wave, kept) : keep(*wave[0], left, kept);
    kept.allocate();
    Reserve::of_process().release(0);  // what an earlier wave, or call, needed beyond this

    const bool two_sweeps = !needs_grad_ || problem_.apart();
    if (two_sweeps) {
      compare(wave, 0, chunks);
      if (problem_.task == Task::loss) add_losses(wave);
    }
    for (int64_t begin = 0; needs_grad_ && begin < wave[0]->num_chunks(); begin += slab) {
      for (int64_t i = begin; begin > 0 && i < std::min(begin + slab, wave[0]->num_chunks()); ++i) {
        wave[0]->chunks[i].maps = wave[0]->chunks[i - begin].maps;
        wave[0]->chunks[i].numerators = wave[0]->chunks[i - begin].numerators;
      }
      if (begin > 0 || !two_sweeps) compare(wave, begin, begin + slab);
      add_gradients(wave, examples, begin, begin + slab);
    }
    if (!two_sweeps && problem_.task == Task::loss) add_losses(wave);
    if (problem_.needs_grad) write_keys(examples);
  }

  int64_t keep_all(Wave& wave, Parts& kept) const {
    int64_t most = 0;
    for (auto& group : wave) {
      most = std::max(most, group->num_chunks());
      for (SharedChunk& chunk : group->chunks) {
        kept.want(chunk.maps, kernels_.shared_map_bytes(problem_, *group->view.example, chunk));
        kept.want(chunk.numerators, kernels_.shared_numerator_bytes(problem_, *group->view.example, chunk));
      }
    }
    return most;
  }

  // In two sweeps maps come first, for to compute them again takes both models' scores, then as many numerators as have
  // room. In one sweep, or where maps have no room, a slab of chunks goes through at a time.
  int64_t keep(Group& group, int64_t bytes, Parts& kept) const {
    const Example& example = *group.view.example;
    int64_t all_maps = 0, maps = 0, numerators = 0;
    for (const SharedChunk& chunk : group.chunks) {
      const int64_t own = kernels_.shared_map_bytes(problem_, example, chunk);
      all_maps += own;
      maps = std::max(maps, own);
      numerators = std::max(numerators, kernels_.shared_numerator_bytes(problem_, example, chunk));
    }
    if (!problem_.apart() || all_maps > bytes) {
      if (problem_.apart() || maps + numerators > bytes) numerators = 0;
      const int64_t slab = std::clamp<int64_t>(bytes / (maps + numerators), 1, group.num_chunks());
      for (int64_t i = 0; i < slab; ++i) {
        kept.want(group.chunks[i].maps, maps);
        if (numerators > 0) kept.want(group.chunks[i].numerators, numerators);
      }
      return slab;
    }
    for (SharedChunk& chunk : group.chunks)
      kept.want(chunk.maps, kernels_.shared_map_bytes(problem_, example, chunk));
    for (SharedChunk& chunk : group.chunks) {
      const int64_t own = kernels_.shared_numerator_bytes(problem_, example, chunk);
      if (kept.size() + own <= bytes) kept.want(chunk.numerators, own);
    }
    return group.num_chunks();
  }

  // Calls work(group, chunk, arena) for chunks [begin, end) of every group.
  template <class Work>
  void for_chunks(Wave& wave, int64_t begin, int64_t end, const Work& work) {
    std::vector<std::pair<const Group*, const SharedChunk*>> pieces;
    for (auto& group : wave)
      for (int64_t i = begin; i < std::min(end, group->num_chunks()); ++i)
        pieces.push_back({group.get(), &group->chunks[i]});
    in_parallel(pieces.size(), arenas_.size(), [&](int64_t task, int64_t thread) {
      work(*pieces[task].first, *pieces[task].second, arenas_[thread]);
    });
  }

  void compare(Wave& wave, int64_t begin, int64_t end) {
    for_chunks(wave, begin, end, [&](const Group& group, const SharedChunk& chunk, char* arena) {
      kernels_.compare_shared(problem_, group.view, chunk, arena);
    });
  }

  void add_losses(Wave& wave) {
    const double averaged = static_cast<double>(problem_.num_head_groups * problem_.num_examples);
    for (auto& group : wave)
      for (int64_t x = 0; x < problem_.segments; ++x)
        for (int64_t y = 0; y < problem_.segments; ++y) {
          const BlockLoss found = block_loss<T>(
              problem_, group->view.example->units, group->view.group, x, y, group->view.total_weights[x]);
          group->factors[x * problem_.segments + y] = found.factor;
          (x == y ? losses_.intra : losses_.inter) += found.loss / averaged;
        }
  }

  // The order of a dk's sums is that of groups and chunks, whatever a slab or a wave holds.
  void add_gradients(Wave& wave, const std::vector<State*>& examples, int64_t begin, int64_t end) {
    for_chunks(wave, begin, end, [&](const Group& group, const SharedChunk& chunk, char* arena) {
      kernels_.differentiate_shared(problem_, group.view, chunk, arena);
    });
    struct Piece {
      const State* example;
      int64_t kv_head, strand;
    };
    std::vector<Piece> pieces;
    for (const State* example : examples)
      for (int64_t strand = 0; strand < example->strands; ++strand)
        for (int64_t head = 0; head < problem_.student.num_kv_heads; ++head) pieces.push_back({example, head, strand});
    in_parallel(pieces.size(), arenas_.size(), [&](int64_t task, int64_t thread) {
      const Piece& piece = pieces[task];
      char* dk = piece.example->key_sum(problem_, piece.strand, piece.kv_head);
      for (auto& group : wave) {
        const KvHeads own = kv_heads(problem_, group->view.group);
        if (group->state != piece.example || piece.kv_head < own.first || piece.kv_head >= own.first + own.count)
          continue;
        const int64_t last = std::min(end, group->state->strand_begin(piece.strand + 1));
        for (int64_t i = std::max(begin, group->state->strand_begin(piece.strand)); i < last; ++i)
          kernels_.add_shared_gradients(
              problem_, group->view, group->chunks[i], piece.kv_head, dk, arenas_[thread]);
      }
    });
  }

  // Of the examples whose last group was in the wave.
  void write_keys(const std::vector<State*>& examples) {
    const int64_t heads = problem_.student.num_kv_heads;
    std::vector<const State*> complete;
    for (const State* example : examples)
      if (example->groups_left == 0) complete.push_back(example);
    in_parallel(complete.size() * heads, threads_, [&](int64_t task, int64_t) {
      const State& example = *complete[task / heads];
      const int64_t head = task % heads;
      char* dk = example.key_sum(problem_, 0, head);
      kernels_.sum_shared_keys(problem_, example.view, dk, example.strands, heads * example.key_sum_bytes);
      kernels_.write_keys(problem_, example.view, head, dk);
    });
  }

  const Problem& problem_;
  const Kernels& kernels_;
  const int64_t threads_;
  bool needs_grad_ = false;
  std::vector<char*> arenas_;
  Losses losses_;
};

}  // namespace

Losses run_shared(
    const Problem& problem, const Kernels& kernels, int64_t threads, const std::vector<SharedExample>& examples) {
  if (problem.student.element == Element::float64) return SharedRun<double>(problem, kernels, threads).run(examples);
  return SharedRun<float>(problem, kernels, threads).run(examples);
}

}  // namespace idrm

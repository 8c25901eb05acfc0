// Buffers of a call, which the process keeps for its next one.
#pragma once

#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace idrm {

// Memory from torch's allocator that the process keeps from call to call: a call's buffers are several times as large
// as its inputs, and on a virtual machine the system's part of touching new pages came near the kernel's.
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

}  // namespace idrm

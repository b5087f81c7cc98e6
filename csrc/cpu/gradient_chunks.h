// Walks the chunks of lists of gradients with torch's threads.
#pragma once

#include <algorithm>
#include <vector>

#include "gradient_pairs.h"
#include "tensors.h"

namespace vgs {

struct Chunk {
  const GradientPair* pair;
  int64_t begin, end;  // entries
};

class Chunks {
 public:
  explicit Chunks(const std::vector<GradientPair>& pairs) : pairs_(pairs), size_(chunk_size(pairs)), first_{0} {
    first_.reserve(pairs.size() + 1);
    for (const GradientPair& pair : pairs) first_.push_back(first_.back() + chunks_of(pair, size_));
  }

  int64_t count() const { return first_.back(); }

  // Call f(index, chunk) for every chunk, each from one thread.
  template <class F>
  void for_each(const F& f) const {
    // Below about this many chunks waking a thread costs more than it brings.
    constexpr int64_t kGrain = 2;
    torch::stable::parallel_for(0, count(), kGrain, [&](int64_t begin, int64_t end) {
      size_t at = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t index = begin; index < end; ++index) {
        while (first_[at + 1] <= index) ++at;
        const int64_t start = (index - first_[at]) * size_;
        f(index, Chunk{&pairs_[at], start, std::min(pairs_[at].size, start + size_)});
      }
    });
  }

 private:
  const std::vector<GradientPair>& pairs_;
  int64_t size_;
  std::vector<int64_t> first_;  // of each pair, then the total
};

inline const void* entry(const void* data, Element element, int64_t index) {
  return data ? static_cast<const char*>(data) + index * element_size(element) : nullptr;
}

}  // namespace vgs

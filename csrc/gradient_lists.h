// From lists of torch tensors to `GradientPair`s.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/tensors.h"
#include "gradient_pairs.h"

namespace vgs {

using torch::stable::Tensor;

// The pairs, and whatever has to live as long as they are read.
class GradientLists {
 public:
  GradientLists(const std::vector<Tensor>& lang, const std::vector<Tensor>& vis, const std::vector<Tensor>* out) {
    STD_TORCH_CHECK(lang.size() == vis.size() && (!out || out->size() == lang.size()),
                    "the lists of gradients must have the same length");
    pairs_.reserve(lang.size());
    for (size_t i = 0; i < lang.size(); ++i) add(lang[i], vis[i], out ? &(*out)[i] : nullptr, i);
  }

  const std::vector<GradientPair>& pairs() const { return pairs_; }

  // Bring results that were written to a contiguous temporary to where they belong.
  void finish() {
    for (auto& [target, result] : copies_) torch::stable::copy_(target, result);
  }

 private:
  void add(const Tensor& lang, const Tensor& vis, const Tensor* out, size_t index) {
    const int64_t lang_size = lang.numel(), vis_size = vis.numel();
    const int64_t size = out ? out->numel() : std::max(lang_size, vis_size);
    if (size == 0) return;
    // No entries stand for a gradient that is None.
    STD_TORCH_CHECK((lang_size == 0 || lang_size == size) && (vis_size == 0 || vis_size == size), "gradient ", index,
                    " has ", lang_size, " and ", vis_size, " entries, ", size, " were expected");
    const bool same_order = have_same_order(lang_size ? &lang : nullptr, vis_size ? &vis : nullptr, out);
    GradientPair pair{};
    pair.size = size;
    if (lang_size) pair.lang = flat(lang, same_order);
    if (vis_size) pair.vis = flat(vis, same_order);
    pair.lang_element = element_of(lang_size ? lang : vis_size ? vis : *out, "a gradient");
    pair.vis_element = vis_size ? element_of(vis, "a gradient") : pair.lang_element;
    if (out) {
      pair.out_element = element_of(*out, "out");
      Tensor result = *out;
      if (!same_order && !out->is_contiguous()) {
        result = torch::stable::new_empty(*out, {size});
        result = torch::stable::view(result, out->sizes());
        copies_.emplace_back(*out, result);
      }
      pair.out = result.mutable_data_ptr();
    }
    pairs_.push_back(pair);
  }

  const void* flat(const Tensor& tensor, bool same_order) {
    if (same_order || tensor.is_contiguous()) return tensor.const_data_ptr();
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  // Whether the tensors fill their memory without gaps and walk it in the same order, as gradients of channels-last or
  // transposed parameters do: entry i of one then belongs to entry i of the others, whatever the order is.
  static bool have_same_order(const Tensor* lang, const Tensor* vis, const Tensor* out) {
    const Tensor* first = nullptr;
    for (const Tensor* tensor : {lang, vis, out}) {
      if (!tensor) continue;
      if (!first) {
        first = tensor;
        if (!is_dense(*first)) return false;
        continue;
      }
      if (tensor->dim() != first->dim()) return false;
      for (int64_t d = 0; d < first->dim(); ++d)
        if (first->size(d) != tensor->size(d) || (first->size(d) > 1 && first->stride(d) != tensor->stride(d)))
          return false;
    }
    return true;
  }

  static bool is_dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return true;
    std::vector<int64_t> order;
    for (int64_t d = 0; d < tensor.dim(); ++d)
      if (tensor.size(d) > 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); });
    int64_t expected = 1;
    for (const int64_t d : order) {
      if (tensor.stride(d) != expected) return false;
      expected *= tensor.size(d);
    }
    return true;
  }

  std::vector<GradientPair> pairs_;
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

}  // namespace vgs

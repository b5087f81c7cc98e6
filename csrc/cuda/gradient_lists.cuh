// Lists of gradients on the device: the table that a launch takes as its argument, how a block finds its chunk in it,
// and how entries are read and written.
//
// No torch headers: nvcc compiles this file, and so does the C++ compiler, over tests/cuda_emulator/cuda_emulator.h.
//
//   Acc    arithmetic type: float, or double when a gradient is float64
//   entry  one number of a gradient        group  kGroup entries, read with 128-bit loads
//   chunk  what a block works on: a run of entries of one tensor (../gradient_pairs.h)
//
// The table travels in the kernel's arguments, not in a copy from the host: a captured CUDA graph holds the arguments
// themselves, while a copy would read its host buffer again at every replay, long after it was freed or reused.
#pragma once

#ifdef VGS_CUDA_EMULATOR
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <string.h>

#include "../gradient_pairs.h"

namespace vgs::cuda {

#ifndef VGS_CUDA_EMULATOR
template <class T, int kSize>
using Shared = T[kSize];
#endif

constexpr int kThreads = 512;
constexpr int kGroup = 8;  // one 128-bit load of bfloat16 or float16, two of float32, four of float64

// Tensors of one launch. Arguments end at 4 KiB, or at 32764 bytes where the driver is sure to know that limit.
#if defined(VGS_TABLE_TENSORS)
constexpr int kTensors = VGS_TABLE_TENSORS;
#elif defined(CUDART_VERSION) && CUDART_VERSION >= 13000
constexpr int kTensors = 800;
#else
constexpr int kTensors = 100;
#endif

struct Table {
  const void* lang[kTensors];  // null counts as zeros
  const void* vis[kTensors];   // null counts as zeros
  void* out[kTensors];
  int64_t size[kTensors];             // entries
  int32_t first_chunk[kTensors + 1];  // of each tensor, in blocks of this launch; then their total
  uint8_t elements[kTensors];         // Element of lang, vis, out: two bits each
  int32_t tensors;
  int64_t chunk;  // entries
};
static_assert(sizeof(Table) <= (kTensors > 100 ? 32764 : 4096) - 64, "the table does not fit a kernel's arguments");

// Call launch(table, blocks, first_part) for as many tables as the pairs need. Returns the number of chunks.
template <class Launch>
int64_t for_each_table(const std::vector<GradientPair>& pairs, const Launch& launch) {
  Table table{};
  table.chunk = chunk_size(pairs);
  int64_t done = 0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const GradientPair& pair = pairs[i];
    const int t = table.tensors++;
    table.lang[t] = pair.lang;
    table.vis[t] = pair.vis;
    table.out[t] = pair.out;
    table.size[t] = pair.size;
    table.elements[t] = static_cast<uint8_t>(pair.lang_element | pair.vis_element << 2 | pair.out_element << 4);
    table.first_chunk[t + 1] = table.first_chunk[t] + static_cast<int32_t>(chunks_of(pair, table.chunk));
    if (table.tensors == kTensors || i + 1 == pairs.size()) {
      launch(table, table.first_chunk[table.tensors], done);
      done += table.first_chunk[table.tensors];
      table.tensors = 0;
    }
  }
  return done;
}

// A block's share of the work: [begin, end) of one tensor, where [vector_begin, vector_end) can be read in groups.
struct Work {
  const void* lang;
  const void* vis;
  void* out;
  Element lang_element, vis_element, out_element;
  int64_t begin, vector_begin, vector_end, end;
};

__device__ inline int size_of(Element element) { return element == kFloat64 ? 8 : element == kFloat32 ? 4 : 2; }

__device__ inline bool is_aligned(const void* data, Element element, int64_t index) {
  return (reinterpret_cast<uintptr_t>(data) + index * size_of(element)) % 16 == 0;
}

__device__ inline Work find_work(const Table& table, int block) {
  int low = 0, high = table.tensors;  // first_chunk[low] <= block < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= block) low = middle;
    else high = middle;
  }
  Work work;
  work.lang = table.lang[low];
  work.vis = table.vis[low];
  work.out = table.out[low];
  const int elements = table.elements[low];
  work.lang_element = static_cast<Element>(elements & 3);
  work.vis_element = static_cast<Element>(elements >> 2 & 3);
  work.out_element = static_cast<Element>(elements >> 4 & 3);
  // 64 bits from here on: a tensor may have more than 2^31 entries.
  work.begin = static_cast<int64_t>(block - table.first_chunk[low]) * table.chunk;
  const int64_t rest = table.size[low] - work.begin;
  work.end = work.begin + (rest < table.chunk ? rest : table.chunk);
  // Views may start anywhere: step over entries until every tensor is at a multiple of 16 bytes. Where they never are
  // at the same time, the whole chunk is read entry by entry.
  work.vector_begin = work.vector_end = work.end;
  for (int64_t first = work.begin; first < work.begin + kGroup && first < work.end; ++first) {
    if (is_aligned(work.lang, work.lang_element, work.lang ? first : 0) &&
        is_aligned(work.vis, work.vis_element, work.vis ? first : 0) &&
        is_aligned(work.out, work.out_element, work.out ? first : 0)) {
      work.vector_begin = first;
      work.vector_end = first + (work.end - first) / kGroup * kGroup;
      break;
    }
  }
  return work;
}

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

template <class T> __device__ inline T narrowed(double x) { return static_cast<T>(x); }
template <> __device__ inline __nv_bfloat16 narrowed(double x) { return __float2bfloat16(static_cast<float>(x)); }
template <> __device__ inline __half narrowed(double x) { return __float2half(static_cast<float>(x)); }

template <class T, class Acc>
__device__ inline void read_group_of(const void* data, int64_t index, Acc (&x)[kGroup]) {
  constexpr int kEach = 16 / sizeof(T), kLoads = kGroup / kEach;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(data) + index);
  uint4 raw[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) raw[k] = from[k];
  T entries[kGroup];
  memcpy(entries, raw, sizeof(entries));
#pragma unroll
  for (int j = 0; j < kGroup; ++j) x[j] = static_cast<Acc>(widened(entries[j]));
}

template <class T, class Acc>
__device__ inline void write_group_of(void* data, int64_t index, const Acc (&x)[kGroup]) {
  constexpr int kEach = 16 / sizeof(T), kStores = kGroup / kEach;
  T entries[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) entries[j] = narrowed<T>(x[j]);
  uint4 raw[kStores];
  memcpy(raw, entries, sizeof(entries));
  uint4* to = reinterpret_cast<uint4*>(static_cast<T*>(data) + index);
#pragma unroll
  for (int k = 0; k < kStores; ++k) to[k] = raw[k];
}

// Dtypes are looked up at run time: the branch is the same for a whole block, and one kernel serves any mixture.
template <class Acc>
__device__ inline void read_group(const void* data, Element element, int64_t index, Acc (&x)[kGroup]) {
  if (data == nullptr) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) x[j] = Acc(0);
    return;
  }
  switch (element) {
    case kFloat32: return read_group_of<float>(data, index, x);
    case kBFloat16: return read_group_of<__nv_bfloat16>(data, index, x);
    case kFloat16: return read_group_of<__half>(data, index, x);
    case kFloat64: return read_group_of<double>(data, index, x);
  }
}

template <class Acc>
__device__ inline void write_group(void* data, Element element, int64_t index, const Acc (&x)[kGroup]) {
  switch (element) {
    case kFloat32: return write_group_of<float>(data, index, x);
    case kBFloat16: return write_group_of<__nv_bfloat16>(data, index, x);
    case kFloat16: return write_group_of<__half>(data, index, x);
    case kFloat64: return write_group_of<double>(data, index, x);
  }
}

template <class Acc>
__device__ inline Acc read_entry(const void* data, Element element, int64_t index) {
  if (data == nullptr) return Acc(0);
  switch (element) {
    case kBFloat16: return static_cast<Acc>(widened(static_cast<const __nv_bfloat16*>(data)[index]));
    case kFloat16: return static_cast<Acc>(widened(static_cast<const __half*>(data)[index]));
    case kFloat64: return static_cast<Acc>(static_cast<const double*>(data)[index]);
    default: return static_cast<Acc>(static_cast<const float*>(data)[index]);
  }
}

template <class Acc>
__device__ inline void write_entry(void* data, Element element, int64_t index, Acc x) {
  switch (element) {
    case kBFloat16: static_cast<__nv_bfloat16*>(data)[index] = narrowed<__nv_bfloat16>(x); return;
    case kFloat16: static_cast<__half*>(data)[index] = narrowed<__half>(x); return;
    case kFloat64: static_cast<double*>(data)[index] = x; return;
    default: static_cast<float*>(data)[index] = static_cast<float>(x);
  }
}

}  // namespace vgs::cuda

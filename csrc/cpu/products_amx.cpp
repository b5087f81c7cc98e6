// The tiles of the matrix unit hold 16 rows of 64 bytes. One instruction adds to a tile of 16 x 16 float32 sums the
// product of 16 rows of the weight, as they lie, and 16 rows of the chunk, of which it wants pairs of entries side by side.
// Four tiles of sums share two of each operand, so that every operand fetched is used twice.
//
// Logits: the sums have the vocabulary in their rows and the logits have it in their columns: they are transposed on the way
// out, and leave in whole cache lines past the caches, since a chunk of logits does not fit in any.
//
// Gathered products: the gathered rows are those of which pairs are wanted, interleaved once for all rows of the result.
#include "products_amx.h"

#include "simd.h"

namespace vgs::amx {
namespace {

constexpr int64_t kHalf = kBlock / 2;
constexpr int64_t kLower = kHalf * kBlock;  // where the lower half of a square of kBlock x kBlock entries begins
constexpr int64_t kDepth = 256;  // columns of the weight that stay in the first-level cache, kBlock rows of them: 16 KiB

// While it lives the tiles are configured for 16 rows of 64 bytes; then as they were: the library's products rely on theirs.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    const Configuration ours;
    _tile_loadconfig(&ours);
  }
  ~Tiles() { _tile_loadconfig(&before_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Configuration before_;
};

// Tiles 0 to 3 = the quarters of sums (kBlock, kBlock), or 0.
inline void load_sums(bool accumulate, const float* sums) {
  constexpr int64_t kStride = kBlock * sizeof(float);
  if (accumulate) {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kHalf, kStride);
    _tile_loadd(2, sums + kLower, kStride);
    _tile_loadd(3, sums + kLower + kHalf, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

inline void store_sums(float* sums) {
  constexpr int64_t kStride = kBlock * sizeof(float);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kHalf, kStride);
  _tile_stored(2, sums + kLower, kStride);
  _tile_stored(3, sums + kLower + kHalf, kStride);
}

// Copy rows of the weight, columns [0, depth), into tiles [column / kBlock][kBlock][kBlock]; rows that are not there are 0.
void pack_weight(const uint16_t* weight, int64_t stride, int64_t rows, int64_t depth, uint16_t* tiles) {
  for (int64_t row = 0; row < kBlock; ++row)
    for (int64_t k = 0; k < depth; k += kBlock)
      _mm512_store_si512(tiles + k * kBlock + row * kBlock,
                         row < rows ? _mm512_loadu_si512(weight + row * stride + k) : _mm512_setzero_si512());
}

// Rows that are fetched into the second-level cache while others are multiplied, a cache line after the other.
struct Ahead {
  const uint16_t* row;
  int64_t stride, width, lines, column = 0;

  void fetch(int64_t count) {
    for (; count > 0 && lines > 0; --count, --lines) {
      _mm_prefetch(reinterpret_cast<const char*>(row + column), _MM_HINT_T1);
      column += kBlock;
      if (column == width) column = 0, row += stride;
    }
  }
};

// sums (kBlock of the vocabulary, kBlock of the chunk) = or += tiles times a panel, over `depth` columns. Meanwhile lines
// are fetched, `lines` of them every kBlock columns; not in one go, which would hold up the loads of the next tiles.
void multiply(const uint16_t* tiles, const uint16_t* panel, int64_t depth, bool accumulate, Ahead& ahead, int64_t lines,
              float* sums) {
  load_sums(accumulate, sums);
  for (int64_t k = 0; k < depth; k += kBlock) {
    _tile_loadd(4, tiles + k * kBlock, 64);
    _tile_loadd(6, panel + k * kBlock, 64);
    ahead.fetch((lines + 3) / 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, tiles + k * kBlock + kLower, 64);
    ahead.fetch((lines + 2) / 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, panel + k * kBlock + kLower, 64);
    ahead.fetch((lines + 1) / 4);
    _tile_dpbf16ps(1, 4, 7);
    ahead.fetch(lines / 4);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(sums);
}

// Write `rows` rows of the chunk, `columns` logits each, from sums (kBlock of the vocabulary, kBlock of the chunk).
template <class Out>
void write(const float* sums, int64_t rows, int64_t columns, const float* bias, Out* out, int64_t stride) {
  constexpr bool kWholeLines = kHalf * sizeof(Out) == 64;
  const bool around = kWholeLines && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride * sizeof(Out) % 64 == 0;
  for (int64_t first = 0; first < rows; first += kHalf)
    for (int64_t v = 0; v < columns; v += kHalf) {
      const int64_t count = columns - v < kHalf ? columns - v : kHalf;
      FloatVec block[kHalf], added = {};
#pragma GCC unroll 16
      for (int64_t i = 0; i < kHalf; ++i) block[i] = load<FloatVec>(sums + (v + i) * kBlock + first);
      transpose(block);
      if (bias) memcpy(&added, bias + v, count * sizeof(float));
      for (int64_t i = 0; i < kHalf && first + i < rows; ++i) {
        Out* const to = out + (first + i) * stride + v;
        if (count == kHalf && around) {
          narrow_around_caches(to, block[i] + added);
        } else if (count == kHalf) {
          narrow(to, block[i] + added);
        } else {
          Out entries[kHalf];
          narrow(entries, block[i] + added);
          memcpy(to, entries, count * sizeof(Out));
        }
      }
    }
}

// Pairs of rows side by side, kBlock rows by kBlock columns, as two tiles of 16 pairs. An unpack works on
// quarters of a register, so the first tile holds the columns 0-3, 8-11, 16-19 and 24-27, the second one the others.
// Rows from `count` on are 0.
void pack_pairs(const uint16_t* right, int64_t stride, const int64_t* rows, int64_t count, uint16_t* tiles) {
  for (int64_t i = 0; i < kBlock; i += 2) {
    const __m512i even = i < count ? _mm512_loadu_si512(right + rows[i] * stride) : _mm512_setzero_si512();
    const __m512i odd = i + 1 < count ? _mm512_loadu_si512(right + rows[i + 1] * stride) : _mm512_setzero_si512();
    _mm512_store_si512(tiles + i * kHalf, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(tiles + kBlock * kHalf + i * kHalf, _mm512_unpackhi_epi16(even, odd));
  }
}

// sums (kBlock, kBlock) = or += kBlock rows of `left` times tiles, over `blocks` blocks of gathered rows.
void multiply_gathered(const uint16_t* left, const uint16_t* tiles, int64_t blocks, bool accumulate, float* sums) {
  constexpr int64_t kRow = kGathered * sizeof(uint16_t);
  load_sums(accumulate, sums);
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, left + block * kBlock, kRow);
    _tile_loadd(6, tiles + block * kBlock * kBlock, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, tiles + block * kBlock * kBlock + kBlock * kHalf, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kHalf * kGathered + block * kBlock, kRow);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(sums);
}

// Half a block of bfloat16 as float32.
inline __m512 widened(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Put kBlock sums of pack_pairs's two tiles back in order, add what is there if `adds`, round and write them.
inline void write_columns(const float* sums, bool adds, uint16_t* to) {
  const __m512 first = _mm512_loadu_ps(sums), second = _mm512_loadu_ps(sums + kHalf);
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  __m512 left = _mm512_permutex2var_ps(first, low, second), right = _mm512_permutex2var_ps(first, high, second);
  if (adds) {
    left = _mm512_add_ps(left, widened(to));
    right = _mm512_add_ps(right, widened(to + kHalf));
  }
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left)));
}

// A page that was never written is the system's page of zeros once it is read, and replaced when it is written. Asked for
// with a write, here of nothing, it comes in one step.
inline void touch(uint16_t* row, int64_t columns) {
  constexpr int64_t kPage = 4096 / sizeof(uint16_t);
  for (int64_t i = 0; i < columns; i += kPage) __atomic_fetch_or(row + i, 0, __ATOMIC_RELAXED);
  __atomic_fetch_or(row + columns - 1, 0, __ATOMIC_RELAXED);
}

}  // namespace

void pack_hidden(const uint16_t* hidden, int64_t stride, int64_t n, int64_t width, uint16_t* panels) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t start = 0; start < width; start += kDepth) {
    const int64_t depth = width - start < kDepth ? width - start : kDepth;
    for (int64_t row = 0; row < blocks * kBlock; ++row) {
      // Tiles of 16 pairs of columns by 16 rows of the chunk, two of them for a block.
      uint16_t* const to = panels + (start * blocks + row / kBlock * depth) * kBlock + row % kBlock / kHalf * kLower + row % kHalf * 2;
      for (int64_t k = 0; k < depth; k += 2)
        for (int64_t i = 0; i < 2; ++i)
          to[k / kBlock * kBlock * kBlock + k % kBlock * kHalf + i] = row < n ? hidden[row * stride + start + k + i] : 0;
    }
  }
}

void logits(const uint16_t* panels, const uint16_t* weight, int64_t weight_stride, int64_t n, int64_t width,
            const float* bias, void* out, Element out_element, int64_t out_stride, int64_t begin, int64_t end,
            float* scratch) {
  alignas(64) uint16_t tiles[kBlock * kDepth];
  const Tiles configured;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t v = begin; v < end; v += kBlock) {
    const int64_t rows = end - v < kBlock ? end - v : kBlock;
    const int64_t rows_after = end - v - rows < kBlock ? end - v - rows : kBlock;
    Ahead ahead{weight + (v + rows) * weight_stride, weight_stride, width, rows_after * width / kBlock};
    const int64_t lines = (kBlock + blocks - 1) / blocks;  // of kBlock rows, for each of the blocks
    for (int64_t start = 0; start < width; start += kDepth) {
      const int64_t depth = width - start < kDepth ? width - start : kDepth;
      pack_weight(weight + v * weight_stride + start, weight_stride, rows, depth, tiles);
      for (int64_t block = 0; block < blocks; ++block) {
        float* sums = scratch + block * kBlock * kBlock;
        multiply(tiles, panels + (start * blocks + block * depth) * kBlock, depth, start > 0, ahead, lines, sums);
        if (start + depth < width) continue;
        const int64_t tokens = n - block * kBlock < kBlock ? n - block * kBlock : kBlock;
        const auto write_as = [&](auto* to) {
          write(sums, tokens, rows, bias ? bias + v : nullptr, to + block * kBlock * out_stride + v, out_stride);
        };
        switch (out_element) {
          case kBFloat16: write_as(static_cast<BFloat16*>(out)); break;
          case kFloat16: write_as(static_cast<Float16*>(out)); break;
          default: write_as(static_cast<float*>(out));
        }
      }
    }
  }
  _mm_sfence();
}

void gathered_product(const uint16_t* left, const uint16_t* right, int64_t right_stride, const int64_t* rows,
                      int64_t count, int64_t n, uint16_t* out, int64_t out_stride, const int64_t* into, int64_t begin,
                      int64_t end, float* sums, uint16_t* tiles) {
  const Tiles configured;
  const int64_t padded = (n + kBlock - 1) / kBlock * kBlock;
  for (int64_t band = begin; band < end; band += kGatheredColumns) {
    const int64_t columns = end - band < kGatheredColumns ? end - band : kGatheredColumns;
    const auto fetch = [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k)
        for (int64_t w = 0; w < columns; w += kBlock)
          _mm_prefetch(reinterpret_cast<const char*>(right + rows[k] * right_stride + band + w), _MM_HINT_T1);
    };
    fetch(0, count < kGathered ? count : kGathered);
    for (int64_t start = 0; start == 0 || start < count; start += kGathered) {  // without rows, sums of 0
      const int64_t depth = count - start < kGathered ? count - start : kGathered;
      const int64_t blocks = (depth + kBlock - 1) / kBlock, left_over = count - start - depth;
      const int64_t next = left_over < kGathered ? left_over : kGathered;  // rows, fetched meanwhile
      for (int64_t k = 0; k < depth; k += kBlock)
        for (int64_t w = 0; w < columns; w += kBlock)
          pack_pairs(right + band + w, right_stride, rows + start + k, depth - k, tiles + w * kGathered + k * kBlock);
      for (int64_t w = 0; w < columns; w += kBlock) {
        fetch(start + depth + next * w / columns, start + depth + next * (w + kBlock) / columns);
        for (int64_t row = 0; row < padded; row += kBlock)
          multiply_gathered(left + start * padded + row * kGathered, tiles + w * kGathered, blocks, start > 0, sums + w * padded + row * kBlock);
      }
    }
    for (int64_t row = 0; row < n; ++row) {
      uint16_t* const to = out + (into ? into[row] : row) * out_stride + band;
      if (into) touch(to, columns);
      for (int64_t w = 0; w < columns; w += kBlock) write_columns(sums + w * padded + row * kBlock, into, to + w);
    }
  }
}

}  // namespace vgs::amx

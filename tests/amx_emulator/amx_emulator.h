// The tile registers of a matrix unit (AMX) in plain C++, one set a thread: what csrc/cpu/products_amx.cpp needs of them.
// The instructions' checks are checks here: tiles are configured before they are used, rows and bytes are those of the
// configuration.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace amx_emulator {

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

inline thread_local Configuration configuration = {};
inline thread_local uint8_t tiles[8][16][64];

inline void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "amx: %s\n", what);
  abort();
}

inline void load_configuration(const void* from) {
  memcpy(&configuration, from, sizeof(configuration));
  memset(tiles, 0, sizeof(tiles));
}

inline void store_configuration(void* to) { memcpy(to, &configuration, sizeof(configuration)); }

inline void check(int tile) {
  require(configuration.palette == 1, "a tile is used while none is configured");
  require(configuration.rows[tile] == 16 && configuration.row_bytes[tile] == 64, "a tile has other than 16 rows of 64 bytes");
}

inline void load(int tile, const void* base, int64_t stride) {
  check(tile);
  for (int row = 0; row < 16; ++row) memcpy(tiles[tile][row], static_cast<const char*>(base) + row * stride, 64);
}

inline void store(int tile, void* base, int64_t stride) {
  check(tile);
  for (int row = 0; row < 16; ++row) memcpy(static_cast<char*>(base) + row * stride, tiles[tile][row], 64);
}

inline void zero(int tile) {
  check(tile);
  memset(tiles[tile], 0, sizeof(tiles[tile]));
}

inline float widened(const uint8_t* from) {
  uint16_t half;
  memcpy(&half, from, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// c[m][n] += a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1]
inline void multiply(int c, int a, int b) {
  check(a), check(b), check(c);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, tiles[c][m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 2; ++i) sum += widened(tiles[a][m] + 4 * k + 2 * i) * widened(tiles[b][k] + 4 * n + 2 * i);
      memcpy(tiles[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace amx_emulator

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulator::load_configuration
#define _tile_storeconfig amx_emulator::store_configuration
#define _tile_loadd amx_emulator::load
#define _tile_stored amx_emulator::store
#define _tile_zero amx_emulator::zero
#define _tile_dpbf16ps amx_emulator::multiply

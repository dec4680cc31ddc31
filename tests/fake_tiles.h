// The matrix unit of Intel's processors (AMX) in plain C++: what its instructions do, where there are none.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

struct Tile {
    uint8_t bytes[16][64];
    int rows, columns;
};

inline Tile &tile(int number) {
    static thread_local Tile all[8];
    return all[number];
}

inline void configure(const uint8_t *shapes) {
    for (int number = 0; number < 8; ++number) {
        uint16_t columns;
        std::memcpy(&columns, shapes + 16 + 2 * number, 2);
        tile(number).columns = columns;
        tile(number).rows = shapes[48 + number];
    }
}

inline void load(int number, const void *from, int64_t stride) {
    Tile &into = tile(number);
    std::memset(into.bytes, 0, sizeof(into.bytes));
    for (int row = 0; row < into.rows; ++row)
        std::memcpy(into.bytes[row], (const uint8_t *)from + row * stride, into.columns);
}

inline void store(int number, void *to, int64_t stride) {
    Tile &from = tile(number);
    for (int row = 0; row < from.rows; ++row)
        std::memcpy((uint8_t *)to + row * stride, from.bytes[row], from.columns);
}

inline float bfloat16(const uint8_t *at) {
    uint32_t bits = 0;
    std::memcpy((uint8_t *)&bits + 2, at, 2);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void multiply(int into, int one, int other) {
    Tile &sums = tile(into), &a = tile(one), &b = tile(other);
    for (int row = 0; row < sums.rows; ++row)
        for (int column = 0; column < sums.columns / 4; ++column) {
            float sum;
            std::memcpy(&sum, sums.bytes[row] + 4 * column, 4);
            for (int pair = 0; pair < a.columns / 4; ++pair)
                for (int half = 0; half < 2; ++half)
                    sum += bfloat16(a.bytes[row] + 4 * pair + 2 * half) * bfloat16(b.bytes[pair] + 4 * column + 2 * half);
            std::memcpy(sums.bytes[row] + 4 * column, &sum, 4);
        }
}

}  // namespace emulated

#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadconfig(shapes) emulated::configure((const uint8_t *)(shapes))
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(number) std::memset(emulated::tile(number).bytes, 0, 1024)
#define _tile_dpbf16ps(into, one, other) emulated::multiply(into, one, other)
#define _tile_release() (void)0
#define syscall(...) 0

// Attention of queries that share keys, in bfloat16 or codes of a byte, by the matrix unit of Intel's processors (AMX). Part
// of host_attention.cpp, whose vectors it uses.
//
// A block of 32 tokens is scored by products of tiles, keys as they lie in memory, or codes as numbers in bfloat16,
// times queries; weights and values are brought into the order that the second product takes. Sums are in float32,
// weights are rounded to bfloat16 as GPUs' kernels do.

constexpr int MOST_TILE_WIDTH = 256;

// A head's block of keys and values.
struct HeadBlock {
    const uint8_t *keys, *values;
    int64_t stride;  // between tokens
    int count, width, value_width;
    alignas(64) float key_scales[32] = {}, value_scales[32] = {};  // of codes
};

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
// The system must be asked once for a process to use tiles. It may refuse.
inline bool may_use_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return may;
}

// Registers: 0 and 1 scores of 16 tokens each, 2 and 3 their keys, 4 queries, 5 weights, 6 values, 7 sums.
inline void begin_tiles(int group) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    const int rows[] = {16, 16, 16, 16, 16, group, 16, group};
    const int columns[] = {group, group, 16, 16, group, 16, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
        shapes.rows[tile] = (uint8_t)rows[tile];
        shapes.row_bytes[tile] = (uint16_t)(columns[tile] * 4);
    }
    _tile_loadconfig(&shapes);
}

inline void end_tiles() { _tile_release(); }

// Loads of tiles are no loads to the compiler: what was stored before must be there.
inline void settle(const void *stored) { asm volatile("" : : "r"(stored) : "memory"); }

// Exchanges the GROUP vectors' numbers with the lowest bits of their lanes' numbers.
template <int GROUP, int STEP = 1> inline __attribute__((always_inline)) void exchange(Floats *of) {
    if constexpr (STEP < GROUP) {
        constexpr auto ALL = std::make_index_sequence<LANES>{};
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; ++i)
            if (!(i & STEP)) {
                Floats low = shuffled(of[i], of[i | STEP], swapped<STEP, false>(ALL));
                of[i | STEP] = shuffled(of[i], of[i | STEP], swapped<STEP, true>(ALL));
                of[i] = low;
            }
        exchange<GROUP, STEP * 2>(of);
    }
}

// Queries as the second factor: (width / 2, GROUP) pairs of neighbours. query: (GROUP, padded), bfloat16.
template <int GROUP> inline void pair_queries(const uint16_t *query, int padded, int width, uint32_t *paired) {
    for (int pair = 0; pair < width / 2; pair += LANES) {
        Floats of[GROUP];
        for (int g = 0; g < GROUP; ++g) of[g] = read<Floats>(query + g * padded + pair * 2);
        exchange<GROUP>(of);
        for (int i = 0; i < LANES; ++i)
            std::memcpy(paired + (pair + i) * GROUP, (const float *)&of[i % GROUP] + i / GROUP * GROUP, GROUP * 4);
    }
}

// What an operation makes of all lanes that belong to one query, in each of them.
template <typename Operation, int GROUP> inline __attribute__((always_inline)) Floats over_tokens(Floats x) {
#pragma GCC unroll 4
    for (int step = GROUP; step < LANES; step *= 2) {
        Ints lanes;
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane ^ step;
        x = Operation::of(shuffled(x, x, lanes), x);
    }
    return x;
}

template <int GROUP> inline Floats each_query(const float *of) {
    Floats found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = of[lane % GROUP];
    return found;
}

// Scores (32, GROUP) of a block.
template <int KIND, int GROUP>
inline void score_tiles(const HeadBlock &block, const uint32_t *paired, Ahead &ahead, float *scores) {
    alignas(64) uint8_t padded[32 * MOST_TILE_WIDTH * 2];
    const uint8_t *keys = block.keys;
    int64_t stride = block.stride;
    if (KIND == INT8 || block.count < 32) {  // nothing behind the last record may be read
        stride = block.width * 2;
        for (int t = 0; t < block.count; ++t)
            for (int c = 0; c < block.width; c += 32)
                _mm512_store_si512(padded + t * stride + c * 2,
                                   load_pairs<KIND>(keys + t * block.stride + c * size_of(KIND)));
        std::memset(padded + block.count * stride, 0, (32 - block.count) * stride);
        keys = padded;
    }
    settle(padded), settle(paired);
    _tile_zero(0);
    _tile_zero(1);
    for (int c = 0; c < block.width / 32; ++c) {
        _tile_loadd(4, paired + c * 16 * GROUP, GROUP * 4);
        _tile_loadd(2, keys + c * 64, stride);
        _tile_dpbf16ps(0, 2, 4);
        ahead.fetch<2>(8 * size_of(KIND));
        _tile_loadd(3, keys + 16 * stride + c * 64, stride);
        _tile_dpbf16ps(1, 3, 4);
        ahead.fetch<2>(8 * size_of(KIND));
    }
    _tile_stored(0, scores, GROUP * 4);
    _tile_stored(1, scores + 16 * GROUP, GROUP * 4);
    settle(scores);
}

// Values of pairs of tokens side by side, for each 16 of them: (value_width / 16, 16, 16, 2), in the order of tokens
// that weights have, and of values that `place_of_pairs` says.
template <int KIND, int GROUP> inline void pair_values(const HeadBlock &block, Ahead &ahead, uint8_t *paired) {
    alignas(64) static const uint8_t nothing[MOST_TILE_WIDTH * 2] = {};
    auto values_of = [&](int place) {
        int token = place / 16 * 16 + place % GROUP * (16 / GROUP) + place % 16 / GROUP;
        return token < block.count ? block.values + token * block.stride : nothing;
    };
    for (int pair = 0; pair < 16; ++pair) {
        const uint8_t *one = values_of(2 * pair), *other = values_of(2 * pair + 1);
        uint8_t *into = paired + pair * 64;
        for (int c = 0; c < block.value_width / 32; ++c, into += 2048) {
            __m512i a = load_pairs<KIND>(one + c * 32 * size_of(KIND)), b = load_pairs<KIND>(other + c * 32 * size_of(KIND));
            _mm512_store_si512(into, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(into + 1024, _mm512_unpackhi_epi16(a, b));
        }
        ahead.fetch<2>(block.value_width * size_of(KIND) / 32);
    }
}

// Attends to a block for GROUP queries. paired: their pairs; highest, totals: (GROUP,); sums: (GROUP, value_width). `of`
// turns products of LANES lanes into scores.
template <int KIND, int GROUP, typename Scored>
void attend_tiles(const HeadBlock &block, const uint32_t *paired, Ahead &ahead, Scored of, float *highest, float *totals,
                  float *sums) {
    constexpr int VECTORS = 2 * GROUP, TOKENS = LANES / GROUP;  // of 16 lanes, and of one of them
    alignas(64) float scores[32 * GROUP];
    alignas(64) uint8_t values[32 * MOST_TILE_WIDTH * 2];
    alignas(64) float added[GROUP * MOST_TILE_WIDTH], fading[LANES];
    score_tiles<KIND, GROUP>(block, paired, ahead, scores);
    pair_values<KIND, GROUP>(block, ahead, values);
    Floats x[VECTORS], most = Floats{} - INFINITY, total{};
    Ints token;
    for (int lane = 0; lane < LANES; ++lane) token[lane] = lane / GROUP;
    auto scales_of = [&](const float *of_tokens, int i) {
        return shuffled(read<Floats>(of_tokens), read<Floats>(of_tokens + LANES), token + i * TOKENS);
    };
#pragma GCC unroll 32
    for (int i = 0; i < VECTORS; ++i) {
        x[i] = read<Floats>(scores + i * LANES);
        if (KIND == INT8) x[i] *= scales_of(block.key_scales, i);
        x[i] = of(x[i]);
        if (block.count < 32) x[i] = token + i * TOKENS < block.count ? x[i] : Floats{} - INFINITY;
        most = larger(x[i], most);
    }
    Floats before = each_query<GROUP>(highest);
    Floats now = larger(before, over_tokens<Largest, GROUP>(most)), faded = exponential(before - now);
#pragma GCC unroll 32
    for (int i = 0; i < VECTORS; ++i) {
        x[i] = exponential(x[i] - now);
        if (block.count < 32) x[i] = token + i * TOKENS < block.count ? x[i] : Floats{};
        total += x[i];
        if (KIND == INT8) x[i] *= scales_of(block.value_scales, i);
    }
    total = each_query<GROUP>(totals) * faded + over_tokens<Sum, GROUP>(total);
    std::memcpy(highest, &now, GROUP * 4);
    std::memcpy(totals, &total, GROUP * 4);
    std::memcpy(fading, &faded, sizeof(Floats));
    exchange<GROUP>(x);
    exchange<GROUP>(x + GROUP);
    alignas(64) uint16_t weights[GROUP * 32];
#pragma GCC unroll 16
    for (int g = 0; g < GROUP; ++g) {
        __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[GROUP + g], (__m512)x[g]);
        std::memcpy(weights + g * 32, &both, 64);
    }
    settle(weights), settle(values);
    _tile_loadd(5, weights, 64);
    for (int c = 0; c < block.value_width / 16; ++c) {
        _tile_zero(7);
        _tile_loadd(6, values + c * 1024, 64);
        _tile_dpbf16ps(7, 5, 6);
        _tile_stored(7, added + c * 16 * GROUP, 64);
    }
    settle(added);
    for (int c = 0; c < block.value_width / 16; ++c)
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; ++g) {
            float *into = sums + g * block.value_width + c * 16;
            Floats found = read<Floats>(into) * fading[g] + read<Floats>(added + (c * GROUP + g) * 16);
            std::memcpy(into, &found, sizeof(Floats));
        }
}
#else
inline bool may_use_tiles() { return false; }
inline void begin_tiles(int) {}
inline void end_tiles() {}
template <int GROUP> inline void pair_queries(const uint16_t *, int, int, uint32_t *) {}
template <int KIND, int GROUP, typename Scored>
void attend_tiles(const HeadBlock &, const uint32_t *, Ahead &, Scored, float *, float *, float *) {}
#endif

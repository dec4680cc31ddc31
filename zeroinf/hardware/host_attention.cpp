// Attention of decode steps over keys and values that rest in host memory, one record of bytes for each token.
//
// Called by zeroinf/hardware/host_library.py, which compiles it for the machine's own instructions. A task is a part of
// a row's tokens and some of its heads; its records are read once, in order, and prefetched a block ahead, since heads
// of one record lie further apart than processors fetch by themselves. Sums are in float32.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
// Tokens that are scored before their values are added: fewer where few queries share keys, so that a task has more heads.
constexpr int BLOCK = 32, SMALL_BLOCK = 16, FEW_QUERIES = 2;
constexpr int TASKS_A_THREAD = 16;
constexpr double AWAKE_S = 0.02;  // that long, who waits for a step does not sleep: its processor has nothing else to do

using Floats = float __attribute__((vector_size(LANES * 4)));
using Ints = int32_t __attribute__((vector_size(LANES * 4)));
using Words = uint32_t __attribute__((vector_size(LANES * 4)));
using Halves = uint16_t __attribute__((vector_size(LANES * 2)));
using Bytes = int8_t __attribute__((vector_size(LANES)));

enum Kind { BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2, INT8 = 3 };  // as in zeroinf/generation/host_kernels.py

constexpr int size_of(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

template <typename T> inline T read(const void *at) {
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
}

template <int KIND> inline Floats load(const uint8_t *at) {
    if constexpr (KIND == FLOAT32) return read<Floats>(at);
#if defined(__AVX512F__)
    if constexpr (KIND == BFLOAT16) return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(at)), 16);
    if constexpr (KIND == INT8) return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(at)));
    return (Floats)_mm512_cvtph_ps(read<__m256i>(at));
#elif defined(__AVX2__) && defined(__F16C__)
    if constexpr (KIND == BFLOAT16) return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(at)), 16);
    if constexpr (KIND == INT8) return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
    return (Floats)_mm256_cvtph_ps(read<__m128i>(at));
#else
    if constexpr (KIND == BFLOAT16) return (Floats)(__builtin_convertvector(read<Halves>(at), Words) << 16);
    if constexpr (KIND == INT8) return __builtin_convertvector(__builtin_convertvector(read<Bytes>(at), Ints), Floats);
    Words bits = __builtin_convertvector(read<Halves>(at), Words);
    Words special = (Words)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Words)magnitude | special | ((bits & 0x8000) << 16));
#endif
}

#if defined(__AVX512BF16__)
// 32 numbers in bfloat16, which has all codes of a byte.
template <int KIND> inline __m512i load_pairs(const uint8_t *at) {
    if constexpr (KIND == BFLOAT16) return _mm512_loadu_si512(at);
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)load<INT8>(at + 16), (__m512)load<INT8>(at));
}
#endif

// The last elements of a head, and zeros behind them.
template <int KIND> inline Floats load_part(const uint8_t *at, int count) {
    alignas(64) uint8_t padded[LANES * 4] = {};
    std::memcpy(padded, at, count * size_of(KIND));
    return load<KIND>(padded);
}

inline uint16_t rounded_float16(float value) {
#if defined(__F16C__) || defined(__AVX512F__)
    return _cvtss_sh(value, 0);
#else
#if defined(__FLT16_MANT_DIG__)
    _Float16 half = value;
#else
    __fp16 half = value;
#endif
    return read<uint16_t>(&half);
#endif
}

// The first `count` lanes, rounded.
inline void store(int kind, uint8_t *at, Floats values, int count) {
    if (kind == FLOAT32) {
        std::memcpy(at, &values, count * 4);
        return;
    }
    Halves rounded;
    if (kind == BFLOAT16) {
        Words bits = (Words)values, up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        rounded = __builtin_convertvector(values == values ? up : bits >> 16 | 0x40, Halves);
    } else
        for (int lane = 0; lane < LANES; ++lane) rounded[lane] = rounded_float16(values[lane]);
    std::memcpy(at, &rounded, count * 2);
}

// NaN stays NaN; what is below the smallest normal number becomes that.
inline Floats exponential(Floats x) {
    x = x < -87.3f ? (Floats{} - 87.3f) : x;
    Floats shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Floats)(((Ints)shifted - 0x4b400000 + 127) << 23);
}

// Lanes of two vectors of which every other STEP change places, so that their sums lie in one vector.
template <int STEP, bool HIGH, size_t... LANE> constexpr Ints swapped(std::index_sequence<LANE...>) {
    return Ints{(LANE & STEP ? (int)(LANES + (HIGH ? LANE : LANE ^ STEP)) : (int)(HIGH ? LANE ^ STEP : LANE))...};
}

inline Floats shuffled(Floats a, Floats b, Ints lanes) {
#if defined(__clang__)
    Floats found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = lanes[lane] < LANES ? a[lanes[lane]] : b[lanes[lane] - LANES];
    return found;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

struct Sum {
    static Floats of(Floats a, Floats b) { return a + b; }
};

struct Largest {
    static Floats of(Floats a, Floats b) { return larger(a, b); }
};

// The place that value `of` of a head has where values of two tokens are brought side by side, 32 of each at once.
constexpr int place_of_pairs(int of) { return of / 32 * 32 + of % 8 / 4 * 16 + of % 32 / 8 * 4 + of % 4; }

template <size_t... LANE> inline Floats in_order(const float *sums, int first, std::index_sequence<LANE...>) {
    constexpr Ints LOW{(place_of_pairs(LANE) % (2 * LANES))...}, HIGH{(place_of_pairs(LANE + LANES) % (2 * LANES))...};
    const float *both = sums + first / 32 * 32;
    Floats a = read<Floats>(both), b = read<Floats>(both + LANES);
    return first % 32 ? shuffled(a, b, HIGH) : shuffled(a, b, LOW);
}

// LANES (16) values from the `first` on, of sums in the order of pairs.
inline Floats in_order(const float *sums, int first) {
    return in_order(sums, first, std::make_index_sequence<LANES>{});
}

// What an operation makes of each of COUNT vectors' lanes, of number i in every lane whose number is i modulo COUNT.
template <typename Operation, int COUNT, int STEP = 1> inline __attribute__((always_inline)) Floats fold(const Floats *of) {
    constexpr auto ALL = std::make_index_sequence<LANES>{};
    if constexpr (STEP == LANES) return of[0];
    else if constexpr (STEP >= COUNT) {
        Floats both = Operation::of(of[0], shuffled(of[0], of[0], swapped<STEP, true>(ALL)));
        return fold<Operation, COUNT, STEP * 2>(&both);
    } else {
        Floats half[COUNT / STEP / 2];
#pragma GCC unroll 16
        for (int i = 0; i < COUNT / STEP / 2; ++i) {
            Floats low = shuffled(of[2 * i], of[2 * i + 1], swapped<STEP, false>(ALL));
            half[i] = Operation::of(low, shuffled(of[2 * i], of[2 * i + 1], swapped<STEP, true>(ALL)));
        }
        return fold<Operation, COUNT, STEP * 2>(half);
    }
}

// What a task reads next, in the order of its addresses: a run of keys and a run of values of each record. Processors
// fetch by themselves what is read in order, and memory is quickest at it, but heads are read one after the other.
struct Ahead {
    const uint8_t *at = nullptr, *end = nullptr;
    int64_t runs[2] = {}, gaps[2] = {};  // bytes of keys and of values, and between them
    int64_t left = 0;          // runs
    int kind = 0;

    // LEVEL as the compiler has it: 3 is the smallest cache, 2 the next one.
    template <int LEVEL> inline void fetch() {
        if (at >= end) {
            if (left == 0) return;
            --left;
            at = end + gaps[kind];
            kind ^= 1;
            end = at + runs[kind];
        }
        __builtin_prefetch(at, 0, LEVEL);
        at += 64;
    }

    template <int LEVEL> inline void fetch(int lines) {
        for (int i = 0; i < lines; ++i) fetch<LEVEL>();
    }
};

// Where a query has keys of its own, or tiles multiply, little is computed for each byte: a block is gone from the
// smallest cache before its turn.
constexpr int level_of(int group) { return group == 1 ? 2 : 3; }

// A block of a task's heads, and the next one, which is prefetched, take three quarters of the second cache. Heads whose
// keys lie side by side are read together as far as may be: each page of memory is come to but once.
inline int64_t most_block_bytes() {
    long nbytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    nbytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::max<int64_t>(nbytes, 256 << 10) * 3 / 8;
}

#include "host_attention_tiles.h"

// Queries times the keys of a block. query: (GROUP, width, padded with zeros); scores: (GROUP, BLOCK).
template <int KIND, int GROUP>
void multiply_keys(const float *query, int padded, const uint8_t *keys, int64_t stride, Ahead &ahead, int width,
                   int count, float *scores) {
    constexpr int KEYS = LANES / GROUP;
    const int whole = width / LANES * LANES;
    for (int first = 0; first < count; first += KEYS) {
        const uint8_t *at[KEYS];
        for (int k = 0; k < KEYS; ++k) at[k] = keys + std::min(first + k, count - 1) * stride;
        Floats sums[LANES] = {};
        for (int c = 0; c < whole; c += LANES)
#pragma GCC unroll 16
            for (int k = 0; k < KEYS; ++k) {
                Floats key = load<KIND>(at[k] + c * size_of(KIND));
                if (c % (64 / size_of(KIND)) == 0) ahead.fetch<level_of(GROUP)>();
#pragma GCC unroll 16
                for (int g = 0; g < GROUP; ++g) sums[g * KEYS + k] += key * read<Floats>(query + g * padded + c);
            }
        if (whole < width)
            for (int k = 0; k < KEYS; ++k) {
                Floats key = load_part<KIND>(at[k] + whole * size_of(KIND), width - whole);
                for (int g = 0; g < GROUP; ++g) sums[g * KEYS + k] += key * read<Floats>(query + g * padded + whole);
            }
        Floats found = fold<Sum, LANES>(sums);
        for (int g = 0; g < GROUP; ++g) std::memcpy(scores + g * BLOCK + first, (float *)&found + g * KEYS, KEYS * 4);
    }
}

#if defined(__AVX512BF16__)
// The same with products of pairs. query: (GROUP, width) in bfloat16, of which 32 fill a vector. Codes become numbers once
// for all queries.
template <int KIND, int GROUP>
void multiply_pairs(const uint16_t *query, int padded, const uint8_t *keys, int64_t stride, Ahead &ahead, int width,
                    int count, float *scores) {
    constexpr int KEYS = LANES / GROUP;
    for (int first = 0; first < count; first += KEYS) {
        const uint8_t *at[KEYS];
        for (int k = 0; k < KEYS; ++k) at[k] = keys + std::min(first + k, count - 1) * stride;
        Floats sums[LANES] = {};
        for (int c = 0; c < width; c += 32)
#pragma GCC unroll 16
            for (int k = 0; k < KEYS; ++k) {
                __m512bh key = (__m512bh)load_pairs<KIND>(at[k] + c * size_of(KIND));
                if (c % (64 / size_of(KIND)) == 0) ahead.fetch<level_of(GROUP)>();
#pragma GCC unroll 16
                for (int g = 0; g < GROUP; ++g) {
                    __m512bh other = (__m512bh)_mm512_loadu_si512(query + g * padded + c);
                    sums[g * KEYS + k] = (Floats)_mm512_dpbf16_ps((__m512)sums[g * KEYS + k], key, other);
                }
            }
        Floats found = fold<Sum, LANES>(sums);
        for (int g = 0; g < GROUP; ++g) std::memcpy(scores + g * BLOCK + first, (float *)&found + g * KEYS, KEYS * 4);
    }
}
#endif

// Adds a block's values to CHUNKS vectors of the sums. weights: (GROUP, BLOCK); sums: (GROUP, padded).
template <int KIND, int GROUP, int CHUNKS>
inline void add_chunks(const float *weights, const float *fading, const uint8_t *values, int64_t stride, Ahead &ahead,
                       int count, float *sums, int padded) {
    Floats held[GROUP][CHUNKS];
    for (int g = 0; g < GROUP; ++g)
        for (int c = 0; c < CHUNKS; ++c) held[g][c] = read<Floats>(sums + g * padded + c * LANES) * fading[g];
    for (int t = 0; t < count; ++t, values += stride) {
        ahead.fetch<level_of(GROUP)>((CHUNKS * LANES * size_of(KIND) + 63) / 64);
#pragma GCC unroll 8
        for (int c = 0; c < CHUNKS; ++c) {
            Floats value = load<KIND>(values + c * LANES * size_of(KIND));
#pragma GCC unroll 16
            for (int g = 0; g < GROUP; ++g) held[g][c] += value * weights[g * BLOCK + t];
        }
    }
    for (int g = 0; g < GROUP; ++g)
        for (int c = 0; c < CHUNKS; ++c) std::memcpy(sums + g * padded + c * LANES, &held[g][c], sizeof(Floats));
}

template <int KIND, int GROUP>
void add_values(const float *weights, const float *fading, const uint8_t *values, int64_t stride, Ahead &ahead,
                int width, int count, float *sums, int padded) {
    constexpr int MOST = std::min(8, std::max(1, LANES / GROUP));
    const int whole = width / LANES * LANES;
    int c = 0;
    for (; c + MOST * LANES <= whole; c += MOST * LANES)
        add_chunks<KIND, GROUP, MOST>(weights, fading, values + c * size_of(KIND), stride, ahead, count, sums + c, padded);
    for (; c < whole; c += LANES)
        add_chunks<KIND, GROUP, 1>(weights, fading, values + c * size_of(KIND), stride, ahead, count, sums + c, padded);
    if (c == width) return;
    for (int g = 0; g < GROUP; ++g) {
        Floats held = read<Floats>(sums + g * padded + c) * fading[g];
        for (int t = 0; t < count; ++t)
            held += load_part<KIND>(values + t * stride + c * size_of(KIND), width - c) * weights[g * BLOCK + t];
        std::memcpy(sums + g * padded + c, &held, sizeof(Floats));
    }
}

}  // namespace

extern "C" {

// Field by field as `HostLayout` in zeroinf/hardware/host_library.py.
struct Layout {
    int64_t stride, keys_at, values_at, key_scales_at, value_scales_at;
    int32_t heads, group, width, value_width, kind, query_kind;
    float scale, softcap;  // 0: none
    const float *sinks;    // of each head of the queries, or null
};

struct RowTokens {
    int64_t first, count;  // records that the row's query sees, its own among them as the last one
};
}

namespace {

// Threads stay on these processors, whichever are idle; on any where none are named.
struct Processors {
    std::vector<int> numbers;

    void bind(std::thread &thread) const {
#if defined(__linux__)
        cpu_set_t set;
        CPU_ZERO(&set);
        for (int number : numbers)
            if (number < CPU_SETSIZE) CPU_SET(number, &set);
        if (CPU_COUNT(&set)) pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
#endif
    }
};

// Between two looks at what another thread or a GPU writes.
inline void wait_briefly(int turn) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (turn % 256 == 0) std::this_thread::yield();
}

// Whether something came true within so many seconds, in which nobody sleeps.
template <typename Ready> bool look_for(double seconds, Ready ready) {
    using Clock = std::chrono::steady_clock;
    const auto until = Clock::now() + std::chrono::duration<double>(seconds);
    for (int turn = 1; !ready(); ++turn) {
        wait_briefly(turn);
        if (turn % 64 == 0 && Clock::now() > until) return ready();
    }
    return true;
}

// Threads that work on the tasks of one call at a time. Only those that fall asleep, and who wakes them, take a lock:
// where all begin at once, they would wait for each other's turns, asleep.
class Pool {
  public:
    Pool(int threads, const Processors &processors) : sleepers_(threads) {
        try {
            for (int i = 1; i < threads; ++i) {
                threads_.emplace_back([this, i] { serve(i); });
                processors.bind(threads_.back());
            }
        } catch (...) {  // the system has no more
            end();
            throw;
        }
    }

    ~Pool() { end(); }

    int size() const { return (int)threads_.size() + 1; }

    // Wakes the threads, which takes longer than a GPU does for a layer: for a while they look for the next call without
    // sleeping.
    void expect_call() {
        ++expected_;
        wake();
    }

    // Calls act(thread, task, next) for each of `count` tasks, by all threads and this one, of which `thread` is the
    // number; `next` is what the same thread does then, `count` or more if nothing. Nothing may be thrown.
    template <typename Act> void run(int count, Act act) {
        if (count < 1) return;
        std::lock_guard<std::mutex> one_caller(calls_);
        count_ = count;
        act_ = [&act](int thread, int task, int next) { act(thread, task, next); };
        done_ = 0;
        left_ = ++number_ << 32 | (uint64_t)count;
        wake();
        work(0);
        auto is_done = [&] { return done_ == count; };
        if (look_for(AWAKE_S, is_done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        over_.wait(lock, is_done);
    }

  private:
    struct Sleeper {
        std::mutex mutex;
        std::condition_variable wakes;
        std::atomic<bool> sleeps{false};
    };

    void end() {
        ends_ = true;
        wake();
        for (auto &thread : threads_) thread.join();
    }

    bool has_tasks() const { return (uint32_t)left_ != 0; }

    // A task that nobody has, or the number of tasks. `count_` and `act_` are those of its call, which cannot be over
    // before the task is.
    int take() {
        uint64_t left = left_;
        while ((uint32_t)left != 0)
            if (left_.compare_exchange_weak(left, left - 1)) return count_ - (int)(uint32_t)left;
        return NOTHING;
    }

    void work(int thread) {
        for (int task = take(), next; task != NOTHING; task = next) {
            const int count = count_;
            next = take();
            act_(thread, task, next);
            if (++done_ == count) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                over_.notify_all();
            }
        }
    }

    // Whoever is about to sleep says so before looking a last time; what it looks at has changed before this is called.
    void wake() {
        for (auto &sleeper : sleepers_)
            if (sleeper.sleeps) {
                { std::lock_guard<std::mutex> lock(sleeper.mutex); }
                sleeper.wakes.notify_one();
            }
    }

    void serve(int thread) {
        auto &own = sleepers_[thread];
        for (uint64_t seen = 0;;) {
            work(thread);
            {
                std::unique_lock<std::mutex> lock(own.mutex);
                own.sleeps = true;
                own.wakes.wait(lock, [&] { return ends_ || has_tasks() || expected_ != seen; });
                own.sleeps = false;
            }
            if (ends_) return;
            if (expected_ == seen) continue;
            seen = expected_;
            look_for(AWAKE_S, [&] { return ends_ || has_tasks(); });
        }
    }

    static constexpr int NOTHING = INT32_MAX;
    std::vector<Sleeper> sleepers_;
    std::vector<std::thread> threads_;
    std::mutex calls_, mutex_;
    std::condition_variable over_;
    uint64_t number_ = 0;  // of the call
    int count_ = 0;
    std::function<void(int, int, int)> act_;
    std::atomic<uint64_t> left_{0};  // the call's number, and in the lower half its tasks that nobody has
    std::atomic<int> done_{0};
    std::atomic<uint64_t> expected_{0};
    std::atomic<bool> ends_{false};
};

int round_up(int number, int unit) { return (number + unit - 1) / unit * unit; }

// Memory that steps use one after the other: the system would clear it for each of them. It begins with a line of the
// cache, as everything in it does that vectors or tiles are read from.
class Buffer {
  public:
    float *of(size_t count) {
        if (count > count_) {
            held_.reset();
            count_ = 0;
            held_.reset(new float[count + LINE]);
            count_ = count;
        }
        return (float *)(((uintptr_t)held_.get() + LINE * sizeof(float) - 1) / (LINE * sizeof(float)) * (LINE * sizeof(float)));
    }

    static constexpr int LINE = 16;  // numbers

  private:
    std::unique_ptr<float[]> held_;
    size_t count_ = 0;
};

struct Step {
    Layout layout;
    const RowTokens *rows;
    int64_t count;
    uint8_t *memory;
    const uint8_t *fresh, *query;
    uint8_t *out;
    const int64_t *flag;  // raised to the step's number when all of this is there; null: it is
};

// A step in tasks. What its pointers point to is read by tasks alone, but for `rows`.
class Attention {
  public:
    Attention(const Step &step, int threads, Buffer &results, Buffer &queries)
        : of_(step.layout), rows_(step.rows), memory_(step.memory), fresh_(step.fresh), query_(step.query), out_(step.out) {
        const Layout &layout = of_;
        const RowTokens *rows = rows_;
        const int64_t count = step.count;
        padded_ = round_up(layout.width, 32);
        value_padded_ = round_up(layout.value_width, LANES);
        tiles_ = takes_tiles(layout);
        tile_ = tiles_ ? 16 : std::min(8, LANES);
        while (tile_ > 1 && tile_ / 2 >= layout.group) tile_ /= 2;
        group_ = round_up(layout.group, tile_);
        block_ = tiles_ || tile_ > FEW_QUERIES ? BLOCK : SMALL_BLOCK;
        int64_t head_bytes = (int64_t)(layout.width + layout.value_width) * size_of(layout.kind);
        int most = (int)std::clamp<int64_t>(most_block_bytes() / block_ / head_bytes, 1, layout.heads);
        parts_ = (layout.heads + most - 1) / most;
        heads_ = (layout.heads + parts_ - 1) / parts_;
        int64_t total = 0;
        for (int64_t row = 0; row < count; ++row) total += rows[row].count;
        int64_t share = total * parts_ / ((int64_t)threads * TASKS_A_THREAD);
        const int64_t tokens = std::max<int64_t>(4 * BLOCK, share);
        for (int64_t row = 0; row < count; ++row) {
            int splits = (int)((rows[row].count + tokens - 1) / tokens);
            for (int part = 0; part < parts_; ++part) {
                for (int split = 0; split < splits; ++split) tasks_.push_back({row, part, split, splits});
            }
        }
        results_ = std::vector<std::atomic<int>>(count * parts_);
        firsts_.resize(tasks_.size());
        int64_t at = 0;
        for (size_t task = 0; task < tasks_.size(); ++task) firsts_[task] = at, at += result_floats(tasks_[task].part);
        held_ = results.of(at);
        lines_floats_ = (size_t)heads_ * group_ * padded_;
        queries_ = queries.of(2 * lines_floats_ * threads);
    }

    int tasks() const { return (int)tasks_.size(); }

    void act(int thread, int number, int next) {
        const Task &task = tasks_[number];
        float *result = held_ + firsts_[number];
        attend(task, next < tasks() ? &tasks_[next] : nullptr, result, queries_ + 2 * lines_floats_ * thread);
        auto &done = results_[task.row * parts_ + task.part];
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == task.splits) combine(task, number - task.split);
        // `number` is whichever part came last; the parts of one result lie side by side
    }

  private:
    struct Task {
        int64_t row;
        int part, split, splits;
    };

    static bool takes_tiles(const Layout &of) {
        auto fits = [](int width) { return width % 32 == 0 && width <= MOST_TILE_WIDTH; };
        bool shared = of.group > 1 && (of.kind == BFLOAT16 || of.kind == INT8) && of.query_kind == BFLOAT16;
        return shared && fits(of.width) && fits(of.value_width) && may_use_tiles();
    }

    int first_head(int part) const { return part * heads_; }
    int head_count(int part) const { return std::min(heads_, of_.heads - part * heads_); }
    // A result is the highest scores of some queries, their totals, and sums of values.
    static int sums_at(int lines) { return round_up(2 * lines, Buffer::LINE); }
    int64_t result_floats(int part) const {
        int64_t lines = (int64_t)head_count(part) * group_;
        return sums_at(lines) + round_up(lines * value_padded_, Buffer::LINE);
    }

    void place_new(const Task &task, uint8_t *record) {
        const uint8_t *from = fresh_ + task.row * of_.stride;
        auto copy = [&](int64_t at, int64_t nbytes) {  // of one head
            at += first_head(task.part) * nbytes;
            std::memcpy(record + at, from + at, head_count(task.part) * nbytes);
        };
        copy(of_.keys_at, (int64_t)of_.width * size_of(of_.kind));
        copy(of_.values_at, (int64_t)of_.value_width * size_of(of_.kind));
        if (of_.kind == INT8) copy(of_.key_scales_at, 4), copy(of_.value_scales_at, 4);
    }

    // The parts of a row are as long as each other, but for a block.
    int64_t begin_of(const Task &task, int more = 0) const {
        int64_t blocks = (rows_[task.row].count + BLOCK - 1) / BLOCK;
        return (task.split + more) * blocks / task.splits * BLOCK;
    }
    int64_t end_of(const Task &task) const { return std::min(rows_[task.row].count, begin_of(task, 1)); }

    // queries: memory for those of the task, which are brought into the form in which they are multiplied.
    void attend(const Task &task, const Task *next, float *result, float *queries) {
        const RowTokens &row = rows_[task.row];
        int64_t begin = begin_of(task), end = end_of(task);
        uint8_t *records = memory_ + row.first * of_.stride;
        if (end == row.count) place_new(task, records + (row.count - 1) * of_.stride);
        const int heads = head_count(task.part), lines = heads * group_;
        float *floats = queries;
        auto *pairs = (uint16_t *)(queries + lines_floats_);
        if (padded_ != of_.width || group_ != of_.group) std::memset(queries, 0, 2 * lines_floats_ * sizeof(float));
        for (int head = 0; head < heads; ++head)
            for (int g = 0; g < of_.group; ++g) {
                int64_t line = (int64_t)task.row * of_.heads * of_.group + (first_head(task.part) + head) * of_.group + g;
                const uint8_t *query = query_ + line * of_.width * size_of(of_.query_kind);
                size_t own = (size_t)(head * group_ + g) * padded_;
                if (of_.query_kind == BFLOAT16) std::memcpy(pairs + own, query, of_.width * 2);
                if (!tiles_) read_query(query, floats + own);
            }
        float *highest = result, *totals = result + lines, *sums = result + sums_at(lines);
        std::fill(highest, highest + lines, -1e30f);
        std::fill(totals, totals + lines, 0.0f);
        std::fill(sums, sums + (size_t)lines * value_padded_, 0.0f);
        auto *tiled = (uint32_t *)queries;
        if (tiles_) {
            for (int line = 0; line < lines; line += tile_) {
                size_t own = (size_t)line * padded_;
                pair_tile(pairs + own, tiled + own / 2);
            }
            begin_tiles(tile_);
        }
        for (int64_t at = begin; at < end; at += block_) {
            int count = (int)std::min<int64_t>(block_, end - at);
            const uint8_t *block = records + at * of_.stride;
            if (of_.kind == INT8 && at + block_ < end)
                fetch_scales(block + block_ * of_.stride, std::min<int64_t>(block_, end - at - block_), task.part);
            Ahead ahead = at + block_ < end ? ahead_of(task, at + block_) : next ? ahead_of(*next, begin_of(*next)) : Ahead();
            for (int head = 0; head < heads; ++head) {
                for (int g = 0; g < group_; g += tile_) {
                    int line = head * group_ + g;
                    if (tiles_)
                        one_by_tiles(block, ahead, first_head(task.part) + head, count,
                                     tiled + (size_t)line * padded_ / 2, highest + line, totals + line,
                                     sums + (size_t)line * value_padded_);
                    else
                        one(block, ahead, first_head(task.part) + head, count, floats + (size_t)line * padded_,
                            pairs + (size_t)line * padded_, highest + line, totals + line,
                            sums + (size_t)line * value_padded_);
                }
            }
        }
        if (tiles_) end_tiles();
    }

    // Scales lie apart from what is prefetched in the order of its addresses, in a line or two of each record.
    void fetch_scales(const uint8_t *block, int64_t count, int part) const {
        const int64_t first = first_head(part) * 4, last = first + head_count(part) * 4 - 4;
        for (int64_t t = 0; t < count; ++t, block += of_.stride)
            for (int64_t at : {of_.key_scales_at, of_.value_scales_at}) {
                __builtin_prefetch(block + at + first);
                __builtin_prefetch(block + at + last);
            }
    }

    // The block of a task that begins with its token `at`.
    Ahead ahead_of(const Task &task, int64_t at) const {
        const int part = task.part;
        const uint8_t *block = memory_ + (rows_[task.row].first + at) * of_.stride;
        int64_t key = (int64_t)of_.width * size_of(of_.kind), value = (int64_t)of_.value_width * size_of(of_.kind);
        int64_t keys = of_.keys_at + first_head(part) * key, values = of_.values_at + first_head(part) * value;
        Ahead ahead;
        ahead.runs[0] = head_count(part) * key, ahead.runs[1] = head_count(part) * value;
        ahead.gaps[0] = values - keys - ahead.runs[0], ahead.gaps[1] = of_.stride - (values - keys) - ahead.runs[1];
        ahead.left = 2 * std::min<int64_t>(block_, end_of(task) - at), ahead.kind = 1;
        ahead.end = block + keys - ahead.gaps[1];
        ahead.at = ahead.end;
        return ahead;
    }

    void read_query(const uint8_t *from, float *floats) const {
        for (int c = 0; c < of_.width; c += LANES) {
            int left = std::min(LANES, of_.width - c);
            const uint8_t *at = from + c * size_of(of_.query_kind);
            Floats found = of_.query_kind == FLOAT32    ? load_part<FLOAT32>(at, left)
                           : of_.query_kind == BFLOAT16 ? load_part<BFLOAT16>(at, left)
                                                        : load_part<FLOAT16>(at, left);
            std::memcpy(floats + c, &found, sizeof(Floats));
        }
    }

    void pair_tile(const uint16_t *query, uint32_t *paired) const {
        if (tile_ == 2) pair_queries<2>(query, padded_, of_.width, paired);
        else if (tile_ == 4) pair_queries<4>(query, padded_, of_.width, paired);
        else if (tile_ == 8) pair_queries<8>(query, padded_, of_.width, paired);
        else pair_queries<16>(query, padded_, of_.width, paired);
    }

    void one_by_tiles(const uint8_t *block, Ahead &ahead, int head, int count, const uint32_t *paired, float *highest,
                      float *totals, float *sums) const {
        const int size = size_of(of_.kind);
        HeadBlock of{block + of_.keys_at + (int64_t)head * of_.width * size,
                     block + of_.values_at + (int64_t)head * of_.value_width * size, of_.stride, count, of_.width,
                     of_.value_width};
        auto scored = [this](Floats x) { return of_.softcap != 0 ? capped(x * of_.scale) : x * of_.scale; };
        auto attend = [&](auto kind) {
            constexpr int KIND = decltype(kind)::value;
            if (tile_ == 2) attend_tiles<KIND, 2>(of, paired, ahead, scored, highest, totals, sums);
            else if (tile_ == 4) attend_tiles<KIND, 4>(of, paired, ahead, scored, highest, totals, sums);
            else if (tile_ == 8) attend_tiles<KIND, 8>(of, paired, ahead, scored, highest, totals, sums);
            else attend_tiles<KIND, 16>(of, paired, ahead, scored, highest, totals, sums);
        };
        if (of_.kind == BFLOAT16) return attend(std::integral_constant<int, BFLOAT16>{});
        scales(block, head, count, of.key_scales, of.value_scales);
        attend(std::integral_constant<int, INT8>{});
    }

    // Scales of a block's codes, (BLOCK,) each.
    void scales(const uint8_t *block, int head, int count, float *of_keys, float *of_values) const {
        for (int t = 0; t < count; ++t, block += of_.stride) {
            of_keys[t] = read<float>(block + of_.key_scales_at + head * 4);
            of_values[t] = read<float>(block + of_.value_scales_at + head * 4);
        }
    }

    void one(const uint8_t *block, Ahead &ahead, int head, int count, const float *floats, const uint16_t *pairs,
             float *highest, float *totals, float *sums) const {
        alignas(64) float scores[8 * BLOCK], key_scales[BLOCK], value_scales[BLOCK], fading[LANES];
        const uint8_t *keys = block + of_.keys_at + (int64_t)head * of_.width * size_of(of_.kind);
        const uint8_t *values = block + of_.values_at + (int64_t)head * of_.value_width * size_of(of_.kind);
        if (of_.kind == INT8) scales(block, head, count, key_scales, value_scales);
        multiply(keys, ahead, count, floats, pairs, scores);
        if (tile_ == 1) weigh<1>(scores, count, key_scales, value_scales, highest, totals, fading);
        else if (tile_ == 2) weigh<2>(scores, count, key_scales, value_scales, highest, totals, fading);
        else if (tile_ == 4) weigh<4>(scores, count, key_scales, value_scales, highest, totals, fading);
        else weigh<8>(scores, count, key_scales, value_scales, highest, totals, fading);
        add(scores, fading, values, ahead, count, sums);
    }

    // Turns scores of a block into weights; `fading` is what earlier sums are to be multiplied by.
    template <int GROUP>
    void weigh(float *scores, int count, const float *key_scales, const float *value_scales, float *highest,
               float *totals, float *fading) const {
        Floats most[GROUP], sums[GROUP] = {}, before, total;
        for (int lane = 0; lane < LANES; ++lane) before[lane] = highest[lane % GROUP], total[lane] = totals[lane % GROUP];
        for (int g = 0; g < GROUP; ++g) most[g] = Floats{} - INFINITY;
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; ++g) {
            float *own = scores + g * BLOCK;
            for (int t = 0; t < count; t += LANES) {
                Floats x = read<Floats>(own + t) * of_.scale;
                if (of_.kind == INT8) x *= read<Floats>(key_scales + t);
                if (of_.softcap != 0) x = capped(x);
                for (int lane = std::min(LANES, count - t); lane < LANES; ++lane) x[lane] = -INFINITY;
                std::memcpy(own + t, &x, sizeof(Floats));
                most[g] = larger(x, most[g]);
            }
        }
        Floats now = larger(before, fold<Largest, GROUP>(most)), faded = exponential(before - now);
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; ++g) {
            float *own = scores + g * BLOCK;
            for (int t = 0; t < count; t += LANES) {
                Floats x = exponential(read<Floats>(own + t) - now[g]);
                for (int lane = std::min(LANES, count - t); lane < LANES; ++lane) x[lane] = 0;
                sums[g] += x;
                if (of_.kind == INT8) x *= read<Floats>(value_scales + t);
                std::memcpy(own + t, &x, sizeof(Floats));
            }
        }
        total = total * faded + fold<Sum, GROUP>(sums);
        std::memcpy(highest, &now, GROUP * 4);
        std::memcpy(totals, &total, GROUP * 4);
        std::memcpy(fading, &faded, sizeof(Floats));
    }

    Floats capped(Floats x) const {
        Floats most = Floats{} + 40.0f * of_.softcap, inside = x > most ? most : x;
        inside = inside < -most ? -most : inside;
        return of_.softcap * (1.0f - 2.0f / (exponential(inside * (2 / of_.softcap)) + 1.0f));
    }

    template <int KIND, int GROUP>
    void multiply_as(const uint8_t *keys, Ahead &ahead, int count, const float *floats, const uint16_t *pairs, float *scores) const {
#if defined(__AVX512BF16__)
        if constexpr (KIND == BFLOAT16 || (KIND == INT8 && GROUP > FEW_QUERIES))
            if (of_.query_kind == BFLOAT16 && of_.width % 32 == 0)
                return multiply_pairs<KIND, GROUP>(pairs, padded_, keys, of_.stride, ahead, of_.width, count, scores);
#endif
        multiply_keys<KIND, GROUP>(floats, padded_, keys, of_.stride, ahead, of_.width, count, scores);
    }

    template <int KIND>
    void multiply_tile(const uint8_t *keys, Ahead &ahead, int count, const float *floats, const uint16_t *pairs, float *scores) const {
        if (tile_ == 1) multiply_as<KIND, 1>(keys, ahead, count, floats, pairs, scores);
        else if (tile_ == 2) multiply_as<KIND, 2>(keys, ahead, count, floats, pairs, scores);
        else if (tile_ == 4) multiply_as<KIND, 4>(keys, ahead, count, floats, pairs, scores);
        else multiply_as<KIND, 8>(keys, ahead, count, floats, pairs, scores);
    }

    void multiply(const uint8_t *keys, Ahead &ahead, int count, const float *floats, const uint16_t *pairs, float *scores) const {
        if (of_.kind == BFLOAT16) multiply_tile<BFLOAT16>(keys, ahead, count, floats, pairs, scores);
        else if (of_.kind == FLOAT16) multiply_tile<FLOAT16>(keys, ahead, count, floats, pairs, scores);
        else if (of_.kind == FLOAT32) multiply_tile<FLOAT32>(keys, ahead, count, floats, pairs, scores);
        else multiply_tile<INT8>(keys, ahead, count, floats, pairs, scores);
    }

    template <int KIND>
    void add_tile(const float *weights, const float *fading, const uint8_t *values, Ahead &ahead, int count, float *sums) const {
        auto with = [&](auto add) { add(weights, fading, values, of_.stride, ahead, of_.value_width, count, sums, value_padded_); };
        if (tile_ == 1) with(add_values<KIND, 1>);
        else if (tile_ == 2) with(add_values<KIND, 2>);
        else if (tile_ == 4) with(add_values<KIND, 4>);
        else with(add_values<KIND, 8>);
    }

    void add(const float *weights, const float *fading, const uint8_t *values, Ahead &ahead, int count, float *sums) const {
        if (of_.kind == BFLOAT16) add_tile<BFLOAT16>(weights, fading, values, ahead, count, sums);
        else if (of_.kind == FLOAT16) add_tile<FLOAT16>(weights, fading, values, ahead, count, sums);
        else if (of_.kind == FLOAT32) add_tile<FLOAT32>(weights, fading, values, ahead, count, sums);
        else add_tile<INT8>(weights, fading, values, ahead, count, sums);
    }

    // The parts of a row's tokens become the result of some of its heads.
    void combine(const Task &task, int first) {
        const int heads = head_count(task.part), lines = heads * group_, size = size_of(of_.query_kind);
        for (int head = 0; head < heads; ++head)
            for (int g = 0; g < of_.group; ++g) {
                int line = head * group_ + g, index = (first_head(task.part) + head) * of_.group + g;
                float most = of_.sinks ? of_.sinks[index] : -1e30f;
                for (int split = 0; split < task.splits; ++split) {
                    float other = held_[firsts_[first + split] + line];
                    most = other > most || std::isnan(other) ? other : most;
                }
                float total = of_.sinks ? std::exp(of_.sinks[index] - most) : 0.0f;
                float *sums = sums_of(first, line, lines);
                for (int split = 0; split < task.splits; ++split) {
                    const float *part = held_ + firsts_[first + split], *theirs = sums_of(first + split, line, lines);
                    float share = std::exp(part[line] - most);
                    total += part[lines + line] * share;
                    for (int c = 0; c < value_padded_; c += LANES) {
                        Floats sum = read<Floats>(theirs + c) * share;
                        if (split) sum += read<Floats>(sums + c);
                        std::memcpy(sums + c, &sum, sizeof(Floats));
                    }
                }
                uint8_t *into = out_ + (task.row * of_.heads * of_.group + index) * (int64_t)of_.value_width * size;
                for (int c = 0; c < of_.value_width; c += LANES) {
                    Floats found = tiles_ ? in_order(sums, c) : read<Floats>(sums + c);
                    store(of_.query_kind, into + c * size, found / total, std::min(LANES, of_.value_width - c));
                }
            }
    }

    float *sums_of(int task, int line, int lines) const {
        return held_ + firsts_[task] + sums_at(lines) + (size_t)line * value_padded_;
    }

    const Layout of_;
    const RowTokens *rows_;
    uint8_t *memory_;
    const uint8_t *fresh_, *query_;
    uint8_t *out_;
    bool tiles_;  // with them, sums of values are in the order of pairs
    int padded_, value_padded_, tile_, group_, block_, heads_, parts_;
    std::vector<Task> tasks_;
    std::vector<int64_t> firsts_;
    std::vector<std::atomic<int>> results_;
    float *held_, *queries_;
    size_t lines_floats_;
};

// Threads, one of which takes steps in the order of their numbers.
class Attending {
  public:
    Attending(int threads, const Processors &processors) : pool(threads, processors), thread_([this] { serve(); }) {
        processors.bind(thread_);
    }

    ~Attending() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
        }
        wakes_.notify_all();
        thread_.join();
    }

    int64_t submit(const Step &step) {
        std::lock_guard<std::mutex> lock(mutex_);
        waiting_.push_back(step);
        wakes_.notify_all();
        return ++submitted_;
    }

    bool wait(int64_t number, double seconds) {
        if (look_for(std::min(seconds, AWAKE_S), [&] { return finished_ >= number; })) return true;
        std::unique_lock<std::mutex> lock(mutex_);
        return done_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return finished_ >= number; });
    }

    double seconds() {
        std::lock_guard<std::mutex> lock(mutex_);
        return seconds_;
    }

    Pool pool;

  private:
    void serve() {
        for (int64_t number = 1;; ++number) {
            Step step;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wakes_.wait(lock, [&] { return ends_ || !waiting_.empty(); });
                if (ends_) return;
                step = waiting_.front();
                waiting_.pop_front();
            }
            if (step.flag) pool.expect_call();
            Attention attention(step, pool.size(), results_, queries_);
            if (!is_there(step, number)) return;
            auto begin = std::chrono::steady_clock::now();
            pool.run(attention.tasks(), [&](int thread, int task, int next) { attention.act(thread, task, next); });
            {
                std::lock_guard<std::mutex> lock(mutex_);
                finished_ = number;
                seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
            }
            done_.notify_all();
        }
    }

    bool is_there(const Step &step, int64_t number) {
        for (int turn = 1; step.flag && __atomic_load_n(step.flag, __ATOMIC_ACQUIRE) < number; ++turn) {
            if (ends_) return false;
            wait_briefly(turn);
        }
        return true;
    }

    Buffer results_, queries_;
    std::mutex mutex_;
    std::condition_variable wakes_, done_;
    std::deque<Step> waiting_;
    int64_t submitted_ = 0;
    std::atomic<int64_t> finished_{0};
    double seconds_ = 0;
    std::atomic<bool> ends_{false};
    std::thread thread_;  // begins when all of this is there
};

}  // namespace

extern "C" {

// processors: `count` numbers, on which the threads stay.
// Null where the system has no threads or no memory for it.
void *zeroinf_new_pool(int threads, const int *processors, int count) {
    try {
        return new Attending(threads, {{processors, processors + count}});
    } catch (const std::exception &) {
        return nullptr;
    }
}

// What has not begun is left out.
void zeroinf_end_pool(void *pool) { delete (Attending *)pool; }

// memory: a layer's records. fresh: (rows, stride), the records of new tokens, which are put in their places. query:
// (rows, heads * group, width); out: (rows, heads * group, value_width). All of it stays until the step is over, whose
// number is returned: they count from 1.
int64_t zeroinf_submit(void *pool, const Layout *layout, const RowTokens *rows, int64_t count, uint8_t *memory,
                       const uint8_t *fresh, const uint8_t *query, uint8_t *out, const int64_t *flag) {
    return ((Attending *)pool)->submit({*layout, rows, count, memory, fresh, query, out, flag});
}

// Whether the step of that number is over, at the latest after so many seconds.
int zeroinf_wait(void *pool, int64_t number, double seconds) { return ((Attending *)pool)->wait(number, seconds); }

// Seconds that steps have taken, waits for flags left out.
double zeroinf_seconds(void *pool) { return ((Attending *)pool)->seconds(); }

// Fills memory with zeros; pages that nobody has touched come to lie where these threads are.
void zeroinf_clear(void *pool, uint8_t *memory, int64_t nbytes) {
    constexpr int64_t PART = 32 << 20;
    ((Attending *)pool)->pool.run((int)((nbytes + PART - 1) / PART), [&](int, int task, int) {
        std::memset(memory + task * PART, 0, std::min(PART, nbytes - task * PART));
    });
}

// Reads all of `memory` once; the result depends on every byte.
uint64_t zeroinf_read(void *pool, const uint8_t *memory, int64_t nbytes) {
    constexpr int64_t PART = 1 << 20;
    std::atomic<uint64_t> result{0};
    ((Attending *)pool)->pool.run((int)((nbytes + PART - 1) / PART), [&](int, int task, int) {
        const uint8_t *at = memory + task * PART, *end = memory + std::min(nbytes, (task + 1) * PART);
        Words sums[8] = {};
        for (; at + sizeof(sums) <= end; at += sizeof(sums))
            for (int i = 0; i < 8; ++i) sums[i] += read<Words>(at + i * sizeof(Words));
        uint64_t sum = 0;
        for (auto &each : sums)
            for (int lane = 0; lane < LANES; ++lane) sum += each[lane];
        result += sum;
    });
    return result;
}
}

// What is common to all instruction sets: memory, threads, and the geometry of a call. Compiled for the oldest processor.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace nsa {

constexpr int64_t kLanes = 16;    // rows (a query and a head) that are worked on side by side
constexpr int64_t kKeys = 128;    // most keys in a tile
constexpr int64_t kDepth = 32;    // dims are padded to multiples of this
constexpr int64_t kHugePage = 2 << 20;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.4028234663852886e38f; // the maximum of a row whose listed keys are all masked

inline int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
inline int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// Asks for huge pages for what of some memory they fit: the first touch of small ones takes longer than most of the work on them.
inline void prefer_huge_pages(void *data, int64_t bytes) {
#if defined(__linux__)
    uintptr_t start = round_up(int64_t(data), kHugePage), stop = (uintptr_t(data) + bytes) / kHugePage * kHugePage;
    if (start < stop) madvise(reinterpret_cast<void *>(start), stop - start, MADV_HUGEPAGE);
#endif
}

// Uninitialized memory on a cache line's edge. Throws std::bad_alloc.
template <class T> class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) {
        if (count == 0) return;
        int64_t bytes = count * int64_t(sizeof(T)), edge = bytes < kHugePage / 8 ? 64 : kHugePage;
        data_ = static_cast<T *>(std::aligned_alloc(edge, round_up(bytes, edge)));
        if (!data_) throw std::bad_alloc();
        prefer_huge_pages(data_, round_up(bytes, edge));
    }
    Buffer(Buffer &&other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer &operator=(Buffer &&other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~Buffer() { std::free(data_); }
    operator T *() const { return data_; }

  private:
    T *data_ = nullptr;
};

// Asks for memory that is read soon, into the second cache.
inline void prefetch(const void *data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(data) + i, 0, 2);
}

struct NoSession {};

// Runs tasks 0 to tasks - 1, each once. `make` is called in each thread and returns what runs a task there; a Session lives as
// long as the thread's work.
template <class Session = NoSession, class Make> void parallel(int64_t threads, int64_t tasks, const Make &make) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto work = [&] {
        try {
            [[maybe_unused]] Session session;
            auto run = make();
            for (int64_t task; !failed && (task = next++) < tasks;) run(task);
            std::atomic_thread_fence(std::memory_order_seq_cst); // what was stored past the caches has arrived
        } catch (const std::bad_alloc &) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    try {
        others.reserve(threads);
        while (int64_t(others.size()) + 1 < std::min(threads, tasks)) others.emplace_back(work);
    } catch (const std::system_error &) { // no more threads to be had: the others do the work
    }
    work();
    for (auto &other : others) other.join();
    if (failed) throw std::bad_alloc();
}

struct Range {
    int64_t first, last; // exclusive
};

struct Sample {
    int64_t q_start, q_stop, k_start, keys, offset; // offset: position of the first query
    int64_t position(int64_t query) const { return query - q_start + offset; }
};

// A call to an attention, with what follows from its arguments.
struct Problem {
    NsaAttention at;
    int64_t group, qk_pad, v_pad;
    float slope; // |scale| in powers of 2; its sign goes into the packed queries
    std::vector<Sample> samples;

    explicit Problem(const NsaAttention &given)
        : at(given), group(given.query_heads / given.kv_heads), qk_pad(round_up(given.qk_dim, kDepth)),
          v_pad(round_up(given.v_dim, kDepth)), slope(float(std::fabs(given.scale)) * kLog2E) {
        for (int64_t b = 0; b < at.samples; b++) {
            int64_t q_start = b ? at.q_end[b - 1] : 0, k_start = b ? at.kv_end[b - 1] : 0;
            samples.push_back({q_start, at.q_end[b], k_start, at.kv_end[b] - k_start, at.q_offset[b]});
        }
    }
    int64_t queries() const { return at.samples ? at.q_end[at.samples - 1] : 0; }
    int64_t keys() const { return at.samples ? at.kv_end[at.samples - 1] : 0; }
    // Says that the rows of all queries and heads will be written.
    void will_write(void *rows, int64_t dim) const {
        prefer_huge_pages(rows, queries() * at.query_heads * dim * (at.type == NSA_FLOAT32 ? 4 : 2));
    }
};

// Keys of a tile: `count` of a sample from `start` on, padded to `rows`.
struct Span {
    int64_t start, count, rows;

    // What lies between `first` and `last`, in steps of the depth of a product.
    Span part(int64_t first, int64_t last) const {
        int64_t skip = std::max<int64_t>(first - start, 0) / kDepth * kDepth;
        int64_t left = std::max<int64_t>(std::min(round_up(std::max<int64_t>(last - start, 0), kDepth), rows) - skip, 0);
        return {start + skip, std::max<int64_t>(std::min(count - skip, left), 0), left};
    }
};

// Keys cut into tiles, sample by sample: a block is one tile, or several where it is large.
struct KeyTiles {
    int64_t block_size, per_block, rows; // rows: of a tile, padded
    std::vector<int64_t> first;          // [samples + 1] tiles of the samples before

    KeyTiles(const Problem &problem, int64_t size)
        : block_size(size), per_block(ceil_div(size, kKeys)), rows(std::min(kKeys, round_up(size, kDepth))), first(1) {
        for (const Sample &sample : problem.samples) first.push_back(first.back() + ceil_div(sample.keys, size) * per_block);
    }
    int64_t start(int64_t tile) const { return tile / per_block * block_size + tile % per_block * kKeys; }
    int64_t count(int64_t tile, int64_t keys) const {
        int64_t of_block = std::min(kKeys, block_size - tile % per_block * kKeys);
        return std::max<int64_t>(std::min(of_block, keys - start(tile)), 0);
    }
    Span span(int64_t tile, int64_t keys) const { return {start(tile), count(tile, keys), rows}; }
    int64_t sample_of(int64_t tile) const {
        return std::upper_bound(first.begin(), first.end(), tile) - first.begin() - 1;
    }
};

// Which keys a query sees by its position: the newest, or the compressed windows that have ended.
struct Sight {
    int64_t window;        // tokens; 0: compressed windows
    int64_t block, stride; // of compressed windows

    Range of(const Sample &sample, int64_t position) const {
        int64_t first = 0, last = position + 1;
        if (window)
            first = last - window;
        else
            last = last >= block ? (last - block) / stride + 1 : 0;
        last = std::max<int64_t>(std::min(last, sample.keys), 0);
        return {std::max<int64_t>(std::min(first, last), 0), last};
    }
};

// Some queries of a sample, for one key/value head.
struct Chunk {
    const Sample *sample;
    int64_t head, start, stop;
    int64_t size() const { return stop - start; }
};

// Every sample cut into chunks of `size` queries, from the last to the first: the longest work starts first.
inline std::vector<Chunk> chunks(const Problem &problem, int64_t size) {
    std::vector<Chunk> all;
    for (const Sample &sample : problem.samples)
        for (int64_t start = sample.q_start; start < sample.q_stop; start += size)
            for (int64_t head = 0; head < problem.at.kv_heads; head++)
                all.push_back({&sample, head, start, std::min(start + size, sample.q_stop)});
    std::reverse(all.begin(), all.end());
    return all;
}

// How the rows of a chunk fill tiles of lanes: a tile holds some whole queries, or a query takes some tiles.
struct Lanes {
    int64_t group, heads, queries_per_tile, tiles_per_query; // heads: of a query in a tile

    explicit Lanes(int64_t group)
        : group(group), heads(std::min(group, kLanes)), queries_per_tile(kLanes / heads),
          tiles_per_query(ceil_div(group, kLanes)) {}
    int64_t tiles(int64_t queries) const { return ceil_div(queries, queries_per_tile) * tiles_per_query; }
    int64_t query(int64_t tile, int64_t lane) const { return tile / tiles_per_query * queries_per_tile + lane / heads; }
    int64_t head(int64_t tile, int64_t lane) const { return tile % tiles_per_query * kLanes + lane % heads; }
    // Queries that fill so many tiles.
    int64_t queries(int64_t tiles) const { return std::max<int64_t>(tiles / tiles_per_query, 1) * queries_per_tile; }
    // What those fill, which is more where a query needs more.
    int64_t most_tiles(int64_t wanted) const { return tiles(queries(wanted)); }
    bool used(int64_t tile, int64_t lane) const { return lane < heads * queries_per_tile && head(tile, lane) < group; }
};

} // namespace nsa

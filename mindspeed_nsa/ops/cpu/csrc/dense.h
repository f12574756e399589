// Attention to what a query sees by its position (Sight): the sliding window and, in backward, the compressed windows.

constexpr int64_t kDenseKeys = 64; // of a tile
constexpr int64_t kChunkTiles = 64; // tiles of lanes of a chunk: with what belongs to them they fit into the second cache

// Calls run(tile of keys, tiles of lanes, how many) for all that see one another; those of a tile of lanes in the order of keys.
template <int most, class Tile, class Run>
inline void pair_up(const Sample &sample, const KeyTiles &keys, const Sight &sight, const Tile &tile, int64_t tiles,
                    const Run &run) {
    // Keys of a window serve a few tiles of lanes while these are in the caches; compressed ones stay for all of a chunk.
    int64_t stretch = sight.window ? sample.keys : 512;
    int64_t first = sample.keys, last = 0;
    for (int64_t i = 0; i < tiles; i++) {
        first = std::min<int64_t>(first, tile(i).lowest_first);
        last = std::max<int64_t>(last, tile(i).highest_last);
    }
    first = first / keys.block_size * keys.block_size;
    for (int64_t start = first; start < last; start += stretch)
        for (int64_t i = 0; i < tiles; i += most) {
            int64_t some[most], n = std::min<int64_t>(most, tiles - i), from = last, to = start;
            for (int64_t j = 0; j < n; j++) {
                some[j] = i + j;
                from = std::min<int64_t>(from, tile(i + j).lowest_first);
                to = std::max<int64_t>(to, tile(i + j).highest_last);
            }
            to = std::min(to, start + stretch);
            for (int64_t k = std::max(from, start) / keys.block_size; keys.start(k) < to; k++) run(k, some, int(n));
        }
}

inline bool never(int64_t) { return false; }

// Forward of the sliding window, chunk by chunk.
template <class E> class WindowAttention {
  public:
    WindowAttention(const Problem &problem, int64_t window_size, const NsaTensor &query, const ForwardKeys<E> &keys)
        : query_(query), keys_(keys), sight_{window_size, 0, 0}, lanes_(problem.group) {}

    void run(const Chunk &chunk, Forward<E> &forward) const {
        const Sample &sample = *chunk.sample;
        auto see = [&](int64_t token) { return sight_.of(sample, sample.position(token)); };
        forward.begin(chunk, lanes_, query_, see, never);
        auto tile = [&](int64_t i) -> LaneTile & { return forward.tile(i); };
        pair_up<kTiles>(sample, keys_.tiles, sight_, tile, lanes_.tiles(chunk.size()), [&](int64_t k, const int64_t *some, int n) {
            forward.template attend<E::kRough>(keys_.tile(chunk, k), some, n);
        });
    }

  private:
    const NsaTensor &query_;
    const ForwardKeys<E> &keys_;
    Sight sight_;
    Lanes lanes_;
};

template <class E>
void window_forward(const Problem &problem, int64_t window_size, const NsaTensor &query, const NsaTensor &key,
                    const NsaTensor &value, const Results &to) {
    problem.will_write(to.attention, problem.at.v_dim);
    ForwardKeys<E> keys(problem, kDenseKeys, key, value);
    WindowAttention<E> window(problem, window_size, query, keys);
    Lanes lanes(problem.group);
    auto work = chunks(problem, lanes.queries(kChunkTiles));
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        return [&, forward = Forward<E>(problem, lanes.most_tiles(kChunkTiles))](int64_t task) mutable {
            window.run(work[task], forward);
            forward.finish(work[task], lanes, to);
        };
    });
}

// ---- backward, in one pass over the queries: each span of them sums the gradients of the keys it sees in memory of its own.

struct Part {
    Chunk chunk;
    int64_t first_tile, tiles; // of keys, in the sample
    int64_t memory;            // tiles of the parts before
};

inline std::vector<Part> parts(const Problem &problem, const Sight &sight, const KeyTiles &keys, int64_t size) {
    std::vector<Part> all;
    int64_t memory = 0;
    for (const Chunk &chunk : chunks(problem, size)) {
        Range a = sight.of(*chunk.sample, chunk.sample->position(chunk.start));
        Range z = sight.of(*chunk.sample, chunk.sample->position(chunk.stop - 1));
        int64_t first = a.first / keys.block_size, tiles = std::max<int64_t>(ceil_div(z.last, keys.block_size) - first, 0);
        all.push_back({chunk, first, tiles, memory});
        memory += tiles;
    }
    return all;
}

// A chunk of a part.
template <class E>
inline void dense_backward_chunk(const Problem &problem, const Sight &sight, const Gradients &from, const KeyTiles &keys,
                                 const PackedKeys<E> *const *packed, const Chunk &chunk, const Lanes &lanes, QuerySide<E> &side,
                                 Backward<E> &backward, float *grad_query, float *grad_key, float *grad_value) {
    const Sample &sample = *chunk.sample;
    int64_t count = lanes.tiles(chunk.size()), first = keys.first[chunk.sample - problem.samples.data()];
    auto see = [&](int64_t token) { return sight.of(sample, sample.position(token)); };
    for (int64_t i = 0; i < count; i++) side.take(i, from, TileRows(chunk, lanes, i), see, true);
    side.fill(count);
    int64_t panel = problem.qk_pad * kLanes;
    memset(grad_query, 0, round_up(count, kGroup) * panel * sizeof(float));
    auto tile = [&](int64_t i) -> LaneTile & { return side.tile(i); };
    pair_up<kGroup>(sample, keys, sight, tile, round_up(count, kGroup), [&](int64_t k, const int64_t *some, int n) {
        BackwardTile<E> at{packed[0]->at(kRows, first + k, chunk.head), packed[1]->at(kRows, first + k, chunk.head),
                           packed[0]->at(kTransposed, first + k, chunk.head), keys.span(k, sample.keys)};
        backward.template add<true, true>(
            at, side, some, n, [&](int64_t i) { return grad_query + i * panel; }, grad_key + k * keys.rows * problem.qk_pad,
            grad_value + k * keys.rows * problem.v_pad, [](int64_t) {});
    });
}

// Sums what the parts found for each key, in the order of the parts.
inline void sum_parts(const Problem &problem, const KeyTiles &keys, const std::vector<Part> &all, int64_t size, float *partial,
                      int64_t dim, float scale, void *grad) {
    int64_t heads = problem.at.kv_heads;
    parallel(problem.at.threads, keys.first.back() * heads, [&] {
        return [&, total = Buffer<float>(size)](int64_t task) {
            int64_t tile = task / heads, head = task % heads, b = keys.sample_of(tile), k = tile - keys.first[b];
            memset(total, 0, size * sizeof(float));
            for (const Part &part : all) {
                int64_t inside = k - part.first_tile;
                if (part.chunk.sample != &problem.samples[b] || part.chunk.head != head || inside < 0 || inside >= part.tiles)
                    continue;
                const float *from = partial + (part.memory + inside) * size;
                for (int64_t i = 0; i < size; i += kWidth) store(total + i, load(total + i) + load(from + i));
            }
            const Sample &sample = problem.samples[b];
            write_grad_keys(problem, total, keys.rows, keys.count(k, sample.keys), sample.k_start + keys.start(k), head, dim,
                            scale, grad);
        };
    });
}

template <class E>
void dense_backward(const Problem &problem, const Sight &sight, int64_t span, const Gradients &from, const NsaTensor &key,
                    const NsaTensor &value, void *grad_query, void *grad_key, void *grad_value) {
    problem.will_write(grad_query, problem.at.qk_dim);
    KeyTiles tiles(problem, kDenseKeys);
    PackedKeys<E> keys(problem, tiles, key, problem.at.qk_dim, {kRows, kTransposed});
    PackedKeys<E> values(problem, tiles, value, problem.at.v_dim, {kRows});
    const PackedKeys<E> *packed[2] = {&keys, &values};
    Lanes lanes(problem.group);
    int64_t size = lanes.queries(kChunkTiles / 2), panel = problem.qk_pad * kLanes;
    auto all = parts(problem, sight, tiles, round_up(span, size));
    int64_t memory = all.empty() ? 0 : all.back().memory + all.back().tiles;
    int64_t key_size = tiles.rows * problem.qk_pad, value_size = tiles.rows * problem.v_pad;
    Buffer<float> keys_partial(memory * key_size), values_partial(memory * value_size);
    parallel<typename E::Session>(problem.at.threads, int64_t(all.size()), [&] {
        int64_t most = round_up(lanes.tiles(size), kGroup);
        return [&, side = QuerySide<E>(problem, most), backward = Backward<E>(problem), sums = Buffer<float>(most * panel),
                scratch = Buffer<float>(kLanes * problem.qk_pad)](int64_t task) mutable {
            const Part &part = all[task];
            float *for_keys = keys_partial + part.memory * key_size, *for_values = values_partial + part.memory * value_size;
            memset(for_keys, 0, part.tiles * key_size * sizeof(float));
            memset(for_values, 0, part.tiles * value_size * sizeof(float));
            for (Chunk chunk = part.chunk; chunk.start < part.chunk.stop; chunk.start += size) {
                chunk.stop = std::min(chunk.start + size, part.chunk.stop);
                dense_backward_chunk(problem, sight, from, tiles, packed, chunk, lanes, side, backward, sums,
                                     for_keys - part.first_tile * key_size, for_values - part.first_tile * value_size);
                for (int64_t i = 0; i < lanes.tiles(chunk.size()); i++)
                    write_grad_query<E>(problem, TileRows(chunk, lanes, i), sums + i * panel, from.row_max, scratch, grad_query);
            }
        };
    });
    sum_parts(problem, tiles, all, key_size, keys_partial, problem.at.qk_dim, float(std::fabs(problem.at.scale)), grad_key);
    sum_parts(problem, tiles, all, value_size, values_partial, problem.at.v_dim, 1, grad_value);
}

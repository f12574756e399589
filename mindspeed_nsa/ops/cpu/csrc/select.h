// Attention over listed blocks. Queries are paired with the tiles of their blocks; a block listed twice is a pair twice.

constexpr int64_t kSelectQueries = 64; // of a chunk: their sums stay in the second cache

// Which blocks a row lists: `run` gets each that it sees, or all where causality masks them all (its logits are then equal).
struct Lists {
    const NsaSelected &at;
    int64_t kv_heads;

    const int32_t *ids(int64_t token, int64_t head) const { return at.ids + (token * kv_heads + head) * at.count; }
    // The keys that a row's listed blocks show.
    Range see(const Sample &sample, int64_t token, int64_t head) const {
        return {0, blind(sample, token, head) || !at.causal ? sample.keys : std::min(sample.position(token) + 1, sample.keys)};
    }
    bool blind(const Sample &sample, int64_t token, int64_t head) const {
        if (!at.causal) return false;
        const int32_t *row = ids(token, head);
        int64_t end = std::min(sample.position(token) + 1, sample.keys);
        return std::none_of(row, row + at.count, [&](int64_t id) { return id * at.block_size < end; });
    }
    template <class Run> void each(const Sample &sample, int64_t token, int64_t head, const Run &run) const {
        int64_t end = see(sample, token, head).last;
        const int32_t *row = ids(token, head);
        for (int64_t i = 0; i < at.count; i++)
            if (row[i] * at.block_size < end) run(row[i]);
    }
};

// Queries by block: those of block s are queries[first[s]] to queries[first[s + 1] - 1], in order.
struct ByBlock {
    std::vector<int64_t> first;
    std::vector<int32_t> queries;

    void build(const Lists &lists, const Sample &sample, int64_t head, int64_t start, int64_t stop) {
        int64_t blocks = ceil_div(sample.keys, lists.at.block_size);
        first.assign(blocks + 2, 0);
        for (int64_t t = start; t < stop; t++) lists.each(sample, t, head, [&](int64_t s) { first[s + 2]++; });
        for (int64_t s = 0; s < blocks; s++) first[s + 2] += first[s + 1];
        queries.resize(first[blocks + 1]);
        for (int64_t t = start; t < stop; t++)
            lists.each(sample, t, head, [&](int64_t s) { queries[first[s + 1]++] = int32_t(t - start); });
        first.pop_back();
    }
    // The next queries of a block from `at` on, all different and at most `most`.
    int64_t take(int64_t at, int64_t end, int64_t most) const {
        int64_t n = 1;
        while (n < most && at + n < end && queries[at + n] != queries[at + n - 1]) n++;
        return n;
    }
};

// Calls run(tile of keys in the sample, tiles of lanes, how many) for the pairs of a chunk, tile by tile.
template <class Run>
inline void pair_up_listed(const ByBlock &by_block, const KeyTiles &keys, const Lanes &lanes, const Run &run) {
    int64_t most = std::max<int64_t>(kTiles / lanes.tiles_per_query, 1);
    for (int64_t s = 0; s + 1 < int64_t(by_block.first.size()); s++)
        for (int64_t k = s * keys.per_block; k < (s + 1) * keys.per_block; k++)
            for (int64_t i = by_block.first[s], n; i < by_block.first[s + 1]; i += n) {
                n = by_block.take(i, by_block.first[s + 1], most);
                int64_t some[kTiles * kLanes], count = n * lanes.tiles_per_query;
                for (int64_t j = 0; j < count; j++)
                    some[j] = by_block.queries[i + j / lanes.tiles_per_query] * lanes.tiles_per_query + j % lanes.tiles_per_query;
                for (int64_t j = 0; j < count; j += kTiles) run(k, some + j, int(std::min<int64_t>(kTiles, count - j)));
            }
}

template <class E>
void select_forward(const Problem &problem, const NsaSelected &selected, const NsaTensor &query, const NsaTensor &key,
                    const NsaTensor &value, void *attention, float *row_max, float *row_sum) {
    problem.will_write(attention, problem.at.v_dim);
    KeyTiles tiles(problem, selected.block_size);
    PackedKeys<E> keys(problem, tiles, key, problem.at.qk_dim, {kColumns});
    PackedKeys<E> values(problem, tiles, value, problem.at.v_dim, {kPanels});
    Lanes lanes(problem.group, false);
    Lists lists{selected, problem.at.kv_heads};
    auto work = chunks(problem, kSelectQueries);
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        return [&, forward = Forward<E>(problem, lanes.tiles(kSelectQueries)), by_block = ByBlock()](int64_t task) mutable {
            const Chunk &chunk = work[task];
            const Sample &sample = *chunk.sample;
            int64_t first = tiles.first[chunk.sample - problem.samples.data()];
            auto blind = [&](int64_t token) { return lists.blind(sample, token, chunk.head); };
            forward.begin(chunk, lanes, query, [&](int64_t token) { return lists.see(sample, token, chunk.head); }, blind);
            by_block.build(lists, sample, chunk.head, chunk.start, chunk.stop);
            pair_up_listed(by_block, tiles, lanes, [&](int64_t k, const int64_t *some, int n) {
                forward.attend({keys.at(kColumns, first + k, chunk.head), values.at(kPanels, first + k, chunk.head),
                                tiles.span(k, sample.keys)}, some, n);
            });
            forward.finish(chunk, lanes, attention, row_max, row_sum);
        };
    });
}

// ---- backward, in two passes: queries by their blocks, then blocks by their queries.

template <class E>
void select_backward_queries(const Problem &problem, const Lists &lists, const Gradients &from, const KeyTiles &tiles,
                             const PackedKeys<E> &keys, const PackedKeys<E> &values, void *grad_query) {
    Lanes lanes(problem.group, false);
    auto work = chunks(problem, kSelectQueries);
    int64_t panel = problem.qk_pad * kLanes;
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        int64_t most = lanes.tiles(kSelectQueries);
        return [&, side = QuerySide<E>(problem, most), backward = Backward<E>(problem), by_block = ByBlock(),
                sums = Buffer<float>(most * panel), scratch = Buffer<float>(panel)](int64_t task) mutable {
            const Chunk &chunk = work[task];
            const Sample &sample = *chunk.sample;
            int64_t count = lanes.tiles(chunk.size()), first = tiles.first[chunk.sample - problem.samples.data()];
            auto see = [&](int64_t token) { return lists.see(sample, token, chunk.head); };
            for (int64_t i = 0; i < count; i++) side.take(i, from, TileRows(chunk, lanes, i), see, false);
            memset(sums, 0, count * panel * sizeof(float));
            by_block.build(lists, sample, chunk.head, chunk.start, chunk.stop);
            pair_up_listed(by_block, tiles, lanes, [&](int64_t k, const int64_t *some, int n) {
                BackwardTile<E> at{keys.at(kRows, first + k, chunk.head), values.at(kRows, first + k, chunk.head),
                                   keys.at(kTransposed, first + k, chunk.head), tiles.span(k, sample.keys)};
                auto grad_query_of = [&](int64_t i) { return sums + i * panel; };
                backward.template add<true, false>(at, side, some, n, grad_query_of, nullptr, nullptr, [](int64_t) {});
            });
            for (int64_t i = 0; i < count; i++)
                write_grad_query<E>(problem, TileRows(chunk, lanes, i), sums + i * panel, from.row_max, scratch, grad_query);
        };
    });
}

// A block's queries against its keys, a group of tiles of lanes at a time.
template <class E> class BlockGradients {
  public:
    BlockGradients(const Problem &problem, const Lists &lists, const Gradients &from, const KeyTiles &tiles)
        : problem_(problem), lists_(lists), from_(from), tiles_(tiles), lanes_(problem.group, false), side_(problem, kGroup),
          backward_(problem), key_size_(tiles.rows * problem.qk_pad), value_size_(tiles.rows * problem.v_pad),
          grad_key_(tiles.per_block * key_size_), grad_value_(tiles.per_block * value_size_),
          scratch_(std::max(problem.qk_pad, problem.v_pad)) {}

    void run(const PackedKeys<E> &keys, const PackedKeys<E> &values, const Sample &sample, int64_t head, int64_t block,
             const int32_t *queries, int64_t count, void *grad_key, void *grad_value) {
        memset(grad_key_, 0, tiles_.per_block * key_size_ * sizeof(float));
        memset(grad_value_, 0, tiles_.per_block * value_size_ * sizeof(float));
        int64_t first = tiles_.first[&sample - problem_.samples.data()];
        static const int64_t some[kGroup] = {0, 1, 2, 3, 4, 5, 6, 7};
        int64_t all = count * lanes_.tiles_per_query;
        for (int64_t i = 0; i < all; i += kGroup) {
            take(sample, head, queries, i, std::min(i + kGroup, all));
            for (int64_t j = 0; j < tiles_.per_block; j++) {
                int64_t k = block * tiles_.per_block + j;
                BackwardTile<E> at{keys.at(kRows, first + k, head), values.at(kRows, first + k, head), nullptr, tiles_.span(k, sample.keys)};
                // The next group's rows lie scattered: they are asked for between the products of this one.
                auto ahead = [&](int64_t t) {
                    int64_t next = i + kGroup + t;
                    if (j == 0 && next < all) side_.prefetch(from_, rows_of(sample, head, queries, next));
                };
                auto no_query = [](int64_t) -> float * { return nullptr; };
                backward_.template add<false, true>(at, side_, some, kGroup, no_query, grad_key_ + j * key_size_,
                                                    grad_value_ + j * value_size_, ahead);
            }
        }
        write(sample, head, block, grad_key, grad_value);
    }

  private:
    TileRows rows_of(const Sample &sample, int64_t head, const int32_t *queries, int64_t i) const {
        int64_t token = sample.q_start + queries[i / lanes_.tiles_per_query];
        return TileRows({&sample, head, token, token + 1}, lanes_, i % lanes_.tiles_per_query);
    }
    void take(const Sample &sample, int64_t head, const int32_t *queries, int64_t start, int64_t stop) {
        auto see = [&](int64_t token) { return lists_.see(sample, token, head); };
        for (int64_t i = start; i < stop; i++) side_.take(i - start, from_, rows_of(sample, head, queries, i), see, true);
        side_.fill(stop - start);
    }
    void write(const Sample &sample, int64_t head, int64_t block, void *grad_key, void *grad_value) {
        for (int64_t j = 0; j < tiles_.per_block; j++) {
            int64_t k = block * tiles_.per_block + j, count = tiles_.count(k, sample.keys), at = sample.k_start + tiles_.start(k);
            write_grad_keys(problem_, grad_key_ + j * key_size_, tiles_.rows, count, at, head, problem_.at.qk_dim,
                            float(std::fabs(problem_.at.scale)), scratch_, grad_key);
            write_grad_keys(problem_, grad_value_ + j * value_size_, tiles_.rows, count, at, head, problem_.at.v_dim, 1, scratch_,
                            grad_value);
        }
    }

    const Problem &problem_;
    const Lists &lists_;
    const Gradients &from_;
    const KeyTiles &tiles_;
    Lanes lanes_;
    QuerySide<E> side_;
    Backward<E> backward_;
    int64_t key_size_, value_size_;
    Buffer<float> grad_key_, grad_value_, scratch_;
};

template <class E>
void select_backward(const Problem &problem, const NsaSelected &selected, const Gradients &from, const NsaTensor &key,
                     const NsaTensor &value, void *grad_query, void *grad_key, void *grad_value) {
    problem.will_write(grad_query, problem.at.qk_dim);
    KeyTiles tiles(problem, selected.block_size);
    PackedKeys<E> keys(problem, tiles, key, problem.at.qk_dim, {kRows, kTransposed});
    PackedKeys<E> values(problem, tiles, value, problem.at.v_dim, {kRows});
    Lists lists{selected, problem.at.kv_heads};
    select_backward_queries(problem, lists, from, tiles, keys, values, grad_query);

    int64_t heads = problem.at.kv_heads, blocks = tiles.first.back() / tiles.per_block;
    std::vector<ByBlock> by_block(problem.samples.size() * heads);
    parallel(problem.at.threads, int64_t(by_block.size()), [&] {
        return [&](int64_t task) {
            const Sample &sample = problem.samples[task / heads];
            by_block[task].build(lists, sample, task % heads, sample.q_start, sample.q_stop);
        };
    });
    parallel<typename E::Session>(problem.at.threads, blocks * heads, [&] {
        return [&, gradients = BlockGradients<E>(problem, lists, from, tiles)](int64_t task) mutable {
            int64_t block = task / heads, head = task % heads, b = tiles.sample_of(block * tiles.per_block);
            const ByBlock &of = by_block[b * heads + head];
            block -= tiles.first[b] / tiles.per_block;
            int64_t first = of.first[block], count = of.first[block + 1] - first;
            gradients.run(keys, values, problem.samples[b], head, block, of.queries.data() + first, count, grad_key, grad_value);
        };
    });
}

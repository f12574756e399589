// Attention over listed blocks. Queries are paired with the tiles of their blocks; a block listed twice is a pair twice.

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
    // The tiles of lanes that a block meets, and which of their queries list it: a query that lists it twice is in two of them.
    struct Visit {
        int64_t tile;
        uint32_t queries;
    };
    void visits(int64_t block, const Lanes &lanes, std::vector<Visit> &found) const {
        found.clear();
        for (int64_t i = first[block]; i < first[block + 1]; i++) {
            int64_t tile = queries[i] / lanes.queries_per_tile * lanes.tiles_per_query;
            uint32_t bit = 1u << queries[i] % lanes.queries_per_tile;
            if (found.empty() || found.back().tile != tile || found.back().queries & bit)
                for (int64_t j = 0; j < lanes.tiles_per_query; j++) found.push_back({tile + j, bit});
            else
                found.back().queries |= bit;
        }
    }
};

// Calls run(tile of keys in the sample, tiles of lanes, how many) for the pairs of a chunk, block by block; `tile(i)` shows the
// keys to those of its queries that list them.
template <class Tile, class Run>
inline void pair_up_listed(const ByBlock &by_block, const KeyTiles &keys, const Lanes &lanes, const Tile &tile, const Run &run) {
    std::vector<ByBlock::Visit> visits;
    for (int64_t s = 0; s + 1 < int64_t(by_block.first.size()); s++) {
        by_block.visits(s, lanes, visits);
        int64_t all = int64_t(visits.size());
        for (int64_t k = s * keys.per_block; k < (s + 1) * keys.per_block; k++)
            for (int64_t i = 0, n; i < all; i += n) {
                int64_t some[kTiles];
                for (n = 0; n < kTiles && i + n < all && (n == 0 || visits[i + n].tile > some[n - 1]); n++) {
                    some[n] = visits[i + n].tile;
                    if (lanes.queries_per_tile > 1) tile(some[n]).show(visits[i + n].queries, lanes.heads);
                }
                run(k, some, int(n));
            }
    }
}

// Forward of listed blocks, chunk by chunk. Tiles of keys are blocks, or parts of them.
template <class E> class SelectAttention {
  public:
    SelectAttention(const Problem &problem, const NsaSelected &selected, const NsaTensor &query, const ForwardKeys<E> &keys)
        : query_(query), keys_(keys), lists_{selected, problem.at.kv_heads}, lanes_(problem.group) {}

    // The lists are read here: they may be written until then.
    void run(const Chunk &chunk, Forward<E> &forward, ByBlock &by_block) const {
        const Sample &sample = *chunk.sample;
        auto see = [&](int64_t token) { return lists_.see(sample, token, chunk.head); };
        forward.begin(chunk, lanes_, query_, see, [&](int64_t token) { return lists_.blind(sample, token, chunk.head); });
        by_block.build(lists_, sample, chunk.head, chunk.start, chunk.stop);
        auto tile = [&](int64_t i) -> LaneTile & { return forward.tile(i); };
        pair_up_listed(by_block, keys_.tiles, lanes_, tile, [&](int64_t k, const int64_t *some, int n) {
            forward.template attend<E::kRough>(keys_.tile(chunk, k), some, n);
        });
    }

  private:
    const NsaTensor &query_;
    const ForwardKeys<E> &keys_;
    Lists lists_;
    Lanes lanes_;
};

template <class E>
void select_forward(const Problem &problem, const NsaSelected &selected, const NsaTensor &query, const NsaTensor &key,
                    const NsaTensor &value, const Results &to) {
    problem.will_write(to.attention, problem.at.v_dim);
    ForwardKeys<E> keys(problem, selected.block_size, key, value);
    SelectAttention<E> select(problem, selected, query, keys);
    Lanes lanes(problem.group);
    auto work = chunks(problem, lanes.queries(kChunkTiles));
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        return [&, forward = Forward<E>(problem, lanes.most_tiles(kChunkTiles)), by_block = ByBlock()](int64_t task) mutable {
            select.run(work[task], forward, by_block);
            forward.finish(work[task], lanes, to);
        };
    });
}

// ---- backward, in two passes: queries by their blocks, then blocks by their queries.

template <class E>
void select_backward_queries(const Problem &problem, const Lists &lists, const Gradients &from, const KeyTiles &tiles,
                             const PackedKeys<E> &keys, const PackedKeys<E> &values, void *grad_query) {
    Lanes lanes(problem.group);
    int64_t size = lanes.queries(kChunkTiles);
    auto work = chunks(problem, size);
    int64_t panel = problem.qk_pad * kLanes;
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        int64_t most = lanes.tiles(size);
        return [&, side = QuerySide<E>(problem, most), backward = Backward<E>(problem), by_block = ByBlock(),
                sums = Buffer<float>(most * panel), scratch = Buffer<float>(panel)](int64_t task) mutable {
            const Chunk &chunk = work[task];
            const Sample &sample = *chunk.sample;
            int64_t count = lanes.tiles(chunk.size()), first = tiles.first[chunk.sample - problem.samples.data()];
            auto see = [&](int64_t token) { return lists.see(sample, token, chunk.head); };
            for (int64_t i = 0; i < count; i++) side.take(i, from, TileRows(chunk, lanes, i), see, false);
            memset(sums, 0, count * panel * sizeof(float));
            by_block.build(lists, sample, chunk.head, chunk.start, chunk.stop);
            auto tile = [&](int64_t i) -> LaneTile & { return side.tile(i); };
            pair_up_listed(by_block, tiles, lanes, tile, [&](int64_t k, const int64_t *some, int n) {
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
        : problem_(problem), lists_(lists), from_(from), tiles_(tiles), lanes_(problem.group), side_(problem, kGroup),
          backward_(problem), key_size_(tiles.rows * problem.qk_pad), value_size_(tiles.rows * problem.v_pad),
          grad_key_(tiles.per_block * key_size_), grad_value_(tiles.per_block * value_size_) {}

    void run(const PackedKeys<E> &keys, const PackedKeys<E> &values, const Sample &sample, int64_t head, int64_t block,
             const int32_t *queries, int64_t count, void *grad_key, void *grad_value) {
        memset(grad_key_, 0, tiles_.per_block * key_size_ * sizeof(float));
        memset(grad_value_, 0, tiles_.per_block * value_size_ * sizeof(float));
        int64_t first = tiles_.first[&sample - problem_.samples.data()];
        static const int64_t some[kGroup] = {0, 1, 2, 3, 4, 5, 6, 7};
        Listed listed{{&sample, head, sample.q_start, sample.q_start + count}, queries};
        int64_t all = lanes_.tiles(count);
        for (int64_t i = 0; i < all; i += kGroup) {
            take(listed, i, std::min(i + kGroup, all));
            for (int64_t j = 0; j < tiles_.per_block; j++) {
                int64_t k = block * tiles_.per_block + j;
                BackwardTile<E> at{keys.at(kRows, first + k, head), values.at(kRows, first + k, head), nullptr, tiles_.span(k, sample.keys)};
                // The next group's rows lie scattered: they are asked for between the products of this one.
                auto ahead = [&](int64_t t) {
                    int64_t next = i + kGroup + t;
                    if (j == 0 && next < all) side_.prefetch(from_, rows_of(listed, next));
                };
                auto no_query = [](int64_t) -> float * { return nullptr; };
                backward_.template add<false, true>(at, side_, some, kGroup, no_query, grad_key_ + j * key_size_,
                                                    grad_value_ + j * value_size_, ahead);
            }
        }
        write(sample, head, block, grad_key, grad_value);
    }

  private:
    // Queries of a sample that list a block; as many as the chunk is long.
    struct Listed {
        Chunk chunk;
        const int32_t *queries;
    };
    TileRows rows_of(const Listed &listed, int64_t i) const { return TileRows(listed.chunk, lanes_, i, listed.queries); }
    void take(const Listed &listed, int64_t start, int64_t stop) {
        auto see = [&](int64_t token) { return lists_.see(*listed.chunk.sample, token, listed.chunk.head); };
        for (int64_t i = start; i < stop; i++) side_.take(i - start, from_, rows_of(listed, i), see, true);
        side_.fill(stop - start);
    }
    void write(const Sample &sample, int64_t head, int64_t block, void *grad_key, void *grad_value) {
        for (int64_t j = 0; j < tiles_.per_block; j++) {
            int64_t k = block * tiles_.per_block + j, count = tiles_.count(k, sample.keys), at = sample.k_start + tiles_.start(k);
            write_grad_keys(problem_, grad_key_ + j * key_size_, tiles_.rows, count, at, head, problem_.at.qk_dim,
                            float(std::fabs(problem_.at.scale)), grad_key);
            write_grad_keys(problem_, grad_value_ + j * value_size_, tiles_.rows, count, at, head, problem_.at.v_dim, 1, grad_value);
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
    Buffer<float> grad_key_, grad_value_;
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

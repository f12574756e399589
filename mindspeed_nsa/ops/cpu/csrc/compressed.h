// Attention over compressed windows with the importance of blocks in the same pass (reference.compress_attention, causal).

// How the probabilities of windows become scores of blocks (reference._scores).
struct Importance {
    int64_t per_block, before;
    std::vector<float> overlap;

    explicit Importance(const NsaCompressed &at) {
        int64_t per_window = at.compress_block_size / at.compress_stride;
        per_block = at.select_block_size / at.compress_stride;
        before = per_window - 1 - (at.importance == NSA_IMPORTANCE_ASCEND);
        int64_t reach = per_block + per_window - 1;
        for (int64_t j = 0; j < reach; j++) overlap.push_back(float(std::min({j + 1, per_window, reach - j})));
    }
    int64_t reach() const { return int64_t(overlap.size()); }
    // Blocks, from the first on, that windows before `end` are of.
    int64_t blocks(int64_t end) const { return (end - 1 + before) / per_block + 1; }

    // Adds a tile of weights, panels of 16 keys [lanes, 16], to the scores of up to so many blocks, panels of 16 [lanes, 16].
    void add(const float *weights, int64_t start, int64_t rows, int64_t blocks, float *scores) const {
        int64_t first = ceil_div(std::max<int64_t>(start + before - reach() + 1, 0), per_block);
        for (int64_t s = first; s < blocks; s++) {
            int64_t window = s * per_block - before - start; // of overlap[0], in the tile
            int64_t j0 = std::max<int64_t>(-window, 0), j1 = std::min(reach(), rows - window);
            for (int64_t lane = 0; lane < kLanes; lane++) {
                float score = 0;
                for (int64_t j = j0; j < j1; j++) score += weights[panel_at(window + j, lane, kLanes)] * overlap[j];
                scores[panel_at(s, lane, kLanes)] += score;
            }
        }
    }

    // The first block of a panel: the one before, where what lies ahead of a block comes with the next panel.
    int64_t shift() const { return by_fours() && before == 0; }

    // The usual sizes: a block is its four windows twice, but for the one at an edge, and the one beside that edge. Then a panel of
    // scores is written once, from registers; `carry` has of each lane what the edge of the last panel leaves to the next.
#if NSA_WIDTH == 16
    bool by_fours() const { return per_block == 4 && reach() == 5; }
    void put(const float *weights, int64_t start, int64_t rows, int64_t blocks, float *carry, float *scores) const {
        before == 0 ? put_fours<true>(weights, start, rows, blocks, carry, scores)
                    : put_fours<false>(weights, start, rows, blocks, carry, scores);
    }

  private:
    template <bool ahead>
    static void put_fours(const float *weights, int64_t start, int64_t rows, int64_t blocks, float *carry, float *scores) {
        constexpr int kEdge = ahead ? 0x00 : 0xff; // the first of four or the last
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i after = _mm512_setr_epi32(15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11);
        for (int64_t i = 0; i < rows && (start + i) / 4 < blocks; i += 4 * kLanes) {
            float *to = scores + (start + i) * (kLanes / 4);
            for (int64_t lane = 0; lane < kLanes; lane++) {
                const float *from = weights + (i + lane) * kLanes;
                auto panel = [&](int64_t k) { return i + k * kLanes < rows ? _mm512_loadu_ps(from + k * kLanes * kLanes) : __m512{}; };
                const __m512 w[4] = {panel(0), panel(1), panel(2), panel(3)};
                auto halve = [](__m512 x, __m512 y) { return _mm512_shuffle_ps(x, y, 0x88) + _mm512_shuffle_ps(x, y, 0xdd); };
                __m512 sums = halve(halve(w[0], w[1]), halve(w[2], w[3])); // of fours: each vector's in the quarters
                __m512 edge = _mm512_shuffle_ps(_mm512_shuffle_ps(w[0], w[1], kEdge), _mm512_shuffle_ps(w[2], w[3], kEdge), 0x88);
                __m512 own = sums + sums - edge;
                __m512 moved = _mm512_permutexvar_ps(after, ahead ? own : edge), first = _mm512_set1_ps(carry[lane]);
                carry[lane] = _mm512_cvtss_f32(moved);
                store(to + lane * kLanes, (vf)(_mm512_mask_mov_ps(moved, 1, first) + _mm512_permutexvar_ps(order, ahead ? edge : own)));
            }
        }
    }
#else
    static bool by_fours() { return false; }
    void put(const float *, int64_t, int64_t, int64_t, float *, float *) const {}
#endif
};

// The ids of the best scores, equal ones by id; forced blocks first (reference.choose). A tournament: the best of 16 scores each
// stand in for them, and one of a group that won is replaced by the group's next. Some queries choose in turn, as each round
// waits for the one before.
class Chooser {
  public:
    static constexpr int kTogether = 4;

    struct Query {
        float *scores; // in whole vectors; written over
        int64_t own, candidates; // its block; the blocks it may choose, from the first on
        int32_t *ids;
    };

    Chooser(const NsaCompressed &at, int64_t blocks)
        : at_(at), size_(round_up(ceil_div(blocks, kLanes), kLanes)), winners_(kTogether * size_) {}

    void choose(const Query *queries, int n) {
        for (int j = 0; j < n; j++) begin(queries[j], winners(j));
        for (int64_t i = 0; i < at_.select_block_count; i++)
            for (int j = 0; j < n; j++) queries[j].ids[i] = int32_t(next(queries[j], winners(j), i));
    }

  private:
    static constexpr float kOut = -INFINITY;

    float *winners(int j) const { return winners_ + j * size_; }
    static int64_t groups(const Query &query) { return ceil_div(query.candidates, kLanes); }

    void begin(const Query &query, float *winners) const {
        int64_t local = std::max<int64_t>(query.own - at_.local_blocks + 1, 0), count = groups(query);
        float *scores = query.scores, *stop = scores + query.candidates;
        std::fill(scores, std::min(scores + at_.init_blocks, stop), INFINITY);
        std::fill(std::min(scores + local, stop), stop, INFINITY);
        std::fill(stop, scores + count * kLanes, kOut);
        for (int64_t g = 0; g < count; g++) winners[g] = highest(scores + g * kLanes, kLanes);
        std::fill(winners + count, winners + round_up(count, kLanes), kOut);
    }
    static int64_t next(const Query &query, float *winners, int64_t i) {
        float best = highest(winners, round_up(groups(query), kLanes));
        if (best == kOut) return i; // fewer blocks than asked for, or scores that are no numbers
        int64_t g = find(winners, best);
        float *group = query.scores + g * kLanes;
        int64_t s = find(group, best);
        put(group, s, kOut);
        put(winners, g, highest(group, kLanes));
        return g * kLanes + s;
    }

    const NsaCompressed &at_;
    int64_t size_;
    Buffer<float> winners_;
};

// What a chunk's queries find important, as far as they have seen.
class Scores {
  public:
    Scores(const NsaCompressed &at, int64_t tiles, int64_t blocks)
        : importance_(at), most_(round_up(blocks, kLanes)), seen_(tiles), by_lane_(tiles * most_ * kLanes), carry_(tiles * kLanes),
          rows_(Chooser::kTogether * (most_ + 2 * kLanes)) {}

    void begin(int64_t blocks) {
        blocks_ = blocks;
        std::fill(seen_.begin(), seen_.end(), 0);
        std::fill(carry_ + 0, carry_ + seen_.size() * kLanes, 0.f);
    }
    void add(int64_t tile, const float *weights, const float *factor, const Span &keys) {
        float *scores = by_lane_ + tile * most_ * kLanes, *carry = carry_ + tile * kLanes;
        if (factor) {
            rescale(scores, seen_[tile] / kLanes, factor);
            for (int lane = 0; lane < kLanes; lane++) carry[lane] *= factor[lane];
        }
        if (importance_.by_fours()) {
            importance_.put(weights, keys.start, keys.rows, blocks_, carry, scores);
            seen_[tile] = round_up(std::min((keys.start + keys.rows) / 4, blocks_), kLanes);
            return;
        }
        int64_t blocks = std::min(importance_.blocks(keys.start + keys.rows), blocks_);
        for (; seen_[tile] < blocks; seen_[tile] += kLanes)
            memset(scores + seen_[tile] * kLanes, 0, kLanes * kLanes * sizeof(float));
        importance_.add(weights, keys.start, keys.rows, blocks, scores);
    }
    // Scores of a query, summed over its heads: those in lanes `first` to `last` of a tile, times their `inverse` sums.
    void sum(int64_t tile, const LaneTile &lanes, int64_t first, int64_t last, bool fresh, float *scores) {
        const float *from = by_lane_ + tile * most_ * kLanes;
        float inverse[kLanes];
        for (int64_t lane = first; lane < last; lane++) inverse[lane] = lanes.total[lane] > 0 ? 1 / lanes.total[lane] : 0;
        if (fresh) std::fill(scores - kLanes, scores + most_ + kLanes, 0.f);
        for (int64_t s = 0; s < seen_[tile]; s += kLanes)
            for (int64_t i = 0; i < kLanes; i += kWidth) {
                float *to = scores + s + i - importance_.shift();
                vf total = load(to);
                for (int64_t lane = first; lane < last; lane++) total += load(from + (s + lane) * kLanes + i) * inverse[lane];
                store(to, total);
            }
        float &beside = scores[seen_[tile] - importance_.shift()]; // what no panel has come for
        for (int64_t lane = first; lane < last; lane++) beside += carry_[tile * kLanes + lane] * inverse[lane];
    }
    // Room for the scores of one of some queries.
    float *row(int i) { return rows_ + i * (most_ + 2 * kLanes) + kLanes; }

  private:
    Importance importance_;
    int64_t most_, blocks_ = 0;
    std::vector<int64_t> seen_; // blocks of a tile of lanes, in whole vectors
    Buffer<float> by_lane_, carry_; // Importance::put
    Buffer<float> rows_;            // with room before and behind, where the edges of panels come to lie
};

// What one pass over the compressed keys is asked for.
struct CompressedPass {
    const NsaCompressed &at;
    int64_t first_row, last_row, most_blocks;
    int32_t *ids;  // or nullptr
    float *scores; // or nullptr
    bool attend;

    int64_t blocks(int64_t b) const { return at.sel_end[b] - (b ? at.sel_end[b - 1] : 0); }
    bool scored() const { return scores || at.select_block_count; }
    // Queries of a chunk whose scores fit into the second cache.
    int64_t chunk_size(const Lanes &lanes) const {
        int64_t bytes = std::max<int64_t>(scored() ? most_blocks * kLanes * 4 : 0, 1);
        return lanes.queries(std::min<int64_t>(std::max<int64_t>((2 << 18) / bytes, kTiles), kChunkTiles));
    }
};

// Scores of one query, all its tiles of lanes summed, in the i-th row.
template <class E>
inline float *score_query(Forward<E> &forward, Scores &scores, const Lanes &lanes, int64_t query, int i) {
    int64_t tile = query / lanes.queries_per_tile * lanes.tiles_per_query, first = query % lanes.queries_per_tile * lanes.heads;
    for (int64_t j = 0; j < lanes.tiles_per_query; j++) {
        int64_t used = std::min(lanes.heads, lanes.group - j * kLanes); // the last tile may have heads to spare
        scores.sum(tile + j, forward.tile(tile + j), first, first + used, j == 0, scores.row(i));
    }
    return scores.row(i);
}

// Forward of compressed windows, chunk by chunk; the chunks are of `CompressedPass::chunk_size`, or shorter.
template <class E> class CompressedAttention {
  public:
    // What a thread needs for it.
    struct Choice {
        Scores scores;
        Chooser chooser;
    };

    CompressedAttention(const Problem &problem, const CompressedPass &pass, const NsaTensor &query, const ForwardKeys<E> &keys)
        : problem_(problem), pass_(pass), query_(query), keys_(keys),
          sight_{0, pass.at.compress_block_size, pass.at.compress_stride}, lanes_(problem.group) {}

    Choice choice() const {
        int64_t tiles = pass_.scored() ? lanes_.tiles(pass_.chunk_size(lanes_)) : 0;
        return {Scores(pass_.at, tiles, pass_.most_blocks), Chooser(pass_.at, pass_.most_blocks)};
    }
    void run(const Chunk &chunk, Forward<E> &forward, Choice &choice) const {
        const Sample &sample = *chunk.sample;
        // Early rows have no choice: their scores are not needed.
        int64_t early = pass_.at.select_block_size * pass_.at.select_block_count;
        bool score = pass_.scores || (pass_.scored() && sample.position(chunk.stop - 1) >= early);
        forward.begin(chunk, lanes_, query_, [&](int64_t token) { return sight_.of(sample, sample.position(token)); }, never);
        if (score) choice.scores.begin(blocks(chunk));
        auto tile = [&](int64_t i) -> LaneTile & { return forward.tile(i); };
        pair_up<kTiles>(sample, keys_.tiles, sight_, tile, lanes_.tiles(chunk.size()), [&](int64_t k, const int64_t *some, int n) {
            if (!score) return forward.template attend<false>(keys_.tile(chunk, k), some, n);
            auto score_tile = [&](int64_t i, const float *weights, const float *factor, const Span &seen) {
                choice.scores.add(i, weights, factor, seen);
            };
            forward.template attend<false, true>(keys_.tile(chunk, k), some, n, score_tile);
        });
        if (pass_.scores) write_scores(chunk, forward, choice.scores);
        if (pass_.ids) choose(chunk, forward, choice);
    }

  private:
    int64_t blocks(const Chunk &chunk) const { return pass_.blocks(chunk.sample - problem_.samples.data()); }

    void write_scores(const Chunk &chunk, Forward<E> &forward, Scores &scores) const {
        for (int64_t token = chunk.start; token < chunk.stop; token++) {
            float *to = pass_.scores + ((token - pass_.first_row) * problem_.at.kv_heads + chunk.head) * pass_.most_blocks;
            memcpy(to, score_query(forward, scores, lanes_, token - chunk.start, 0), blocks(chunk) * sizeof(float));
            std::fill(to + blocks(chunk), to + pass_.most_blocks, 0.f);
        }
    }
    void choose(const Chunk &chunk, Forward<E> &forward, Choice &choice) const {
        Chooser::Query some[Chooser::kTogether];
        int n = 0;
        for (int64_t token = chunk.start; token < chunk.stop; token++) {
            int64_t count = pass_.at.select_block_count, position = chunk.sample->position(token);
            int64_t own = position / pass_.at.select_block_size;
            int32_t *ids = pass_.ids + (token * problem_.at.kv_heads + chunk.head) * count;
            if (own < count) {
                for (int64_t i = 0; i < count; i++) ids[i] = int32_t(i);
                continue;
            }
            float *scores = score_query(forward, choice.scores, lanes_, token - chunk.start, n);
            some[n++] = {scores, own, std::min(blocks(chunk), own + (pass_.at.own_block ? 1 : 0)), ids};
            if (n < Chooser::kTogether) continue;
            choice.chooser.choose(some, n);
            n = 0;
        }
        choice.chooser.choose(some, n);
    }

    const Problem &problem_;
    const CompressedPass &pass_;
    const NsaTensor &query_;
    const ForwardKeys<E> &keys_;
    Sight sight_;
    Lanes lanes_;
};

// Chunks of the rows asked for.
inline std::vector<Chunk> compressed_chunks(const Problem &problem, const CompressedPass &pass, int64_t size) {
    std::vector<Chunk> some;
    for (Chunk chunk : chunks(problem, size)) {
        chunk.start = std::max(chunk.start, pass.first_row);
        chunk.stop = std::min(chunk.stop, pass.last_row);
        if (chunk.start < chunk.stop) some.push_back(chunk);
    }
    return some;
}

template <class E>
void compressed_pass(const Problem &problem, const CompressedPass &pass, const NsaTensor &query, const NsaTensor &key,
                     const NsaTensor &value, const Results &to) {
    if (pass.attend) problem.will_write(to.attention, problem.at.v_dim);
    ForwardKeys<E> keys(problem, kKeys, key, value, pass.attend); // large tiles: sums of values are read and written once a tile
    CompressedAttention<E> compressed(problem, pass, query, keys);
    Lanes lanes(problem.group);
    int64_t size = pass.chunk_size(lanes);
    auto work = compressed_chunks(problem, pass, size);
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        return [&, forward = Forward<E>(problem, lanes.tiles(size), pass.attend), choice = compressed.choice()](int64_t task) mutable {
            compressed.run(work[task], forward, choice);
            if (pass.attend) forward.finish(work[task], lanes, to);
        };
    });
}

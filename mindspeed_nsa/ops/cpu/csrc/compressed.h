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

// The ids of the best of `candidates` scores, equal ones by id; forced blocks first (reference.choose). A tournament: the best of
// 16 scores each stand in for them, and one of a group that won is replaced by the group's next.
class Chooser {
  public:
    Chooser(const NsaCompressed &at, int64_t blocks) : at_(at), winners_(round_up(ceil_div(blocks, kLanes), kLanes)) {}

    // Writes over the scores.
    void choose(float *scores, int64_t own, int64_t candidates, int32_t *ids) {
        int64_t groups = ceil_div(candidates, kLanes), all = round_up(groups, kLanes);
        int64_t local = std::max<int64_t>(own - at_.local_blocks + 1, 0);
        std::fill(scores, scores + std::min(at_.init_blocks, candidates), INFINITY);
        std::fill(scores + std::min(local, candidates), scores + candidates, INFINITY);
        std::fill(scores + candidates, scores + groups * kLanes, kOut);
        for (int64_t g = 0; g < groups; g++) winners_[g] = highest(scores + g * kLanes, kLanes);
        std::fill(winners_ + groups, winners_ + all, kOut);
        for (int64_t i = 0; i < at_.select_block_count; i++) {
            float best = highest(winners_, all);
            if (best == kOut) { // fewer blocks than asked for, or scores that are no numbers
                ids[i] = int32_t(i);
                continue;
            }
            int64_t g = find(winners_, best);
            float *group = scores + g * kLanes;
            int64_t s = find(group, best);
            ids[i] = int32_t(g * kLanes + s);
            put(group, s, kOut);
            put(winners_, g, highest(group, kLanes));
        }
    }

  private:
    static constexpr float kOut = -INFINITY;

    const NsaCompressed &at_;
    Buffer<float> winners_;
};

// What a chunk's queries find important, as far as they have seen.
class Scores {
  public:
    Scores(const NsaCompressed &at, int64_t tiles, int64_t blocks)
        : importance_(at), most_(round_up(blocks, kLanes)), seen_(tiles), by_lane_(tiles * most_ * kLanes), carry_(tiles * kLanes),
          row_(most_ + 2 * kLanes) {}

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
    float *row() { return row_ + kLanes; }

  private:
    Importance importance_;
    int64_t most_, blocks_ = 0;
    std::vector<int64_t> seen_; // blocks of a tile of lanes, in whole vectors
    Buffer<float> by_lane_, carry_; // Importance::put
    Buffer<float> row_;             // with room before and behind, where the edges of panels come to lie
};

// What one pass over the compressed keys is asked for.
struct CompressedPass {
    const NsaCompressed &at;
    int64_t first_row, last_row, most_blocks;
    int32_t *ids;     // or nullptr
    float *scores;    // or nullptr
    void *attention;  // or nullptr
    float *row_max, *row_sum;

    int64_t blocks(int64_t b) const { return at.sel_end[b] - (b ? at.sel_end[b - 1] : 0); }
};

// Scores of one query, all its tiles of lanes summed.
template <class E>
inline float *score_query(Forward<E> &forward, Scores &scores, const Lanes &lanes, int64_t query) {
    int64_t tile = query / lanes.queries_per_tile * lanes.tiles_per_query, first = query % lanes.queries_per_tile * lanes.heads;
    for (int64_t i = 0; i < lanes.tiles_per_query; i++) {
        int64_t used = std::min(lanes.heads, lanes.group - i * kLanes); // the last tile may have heads to spare
        scores.sum(tile + i, forward.tile(tile + i), first, first + used, i == 0, scores.row());
    }
    return scores.row();
}

template <class E>
inline void choose_blocks(const Problem &problem, const CompressedPass &pass, const Chunk &chunk, const Lanes &lanes,
                          Forward<E> &forward, Scores &scores, Chooser &chooser) {
    const Sample &sample = *chunk.sample;
    int64_t count = pass.at.select_block_count, blocks = pass.blocks(chunk.sample - problem.samples.data());
    for (int64_t token = chunk.start; token < chunk.stop; token++) {
        int64_t position = sample.position(token), own = position / pass.at.select_block_size;
        if (pass.scores) {
            float *to = pass.scores + ((token - pass.first_row) * problem.at.kv_heads + chunk.head) * pass.most_blocks;
            memcpy(to, score_query(forward, scores, lanes, token - chunk.start), blocks * sizeof(float));
            std::fill(to + blocks, to + pass.most_blocks, 0.f);
        }
        if (!pass.ids) continue;
        int32_t *ids = pass.ids + (token * problem.at.kv_heads + chunk.head) * count;
        if (position < pass.at.select_block_size * count) {
            for (int64_t i = 0; i < count; i++) ids[i] = int32_t(i);
        } else {
            int64_t candidates = std::min(blocks, own + (pass.at.own_block ? 1 : 0));
            chooser.choose(score_query(forward, scores, lanes, token - chunk.start), own, candidates, ids);
        }
    }
}

// Chunks of the rows asked for, so small that their scores fit into the second cache.
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
                     const NsaTensor &value) {
    if (pass.attention) problem.will_write(pass.attention, problem.at.v_dim);
    Sight sight{0, pass.at.compress_block_size, pass.at.compress_stride};
    KeyTiles tiles(problem, kKeys); // large: sums of values are read and written once a tile
    PackedKeys<E> keys(problem, tiles, key, problem.at.qk_dim, {kColumns});
    std::initializer_list<Form> none, panels = {kPanels};
    PackedKeys<E> values(problem, tiles, value, problem.at.v_dim, pass.attention ? panels : none);
    Lanes lanes(problem.group);
    bool scored = pass.scores || pass.at.select_block_count;
    int64_t bytes = std::max<int64_t>(scored ? pass.most_blocks * kLanes * 4 : 0, 1);
    int64_t size = lanes.queries(std::min<int64_t>(std::max<int64_t>((2 << 18) / bytes, kTiles), kChunkTiles));
    auto work = compressed_chunks(problem, pass, size);
    parallel<typename E::Session>(problem.at.threads, int64_t(work.size()), [&] {
        int64_t most = lanes.tiles(size);
        return [&, forward = Forward<E>(problem, most, pass.attention), chooser = Chooser(pass.at, pass.most_blocks),
                scores = Scores(pass.at, scored ? most : 0, pass.most_blocks)](int64_t task) mutable {
            const Chunk &chunk = work[task];
            const Sample &sample = *chunk.sample;
            int64_t b = chunk.sample - problem.samples.data(), first = tiles.first[b], count = lanes.tiles(chunk.size());
            // Early rows have no choice: their scores are not needed.
            int64_t early = pass.at.select_block_size * pass.at.select_block_count;
            bool score = pass.scores || (scored && sample.position(chunk.stop - 1) >= early);
            forward.begin(chunk, lanes, query, [&](int64_t token) { return sight.of(sample, sample.position(token)); }, never);
            if (score) scores.begin(pass.blocks(b));
            auto tile = [&](int64_t i) -> LaneTile & { return forward.tile(i); };
            pair_up<kTiles>(sample, tiles, sight, tile, count, [&](int64_t k, const int64_t *some, int n) {
                const typename E::In *v = pass.attention ? values.at(kPanels, first + k, chunk.head) : nullptr;
                KeyTile<E> keys_of{keys.at(kColumns, first + k, chunk.head), v, tiles.span(k, sample.keys)};
                if (!score) return forward.attend(keys_of, some, n);
                forward.template attend<true>(keys_of, some, n, [&](int64_t i, const float *weights, const float *factor, const Span &seen) {
                    scores.add(i, weights, factor, seen);
                });
            });
            choose_blocks(problem, pass, chunk, lanes, forward, scores, chooser);
            if (pass.attention) forward.finish(chunk, lanes, pass.attention, pass.row_max, pass.row_sum);
        };
    });
}

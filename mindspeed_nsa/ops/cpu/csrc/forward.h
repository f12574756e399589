// Forward: the softmax of tiles of lanes, key tile by key tile. Logits lie [keys, lanes]: maxima and sums run down the columns.

constexpr float kFloor = -1e38f; // level of a row that has seen nothing
constexpr float kSlack = 8;      // a level is kept until a logit exceeds it by this many powers of 2: sums stay in range

template <class E> struct KeyTile {
    const typename E::In *key, *value_t;
    Span span;
};

// Which lanes see row `i` of a key tile.
inline vi visible(const LaneTile &tile, int lane, Span keys, int64_t i) {
    if (i >= keys.count) return vi{};
    vi at = splat(int32_t(keys.start + i));
    return (load(tile.first + lane) <= at) & (load(tile.last + lane) > at);
}

// Raises the level of lanes where it has fallen behind: the factors for what they have summed, or false where there are none.
inline bool raise_level(LaneTile &tile, const float *highest, float *factor) {
    bool any = false;
    for (int lane = 0; lane < kLanes; lane++) any |= highest[lane] > tile.level[lane] + kSlack;
    if (!any) return false;
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        vf level = load(tile.level + lane), high = load(highest + lane);
        vi behind = high > level + kSlack;
        vf scale = pick(behind, exp2(pick(behind, level - high, vf{})), splat(1.f));
        store(factor + lane, scale);
        store(tile.level + lane, pick(behind, high, level));
        store(tile.total + lane, load(tile.total + lane) * scale);
    }
    return true;
}

inline void rescale(float *panel, int64_t rows, const float *factor) {
    for (int64_t i = 0; i < rows; i++)
        for (int lane = 0; lane < kLanes; lane += kWidth)
            store(panel + i * kLanes + lane, load(panel + i * kLanes + lane) * load(factor + lane));
}

template <bool masked>
inline void find_highest(const float *logits, Span keys, float slope, LaneTile &tile, float *highest) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        vf high[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
        for (int64_t i = 0; i < keys.rows; i += 4)
            for (int j = 0; j < 4; j++) {
                vf x = load(logits + (i + j) * kLanes + lane);
                if (masked) x = pick(visible(tile, lane, keys, i + j), x, splat(kLowest));
                high[j] = larger(x, high[j]);
            }
        vf x = larger(larger(high[0], high[1]), larger(high[2], high[3])) * slope;
        store(highest + lane, x);
        store(tile.top + lane, larger(x, load(tile.top + lane)));
    }
}

// Weights of a key tile, relative to the level: into the engine's form and, where `keep`, in place of the logits.
template <class E, bool masked, bool keep>
inline void weigh(float *logits, Span keys, float slope, LaneTile &tile, typename E::In *weights) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        vf level = load(tile.level + lane), total[2] = {};
#pragma GCC unroll 4
        for (int64_t i = 0; i < keys.rows; i += 2) {
            vf weight[2];
            for (int j = 0; j < 2; j++) {
                float *at = logits + (i + j) * kLanes + lane;
                weight[j] = exp2(at_most(kSlack, load(at) * slope - level)); // more by the rounding of huge logits alone
                if (masked) weight[j] = pick(visible(tile, lane, keys, i + j), weight[j], vf{});
                total[j] += weight[j];
                if (keep) store(at, weight[j]);
            }
            E::put_pair(weights, i, lane, weight[0], weight[1]);
        }
        store(tile.total + lane, load(tile.total + lane) + total[0] + total[1]);
    }
}

template <class E> class Forward {
  public:
    using In = typename E::In;

    Forward(const Problem &problem, int64_t tiles, bool attend = true)
        : problem_(problem), stage_(problem.qk_pad), query_(tiles * problem.qk_pad * kLanes),
          out_(attend ? tiles * problem.v_pad * kLanes : 0), tile_(tiles), logits_(kTiles * kKeys * kLanes),
          weights_(kTiles * kKeys * kLanes), rows_(kLanes * problem.v_pad) {}

    LaneTile &tile(int64_t i) { return tile_[i]; }

    // Take a chunk's queries. `see(token)`: the keys it sees; `blind(token)`: whether its logits count as equal.
    template <class See, class Blind>
    void begin(const Chunk &chunk, const Lanes &lanes, const NsaTensor &query, const See &see, const Blind &blind) {
        tiles_ = lanes.tiles(chunk.size());
        for (int64_t i = 0; i < tiles_; i++) {
            TileRows rows(chunk, lanes, i);
            LaneTile &tile = tile_[i];
            tile.look(rows, see);
            for (int lane = 0; lane < kLanes; lane++) {
                tile.level[lane] = tile.top[lane] = kFloor;
                tile.total[lane] = 0;
                rows.used[lane] = rows.used[lane] && !blind(rows.token[lane]);
            }
            auto pointers = stage_.gather(problem_.at.type, query, problem_.at.qk_dim, problem_.at.scale < 0, rows);
            E::pack_columns(pointers, problem_.qk_pad, query_ + i * problem_.qk_pad * kLanes);
        }
        if (out_) memset(out_, 0, tiles_ * problem_.v_pad * kLanes * sizeof(float));
    }

    // Let `n` tiles of lanes attend to a key tile. `observe(tile, weights, factor)` sees each tile's weights in fp32, and the
    // factors of what came before them, or nullptr.
    template <bool observed, class Observe>
    void attend(const KeyTile<E> &keys, const int64_t *tiles, int n, const Observe &observe) {
        int64_t qk = problem_.qk_pad, v = problem_.v_pad, panel = kKeys * kLanes;
        multiply<E, false>(
            keys.key, keys.span.rows, qk, n, [&](int64_t j) { return query_ + tiles[j] * qk * kLanes; },
            [&](int64_t j) { return logits_ + j * panel; });
        for (int j = 0; j < n; j++) {
            alignas(64) float highest[kLanes], factor[kLanes];
            LaneTile &tile = tile_[tiles[j]];
            float *logits = logits_ + j * panel, slope = problem_.slope;
            bool masked = !tile.sees_all(keys.span);
            auto find = masked ? find_highest<true> : find_highest<false>;
            find(logits, keys.span, slope, tile, highest);
            bool raised = raise_level(tile, highest, factor);
            if (raised && out_) rescale(out_ + tiles[j] * v * kLanes, v, factor);
            auto weigh_tile = masked ? weigh<E, true, observed> : weigh<E, false, observed>;
            weigh_tile(logits, keys.span, slope, tile, weights_ + j * panel);
            observe(tiles[j], logits, raised ? factor : nullptr);
        }
        if (!out_) return;
        multiply<E, true>(
            keys.value_t, v, keys.span.rows, n, [&](int64_t j) { return weights_ + j * panel; },
            [&](int64_t j) { return out_ + tiles[j] * v * kLanes; });
    }
    void attend(const KeyTile<E> &keys, const int64_t *tiles, int n) {
        attend<false>(keys, tiles, n, [](int64_t, const float *, const float *) {});
    }

    // Write a chunk's rows.
    template <class Blind>
    void finish(const Chunk &chunk, const Lanes &lanes, const Blind &blind, void *attention, float *row_max, float *row_sum) {
        int64_t v = problem_.v_pad;
        for (int64_t i = 0; i < tiles_; i++) {
            for (int64_t d = 0; d < v; d += 16) transpose_panel(out_ + (i * v + d) * kLanes, rows_ + d, v);
            TileRows rows(chunk, lanes, i);
            const LaneTile &tile = tile_[i];
            for (int lane = 0; lane < kLanes; lane++) {
                if (!rows.used[lane]) continue;
                int64_t at = rows.token[lane] * problem_.at.query_heads + rows.head[lane];
                float total = tile.total[lane], top = blind(rows.token[lane]) ? kLowest : tile.top[lane] * kLn2;
                row_max[at] = total > 0 ? top : total; // a row that sees nothing: 0; a NaN stays one
                row_sum[at] = total > 0 ? total * std::exp2(std::max(tile.level[lane] - tile.top[lane], -kSlack)) : total;
                float inverse = total == 0 ? 0 : 1 / total, *row = rows_ + lane * v;
                for (int64_t d = 0; d < v; d += kWidth) store(row + d, load(row + d) * inverse);
                write_row(problem_.at.type, row, problem_.at.v_dim, row_of(attention, problem_.at.type, at, problem_.at.v_dim));
            }
        }
    }

  private:
    const Problem &problem_;
    int64_t tiles_ = 0;
    RowStage<E> stage_;
    Buffer<In> query_;
    Buffer<float> out_;
    Buffer<LaneTile> tile_;
    Buffer<float> logits_;
    Buffer<In> weights_;
    Buffer<float> rows_;
};

// Forward: the softmax of tiles of lanes, key tile by key tile. Logits lie in panels of 16 keys [lanes, 16].

constexpr float kFloor = -1e38f; // level of a row that has seen nothing
constexpr float kSlack = 8;      // a level is kept until a logit exceeds it by this many powers of 2: sums stay in range
constexpr float kTame = 1e8f;    // up to this level the rounding of a logit does not lift it far above the level

constexpr int64_t kPanel = kKeys * kLanes; // logits of a tile of lanes and a tile of keys

template <class E> struct KeyTile {
    const typename E::In *key, *value; // as columns, as panels
    Span span;
    int64_t value_rows; // of a panel

    KeyTile(const typename E::In *key, const typename E::In *value, const Span &span)
        : key(key), value(value), span(span), value_rows(span.rows) {}

    // Leaves only a part of the keys.
    void trim(const Span &part, int64_t qk_pad) {
        int64_t skip = part.start - span.start;
        key += skip * qk_pad;
        if (value) value += skip * kLanes;
        span = part;
    }
};

// Keys, and values where they are asked for, as forward multiplies them.
template <class E> struct ForwardKeys {
    const Problem &problem;
    const KeyTiles tiles;
    const PackedKeys<E> keys, values;

    ForwardKeys(const Problem &problem, int64_t tile_size, const NsaTensor &key, const NsaTensor &value, bool with_values = true)
        : problem(problem), tiles(problem, tile_size), keys(problem, tiles, key, problem.at.qk_dim, {kColumns}),
          values(problem, tiles, value, problem.at.v_dim, with_values ? Forms{kPanels} : Forms{}) {}
    ForwardKeys(const ForwardKeys &) = delete; // what is packed refers to the tiles

    // The k-th tile of a chunk's sample.
    KeyTile<E> tile(const Chunk &chunk, int64_t k) const {
        int64_t i = tiles.first[chunk.sample - problem.samples.data()] + k;
        return {keys.at(kColumns, i, chunk.head), values.at(kPanels, i, chunk.head), tiles.span(k, chunk.sample->keys)};
    }
};

// Which keys from the i-th of a tile on a lane sees.
inline vi keys_seen(const LaneTile &tile, int lane, const Span &keys, int64_t i) {
    vi at = load(kCount) + int32_t(keys.start + i);
    return (at >= tile.first[lane]) & (at < std::min(tile.last[lane], int32_t(keys.start + keys.count)));
}

// Raises the level of lanes where it has fallen behind: the factors for what they have summed, or false where there are none.
inline bool raise_level(LaneTile &tile, const float *highest, float *factor) {
    vi above{}, wild{};
    for (int lane = 0; lane < kLanes; lane += kWidth) above |= load(highest + lane) > load(tile.level + lane) + kSlack;
    if (!any(above)) return false;
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        vf level = load(tile.level + lane), high = load(highest + lane);
        vi behind = high > level + kSlack;
        vf scale = pick(behind, exp2(pick(behind, level - high, vf{})), splat(1.f));
        store(factor + lane, scale);
        level = pick(behind, high, level);
        wild |= ~((level < kTame) & (level > -kTame));
        store(tile.level + lane, level);
        store(tile.total + lane, load(tile.total + lane) * scale);
    }
    tile.tame = !any(wild);
    return true;
}

// Panels [lanes, 16] times a factor a lane.
inline void rescale(float *panels, int64_t count, const float *factor) {
    for (int64_t i = 0; i < count * kLanes; i++)
        for (int j = 0; j < kLanes; j += kWidth)
            store(panels + i * kLanes + j, load(panels + i * kLanes + j) * factor[i % kLanes]);
}

// `rows`: of the keys.
template <int rows, bool masked>
inline void find_highest(const float *logits, const Span &keys, float slope, LaneTile &tile, float *highest) {
    vf high[kLanes];
    for (vf &x : high) x = splat(kLowest);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i += kLanes)
        for (int j = 0; j < kLanes; j += kWidth) {
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; lane++) {
                vf x = load(logits + (i + lane) * kLanes + j);
                if (masked) x = pick(keys_seen(tile, lane, keys, i + j), x, splat(kLowest));
                high[lane] = larger(x, high[lane]);
            }
        }
    across(high, [](vf x, vf y) { return larger(x, y); }, highest);
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        vf x = load(highest + lane) * slope;
        store(highest + lane, x);
        store(tile.top + lane, larger(x, load(tile.top + lane)));
    }
}

// Weights of a key tile, relative to the level: as rows of the engine's and, where `keep`, in place of the logits.
// `careful`: with keys that are not seen, or logits that are not tame. `rough`: of exp2.
template <class E, int rows, bool careful, bool keep, bool rough>
inline void weigh(float *logits, const Span &keys, float slope, LaneTile &tile, typename E::In *weights) {
    vf total[kLanes];
    alignas(64) float totals[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; lane++) {
        vf level = splat(tile.level[lane]);
        total[lane] = vf{};
#pragma GCC unroll 4
        for (int i = 0; i < rows; i += 2 * kLanes)
            for (int j = 0; j < kLanes; j += kWidth) {
                vf weight[2];
                for (int k = 0; k < 2; k++) {
                    float *at = logits + (i + k * kLanes + lane) * kLanes + j;
                    vf x = load(at) * slope - level;
                    weight[k] = exp2<rough>(careful ? smaller(splat(kSlack), x) : x);
                    if (careful) weight[k] = pick(keys_seen(tile, lane, keys, i + k * kLanes + j), weight[k], vf{});
                    total[lane] += weight[k];
                    if (keep) store(at, weight[k]);
                }
                E::put_row(weights + lane * rows + i, j, weight[0], weight[1]);
            }
    }
    across(total, [](vf x, vf y) { return x + y; }, totals);
    for (int lane = 0; lane < kLanes; lane += kWidth) store(tile.total + lane, load(tile.total + lane) + load(totals + lane));
}

// Run with the rows of a key tile as a constant: the loops over them unroll.
template <class Run> inline void with_rows(int64_t rows, const Run &run) {
    static_assert(kKeys == 4 * kDepth);
    if (rows == kDepth) return run(std::integral_constant<int, kDepth>());
    if (rows == 2 * kDepth) return run(std::integral_constant<int, 2 * kDepth>());
    if (rows == 3 * kDepth) return run(std::integral_constant<int, 3 * kDepth>());
    run(std::integral_constant<int, 4 * kDepth>());
}

// Where the rows of an attention go: attention [T1, N1, D2], and the statistics [T1, N1].
struct Results {
    void *attention;
    float *row_max, *row_sum;
};

template <class E> class Forward {
  public:
    using In = typename E::In;

    Forward(const Problem &problem, int64_t tiles, bool attend = true)
        : problem_(problem), attend_(attend), stage_(problem.at.qk_dim, problem.qk_pad, problem.at.scale < 0), query_(tiles),
          copies_(tiles * problem.qk_pad * kLanes),
          out_(attend ? tiles * problem.v_pad * kLanes : 0), tile_(tiles), logits_(2 * kPanel),
          weights_(kTiles * kPanel) {}

    LaneTile &tile(int64_t i) { return tile_[i]; }

    // Take a chunk's queries. `see(token)`: the keys it sees; `blind(token)`: whether its logits count as equal.
    template <class See, class Blind>
    void begin(const Chunk &chunk, const Lanes &lanes, const NsaTensor &query, const See &see, const Blind &blind) {
        tiles_ = lanes.tiles(chunk.size());
        for (int64_t i = 0; i < tiles_; i++) {
            TileRows rows(chunk, lanes, i);
            LaneTile &tile = tile_[i];
            tile.look(rows, see);
            tile.fresh = true;
            tile.tame = false;
            for (int lane = 0; lane < kLanes; lane++) {
                tile.level[lane] = tile.top[lane] = kFloor;
                tile.total[lane] = 0;
                tile.blind[lane] = rows.used[lane] && blind(rows.token[lane]);
                rows.used[lane] = rows.used[lane] && !tile.blind[lane];
            }
            query_[i] = stage_.gather(problem_.at.type, query, rows, copies_ + i * problem_.qk_pad * kLanes);
        }
    }

    // Let `n` tiles of lanes attend to a key tile. `rough`: as closely as the engine's weights need, which are not scores.
    // `observe(tile, weights, factor)` sees each tile's weights, in panels of 16 keys, and the factors of what was before, or nullptr.
    template <bool rough, bool observed, class Observe>
    void attend(KeyTile<E> keys, const int64_t *tiles, int n, const Observe &observe) {
        keys.trim(LaneTile::seen(keys.span, tiles, n, [&](int64_t i) -> const LaneTile & { return tile_[i]; }), problem_.qk_pad);
        int64_t rows = keys.span.rows, panels = problem_.v_pad / kLanes;
        if (rows == 0) return;
        for (int i = 0; i < n; i += 2) { // two at a time, so that their logits stay in the first cache
            LeftRows<E> first = query_[tiles[i]], second = i + 1 < n ? query_[tiles[i + 1]] : LeftRows<E>{};
            E::template multiply<false>({{first.data, second.data}, {first.stride, second.stride}, problem_.qk_pad, keys.key,
                                         rows / kLanes, problem_.qk_pad * kLanes, {logits_, logits_ + kPanel}});
            for (int j = i; j < std::min(i + 2, n); j++)
                with_rows(rows, [&](auto constant) {
                    weigh_tile<constant, rough, observed>(keys.span, tiles[j], logits_ + (j - i) * kPanel, weights_ + j * kPanel, observe);
                });
        }
        for (int i = 0; attend_ && i < n; i += 2) {
            int last = std::min(i + 1, n - 1);
            const In *weights = weights_ + i * kPanel;
            Times<In> values{{weights, last > i ? weights + kPanel : nullptr}, {rows, rows}, rows, keys.value, panels,
                             keys.value_rows * kLanes, {out(tiles[i]), out(tiles[last])}};
            sum(tile_[tiles[i]], tile_[tiles[last]], values);
        }
    }
    template <bool rough> void attend(const KeyTile<E> &keys, const int64_t *tiles, int n) {
        attend<rough, false>(keys, tiles, n, [](int64_t, const float *, const float *, const Span &) {});
    }

    // Write a chunk's rows. `copy`: what is written to `attention` once more, [the chunk's queries, heads of the group, D2], or nullptr.
    void finish(const Chunk &chunk, const Lanes &lanes, const Results &to, void *copy = nullptr) {
        for (int64_t i = 0; i < tiles_; i++) {
            alignas(64) float inverse[kLanes], most[kLanes], sums[kLanes];
            const LaneTile &tile = tile_[i];
            for (int lane = 0; lane < kLanes; lane += kWidth) {
                vf total = load(tile.total + lane), top = load(tile.top + lane), seen = load(tile.level + lane) - top;
                vi some = total > 0; // else the row sees nothing: 0; a NaN stays one
                store(inverse + lane, pick(total == 0, vf{}, 1 / total));
                store(most + lane, pick(some, top * kLn2, total));
                store(sums + lane, pick(some, total * exp2(larger(splat(-kSlack), seen)), total));
            }
            TileRows rows(chunk, lanes, i);
            if (tile.fresh) memset(out(i), 0, problem_.v_pad * kLanes * sizeof(float));
            for (int lane = 0; lane < kLanes; lane++) {
                if (!rows.used[lane]) continue;
                int64_t at = rows.token[lane] * problem_.at.query_heads + rows.head[lane], dim = problem_.at.v_dim;
                to.row_max[at] = tile.blind[lane] && tile.total[lane] > 0 ? kLowest : most[lane];
                to.row_sum[at] = sums[lane];
                auto row = [&](int64_t d) { return load(out(i) + panel_at(d, lane, kLanes)) * inverse[lane]; };
                write_row<true>(problem_.at.type, dim, row_of(to.attention, problem_.at.type, at, dim), row);
                if (!copy) continue;
                int64_t beside = (rows.token[lane] - chunk.start) * lanes.group + rows.head[lane] - chunk.head * lanes.group;
                write_row(problem_.at.type, dim, row_of(copy, problem_.at.type, beside, dim), row);
            }
        }
    }

  private:
    // Adds weighted values to the sums of one or two tiles.
    void sum(LaneTile &first, LaneTile &second, const Times<In> &values) {
        if (first.fresh && second.fresh) {
            E::template multiply<false>(values);
        } else {
            int64_t size = problem_.v_pad * kLanes * sizeof(float);
            if (first.fresh) memset(values.c[0], 0, size);
            if (second.fresh) memset(values.c[1], 0, size);
            E::template multiply<true>(values);
        }
        first.fresh = second.fresh = false;
    }
    template <int rows, bool rough, bool observed, class Observe>
    void weigh_tile(const Span &keys, int64_t i, float *logits, In *weights, const Observe &observe) {
        alignas(64) float highest[kLanes], factor[kLanes];
        LaneTile &tile = tile_[i];
        bool masked = !tile.sees_all(keys);
        if (masked)
            find_highest<rows, true>(logits, keys, problem_.slope, tile, highest);
        else
            find_highest<rows, false>(logits, keys, problem_.slope, tile, highest);
        bool raised = raise_level(tile, highest, factor);
        if (raised && !tile.fresh) rescale(out(i), problem_.v_pad / kLanes, factor);
        if (masked || !tile.tame)
            weigh<E, rows, true, observed, rough>(logits, keys, problem_.slope, tile, weights);
        else
            weigh<E, rows, false, observed, rough>(logits, keys, problem_.slope, tile, weights);
        if (!observed) return;
        observe(i, logits, raised ? factor : nullptr, keys);
    }

    // Sums of a tile: panels of dims [lanes, 16].
    float *out(int64_t i) const { return out_ + i * problem_.v_pad * kLanes; }

    const Problem &problem_;
    bool attend_;
    int64_t tiles_ = 0;
    RowStage<E> stage_;
    std::vector<LeftRows<E>> query_;
    Buffer<In> copies_; // of queries
    Buffer<float> out_;
    Buffer<LaneTile> tile_;
    Buffer<float> logits_;
    Buffer<In> weights_;
};

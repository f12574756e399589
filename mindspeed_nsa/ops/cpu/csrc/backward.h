// Backward: probabilities and gradients of logits of tiles of lanes, for one key tile at a time.

inline float dot(const float *x, const float *y, int64_t count) {
    vf total{};
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) total += load(x + i) * load(y + i);
    float rest = sum(total);
    for (; i < count; i++) rest += x[i] * y[i];
    return rest;
}

// What backward is given for the rows of queries, and grad * attention summed over each row.
struct Gradients {
    const NsaTensor &grad, &query;
    const float *row_max, *row_sum;
    Buffer<float> delta; // [T1, N1]

    Gradients(const Problem &problem, const NsaTensor &grad, const NsaTensor &query, const NsaTensor &attention,
              const float *row_max, const float *row_sum)
        : grad(grad), query(query), row_max(row_max), row_sum(row_sum), delta(problem.queries() * problem.at.query_heads) {
        constexpr int64_t kTokens = 32; // of a task
        int64_t heads = problem.at.query_heads, dim = problem.at.v_dim;
        int32_t type = problem.at.type;
        parallel(problem.at.threads, ceil_div(problem.queries(), kTokens), [&, heads, dim, type] {
            return [&, heads, dim, type, left = Buffer<float>(dim), right = Buffer<float>(dim)](int64_t task) {
                int64_t stop = std::min(problem.queries(), (task + 1) * kTokens) * heads;
                for (int64_t i = task * kTokens * heads; i < stop; i++) {
                    read_row(type, row_of(grad, type, i / heads, i % heads), dim, left);
                    read_row(type, row_of(attention, type, i / heads, i % heads), dim, right);
                    delta[i] = dot(left, right, dim);
                }
            };
        });
    }
};

// The queries of a chunk (or of a list) as backward reads them, in groups of kGroup tiles of lanes.
template <class E> class QuerySide {
  public:
    using In = typename E::In;

    QuerySide(const Problem &problem, int64_t tiles)
        : problem_(problem), query_stage_(problem.at.qk_dim, problem.qk_pad, problem.at.scale < 0),
          grad_stage_(problem.at.v_dim, problem.v_pad, false), tile_(tiles),
          query_t_(tiles * problem.qk_pad * kLanes), grad_t_(tiles * problem.v_pad * kLanes),
          query_(tiles * problem.qk_pad * kLanes), grad_(tiles * problem.v_pad * kLanes) {}

    LaneTile &tile(int64_t i) { return tile_[i]; }
    const In *query_t(int64_t i) const { return query_t_ + i * problem_.qk_pad * kLanes; }
    const In *grad_t(int64_t i) const { return grad_t_ + i * problem_.v_pad * kLanes; }
    // Panel j of dims of the group's rows; a group starts at a multiple of kGroup.
    const In *query(int64_t group, int64_t j) const { return query_ + (group * problem_.qk_pad + j * kGroupRows) * kLanes; }
    const In *grad(int64_t group, int64_t j) const { return grad_ + (group * problem_.v_pad + j * kGroupRows) * kLanes; }

    // Asks for rows that are taken later.
    void prefetch(const Gradients &from, const TileRows &rows) const {
        int32_t type = problem_.at.type;
        for (int lane = 0; lane < kLanes && rows.used[lane]; lane++)
            nsa::prefetch(row_of(from.query, type, rows.token[lane], rows.head[lane]), problem_.at.qk_dim * type_size(type));
        for (int lane = 0; lane < kLanes && rows.used[lane]; lane++)
            nsa::prefetch(row_of(from.grad, type, rows.token[lane], rows.head[lane]), problem_.at.v_dim * type_size(type));
    }
    // Take the rows of tile `i`; `by_rows`: also as the gradients of keys and values read them.
    template <class See>
    void take(int64_t i, const Gradients &from, TileRows rows, const See &see, bool by_rows) {
        LaneTile &tile = tile_[i];
        tile.look(rows, see);
        int32_t type = problem_.at.type;
        bool all[kLanes];
        memcpy(all, rows.used, sizeof all);
        for (int lane = 0; lane < kLanes; lane++) {
            tile.level[lane] = tile.total[lane] = tile.delta[lane] = 0;
            if (!rows.used[lane]) continue;
            int64_t at = rows.token[lane] * problem_.at.query_heads + rows.head[lane];
            rows.used[lane] = from.row_max[at] != kLowest; // all keys masked: the logits are equal constants
            tile.level[lane] = rows.used[lane] ? from.row_max[at] * kLog2E : 0;
            tile.total[lane] = from.row_sum[at] == 0 ? 0 : 1 / from.row_sum[at];
            tile.delta[lane] = from.delta[at];
        }
        int64_t qk = problem_.qk_pad, v = problem_.v_pad, group = i / kGroup * kGroup, inside = i % kGroup * kLanes * kLanes;
        auto query_rows = query_stage_.gather(type, from.query, rows);
        E::pack_columns(query_rows, qk, query_t_ + i * qk * kLanes);
        if (by_rows) E::pack_rows(query_rows, qk, query_ + group * qk * kLanes + inside, kGroupRows * kLanes);
        memcpy(rows.used, all, sizeof all);
        auto grad_rows = grad_stage_.gather(type, from.grad, rows);
        E::pack_columns(grad_rows, v, grad_t_ + i * v * kLanes);
        if (by_rows) E::pack_rows(grad_rows, v, grad_ + group * v * kLanes + inside, kGroupRows * kLanes);
    }
    // Fill the rest of the last group with rows that weigh nothing.
    void fill(int64_t count) {
        int64_t qk = problem_.qk_pad, v = problem_.v_pad;
        for (int64_t i = count; i % kGroup; i++) {
            LaneTile &tile = tile_[i];
            tile = tile_[count - 1];
            for (int lane = 0; lane < kLanes; lane++) tile.level[lane] = tile.total[lane] = tile.delta[lane] = 0;
            int64_t group = i / kGroup * kGroup, inside = i % kGroup * kLanes * kLanes;
            memset(query_t_ + i * qk * kLanes, 0, qk * kLanes * sizeof(In));
            memset(grad_t_ + i * v * kLanes, 0, v * kLanes * sizeof(In));
            for (int64_t j = 0; j < qk / 16; j++)
                memset(query_ + (group * qk + j * kGroupRows) * kLanes + inside, 0, kLanes * kLanes * sizeof(In));
            for (int64_t j = 0; j < v / 16; j++)
                memset(grad_ + (group * v + j * kGroupRows) * kLanes + inside, 0, kLanes * kLanes * sizeof(In));
        }
    }

  private:
    static constexpr int64_t kGroupRows = kGroup * kLanes; // of a group

    const Problem &problem_;
    RowStage<E> query_stage_, grad_stage_;
    Buffer<LaneTile> tile_;
    Buffer<In> query_t_, grad_t_, query_, grad_;
};

// Which lanes see the i-th key of a tile.
inline vi lanes_seeing(const LaneTile &tile, int lane, const Span &keys, int64_t i) {
    if (i >= keys.count) return vi{};
    vi at = splat(int32_t(keys.start + i));
    return (load(tile.first + lane) <= at) & (load(tile.last + lane) > at);
}

// Probabilities and gradients of the logits, of two tiles of lanes: by rows of lanes, and as panels.
template <class E, bool masked, bool rows_wanted, bool panels_wanted>
inline void differentiate(const float *const *logits, const float *const *grads, LaneTile *const *tiles, Span keys,
                          float slope, int64_t row, typename E::In *by_row, typename E::In *grad_by_row,
                          typename E::In *const *panels) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
        vf level[2], inverse[2], delta[2];
        for (int t = 0; t < 2; t++) {
            level[t] = load(tiles[t]->level + lane);
            inverse[t] = load(tiles[t]->total + lane);
            delta[t] = load(tiles[t]->delta + lane);
        }
        for (int64_t i = 0; i < keys.rows; i += 2) {
            vf weight[2][2], grad[2][2]; // [key][tile]
            for (int j = 0; j < 2; j++)
                for (int t = 0; t < 2; t++) {
                    int64_t at = (i + j) * kLanes + lane;
                    // At most the maximum, but for the rounding of logits that are huge.
                    vf x = exp2(smaller(vf{}, load(logits[t] + at) * slope - level[t])) * inverse[t];
                    vf y = load(grads[t] + at) - delta[t];
                    if (masked) {
                        vi seen = lanes_seeing(*tiles[t], lane, keys, i + j);
                        x = pick(seen, x, vf{});
                        y = pick(seen, y, vf{});
                    }
                    weight[j][t] = x;
                    grad[j][t] = x * y;
                }
            for (int j = 0; rows_wanted && j < 2; j++) {
                E::put_row(by_row + (i + j) * row, lane, weight[j][0], weight[j][1]);
                E::put_row(grad_by_row + (i + j) * row, lane, grad[j][0], grad[j][1]);
            }
            for (int t = 0; panels_wanted && t < 2; t++) E::put_pair(panels[t], i, lane, grad[0][t], grad[1][t]);
        }
    }
}

// A key tile in backward. key_t is read for the gradient of queries only.
template <class E> struct BackwardTile {
    const typename E::In *key, *value, *key_t;
    Span span;
};

template <class E> class Backward {
  public:
    using In = typename E::In;

    explicit Backward(const Problem &problem)
        : problem_(problem), logits_(2 * kPanel), grads_(2 * kPanel), panels_(kGroup * kPanel),
          by_row_(kGroup * kPanel), grad_by_row_(kGroup * kPanel) {}

    // `n` tiles of lanes against a key tile. Adds to the gradients of the queries (`grad_query(tile)`: [qk_pad, lanes]) and, for a
    // whole group, of keys and values (panels of dims [rows, 16]). Between the products ahead(i) may do
    // something else for tile i.
    template <bool to_query, bool to_keys, class GradQuery, class Ahead>
    void add(const BackwardTile<E> &keys, QuerySide<E> &side, const int64_t *tiles, int n, const GradQuery &grad_query,
             float *grad_key, float *grad_value, const Ahead &ahead) {
        Span part = LaneTile::seen(keys.span, tiles, n, [&](int64_t i) -> const LaneTile & { return side.tile(i); });
        int64_t qk = problem_.qk_pad, v = problem_.v_pad, rows = part.rows, group = tiles[0];
        int64_t all = keys.span.rows, skip = part.start - keys.span.start;
        auto panel = [](auto *of) { return [of](int64_t j) { return of + j * kPanel; }; };
        for (int i = 0; i < n; i += 2) { // two at a time, so that their logits stay in the first cache
            int some = std::min(2, n - i);
            multiply<E, false>(keys.key + skip * qk, qk, rows, qk, some, [&](int64_t j) { return side.query_t(tiles[i + j]); },
                               panel(&logits_[0]));
            ahead(i);
            multiply<E, false>(keys.value + skip * v, v, rows, v, some, [&](int64_t j) { return side.grad_t(tiles[i + j]); },
                               panel(&grads_[0]));
            ahead(i + 1);
            differentiate_pair<to_query, to_keys>(part, side, tiles, i, i + some - 1);
        }
        if (to_query)
            multiply<E, true>(keys.key_t + skip, all, qk, rows, n, panel(&panels_[0]), [&](int64_t j) { return grad_query(tiles[j]); });
        if (!to_keys) return;
        multiply<E, true>(by_row_, kRow, rows, kRow, v / 16, [&](int64_t j) { return side.grad(group, j); },
                          [&](int64_t j) { return grad_value + (j * all + skip) * 16; });
        multiply<E, true>(grad_by_row_, kRow, rows, kRow, qk / 16, [&](int64_t j) { return side.query(group, j); },
                          [&](int64_t j) { return grad_key + (j * all + skip) * 16; });
    }

  private:
    static constexpr int64_t kPanel = kKeys * kLanes, kRow = kGroup * kLanes;

    template <bool to_query, bool to_keys>
    void differentiate_pair(const Span &keys, QuerySide<E> &side, const int64_t *tiles, int j, int other) {
        const float *logits[2] = {logits_, logits_ + (other - j) * kPanel};
        const float *grads[2] = {grads_, grads_ + (other - j) * kPanel};
        LaneTile *lanes[2] = {&side.tile(tiles[j]), &side.tile(tiles[other])};
        In *panels[2] = {panels_ + j * kPanel, panels_ + (j + 1) * kPanel};
        bool masked = !lanes[0]->sees_all(keys) || !lanes[1]->sees_all(keys);
        auto run = masked ? differentiate<E, true, to_keys, to_query> : differentiate<E, false, to_keys, to_query>;
        run(logits, grads, lanes, keys, problem_.slope, kRow, by_row_ + j * kLanes, grad_by_row_ + j * kLanes, panels);
    }

    const Problem &problem_;
    Buffer<float> logits_, grads_;
    Buffer<In> panels_, by_row_, grad_by_row_;
};

// Rows of the gradient of queries from panels [qk_pad, lanes].
template <class E>
inline void write_grad_query(const Problem &problem, const TileRows &rows, const float *panel, const float *row_max,
                             float *scratch, void *grad_query) {
    int64_t qk = problem.qk_pad, dim = problem.at.qk_dim;
    for (int64_t d = 0; d < qk; d += 16) transpose_panel(panel + d * kLanes, scratch + d, qk);
    for (int lane = 0; lane < kLanes; lane++) {
        if (!rows.used[lane]) continue;
        int64_t at = rows.token[lane] * problem.at.query_heads + rows.head[lane];
        bool blind = row_max[at] == kLowest;
        write_row<true>(problem.at.type, dim, row_of(grad_query, problem.at.type, at, dim),
                        [&](int64_t d) { return blind ? vf{} : load(scratch + lane * qk + d) * float(problem.at.scale); });
    }
}

// Rows of the gradient of keys or values from panels of dims [rows, 16].
inline void write_grad_keys(const Problem &problem, const float *panels, int64_t rows, int64_t count, int64_t first_key,
                            int64_t head, int64_t dim, float scale, void *grad) {
    for (int64_t i = 0; i < count; i++) {
        int64_t at = (first_key + i) * problem.at.kv_heads + head;
        write_row(problem.at.type, dim, row_of(grad, problem.at.type, at, dim),
                  [&](int64_t d) { return load(panels + panel_at(d, i, rows)) * scale; });
    }
}

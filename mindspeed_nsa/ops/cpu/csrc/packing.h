// Keys, values and query rows in the form that an engine multiplies.

constexpr int kTiles = 4; // most tiles of lanes that attend together; even
constexpr int kGroup = 8; // tiles of lanes whose gradients of keys and values are summed at once

// Two panels at a time, as the engines take them; n panels, of which panel j has b(j) and c(j).
template <class E, bool accumulate, class B, class C>
inline void multiply(const typename E::In *a, int64_t stride, int64_t m, int64_t k, int64_t n, const B &b, const C &c) {
    for (int64_t j = 0; j < n; j += 2) {
        const typename E::In *from[2] = {b(j), j + 1 < n ? b(j + 1) : nullptr};
        float *to[2] = {c(j), j + 1 < n ? c(j + 1) : nullptr};
        if (j + 1 < n)
            E::template multiply<2, accumulate>(a, stride, m, k, from, to);
        else
            E::template multiply<1, accumulate>(a, stride, m, k, from, to);
    }
}

// Where column `d` of a row lies in panels of 16 columns.
inline int64_t panel_at(int64_t d, int64_t row, int64_t rows) { return (d / kLanes * rows + row) * kLanes + d % kLanes; }

// How a tile of keys or values lies in memory, padded with zeros.
enum Form {
    kRows,       // [rows, pad], as the left side of a product
    kTransposed, // [pad, rows], as the left side
    kColumns,    // the right side of rows of lanes times the tile transposed: panels of 16 of its rows
    kPanels,     // the right side of rows of lanes times the tile: panels of 16 dims
    kForms
};
using Forms = std::initializer_list<Form>;

// Tiles of keys or values of all heads, in some of the forms.
template <class E> class PackedKeys {
  public:
    using In = typename E::In;

    PackedKeys(const Problem &problem, const KeyTiles &tiles, const NsaTensor &tensor, int64_t dim, Forms forms)
        : tiles_(tiles), heads_(problem.at.kv_heads), size_(tiles.rows * round_up(dim, kDepth)) {
        int64_t all = tiles.first.back() * heads_;
        for (Form form : forms) packed_[form] = Buffer<In>(all * size_);
        parallel(problem.at.threads, forms.size() ? ceil_div(all, 8) : 0, [&] {
            return [&, rows = Buffer<In>(size_)](int64_t task) {
                for (int64_t i = task * 8; i < std::min(all, task * 8 + 8); i++) pack(problem, tensor, dim, i, rows);
            };
        });
    }
    const In *at(Form form, int64_t tile, int64_t head) const {
        return packed_[form] ? packed_[form] + (tile * heads_ + head) * size_ : nullptr;
    }

  private:
    void pack(const Problem &problem, const NsaTensor &tensor, int64_t dim, int64_t i, In *scratch) {
        int64_t tile = i / heads_, head = i % heads_, b = tiles_.sample_of(tile), pad = round_up(dim, kDepth);
        const Sample &sample = problem.samples[b];
        int64_t start = tiles_.start(tile - tiles_.first[b]), count = tiles_.count(tile - tiles_.first[b], sample.keys);
        In *rows = packed_[kRows] ? packed_[kRows] + i * size_ : scratch;
        memset(rows, 0, size_ * sizeof(In));
        for (int64_t j = 0; j < count; j++) {
            const void *row = row_of(tensor, problem.at.type, sample.k_start + start + j, head);
            E::convert(problem.at.type, row, dim, false, rows + j * pad);
        }
        if (packed_[kTransposed]) {
            In *to = packed_[kTransposed] + i * size_;
            for (int64_t d = 0; d < pad; d++)
                for (int64_t j = 0; j < tiles_.rows; j++) to[d * tiles_.rows + j] = rows[j * pad + d];
        }
        for (int64_t j = 0; j < tiles_.rows; j += 16) {
            const In *some[16];
            for (int k = 0; k < 16; k++) some[k] = rows + (j + k) * pad;
            if (packed_[kColumns]) E::pack_columns(some, pad, packed_[kColumns] + i * size_ + j * pad);
            if (packed_[kPanels]) E::pack_rows(some, pad, packed_[kPanels] + i * size_ + j * kLanes, tiles_.rows * kLanes);
        }
    }

    const KeyTiles &tiles_;
    int64_t heads_, size_;
    Buffer<In> packed_[kForms];
};

// The rows of a tile of lanes.
struct TileRows {
    int64_t token[kLanes], head[kLanes];
    bool used[kLanes];

    TileRows(const Chunk &chunk, const Lanes &lanes, int64_t tile) : TileRows(chunk, lanes, tile, nullptr) {}
    // Of listed queries, counted from the chunk's start, or of all in a row.
    TileRows(const Chunk &chunk, const Lanes &lanes, int64_t tile, const int32_t *listed) {
        for (int64_t lane = 0; lane < kLanes; lane++) {
            int64_t query = lanes.query(tile, lane);
            head[lane] = chunk.head * lanes.group + lanes.head(tile, lane);
            used[lane] = lanes.used(tile, lane) && query < chunk.size();
            token[lane] = chunk.start + (listed && used[lane] ? listed[query] : query);
        }
    }
};

// 16 rows as the left side of a product.
template <class E> struct LeftRows {
    const typename E::In *data = nullptr;
    int64_t stride = 0;
};

// Pointers to 16 rows that an engine can read to their padding: the tensor's own where they serve, else copies.
template <class E> class RowStage {
  public:
    using In = typename E::In;

    RowStage(int64_t dim, int64_t pad, bool negate) : dim_(dim), pad_(pad), negate_(negate), copies_(kLanes * pad) {}

    const In *const *gather(int32_t type, const NsaTensor &tensor, const TileRows &rows) {
        for (int lane = 0; lane < kLanes; lane++) {
            In *copy = copies_ + lane * pad_;
            const void *row = row_of(tensor, type, rows.token[lane], rows.head[lane]);
            rows_[lane] = copy;
            if (!rows.used[lane]) {
                memset(copy, 0, pad_ * sizeof(In));
            } else if (E::direct(type) && dim_ == pad_ && !negate_) {
                rows_[lane] = static_cast<const In *>(row);
                prefetch(row, pad_ * sizeof(In));
            } else {
                E::convert(type, row, dim_, negate_, copy);
                memset(copy + dim_, 0, (pad_ - dim_) * sizeof(In));
            }
        }
        return rows_;
    }
    // The rows as the left side of a product: where they lie at no one stride, in `own`.
    LeftRows<E> gather(int32_t type, const NsaTensor &tensor, const TileRows &rows, In *own) {
        gather(type, tensor, rows);
        int64_t stride = rows_[1] - rows_[0];
        bool even = rows.used[0] && E::direct(type);
        for (int lane = 1; lane < kLanes; lane++) even = even && rows_[lane] - rows_[lane - 1] == stride;
        if (even && rows_[0] != copies_) return {rows_[0], stride};
        for (int lane = 0; lane < kLanes; lane++) memcpy(own + lane * pad_, rows_[lane], pad_ * sizeof(In));
        return {own, pad_};
    }

  private:
    int64_t dim_, pad_;
    bool negate_;
    Buffer<In> copies_;
    const In *rows_[kLanes];
};

// What the lanes of a tile see, and how far their softmax is.
struct alignas(64) LaneTile {
    int32_t first[kLanes], last[kLanes]; // keys of the sample
    int32_t end[kLanes];                 // `last`, where the lane is shown
    float level[kLanes];                 // logits are taken relative to this
    float top[kLanes];                   // their maximum so far
    float total[kLanes];                 // sum of the weights; in backward its inverse
    float delta[kLanes];                 // of backward: grad * attention, summed
    bool fresh, tame, blind[kLanes];     // of forward: nothing summed yet; kTame; all that is listed is masked
    int32_t lowest_first, highest_first, lowest_last, highest_last;

    bool sees(const Span &keys) const { return lowest_first < keys.start + keys.count && highest_last > keys.start; }
    bool sees_all(const Span &keys) const {
        return keys.count == keys.rows && highest_first <= keys.start && lowest_last >= keys.start + keys.rows;
    }

    // Those of a tile that some of the tiles of lanes see.
    template <class Tile> static Span seen(const Span &keys, const int64_t *tiles, int n, const Tile &tile) {
        int64_t first = keys.start + keys.rows, last = keys.start;
        for (int i = 0; i < n; i++) {
            first = std::min<int64_t>(first, tile(tiles[i]).lowest_first);
            last = std::max<int64_t>(last, tile(tiles[i]).highest_last);
        }
        return keys.part(first, last);
    }

    // Show keys to the lanes of some of the tile's queries alone.
    void show(uint32_t queries, int64_t heads) {
        lowest_last = INT32_MAX;
        highest_last = 0;
        for (int lane = 0; lane < kLanes; lane++) {
            last[lane] = queries >> lane / heads & 1 ? end[lane] : 0;
            lowest_last = std::min(lowest_last, last[lane]);
            highest_last = std::max(highest_last, last[lane]);
        }
    }
    template <class See> void look(const TileRows &rows, const See &see) {
        lowest_first = lowest_last = INT32_MAX;
        highest_first = highest_last = 0;
        for (int lane = 0; lane < kLanes; lane++) {
            int other = rows.used[lane] ? lane : 0; // an unused lane looks where the first does; its query is 0
            Range range = see(rows.token[other]);
            first[lane] = int32_t(range.first);
            last[lane] = end[lane] = int32_t(range.last);
            lowest_first = std::min(lowest_first, first[lane]);
            highest_first = std::max(highest_first, first[lane]);
            lowest_last = std::min(lowest_last, last[lane]);
            highest_last = std::max(highest_last, last[lane]);
        }
    }
};

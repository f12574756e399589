// Pooling of windows (reference.compress) and the gated sum of the branches.

struct Pooling {
    int32_t type;
    int64_t threads, heads, dim, block_size, stride;
    std::vector<Range> tokens, windows; // of each sample

    Pooling(int32_t type, int64_t threads, int64_t heads, int64_t dim, int64_t block_size, int64_t stride, int64_t samples,
            const int64_t *ends)
        : type(type), threads(threads), heads(heads), dim(dim), block_size(block_size), stride(stride) {
        int64_t token = 0, window = 0;
        for (int64_t b = 0; b < samples; b++) {
            int64_t length = ends[b] - token, count = length >= block_size ? (length - block_size) / stride + 1 : 0;
            tokens.push_back({token, ends[b]});
            windows.push_back({window, window + count});
            token = ends[b];
            window += count;
        }
    }
    int64_t all_windows() const { return windows.empty() ? 0 : windows.back().last; }
    int64_t all_tokens() const { return tokens.empty() ? 0 : tokens.back().last; }
    static int64_t find(const std::vector<Range> &ranges, int64_t i) {
        return std::upper_bound(ranges.begin(), ranges.end(), i, [](int64_t x, const Range &r) { return x < r.last; }) -
               ranges.begin();
    }
    // The first token of a window.
    int64_t token(int64_t window) const {
        int64_t b = find(windows, window);
        return tokens[b].first + (window - windows[b].first) * stride;
    }
};

inline Buffer<float> floats(int32_t type, const void *from, int64_t count) {
    Buffer<float> to(count);
    read_row(type, from, count, to);
    return to;
}

inline void add_scaled(float *to, const float *from, float by, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i] * by;
}

inline void compress_forward(const Pooling &at, const NsaTensor &input, const void *weight, void *out) {
    Buffer<float> weights = floats(at.type, weight, at.block_size * at.heads);
    parallel(at.threads, at.all_windows(), [&] {
        return [&, row = Buffer<float>(at.dim), sums = Buffer<float>(at.dim)](int64_t window) {
            int64_t token = at.token(window);
            for (int64_t head = 0; head < at.heads; head++) {
                memset(sums, 0, at.dim * sizeof(float));
                for (int64_t j = 0; j < at.block_size; j++) {
                    read_row(at.type, row_of(input, at.type, token + j, head), at.dim, row);
                    add_scaled(sums, row, weights[j * at.heads + head], at.dim);
                }
                write_row(at.type, sums, at.dim, row_of(out, at.type, window * at.heads + head, at.dim));
            }
        };
    });
}

inline void compress_backward_input(const Pooling &at, const NsaTensor &grad, const float *weights, void *grad_input) {
    parallel(at.threads, at.all_tokens(), [&] {
        return [&, row = Buffer<float>(at.dim), sums = Buffer<float>(at.dim)](int64_t token) {
            int64_t b = Pooling::find(at.tokens, token), inside = token - at.tokens[b].first, before = inside - at.block_size + 1;
            int64_t count = at.windows[b].last - at.windows[b].first;
            int64_t first = before > 0 ? ceil_div(before, at.stride) : 0, last = std::min(inside / at.stride + 1, count);
            for (int64_t head = 0; head < at.heads; head++) {
                memset(sums, 0, at.dim * sizeof(float));
                for (int64_t c = first; c < last; c++) {
                    read_row(at.type, row_of(grad, at.type, at.windows[b].first + c, head), at.dim, row);
                    add_scaled(sums, row, weights[(inside - c * at.stride) * at.heads + head], at.dim);
                }
                write_row(at.type, sums, at.dim, row_of(grad_input, at.type, token * at.heads + head, at.dim));
            }
        };
    });
}

// The gradient of the weight, summed over spans of windows whose number does not depend on the threads.
inline void compress_backward_weight(const Pooling &at, const NsaTensor &grad, const NsaTensor &input, void *grad_weight) {
    constexpr int64_t kSpan = 128;
    int64_t spans = ceil_div(at.all_windows(), kSpan), size = at.block_size * at.heads;
    Buffer<float> partial(spans * size), total(size);
    parallel(at.threads, spans, [&] {
        return [&, left = Buffer<float>(at.dim), right = Buffer<float>(at.dim)](int64_t span) {
            float *sums = partial + span * size;
            memset(sums, 0, size * sizeof(float));
            for (int64_t window = span * kSpan; window < std::min(at.all_windows(), (span + 1) * kSpan); window++) {
                int64_t token = at.token(window);
                for (int64_t head = 0; head < at.heads; head++) {
                    read_row(at.type, row_of(grad, at.type, window, head), at.dim, left);
                    for (int64_t j = 0; j < at.block_size; j++) {
                        read_row(at.type, row_of(input, at.type, token + j, head), at.dim, right);
                        sums[j * at.heads + head] += dot(left, right, at.dim);
                    }
                }
            }
        };
    });
    memset(total, 0, size * sizeof(float));
    for (int64_t span = 0; span < spans; span++) add_scaled(total, partial + span * size, 1, size);
    write_row(at.type, total, size, grad_weight);
}

constexpr int64_t kGatedTokens = 32; // of a task

struct Gated {
    int32_t type, gate_type;
    int64_t threads, tokens, heads, dim;
    const void *gate;
    const NsaTensor *branches;

    int64_t tasks() const { return ceil_div(tokens, kGatedTokens); }
    Range rows(int64_t task) const { // of a token and a head
        return {task * kGatedTokens * heads, std::min(tokens, (task + 1) * kGatedTokens) * heads};
    }
    // How far the gates of rows are open, up to as many as a task has.
    Buffer<float> open() const { return Buffer<float>(round_up(kGatedTokens * heads * 3, kWidth)); }
    void open(Range rows, float *to) const {
        int64_t count = (rows.last - rows.first) * 3;
        read_row(gate_type, static_cast<const char *>(gate) + rows.first * 3 * type_size(gate_type), count, to);
        std::fill(to + count, to + round_up(count, kWidth), 0.f);
        for (int64_t i = 0; i < count; i += kWidth) {
            vf power = load(to + i) * -kLog2E;
            store(to + i, 1 / (1 + exp2(pick(power > 127, splat(127.f), power))));
        }
    }
    const void *row(int64_t branch, int64_t i) const { return row_of(branches[branch], type, i / heads, i % heads); }
};

// Sums a row of each branch, as far as its gate is open. `sums`: room for a row.
inline void mix(int32_t type, int64_t dim, const void *const *branches, const float *open, float *sums, void *to) {
    with_type(type, [=](auto as) {
        using Stored = typename decltype(as)::Stored;
        const Stored *from[3];
        for (int j = 0; j < 3; j++) from[j] = static_cast<const Stored *>(branches[j]);
        float *__restrict mixed = sums;
        for (int64_t d = 0; d < dim; d++)
            mixed[d] = as.read(from[0][d]) * open[0] + as.read(from[1][d]) * open[1] + as.read(from[2][d]) * open[2];
    });
    write_row<true>(type, sums, dim, to);
}

inline void gated_sum_forward(const Gated &at, void *out) {
    prefer_huge_pages(out, at.tokens * at.heads * at.dim * type_size(at.type));
    parallel<Simd::Session>(at.threads, at.tasks(), [&] {
        return [&, open = at.open(), mixed = Buffer<float>(at.dim)](int64_t task) {
            Range rows = at.rows(task);
            at.open(rows, open);
            for (int64_t i = rows.first; i < rows.last; i++) {
                const void *from[3] = {at.row(0, i), at.row(1, i), at.row(2, i)};
                mix(at.type, at.dim, from, open + (i - rows.first) * 3, mixed, row_of(out, at.type, i, at.dim));
            }
        };
    });
}

inline void gated_sum_backward(const Gated &at, const NsaTensor &grad, void *grad_gate, void *const *grad_branches) {
    for (int j = 0; j < 3; j++) prefer_huge_pages(grad_branches[j], at.tokens * at.heads * at.dim * type_size(at.type));
    parallel(at.threads, at.tasks(), [&] {
        return [&, open = at.open(), from = Buffer<float>(at.dim), row = Buffer<float>(at.dim)](int64_t task) {
            Range rows = at.rows(task);
            at.open(rows, open);
            for (int64_t i = rows.first; i < rows.last; i++) {
                alignas(64) float grads[kLanes] = {};
                read_row(at.type, row_of(grad, at.type, i / at.heads, i % at.heads), at.dim, from);
                for (int j = 0; j < 3; j++) {
                    float by = open[(i - rows.first) * 3 + j];
                    read_row(at.type, at.row(j, i), at.dim, row);
                    grads[j] = dot(from, row, at.dim) * by * (1 - by);
                    for (int64_t d = 0; d < at.dim; d++) row[d] = from[d] * by;
                    write_row<true>(at.type, row, at.dim, row_of(grad_branches[j], at.type, i, at.dim));
                }
                write_row(at.gate_type, grads, 3, static_cast<char *>(grad_gate) + i * 3 * type_size(at.gate_type));
            }
        };
    });
}

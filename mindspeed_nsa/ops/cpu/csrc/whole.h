// The three attentions and their gated sum. Of arrays, [0] belongs to compressed windows, [1] to listed blocks, [2] to the sliding window.

// Up to so many keys in a sample a chunk of queries goes through all three at once. With more, the keys of one drive out those of
// the others, and one after another they take less time.
constexpr int64_t kKeysAtOnce = 16384;

// Problems that differ in their keys.
struct WholeProblem {
    Problem windows, tokens;

    WholeProblem(const NsaAttention &at, const int64_t *token_end) : windows(at), tokens(over(at, token_end)) {}

  private:
    static Problem over(NsaAttention at, const int64_t *end) {
        at.kv_end = end;
        return Problem(at);
    }
};

// A chunk's results of the three branches, [queries of a chunk, heads of a group, D2] each, and their sums.
class Branches {
  public:
    Branches(const Problem &problem, const Gated &gated, int64_t queries)
        : problem_(problem), gated_(gated), row_bytes_(problem.at.v_dim * type_size(problem.at.type)), open_(gated.open()),
          sums_(problem.at.v_dim) {
        for (Buffer<char> &rows : rows_) rows = Buffer<char>(queries * problem.group * row_bytes_);
    }
    // Where the rows of a branch from a chunk's `query`-th query on go.
    char *rows(int branch, int64_t query) { return rows_[branch] + query * problem_.group * row_bytes_; }

    void mix(const Chunk &chunk, void *out) {
        for (int64_t query = 0; query < chunk.size(); query++) {
            int64_t first = (chunk.start + query) * gated_.heads + chunk.head * problem_.group;
            gated_.open({first, first + problem_.group}, open_);
            for (int64_t head = 0; head < problem_.group; head++) {
                const void *from[3];
                for (int j = 0; j < 3; j++) from[j] = rows(j, query) + head * row_bytes_;
                void *to = row_of(out, gated_.type, first + head, gated_.dim);
                nsa::NSA_ISA::mix(gated_.type, gated_.dim, from, open_ + head * 3, sums_, to);
            }
        }
    }

  private:
    const Problem &problem_;
    const Gated &gated_;
    int64_t row_bytes_;
    Buffer<char> rows_[3];
    Buffer<float> open_, sums_;
};

inline bool same(const NsaTensor &x, const NsaTensor &y) {
    return x.data == y.data && x.token_stride == y.token_stride && x.head_stride == y.head_stride;
}

template <class E>
void attend_at_once(const WholeProblem &problem, const CompressedPass &pass, const NsaSelected &selected, int64_t window_size,
                    const NsaTensor &query, const NsaTensor *keys, const NsaTensor *values, const Gated &gated, void *out,
                    const Results *to) {
    const Problem &windows = problem.windows, &tokens = problem.tokens;
    for (int j = 0; j < 3; j++) tokens.will_write(to[j].attention, tokens.at.v_dim);
    tokens.will_write(out, tokens.at.v_dim);
    ForwardKeys<E> pooled(windows, kKeys, keys[0], values[0]), listed(tokens, selected.block_size, keys[1], values[1]);
    std::optional<ForwardKeys<E>> newest;
    if (selected.block_size != kDenseKeys || !same(keys[1], keys[2]) || !same(values[1], values[2]))
        newest.emplace(tokens, kDenseKeys, keys[2], values[2]);
    CompressedAttention<E> compress(windows, pass, query, pooled);
    SelectAttention<E> select(tokens, selected, query, listed);
    WindowAttention<E> window(tokens, window_size, query, newest ? *newest : listed);
    Lanes lanes(tokens.group);
    int64_t size = lanes.queries(kChunkTiles), part = pass.chunk_size(lanes);
    auto work = chunks(tokens, size);
    parallel<typename E::Session>(tokens.at.threads, int64_t(work.size()), [&] {
        return [&, forward = Forward<E>(tokens, lanes.tiles(size)), choice = compress.choice(), by_block = ByBlock(),
                branches = Branches(tokens, gated, size)](int64_t task) mutable {
            const Chunk &chunk = work[task];
            Chunk some = chunk;
            some.sample = &windows.samples[chunk.sample - tokens.samples.data()];
            for (; some.start < chunk.stop; some.start = some.stop) {
                some.stop = std::min(some.start + part, chunk.stop);
                compress.run(some, forward, choice);
                forward.finish(some, lanes, to[0], branches.rows(0, some.start - chunk.start));
            }
            select.run(chunk, forward, by_block);
            forward.finish(chunk, lanes, to[1], branches.rows(1, 0));
            window.run(chunk, forward);
            forward.finish(chunk, lanes, to[2], branches.rows(2, 0));
            branches.mix(chunk, out);
        };
    });
}

template <class E>
void sparse_attention_forward(const WholeProblem &problem, const CompressedPass &pass, int64_t window_size, const NsaTensor &query,
                              const NsaTensor *keys, const NsaTensor *values, Gated gated, void *out, const Results *to) {
    NsaSelected selected{pass.at.select_block_size, pass.at.select_block_count, true, false, pass.ids};
    int64_t longest = 0, dim = gated.dim;
    for (const Sample &sample : problem.tokens.samples) longest = std::max(longest, sample.keys);
    if (longest <= kKeysAtOnce)
        return attend_at_once<E>(problem, pass, selected, window_size, query, keys, values, gated, out, to);
    compressed_pass<E>(problem.windows, pass, query, keys[0], values[0], to[0]);
    select_forward<E>(problem.tokens, selected, query, keys[1], values[1], to[1]);
    window_forward<E>(problem.tokens, window_size, query, keys[2], values[2], to[2]);
    NsaTensor branches[3];
    for (int j = 0; j < 3; j++) branches[j] = {to[j].attention, gated.heads * dim, dim};
    gated.branches = branches;
    gated_sum_forward(gated, out);
}

// Forward pass of a DeepSeek-V3 model over cached sequences (arXiv 2412.19437, section 2.1), float32.
//
// Prefill and decoding are one function: a call takes tokens of several sequences, writes their keys and values and
// attends to all that their sequence holds. Sequences are dealt to threads whole and never meet, so a step has no
// barrier between layers. Structures are mirrored in native/library.py.

#include <vector>

#include "kernels.h"

extern "C" {

struct Model {
    int32_t hidden, layers, heads, nope, rope, value, q_lora, kv_lora, vocab;
    int32_t experts, top_k, groups, top_groups, normalise, fold;
    float softmax_scale, eps, latent_eps, routed_scale;
    const float *embedding, *head, *cos, *sin;  // head packed, final norm inside; cos, sin [context, rope / 2]
};

// Weights are packed (kernels.h); the norm before a product is multiplied into it.
struct Layer {
    int32_t moe, dense_width;
    const float* first;       // hidden -> [q or q_lora | rotated key | latent, or folded: keys and values | root]
    const float* q_up;        // q_lora -> q, when there is a q_lora
    const float* kv_up;       // kv_lora -> keys and values, when not folded
    const float* root;        // folded: triangular R with |R x| = |latent|
    const float* out;         // heads * padded value -> hidden
    const float *gate_up, *down;  // dense or shared expert, when dense_width > 0
    const float *router, *bias;
    const float *expert_gate_up, *expert_down;
    int32_t expert_width;
};

// A sequence's cache: a prefix that others may share, then its own part. Keys lie as [layer][position / LANES]
// [heads * nope + rope][LANES], values as [layer][position][heads * padded value].
struct Sequence {
    const float *prefix_keys, *prefix_values;
    float *keys, *values;
    int64_t prefix_key_stride, prefix_value_stride, key_stride, value_stride;  // floats from layer to layer
    int32_t prefix, first_token, tokens, position;  // its tokens of this call and the position of the first
    int32_t logits, first_logit;                    // how many of its last tokens want logits, and where they go
};

int32_t vector_lanes() { return LANES; }
}

namespace {

constexpr long SHARE_TOKENS = 112;  // fewer would make the experts' products thin

struct Sizes {
    int key, value, head_value, first, queries, q_first, kv, experts;
    explicit Sizes(const Model& m) {
        key = m.heads * m.nope + m.rope;
        head_value = round_up(m.value, LANES);
        value = m.heads * head_value;
        queries = round_up(m.heads * (m.nope + m.rope), PANEL);
        q_first = m.q_lora ? round_up(m.q_lora, PANEL) : queries;
        kv = round_up(m.heads * (m.nope + m.value), PANEL);
        first = q_first + round_up(m.rope, PANEL) + (m.fold ? kv : round_up(m.kv_lora, PANEL));
        experts = round_up(m.experts, PANEL);
    }
};

void rotate(float* x, int half, const float* cos, const float* sin) {
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// scores[h][position] of H heads over one run of cached positions; writes whole vectors, the caller ignores the rest.
template <int H>
void score(const Model& m, const float* q, int head, const float* keys, int count, float* scores, long stride) {
    const int width = m.heads * m.nope + m.rope;
    const float *nope = q + head * m.nope, *rope = q + m.heads * m.nope + head * m.rope;
    for (int start = 0; start < count; start += LANES, keys += (long)width * LANES) {
        Vec total[H] = {};
        for (int d = 0; d < m.nope; d++)
#pragma GCC unroll 4
            for (int h = 0; h < H; h++)
                total[h] += nope[h * m.nope + d] * load(keys + ((long)(head + h) * m.nope + d) * LANES);
        const float* shared = keys + (long)m.heads * m.nope * LANES;
        for (int d = 0; d < m.rope; d++) {
            const Vec key = load(shared + (long)d * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) total[h] += rope[h * m.rope + d] * key;
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) store(scores + h * stride + start, total[h] * m.softmax_scale);
    }
}

// In place; zero up to the next whole vector. Returns 1 / sum.
float softmax(float* s, int count) {
    const int padded = round_up(count, LANES);
    for (int i = count; i < padded; i++) s[i] = -INFINITY;
    Vec top = load(s);
    for (int i = LANES; i < padded; i += LANES) {
        const Vec x = load(s + i);
        top = x > top ? x : top;
    }
    float highest = top[0];
    for (int i = 1; i < LANES; i++) highest = std::max(highest, top[i]);
    for (int i = count; i < padded; i++) s[i] = highest - 100.0f;  // exp is clamped: no infinities past here
    Vec total = {};
    const Vec zero = {};
    const IntVec limit = count - IntVec{};
    IntVec place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    for (int i = 0; i < padded; i += LANES, place += LANES) {
        Vec e = exponential(load(s + i) - highest);
        e = place < limit ? e : zero;
        store(s + i, e);
        total += e;
    }
    return 1.0f / sum(total);
}

template <int H>
void mix(const Sizes& z, int head, const float* weights, long stride, const float* values, int count, float* out) {
    for (int at = 0; at < z.head_value; at += LANES) {
        Vec total[H];
        for (int h = 0; h < H; h++) total[h] = load(out + (head + h) * z.head_value + at);
        const float* v = values + head * z.head_value + at;
        for (int i = 0; i < count; i++, v += z.value)
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) total[h] += weights[h * stride + i] * load(v + h * z.head_value);
        for (int h = 0; h < H; h++) store(out + (head + h) * z.head_value + at, total[h]);
    }
}

template <int H>
void attend_heads(
    const Model& m, const Sizes& z, const Sequence& s, int layer, int length, int head, const float* q, float* scratch,
    float* out) {
    const long stride = round_up(length, LANES) + 2 * LANES;
    const int prefix = std::min(s.prefix, length), own = length - prefix;
    score<H>(m, q, head, s.prefix_keys + layer * s.prefix_key_stride, prefix, scratch, stride);
    score<H>(m, q, head, s.keys + layer * s.key_stride, own, scratch + prefix, stride);
    float inverse[H];
    for (int h = 0; h < H; h++) inverse[h] = softmax(scratch + h * stride, length);
    std::memset(out + head * z.head_value, 0, sizeof(float) * H * z.head_value);
    mix<H>(z, head, scratch, stride, s.prefix_values + layer * s.prefix_value_stride, prefix, out);
    mix<H>(z, head, scratch + prefix, stride, s.values + layer * s.value_stride, own, out);
    for (int h = 0; h < H; h++)
        for (int i = 0; i < z.head_value; i += LANES) {
            float* o = out + (head + h) * z.head_value + i;
            store(o, load(o) * inverse[h]);
        }
}

void attend(
    const Model& m, const Sizes& z, const Sequence& s, int layer, int length, const float* q, float* scratch,
    float* out) {
    int head = 0;
    for (; head + 4 <= m.heads; head += 4) attend_heads<4>(m, z, s, layer, length, head, q, scratch, out);
    for (; head < m.heads; head++) attend_heads<1>(m, z, s, layer, length, head, q, scratch, out);
}

void remember(
    const Model& m, const Sizes& z, const Sequence& s, int layer, int at, const float* kv, float factor,
    const float* rope) {
    float* keys = s.keys + layer * s.key_stride + (long)(at / LANES) * z.key * LANES + at % LANES;
    float* values = s.values + layer * s.value_stride + (long)at * z.value;
    const int nope = m.heads * m.nope;
    for (int i = 0; i < nope; i++) keys[(long)i * LANES] = kv[i] * factor;
    for (int i = 0; i < m.rope; i++) keys[(long)(nope + i) * LANES] = rope[i];
    for (int h = 0; h < m.heads; h++)
        for (int i = 0; i < z.head_value; i++)
            values[h * z.head_value + i] = i < m.value ? kv[nope + h * m.value + i] * factor : 0.0f;
}

// Chosen experts and their weights of one token (equations 12-16): the bias only selects; a group counts by its two
// best experts.
void route(const Model& m, const float* logits, const float* bias, int32_t* chosen, float* weights, float* work) {
    float *affinity = work, *rank = work + round_up(m.experts, LANES), *group = rank + round_up(m.experts, LANES);
    for (int e = 0; e < m.experts; e += LANES) store(affinity + e, sigmoid(load(logits + e)));
    for (int e = 0; e < m.experts; e++) rank[e] = affinity[e] + bias[e];
    if (m.groups > 1) {
        const int size = m.experts / m.groups;
        for (int g = 0; g < m.groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (int e = g * size; e < (g + 1) * size; e++) {
                if (rank[e] > first) second = first, first = rank[e];
                else if (rank[e] > second) second = rank[e];
            }
            group[g] = first + second;
        }
        for (int g = 0; g < m.groups; g++) {
            int better = 0;
            for (int o = 0; o < m.groups; o++) better += group[o] > group[g] || (group[o] == group[g] && o < g);
            if (better >= m.top_groups) std::fill(rank + g * size, rank + (g + 1) * size, -INFINITY);
        }
    }
    float total = 0;
    for (int k = 0; k < m.top_k; k++) {
        const int best = std::max_element(rank, rank + m.experts) - rank;
        rank[best] = -INFINITY;
        chosen[k] = best;
        total += weights[k] = affinity[best];
    }
    for (int k = 0; k < m.top_k; k++)
        weights[k] = (m.normalise ? weights[k] / (total + 1e-20f) : weights[k]) * m.routed_scale;
}

// One thread's share: some sequences, all layers.
class Pass {
  public:
    Pass(const Model& model, const Layer* layers) : m(model), layers(layers), z(model) {}

    void run(const int64_t* tokens, const Sequence* begin, const Sequence* end, float* logits) {
        n = longest = 0;
        wide = 0;
        for (const Sequence* s = begin; s < end; s++) {
            n += s->tokens;
            longest = std::max(longest, s->position + s->tokens);
        }
        for (int i = 0; i < m.layers; i++) wide = std::max({wide, layers[i].dense_width, layers[i].expert_width});
        allocate();
        int row = 0;
        for (const Sequence* s = begin; s < end; s++)
            for (int t = 0; t < s->tokens; t++, row++)
                std::memcpy(
                    x + row * xs, m.embedding + tokens[s->first_token + t] * m.hidden, sizeof(float) * m.hidden);
        for (int i = 0; i < m.layers; i++) {
            attention(i, begin, end);
            feed_forward(layers[i]);
        }
        row = 0;
        for (const Sequence* s = begin; s < end; s++) {
            row += s->tokens;
            for (int t = 0; t < s->logits; t++)
                head(row - s->logits + t, logits + (long)(s->first_logit + t) * m.vocab);
        }
        flush_head();
    }

  private:
    const Model& m;
    const Layer* layers;
    const Sizes z;
    int n, longest, wide;
    long xs, hs;
    float *x, *first, *q, *kv, *attended, *hidden, *gathered, *routed, *scale, *scratch, *weights, *logit_rows;
    int32_t *chosen, *order;
    float* wanted[TILE_ROWS];  // where the gathered rows' logits go
    int gathered_rows = 0;

    void allocate();
    void attention(int layer, const Sequence* begin, const Sequence* end);
    void feed_forward(const Layer& layer);
    void experts(const Layer& layer);
    void head(int row, float* out);
    void flush_head();
    void norms(const float* from, long stride, int width, float eps) {
        for (int i = 0; i < n; i++) scale[i] = inverse_rms(from + i * stride, width, width, eps);
    }
};

void Pass::allocate() {
    xs = round_up(m.hidden, PANEL);
    hs = round_up(wide, PANEL);
    const long root = m.fold ? round_up(m.hidden, PANEL) : 0;
    // Kept from call to call by each thread: fresh pages would cost more than some products.
    thread_local std::vector<float> memory;
    thread_local std::vector<int32_t> numbers;
    const long sizes[] = {
        n * xs, n * std::max<long>(z.first + root, xs), (long)n * z.queries, (long)n * z.kv, (long)n * z.value, n * hs,
        n * xs, (long)n * m.top_k * xs, n, std::max<long>(n, 4L * (round_up(longest, LANES) + 2 * LANES) + 4 * z.experts),
        (long)n * m.top_k, (long)TILE_ROWS * round_up(m.vocab, PANEL) + (long)n * z.experts};
    float** targets[] = {
        &x, &first, &q, &kv, &attended, &hidden, &gathered, &routed, &scale, &scratch, &weights, &logit_rows};
    size_t total = 0;
    for (long s : sizes) total += s + 16;
    if (memory.size() < total) memory = std::vector<float>(total);
    float* at = memory.data();
    for (int i = 0; i < 12; i++) {
        *targets[i] = at;
        at += sizes[i] + 16;
    }
    if (numbers.size() < 2ul * n * m.top_k + 1) numbers.resize(2ul * n * m.top_k + 1);
    chosen = numbers.data();
    order = chosen + (long)n * m.top_k;
}

void Pass::attention(int index, const Sequence* begin, const Sequence* end) {
    const Layer& w = layers[index];
    const int rope = round_up(m.rope, PANEL), root = m.fold ? round_up(m.hidden, PANEL) : 0;
    const long fs = z.first + root;
    norms(x, xs, m.hidden, m.eps);
    product<SCALE>(n, m.hidden, z.first / PANEL, x, xs, w.first, first, fs, scale);
    if (m.fold) product<SCALE>(n, m.hidden, root / PANEL, x, xs, w.root, first + z.first, fs, scale, true);
    const float *queries = first, *pairs = first + z.q_first + rope;
    long qs = fs, kvs = fs;
    if (m.q_lora) {
        norms(first, fs, m.q_lora, m.latent_eps);
        product<SCALE>(n, m.q_lora, z.queries / PANEL, first, fs, w.q_up, q, z.queries, scale);
        queries = q, qs = z.queries;
    }
    if (!m.fold) {
        norms(pairs, fs, m.kv_lora, m.latent_eps);
        product<SCALE>(n, m.kv_lora, z.kv / PANEL, pairs, fs, w.kv_up, kv, z.kv, scale);
        pairs = kv, kvs = z.kv;
    }
    int row = 0;
    for (const Sequence* s = begin; s < end; s++)
        for (int t = 0; t < s->tokens; t++, row++) {
            const int position = s->position + t;
            const float *cos = m.cos + (long)position * (m.rope / 2), *sin = m.sin + (long)position * (m.rope / 2);
            float *mine = const_cast<float*>(queries) + row * qs, *key = first + row * fs + z.q_first;
            for (int h = 0; h < m.heads; h++) rotate(mine + m.heads * m.nope + h * m.rope, m.rope / 2, cos, sin);
            rotate(key, m.rope / 2, cos, sin);
            // Folded: keys and values still lack the latent's norm; |R x|^2 is the latent's sum of squares.
            const float factor =
                m.fold ? inverse_rms(first + row * fs + z.first, m.hidden, m.kv_lora, m.latent_eps) : 1.0f;
            remember(m, z, *s, index, position - s->prefix, pairs + row * kvs, factor, key);
            attend(m, z, *s, index, position + 1, mine, scratch, attended + (long)row * z.value);
        }
    product<ADD>(n, z.value, xs / PANEL, attended, z.value, w.out, x, xs, nullptr);
}

void Pass::feed_forward(const Layer& w) {
    norms(x, xs, m.hidden, m.eps);
    // Both parts read x before either is added to it.
    if (w.moe) experts(w);
    if (w.dense_width) {
        product<SWIGLU>(
            n, m.hidden, round_up(w.dense_width, LANES) / LANES, x, xs, w.gate_up, hidden, hs, scale);
        product<ADD>(n, w.dense_width, xs / PANEL, hidden, hs, w.down, x, xs, nullptr);
    }
    if (!w.moe) return;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < m.top_k; k++) {
            const float* y = routed + ((long)i * m.top_k + k) * xs;
            const float factor = weights[i * m.top_k + k];
            for (int c = 0; c < xs; c += LANES) store(x + i * xs + c, load(x + i * xs + c) + factor * load(y + c));
        }
}

// routed[token * top_k + choice] = that expert's output. Expert by expert, over the tokens that chose it.
void Pass::experts(const Layer& w) {
    float* router = logit_rows;
    product<SCALE>(n, m.hidden, z.experts / PANEL, x, xs, w.router, router, z.experts, scale);
    for (int i = 0; i < n; i++)
        route(m, router + (long)i * z.experts, w.bias, chosen + i * m.top_k, weights + i * m.top_k, scratch);
    const long gate_up = (long)round_up(w.expert_width, LANES) / LANES * m.hidden * PANEL;
    const long down = (long)xs / PANEL * w.expert_width * PANEL;
    float *scales = scratch, *outputs = first;  // first is free here: [rows, xs] of one expert
    for (int e = 0; e < m.experts; e++) {
        int rows = 0;
        for (int i = 0; i < n * m.top_k; i++) {
            if (chosen[i] != e) continue;
            const int token = i / m.top_k;
            std::memcpy(gathered + rows * xs, x + token * xs, sizeof(float) * m.hidden);
            order[rows] = i;
            rows++;
        }
        if (!rows) continue;
        for (int i = 0; i < rows; i++) scales[i] = scale[order[i] / m.top_k];
        product<SWIGLU>(
            rows, m.hidden, round_up(w.expert_width, LANES) / LANES, gathered, xs, w.expert_gate_up + e * gate_up,
            hidden, hs, scales);
        std::fill(scales, scales + rows, 1.0f);
        product<SCALE>(
            rows, w.expert_width, xs / PANEL, hidden, hs, w.expert_down + e * down, outputs, xs, scales);
        for (int i = 0; i < rows; i++) std::memcpy(routed + order[i] * xs, outputs + i * xs, sizeof(float) * xs);
    }
}

// Rows wait until there are enough for a whole tile of the product.
void Pass::head(int row, float* out) {
    scale[gathered_rows] = inverse_rms(x + row * xs, m.hidden, m.hidden, m.eps);
    std::memcpy(gathered + gathered_rows * xs, x + row * xs, sizeof(float) * m.hidden);
    wanted[gathered_rows++] = out;
    if (gathered_rows == std::min(TILE_ROWS, n)) flush_head();
}

void Pass::flush_head() {
    const int width = round_up(m.vocab, PANEL);
    product<SCALE>(gathered_rows, m.hidden, width / PANEL, gathered, xs, m.head, logit_rows, width, scale);
    for (int i = 0; i < gathered_rows; i++) std::memcpy(wanted[i], logit_rows + (long)i * width, sizeof(float) * m.vocab);
    gathered_rows = 0;
}

}  // namespace

extern "C" {

// logits [rows, vocab]: see Sequence.first_logit. Sequences are dealt in order, in shares of about equal tokens, more
// of them than threads: where another program holds a core, the others take over.
void v3_forward(
    const Model* model, const Layer* layers, const int64_t* tokens, const Sequence* sequences, int32_t count,
    int32_t threads, float* logits) {
    long total = 0;
    for (int i = 0; i < count; i++) total += sequences[i].tokens;
    const int shares = threads * std::clamp<long>(total / (threads * SHARE_TOKENS), 1, 8);
    std::vector<int> bounds(shares + 1, count);
    bounds[0] = 0;
    long seen = 0;
    for (int i = 0, s = 1; i < count && s < shares; i++) {
        while (s < shares && seen >= total * s / shares) bounds[s++] = i;
        seen += sequences[i].tokens;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int s = 0; s < shares; s++)
        if (bounds[s] < bounds[s + 1])
            Pass(*model, layers).run(tokens, sequences + bounds[s], sequences + bounds[s + 1], logits);
}

// rollout.torch.sampler.draw: the token where the cumulative distribution of softmax(logits / temperature) passes `noise`.
void draw(
    int32_t n, int32_t vocab, const float* logits, const float* temperature, const double* noise, int64_t* tokens,
    float* logprobs) {
    std::vector<float> scaled(round_up(vocab, LANES)), mass(scaled.size());
    for (int i = 0; i < n; i++) {
        const float* row = logits + (long)i * vocab;
        for (int v = 0; v < vocab; v++) scaled[v] = row[v] / temperature[i];
        const float top = *std::max_element(scaled.begin(), scaled.begin() + vocab);
        for (int v = 0; v < vocab; v += LANES) store(&mass[v], exponential(load(&scaled[v]) - top));
        double total = 0;
        for (int v = 0; v < vocab; v++) total += mass[v];
        const double target = noise[i] * total;
        double passed = mass[0];
        int token = 0;
        while (passed <= target && token + 1 < vocab) passed += mass[++token];
        tokens[i] = token;
        logprobs[i] = scaled[token] - top - (float)std::log(total);
    }
}
}

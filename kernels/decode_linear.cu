// One token of the mixers whose state is linear in the values: gated linear attention, the delta rule, slots and their
// relatives, with the window, convolution, norm and gates that stand around them. Formulas: src/mixers.
//
// A block per sequence and query head does the whole layer between the projections, in f32, with a thread holding ROWS
// rows of four columns of the state in registers. What gates read of the layer's input is a product of its own before
// (`read`). The ring has one slot more than the window holds, so that no head overwrites what another still reads.
#include "decode.cuh"

namespace margay {

// Of queries, and of keys. Mirrored in src/ops/decode/linear.rs, as all below.
enum Map { SOFTMAX_DIM = 0, EXP_DIM = 1, RELU = 2, ELU = 3, SOFTMAX = 4, IDENTITY = 5, SILU = 6, UNIT = 7, RELEASED = 8, EXP = 9 };
enum Gate { KEEP = 0, FIXED = 1, SCALAR = 2, STEP_SIZE = 3, LOW_RANK = 4, POOLED = 5, BOUNDED = 6 };
enum Rule { GATED = 0, DELTA = 1, SLOTS = 2, MAGNITUDE = 3, AUGMENTED = 4 };
enum Joined { ALONE = 0, BESIDE = 1, SHARED = 2, ANCHORED = 3 };

struct Linear {
    const float* qkv;       // [batch, heads + 2 kv_heads, dim] not rotated
    const float* table;     // [2, dim / 2] of this position
    const int* position;
    const float* read;      // [batch, reads] products of the layer's input; of the first `fine` the rest of `fine` follows
    const bf16* map_q;      // [heads, dim, cols], null for maps without weights
    const bf16* map_k;
    const float* taps_q;    // [heads dim, taps] filters of a short convolution, or null
    const float* taps_k;    // [kv_heads dim, taps], of every query head where `own_keys`
    const float* taps_v;    // [kv_heads dim, taps] or null
    float* rows;            // [batch, taps, heads + 2 kv_heads, dim] what they look back on, position i in slot i % taps
    const float* gate;      // FIXED: log decays [heads]; else biases: [1 or heads], [kv_heads width]; BOUNDED: logit [heads] or null
    const float* rate;      // STEP_SIZE: factors [heads]; LOW_RANK: [kv_heads width, rank]
    const float* beta;      // DELTA: bias of the write strength [heads]
    float* s;               // [batch, heads, width, dim]
    float* z;               // [batch, heads, width] where normalised
    float* first;           // SLOTS: keys [batch, heads, dim, width]; MAGNITUDE: sums of values [.., dim]; AUGMENTED: of queries [.., width]
    float* top;             // AUGMENTED: largest exponent [batch, heads]
    bf16* ring_k;           // [batch, window + 1, kv_heads, dim], position i in slot i % (window + 1)
    bf16* ring_v;
    float* waits;           // SHARED: log decays [batch, window, heads, 1 or width], position i in slot i % window
    const float* weights;   // BESIDE: [2, heads]; SHARED: factors before the sigmoid [heads]; ANCHORED: [heads]
    const float* sinks;     // [sink_count] logits
    const float* skip;      // [heads] what the value itself weighs, or null
    const float* norm;      // [heads, dim] or null
    const float* out_bias;  // [heads dim] of the output's gate, or null
    bf16* y;                // [batch, heads, dim]
    int batch, heads, kv_heads, dim, cols, width, rank, taps, window, sink_count, reads, fine;
    int decay_at, beta_at, mix_at, out_at;  // columns of `read`; -1: none
    int map_of_q, map_of_k, gate_kind, rule, joined;
    int rotary, window_rotary, own_keys, silu, silu_values, one_gate, written, normalised, affine, silu_out;
    float scale, tau, lowest, eps;
};

namespace {

__device__ __forceinline__ float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(__expf(-fabsf(x))); }
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(__expf(-fabsf(x))); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float4 times(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }
__device__ __forceinline__ void add(float4& a, float b, float4 c) { a.x += b * c.x, a.y += b * c.y, a.z += b * c.z, a.w += b * c.w; }

// How threads lie over a state of `keys` rows and `values` columns.
struct Place {
    int groups, mine, column;
    bool working;

    __device__ explicit Place(int values) {
        const int lanes = values / 4;
        groups = STEP / lanes, mine = threadIdx.x / lanes, column = threadIdx.x % lanes * 4, working = mine < groups;
    }
};

// Sums over the groups of threads that hold the same columns, into out[values].
__device__ void gather(float4 part, const Place& at, int values, float* gathered, float* out) {
    if (at.working) *reinterpret_cast<float4*>(gathered + at.mine * values + at.column) = part;
    __syncthreads();
    for (int d = threadIdx.x; d < values; d += STEP) {
        float sum = 0.0f;
        for (int i = 0; i < at.groups; i++) sum += gathered[i * values + d];
        out[d] = sum;
    }
    __syncthreads();
}

template <int ROWS> __device__ __forceinline__ void load(float4 (&state)[ROWS], const float* s, const Place& at, int keys, int values) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int f = at.mine + i * at.groups;
        state[i] = at.working && f < keys ? __ldcg(reinterpret_cast<const float4*>(s + (size_t)f * values + at.column))
                                          : make_float4(0, 0, 0, 0);
    }
}

template <int ROWS> __device__ __forceinline__ void store(const float4 (&state)[ROWS], float* s, const Place& at, int keys, int values) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int f = at.mine + i * at.groups;
        if (at.working && f < keys) __stcg(reinterpret_cast<float4*>(s + (size_t)f * values + at.column), state[i]);
    }
}

// S = decay ∘ S + key valueᵀ and out = queryᵀ S. Decays of rows (`by_row`) or columns; the value in `value` may be made
// smaller by what the state holds for the key (`beta` of the delta rule, negative: none).
template <int ROWS>
__device__ void recur(float4 (&state)[ROWS], const Place& at, int keys, int values, const float* query, const float* key,
                      const float* value, const float* decay, bool by_row, float beta, float* gathered, float* held, float* out) {
    float4 fade = make_float4(1, 1, 1, 1);
    if (!by_row && at.working) fade = *reinterpret_cast<const float4*>(decay + at.column);
    float4 mine = at.working ? *reinterpret_cast<const float4*>(value + at.column) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int f = at.mine + i * at.groups;
        if (!at.working || f >= keys) continue;
        if (by_row) state[i] = times(state[i], decay[f]);
        else state[i] = make_float4(state[i].x * fade.x, state[i].y * fade.y, state[i].z * fade.z, state[i].w * fade.w);
    }
    if (beta >= 0.0f) {
        float4 part = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int f = at.mine + i * at.groups;
            if (at.working && f < keys) add(part, key[f], state[i]);
        }
        gather(part, at, values, gathered, held);
        if (at.working) {
            const float4 old = *reinterpret_cast<const float4*>(held + at.column);
            mine = make_float4(beta * (mine.x - old.x), beta * (mine.y - old.y), beta * (mine.z - old.z), beta * (mine.w - old.w));
        }
    }
    float4 part = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int f = at.mine + i * at.groups;
        if (!at.working || f >= keys) continue;
        add(state[i], key[f], mine);
        add(part, query[f], state[i]);
    }
    gather(part, at, values, gathered, out);
}

// Floats of shared memory.
__host__ __device__ inline int linear_floats(int dim, int width, int cols, int window) {
    const int wide = (width > dim ? width : dim) + 4, own = dim + 4;
    return 11 * own + 5 * wide + 4 * STEP + (2 * cols > STEP ? 2 * cols : STEP) + window + 8 + 32;
}

template <int ROWS> __global__ void __launch_bounds__(STEP) linear(const Linear p) {
    extern __shared__ __align__(16) float memory[];
    const int head = blockIdx.x, batch = blockIdx.y, tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const int dim = p.dim, width = p.width, cols = p.cols, half = dim / 2;
    const int group = p.heads / p.kv_heads, kv = head / group, packed = p.heads + 2 * p.kv_heads;
    const int wide = (width > dim ? width : dim) + 4;
    float* next = memory;
    auto take = [&](int n) {
        float* mine = next;
        next += (n + 3) / 4 * 4;
        return mine;
    };
    float *raw_q = take(dim), *raw_k = take(dim), *raw_v = take(dim);  // as projected
    float *turned_q = take(dim), *turned_k = take(dim);                // rotated
    float *q = take(dim), *k = take(dim), *v = take(dim);              // what maps and the rule see
    float *branch = take(dim), *seen = take(dim);                      // results of the rule and of the window
    bf16* own = reinterpret_cast<bf16*>(take(dim));                    // [2, dim] this position's key and value in the ring
    float *phi_q = take(wide), *phi_k = take(wide), *g = take(wide), *decay = take(wide), *held = take(wide);
    float* gathered = take(4 * STEP);
    const int room = 2 * cols > STEP ? 2 * cols : STEP;
    float* parts = take(room);
    float* scores = take(p.window + 4);
    float* shared = take(32);

    // The state comes from farthest, and the kernel before this one does not write it.
    const Place at(dim);
    float* s = p.s + ((size_t)batch * p.heads + head) * width * dim;
    float* slot_keys = p.first + ((size_t)batch * p.heads + head) * dim * width;
    const Place there(p.rule == SLOTS ? width : dim);
    float4 state[ROWS];
    if (p.rule == SLOTS) load(state, slot_keys, there, dim, width);
    else load(state, s, at, width, dim);
    const int position = *p.position;
    const float* row = p.qkv + (size_t)batch * packed * dim;
    const float* read = p.read + (size_t)batch * p.reads;
    const int slots = p.window + 1, here = position % slots, gone = (position + 1) % slots;
    const int count = min(position + 1, p.window);
    const bool has_window = p.joined != ALONE && p.window > 0, left = p.joined == SHARED && p.window > 0 && position >= p.window;
    const size_t ring = ((size_t)batch * slots * p.kv_heads + kv) * dim;
    const int stride = p.kv_heads * dim;

    wait_for_previous();

    auto fine = [&](int column) { return __ldcg(read + column) + __ldcg(read + p.fine + column); };
    for (int d = tid; d < half; d += STEP) {
        const float cosine = __ldcg(p.table + d), sine = __ldcg(p.table + half + d);
        auto turn = [&](const float* x, float* straight, float* turned) {
            const float a = __ldcg(x + d), b = __ldcg(x + d + half);
            straight[d] = a, straight[d + half] = b;
            turned[d] = a * cosine - b * sine, turned[d + half] = b * cosine + a * sine;
        };
        turn(row + head * dim, raw_q, turned_q);
        turn(row + (p.heads + kv) * dim, raw_k, turned_k);
    }
    for (int d = tid; d < dim; d += STEP) raw_v[d] = __ldcg(row + (p.heads + p.kv_heads + kv) * dim + d);
    __syncthreads();

    // Short convolutions and their curve; the window's ring.
    for (int i = tid; i < 3 * dim; i += STEP) {
        const int which = i / dim, d = i % dim;
        const float* taps = which == 0 ? p.taps_q : which == 1 ? p.taps_k : p.taps_v;
        float x = which == 0 ? (p.rotary ? turned_q : raw_q)[d] : which == 1 ? (p.rotary ? turned_k : raw_k)[d] : raw_v[d];
        if (taps != nullptr) {
            const int source = which == 0 ? head : p.heads + (which - 1) * p.kv_heads + kv;
            const int filter = which == 0 || (which == 1 && p.own_keys) ? head : kv;
            float* rows = p.rows + ((size_t)batch * p.taps * packed + source) * dim + d;
            const float* w = taps + ((size_t)filter * dim + d) * p.taps;
            float sum = w[p.taps - 1] * x;
            for (int t = 0; t + 1 < p.taps; t++) sum += w[t] * rows[(size_t)((position + 1 + t) % p.taps) * packed * dim];
            if (which == 0 || head % group == 0) rows[(size_t)(position % p.taps) * packed * dim] = x;
            x = sum;
        }
        if (which == 2 ? p.silu_values : p.silu) x = silu(x);
        (which == 0 ? q : which == 1 ? k : v)[d] = x;
        if (has_window && which == 1) {
            own[d] = __float2bfloat16_rn((p.window_rotary ? turned_k : raw_k)[d]);
            if (head % group == 0) p.ring_k[ring + (size_t)here * stride + d] = own[d];
        } else if (has_window && which == 2) {
            own[dim + d] = __float2bfloat16_rn(raw_v[d]);
            if (head % group == 0) p.ring_v[ring + (size_t)here * stride + d] = own[dim + d];
        }
    }
    __syncthreads();
    if (p.joined == SHARED && p.window > 0) {  // what joins the state is what leaves the window
        for (int d = tid; d < dim; d += STEP) {
            k[d] = left ? to_float(p.ring_k[ring + (size_t)gone * stride + d]) : 0.0f;
            v[d] = left ? to_float(p.ring_v[ring + (size_t)gone * stride + d]) : 0.0f;
        }
        __syncthreads();
    }

    // Features.
    const int mapped = p.rule == SLOTS ? dim : width;
    if (p.map_q != nullptr) {
        const int both = 2 * cols, share = max(1, room / both);
        for (int i = tid; i < both * share; i += STEP) {
            const int part = i / both, c = i % cols, of_key = i % both / cols;
            const bf16* w = (of_key ? p.map_k : p.map_q) + (size_t)head * dim * cols + c;
            const float* x = of_key ? k : q;
            float sum = 0.0f;
            for (int d = part; d < dim; d += share) sum += x[d] * to_float(w[(size_t)d * cols]);
            parts[part * both + of_key * cols + c] = sum;
        }
        __syncthreads();
        if (warp < 2) activate<0, 0>(warp == 0 ? phi_q : phi_k, parts + warp * cols, share, both, nullptr, cols, p.map_of_q);
    } else if (warp < 2) {
        const int kind = warp == 0 ? p.map_of_q : p.map_of_k;
        const float* x = warp == 0 ? q : k;
        float* phi = warp == 0 ? phi_q : phi_k;
        float top = -INFINITY, sum = 0.0f;
        if (kind == SOFTMAX) {
            for (int d = lane; d < mapped; d += WARP) top = fmaxf(top, x[d]);
            top = warp_max(top);
            for (int d = lane; d < mapped; d += WARP) sum += __expf(x[d] - top);
            sum = 1.0f / warp_sum(sum);
        } else if (kind == UNIT) {
            for (int d = lane; d < mapped; d += WARP) sum += x[d] * x[d];
            sum = rsqrtf(warp_sum(sum) + 1e-6f);
        }
        const float bound = kind == RELEASED && p.gate != nullptr ? sigmoid(p.gate[head]) : 0.0f;
        for (int d = lane; d < mapped; d += WARP) {
            const float u = x[d];
            phi[d] = kind == SOFTMAX    ? __expf(u - top) * sum
                     : kind == UNIT     ? u * sum
                     : kind == SILU     ? silu(u)
                     : kind == ELU      ? (u > 0.0f ? u + 1.0f : __expf(u))
                     : kind == RELEASED ? (1.0f - bound) * sigmoid(-u)
                                        : u;
        }
    }

    // Log decays g, one or one per channel.
    const bool by_channel = p.gate_kind >= LOW_RANK;
    float step_size = 1.0f;
    if (p.gate_kind == STEP_SIZE) step_size = softplus(fine(p.decay_at + head) + p.gate[head]);
    for (int f = tid; f < (by_channel ? width : 1); f += STEP) {
        float x = 0.0f;
        if (p.gate_kind == FIXED) x = p.gate[head];
        else if (p.gate_kind == SCALAR) x = log_sigmoid(fine(p.decay_at + (p.one_gate ? 0 : head)) + p.gate[p.one_gate ? 0 : head]) * p.tau;
        else if (p.gate_kind == STEP_SIZE) x = p.rate[head] * step_size;
        else if (p.gate_kind == LOW_RANK) {
            const int c = kv * width + f;
            x = p.gate[c];
            for (int r = 0; r < p.rank; r++) x += p.rate[(size_t)c * p.rank + r] * fine(p.decay_at + r);
            x = log_sigmoid(x) * p.tau;
        } else if (p.gate_kind == POOLED) {
            // Adaptive average over the channels of all key heads.
            const int from = p.kv_heads * dim, to = p.kv_heads * width, c = kv * width + f;
            const int begin = (int)((long long)c * from / to), end = (int)(((long long)(c + 1) * from + to - 1) / to);
            for (int n = begin; n < end; n++) x += __ldcg(row + p.heads * dim + n);
            x = log_sigmoid(x / (float)(end - begin)) * p.tau;
        } else if (p.gate_kind == BOUNDED) {
            const float bound = p.gate != nullptr ? sigmoid(p.gate[head]) : 0.0f, u = raw_k[f];
            x = p.gate != nullptr ? logf(bound + (1.0f - bound) * sigmoid(u)) : log_sigmoid(u);
        }
        g[f] = fmaxf(x, p.lowest);
    }
    __syncthreads();

    // With a shared denominator a key joins with the decays that it met in the window.
    if (p.joined == SHARED && p.window > 0) {
        const int gates = by_channel ? width : 1;
        float* waits = p.waits + ((size_t)batch * p.window * p.heads + head) * gates;
        for (int f = tid; f < width; f += STEP) {
            const int c = by_channel ? f : 0;
            if (f < gates) waits[(size_t)(position % p.window) * p.heads * gates + f] = g[f];
            float sum = g[c];
            for (int n = 1; n < p.window; n++) sum += waits[(size_t)((position + n) % p.window) * p.heads * gates + c];
            phi_k[f] = left ? phi_k[f] * __expf(sum) : 0.0f;
        }
    }
    for (int f = tid; f < width; f += STEP) decay[f] = __expf(g[by_channel ? f : 0]);
    if (p.written) {
        for (int d = tid; d < dim; d += STEP) k[d] = v[d] * step_size;
    }
    __syncthreads();

    const float seen_tokens = (float)(position + 1);
    float* first = p.first;
    if (p.rule == AUGMENTED) {
        first += ((size_t)batch * p.heads + head) * width;
        float sum = 0.0f;
        for (int f = tid; f < width; f += STEP) {
            const float all = first[f] + phi_q[f];
            first[f] = all;
            sum += all / seen_tokens * phi_k[f];
        }
        const float exponent = block_sum(sum, shared) * p.scale;
        float* top = p.top + (size_t)batch * p.heads + head;
        const float before = position == 0 ? exponent : *top, now = fmaxf(before, exponent);
        __syncthreads();
        if (tid == 0) *top = now;
        for (int f = tid; f < width; f += STEP) phi_k[f] *= __expf(exponent - now), decay[f] = __expf(before - now);
        __syncthreads();
    }
    if (p.rule == SLOTS) {
        for (int m = tid; m < width; m += STEP) held[m] = 1.0f - decay[m];
        __syncthreads();
        recur(state, there, dim, width, phi_q, phi_k, held, decay, false, -1.0f, gathered, nullptr, g);
        store(state, slot_keys, there, dim, width);
        load(state, s, at, width, dim);
        if (warp == 0) {
            float top = -INFINITY, sum = 0.0f;
            for (int m = lane; m < width; m += WARP) top = fmaxf(top, g[m] * p.scale);
            top = warp_max(top);
            for (int m = lane; m < width; m += WARP) sum += __expf(g[m] * p.scale - top);
            sum = 1.0f / warp_sum(sum);
            for (int m = lane; m < width; m += WARP) phi_q[m] = __expf(g[m] * p.scale - top) * sum, phi_k[m] = held[m];
        }
        __syncthreads();
    }
    float beta = -1.0f;
    if (p.rule == DELTA) beta = sigmoid(fine(p.beta_at + head) + p.beta[head]);
    recur(state, at, width, dim, phi_q, phi_k, p.written ? k : v, decay, true, beta, gathered, held, branch);
    store(state, s, at, width, dim);

    float mass = 0.0f;  // what weights of the branch sum to
    if (p.z != nullptr) {
        float* z = p.z + ((size_t)batch * p.heads + head) * width;
        for (int f = tid; f < width; f += STEP) {
            const float all = decay[f] * z[f] + phi_k[f];
            z[f] = all;
            mass += phi_q[f] * all;
        }
        mass = block_sum(mass, shared);
    }
    float by = p.rule == GATED || p.rule == DELTA ? p.scale : 1.0f;
    if (p.normalised) by = 1.0f / fmaxf(mass, FLOOR);
    if (p.rule == MAGNITUDE) {
        first += ((size_t)batch * p.heads + head) * dim;
        const float spread = mass / seen_tokens * p.scale, stretch = 1.0f / (spread + 1e-6f) + 1.0f;
        for (int d = tid; d < dim; d += STEP) {
            const float all = first[d] + v[d];
            first[d] = all;
            branch[d] = (branch[d] * p.scale * stretch - all * spread) / seen_tokens;
        }
    } else if (p.joined != SHARED || p.window == 0) {
        for (int d = tid; d < dim; d += STEP) branch[d] = branch[d] * by + (p.skip != nullptr ? p.skip[head] * v[d] : 0.0f);
    }
    __syncthreads();

    // Norm and gate of the output.
    if (p.norm != nullptr) {
        float sum = 0.0f;
        for (int d = tid; d < dim; d += STEP) sum += branch[d] * branch[d];
        const float size = rsqrtf(block_sum(sum, shared) / dim + p.eps);
        for (int d = tid; d < dim; d += STEP) branch[d] *= size * p.norm[head * dim + d];
    }
    if (p.out_bias != nullptr) {
        for (int d = tid; d < dim; d += STEP) {
            const float u = __ldcg(read + p.out_at + head * dim + d) + p.out_bias[head * dim + d];
            branch[d] *= p.silu_out ? silu(u) : sigmoid(u);
        }
    }

    // The window: eight lanes per key.
    float of_window = 0.0f, of_branch = 1.0f;
    if (has_window) {
        const float* query = p.window_rotary ? turned_q : raw_q;
        const float scale = rsqrtf((float)dim);
        auto slot = [&](int j) { return (position + 1 - count + j) % slots; };
        for (int j = tid / 8; j < (count + 3) / 4 * 4; j += STEP / 8) {
            float dot = 0.0f;
            if (j < count) {
                const bf16* key = j == count - 1 ? own : p.ring_k + ring + (size_t)slot(j) * stride;
                for (int d = tid % 8 * 8; d < dim; d += 64) {
                    const uint4 eight = *reinterpret_cast<const uint4*>(key + d);
                    const float2 k0 = unpack(eight.x), k1 = unpack(eight.y), k2 = unpack(eight.z), k3 = unpack(eight.w);
                    const float* a = query + d;
                    dot += a[0] * k0.x + a[1] * k0.y + a[2] * k1.x + a[3] * k1.y + a[4] * k2.x + a[5] * k2.y + a[6] * k3.x + a[7] * k3.y;
                }
            }
            dot = warp_sum<8>(dot);
            if (tid % 8 == 0 && j < count) scores[j] = dot * scale;
        }
        __syncthreads();
        float top = -INFINITY;
        for (int j = tid; j < count; j += STEP) top = fmaxf(top, scores[j]);
        for (int n = tid; n < p.sink_count; n += STEP) top = fmaxf(top, p.sinks[n]);
        top = block_max(top, shared);
        float sum = 0.0f, sunk = 0.0f;
        for (int j = tid; j < count; j += STEP) {
            const float weight = __expf(scores[j] - top);
            scores[j] = weight;
            sum += weight;
        }
        for (int n = tid; n < p.sink_count; n += STEP) sunk += __expf(p.sinks[n] - top);
        sum = block_sum(sum, shared), sunk = block_sum(sunk, shared);  // their barriers publish the weights
        float4 part = make_float4(0, 0, 0, 0);
        for (int j = at.mine; at.working && j < count; j += at.groups) {
            const bf16* value = j == count - 1 ? own + dim : p.ring_v + ring + (size_t)slot(j) * stride;
            const uint2 four = *reinterpret_cast<const uint2*>(value + at.column);
            const float2 lo = unpack(four.x), hi = unpack(four.y);
            add(part, scores[j], make_float4(lo.x, lo.y, hi.x, hi.y));
        }
        gather(part, at, dim, gathered, seen);
        if (p.joined == SHARED) {
            const float sigma = sigmoid(p.weights[head]), lambda = p.affine ? 1.0f - sigma : 1.0f;
            const float all = fmaxf(sigma * (sum + sunk) + lambda * mass, FLOOR);
            of_window = sigma / all, of_branch = lambda / all;
        } else if (p.joined == ANCHORED) {
            of_window = p.weights[head] / (sum + sunk);
        } else {
            of_window = p.weights[head] / sum, of_branch = p.weights[p.heads + head];
            if (p.mix_at >= 0) {
                of_window *= 2.0f * sigmoid(fine(p.mix_at + head));
                of_branch *= 2.0f * sigmoid(fine(p.mix_at + p.heads + head));
            }
        }
    }
    __syncthreads();
    for (int d = tid; d < dim; d += STEP) {
        const float y = of_branch * branch[d] + (has_window ? of_window * seen[d] : 0.0f);
        p.y[((size_t)batch * p.heads + head) * dim + d] = __float2bfloat16_rn(y);
    }
}

}  // namespace
}  // namespace margay

// Writes y and the state.
extern "C" int margay_decode_linear(const margay::Linear* p, int overlap, void* stream) {
    using namespace margay;
    const bool slots = p->rule == SLOTS;
    if (p->batch < 1 || p->dim < 8 || p->dim % 8 != 0 || p->dim > 256 || p->heads % p->kv_heads != 0 || p->cols > 256 || p->width < 1 ||
        (slots && p->width % 4 != 0))
        return cudaErrorInvalidValue;
    auto rows = [](int keys, int values) { return (keys + STEP / (values / 4) - 1) / (STEP / (values / 4)); };
    const int most = slots ? max(rows(p->width, p->dim), rows(p->dim, p->width)) : rows(p->width, p->dim);
    const size_t shared = linear_floats(p->dim, p->width, p->cols, p->window) * sizeof(float);
    if (most > 16 || shared > 200 * 1024 || p->width > 4 * STEP) return cudaErrorInvalidValue;
    const dim3 grid(p->heads, p->batch);
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (most <= 4) return start(linear<4>, grid, STEP, shared, overlap, s, *p);
    if (most <= 8) return start(linear<8>, grid, STEP, shared, overlap, s, *p);
    return start(linear<16>, grid, STEP, shared, overlap, s, *p);
}

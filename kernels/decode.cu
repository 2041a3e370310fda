// One-token steps: everything between a token id and the choice of the next one, for up to 16 sequences at once.
//
// A step moves every weight through the chip once and little else, so its floor is the weights' bytes. What keeps it from
// the floor is the start and the end of its many short kernels. Hence few kernels per layer, five:
//   product   qkv = r ∘ (x̂ Wᵀ)            x̂ = stream ∘ norm weight in bf16, r the row's 1 / rms
//   attention y from the layer's state     (`lolcats` a block per head or a few; `cached` + `cached_join` for softmax)
//   product   stream += y Wᵀ               and, for the norm that follows, x̂ and partial sums of squares
//   product   act = silu(gate) ∘ up        gate and up rows of one block side by side
//   product   stream += act Wᵀ
// and around them `embed` and the product with the head, which leaves partial maxima for `choose`. The norm's scale r is
// one number per row, so it is applied behind the product; nothing is normalised in a pass of its own.
//
// Kernels overlap on Hopper: each starts while the one before it drains, reads weights and states (which that one does
// not write), then waits for it (`griddepcontrol.wait`). A kernel lets its successor start only after its own wait, so
// what ran before its predecessor is always complete.
//
// The position is a counter in device memory, so that a captured graph of one step can be replayed for every token. All
// sums have a fixed order; a sequence's results do not depend on what else is in the batch of its kernel variant.

#include "decode.cuh"

namespace margay {

// y = x Wᵀ for few rows x. Mirrored in src/ops/decode.rs.
struct Product {
    const bf16* w;          // [rows, inner]
    const bf16* x;          // [batch, inner]
    const bf16* bias;       // [rows] or null
    const float* squares;   // [batch, parts] partial sums of squares of the rows that x was scaled from, or null
    float* out;             // plain, logits: [batch, rows]
    float* stream;          // add: [batch, rows], y is added to it
    const bf16* next;       // add: weight of the norm that follows, [rows]
    bf16* scaled;           // add: the new stream times `next`, [batch, rows]; swiglu: [batch, rows / 2]
    float* squares_out;     // add: [batch, parts of the blocks]
    float* best;            // logits: the largest of every part, [batch, parts of the blocks]
    uint32_t* best_at;      // logits: its column
    int rows, inner, batch, parts;
    float eps;
};

enum Mode { PLAIN = 0, ADD = 1, SWIGLU = 2, LOGITS = 3 };

namespace {

// 16 bytes of a weight to shared memory; its neighbours up to 256 bytes come to L2 with it.
__device__ __forceinline__ void copy_weight(uint4* to, const bf16* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0));
}

constexpr int PRODUCT = 256;  // threads of a product's block
constexpr int DEPTH = 24;     // 16-byte pieces that a thread has room for

// A block makes 16 RT rows of W times 8 MT sequences; its warps share out the inner axis, 32 U columns at a time.
//
// W is the A operand of mma.sync. The inner axis of a sum may be permuted, so lane (g, t) takes 16 bytes, columns
// 8 t .. 8 t + 7 of row g, and calls them the columns 2t, 2t+1, 2t+8, 2t+9 of two products; x is read the same way as B.
// Every thread copies through shared memory only what it multiplies itself: a queue that needs no barrier and holds more
// bytes under way than registers could.
template <int MODE, int MT, int RT, int U>
__global__ void __launch_bounds__(PRODUCT, 2) product(const Product p) {
    constexpr int WARPS = PRODUCT / WARP, PIECES = 2 * RT * U, STAGES = DEPTH / PIECES, TALL = 16 * RT;
    static_assert(WARPS * TALL * 8 * MT * sizeof(float) <= DEPTH * PRODUCT * sizeof(uint4), "sums lie over the queue");
    extern __shared__ __align__(16) uint4 queue[];  // [STAGES][PIECES][PRODUCT]
    __shared__ float scales[8 * MT];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int half = p.rows / 2;
    const int first = blockIdx.x * (MODE == SWIGLU ? TALL / 2 : TALL);
    const int limit = MODE == SWIGLU ? half : p.rows;  // rows a tile may reach

    const bf16* row[RT][2];
#pragma unroll
    for (int r = 0; r < RT; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool up = MODE == SWIGLU && r >= RT / 2;  // the second half of the tiles are rows of `up`
            const int at = min(first + 16 * (up ? r - RT / 2 : r) + g + 8 * h, limit - 1) + (up ? half : 0);
            row[r][h] = p.w + (size_t)at * p.inner + 8 * t;
        }
    }
    constexpr int SPAN = 32 * U;
    const int stages = (p.inner + SPAN * WARPS - 1) / (SPAN * WARPS);
    auto fetch = [&](int stage) {
        if (stage < stages) {
            uint4* to = queue + stage % STAGES * PIECES * PRODUCT + threadIdx.x;
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int k = (stage * WARPS + warp) * SPAN + 32 * u;
                const bool valid = k + 8 * t < p.inner;
#pragma unroll
                for (int i = 0; i < 2 * RT; i++)
                    copy_weight(to + (u * 2 * RT + i) * PRODUCT, valid ? row[i / 2][i % 2] + k : p.w, valid);
            }
        }
        copy_commit();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
    float gain = 0.0f;  // the next norm's weight of this thread's column, one in all its turns below
    if constexpr (MODE == ADD) gain = to_float(p.next[min(first + (int)threadIdx.x % TALL, p.rows - 1)]);
    wait_for_previous();

    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 x[2][U][MT];
    auto read = [&](uint4 (&to)[U][MT], int stage) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int k = (stage * WARPS + warp) * SPAN + 32 * u + 8 * t;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const int b = 8 * m + g;
                const bool valid = b < p.batch && k < p.inner && stage < stages;
                to[u][m] = valid ? *reinterpret_cast<const uint4*>(p.x + (size_t)b * p.inner + k) : none;
            }
        }
    };
    read(x[0], 0);

    // What the end adds to: asked for here, so that nothing waits for it there.
    constexpr int OUTPUTS = TALL * 8 * MT, EACH = (OUTPUTS + PRODUCT - 1) / PRODUCT;
    static_assert(PRODUCT % TALL == 0, "a thread keeps its column");
    float old[EACH] = {};
    if constexpr (MODE == ADD) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * PRODUCT, b = i / TALL, n = first + i % TALL;
            if (b < p.batch && n < p.rows) old[e] = __ldcg(p.stream + (size_t)b * p.rows + n);
        }
    }
    // Scales of the rows of x: every warp takes some.
    auto scale_rows = [&] {
        if (p.squares != nullptr) {
            for (int b = warp; b < p.batch; b += WARPS) {
                float sum = 0.0f;
                for (int i = lane; i < p.parts; i += WARP) sum += __ldcg(p.squares + (size_t)b * p.parts + i);
                sum = warp_sum(sum);
                if (lane == 0) scales[b] = rsqrtf(sum / p.inner + p.eps);
            }
        } else if (threadIdx.x < 8 * MT) {
            scales[threadIdx.x] = 1.0f;
        }
    };

    float c[RT][MT][4] = {};
    auto multiply = [&](uint4 (&b)[U][MT], uint4 (&next)[U][MT], int stage) {
        read(next, stage + 1);
        copy_wait<STAGES - 2>();
        const uint4* from = queue + stage % STAGES * PIECES * PRODUCT + threadIdx.x;
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int r = 0; r < RT; r++) {
                const uint4 lo = from[(u * 2 * RT + 2 * r) * PRODUCT], hi = from[(u * 2 * RT + 2 * r + 1) * PRODUCT];
                const uint32_t first_half[4] = {lo.x, hi.x, lo.y, hi.y}, second_half[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma(c[r][m], first_half, b[u][m].x, b[u][m].y);
                    mma(c[r][m], second_half, b[u][m].z, b[u][m].w);
                }
            }
        }
        fetch(stage + STAGES - 1);
    };
    for (int stage = 0; stage < stages; stage += 2) {
        multiply(x[0], x[1], stage);
        if (stage + 1 < stages) multiply(x[1], x[0], stage + 1);
        if (stage == 0) scale_rows();  // not before: the queue would stand full while the sums are awaited
    }
    copy_wait<0>();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(queue);  // [WARPS][8 MT][TALL]

    // [sequence][row] of each warp, then the warps' sum in order.
#pragma unroll
    for (int r = 0; r < RT; r++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float* at = sums + warp * TALL * 8 * MT + (8 * m + 2 * t) * TALL + 16 * r + g;
            at[0] = c[r][m][0], at[TALL] = c[r][m][1], at[8] = c[r][m][2], at[TALL + 8] = c[r][m][3];
        }
    }
    __syncthreads();
    auto total = [&](int b, int at) {
        float y = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) y += sums[(i * 8 * MT + b) * TALL + at];
        return y * scales[b];
    };
    auto bias = [&](int n) { return p.bias == nullptr ? 0.0f : to_float(p.bias[n]); };

    if constexpr (MODE == SWIGLU) {
        constexpr int HALF = TALL / 2;
        for (int i = threadIdx.x; i < HALF * p.batch; i += PRODUCT) {
            const int b = i / HALF, n = first + i % HALF;
            if (n >= half) continue;
            const float gate = total(b, i % HALF) + bias(n), up = total(b, HALF + i % HALF) + bias(half + n);
            p.scaled[(size_t)b * half + n] = __float2bfloat16_rn(gate * sigmoid(gate) * up);
        }
    } else {
        // `SHARE` lanes hold rows of one sequence, so whole groups of them reach the shuffles.
        constexpr int SHARE = TALL < WARP ? TALL : WARP, SHARES = TALL / SHARE;
        auto part = [&](int b, int i) {
            return ((size_t)b * gridDim.x + blockIdx.x) * SHARES + i % TALL / SHARE;
        };
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * PRODUCT, b = i / TALL, n = first + i % TALL;
            if (i >= OUTPUTS) break;
            const bool live = b < p.batch && n < p.rows;
            float y = live ? total(b, i % TALL) + bias(n) : 0.0f;
            const size_t at = (size_t)b * p.rows + n;
            if constexpr (MODE == PLAIN) {
                if (live) p.out[at] = y;
            } else if constexpr (MODE == ADD) {
                if (live) {
                    y += old[e];
                    p.stream[at] = y;
                    p.scaled[at] = __float2bfloat16_rn(y * gain);
                }
                const float square = warp_sum<SHARE>(y * y);
                if (b < p.batch && i % SHARE == 0) p.squares_out[part(b, i)] = square;
            } else {
                if (live) p.out[at] = y;
                float best = live ? y : -INFINITY;
                int where = n;
#pragma unroll
                for (int step = SHARE / 2; step > 0; step /= 2) {
                    const float other = __shfl_xor_sync(0xffffffffu, best, step);
                    const int there = __shfl_xor_sync(0xffffffffu, where, step);
                    if (other > best || (other == best && there < where)) best = other, where = there;
                }
                if (b < p.batch && i % SHARE == 0) {
                    p.best[part(b, i)] = best;
                    p.best_at[part(b, i)] = where;
                }
            }
        }
    }
}

template <int MODE, int RT> int launch_product(const Product& p, bool overlap, cudaStream_t stream) {
    constexpr int U = RT == 1 ? 2 : 1, TALL = MODE == SWIGLU ? 8 * RT : 16 * RT;
    const int rows = MODE == SWIGLU ? p.rows / 2 : p.rows;
    const dim3 grid((rows + TALL - 1) / TALL);
    const size_t shared = DEPTH * PRODUCT * sizeof(uint4);
    if (p.batch <= 8) return start(product<MODE, 1, RT, U>, grid, PRODUCT, shared, overlap, stream, p);
    return start(product<MODE, 2, RT, U>, grid, PRODUCT, shared, overlap, stream, p);
}

}  // namespace

// The first kernel of a step. Mirrored in src/ops/decode.rs.
struct Embed {
    const uint32_t* tokens;    // [batch]
    const bf16* embedding;     // [vocab, hidden]
    const bf16* next;          // [hidden] weight of the first norm
    const double* frequencies; // [pairs] inverse frequencies of the rotary embedding
    const int* position;
    float* stream;             // [batch, hidden]
    bf16* scaled;              // [batch, hidden]
    float* squares;            // [batch, blocks of EMBED_SPAN]
    float* table;              // [2, pairs] cosines, sines of the position
    int hidden, batch, pairs, vocab;
};

namespace {

constexpr int EMBED_SPAN = 512;

__global__ void __launch_bounds__(256) embed(const Embed p) {
    __shared__ float shared[32];
    const int b = blockIdx.y, from = blockIdx.x * EMBED_SPAN;
    if (b == 0) {
        for (int i = blockIdx.x * 256 + threadIdx.x; i < p.pairs; i += gridDim.x * 256) {
            double sine, cosine;
            sincos((double)*p.position * p.frequencies[i], &sine, &cosine);
            p.table[i] = (float)cosine, p.table[p.pairs + i] = (float)sine;
        }
    }
    const size_t token = min(p.tokens[b], (uint32_t)(p.vocab - 1));
    float sum = 0.0f;
    for (int i = from + threadIdx.x; i < min(from + EMBED_SPAN, p.hidden); i += 256) {
        const float x = to_float(p.embedding[token * p.hidden + i]);
        p.stream[(size_t)b * p.hidden + i] = x;
        p.scaled[(size_t)b * p.hidden + i] = __float2bfloat16_rn(x * to_float(p.next[i]));
        sum += x * x;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) p.squares[(size_t)b * gridDim.x + blockIdx.x] = sum;
}

// The most likely token of every sequence from the maxima of the head's blocks; the first of equals. Moves the position.
__global__ void __launch_bounds__(256) choose(uint32_t* tokens, int* position, const float* best,
                                              const uint32_t* best_at, int parts) {
    __shared__ float values[8];
    __shared__ uint32_t columns[8];
    wait_for_previous();
    const int b = blockIdx.x;
    float top = -INFINITY;
    uint32_t at = 0xffffffffu;
    auto take = [&](float other, uint32_t there) {
        if (other > top || (other == top && there < at)) top = other, at = there;
    };
    for (int i = threadIdx.x; i < parts; i += 256) take(__ldcg(best + (size_t)b * parts + i), __ldcg(best_at + (size_t)b * parts + i));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, top, step);
        const uint32_t there = __shfl_xor_sync(0xffffffffu, at, step);
        take(other, there);
    }
    if (threadIdx.x % WARP == 0) values[threadIdx.x / WARP] = top, columns[threadIdx.x / WARP] = at;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; i++) take(values[i], columns[i]);
        tokens[b] = at == 0xffffffffu ? 0 : at;
        if (b == 0) *position += 1;
    }
}

}  // namespace

// One token of LoLCATs attention (formula: src/ops/hybrid_attn) for every sequence and head. Mirrored in src/ops/decode.rs.
//
// State, all in place: `ring_k`, `ring_v` the keys the window may hold, position i in slot i % slots, keys rotated;
// `s`, `z` the sums of φk v and φk over the keys that left it.
struct Lolcats {
    const float* qkv;       // [batch, heads + 2 kv_heads, dim] not yet rotated
    const float* table;     // [2, dim / 2] of this position
    const int* position;
    const bf16* map_q;      // [heads, dim, cols]; null: elu without weights
    const bf16* map_k;
    const float* bias_q;    // [heads, cols] or null
    const float* bias_k;
    const float* factors;   // [heads] window factors before the sigmoid
    bf16* ring_k;           // [batch, slots, kv_heads, dim]
    bf16* ring_v;
    float* s;               // [batch, heads, width, dim]
    float* z;               // [batch, heads, split, width]
    bf16* y;                // [batch, heads, dim]
    int batch, heads, kv_heads, dim, cols, width, split;
    int window, terraced, affine;
    int activation;         // 0 softmax_dim, 1 exp_dim, 2 relu, 3 elu
};

namespace {

__device__ __forceinline__ int window_start(int i, int window, int terraced) {
    if (terraced && window > 0) return max(i / window - 1, 0) * window;
    return max(i + 1 - window, 0);
}

// Floats of shared memory before the staged operands.
__host__ __device__ inline int lolcats_floats(int dim, int width, int slots) {
    return 2 * dim + 2 * width + (slots + 4) / 4 * 4 + 2 * STEP + 4 * STEP + 32;
}

// A block per sequence, head and, of few sequences, part of the value columns (SPLIT parts; each keeps a z of its own, the
// same bits in all). A thread holds ROWS rows of four columns of S in registers from before the wait to the end.
//
// With DIM and COLS known at compile time the maps and the window are copied to shared memory while the kernel before this
// one runs; the general form (both 0) reads them where they are.
template <int DIM, int COLS, int SPLIT, int ROWS>
__global__ void __launch_bounds__(STEP, ROWS <= 8 ? 2 : 1) lolcats(const Lolcats p) {
    extern __shared__ __align__(16) float memory[];
    constexpr bool STAGED = DIM > 0;
    const int head = blockIdx.x / SPLIT, part_of_d = blockIdx.x % SPLIT, batch = blockIdx.y;
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const int dim = STAGED ? DIM : p.dim, cols = STAGED ? COLS : p.cols, width = STAGED ? 2 * COLS : p.width;
    const int group = p.heads / p.kv_heads, kv = head / group;
    const int slots = p.terraced ? 2 * p.window : p.window;

    float* q = memory;                                          // [dim]
    bf16* key = reinterpret_cast<bf16*>(q + dim);               // [dim] this position's, rotated
    bf16* value = key + dim;                                    // [dim]
    float* phi_q = q + 2 * dim;                                 // [width]
    float* phi_k = phi_q + width;                               // [width]
    float* weights = phi_k + width;                             // [slots], scores first
    float* parts = weights + (slots + 4) / 4 * 4;               // [2 STEP] partial products of the maps
    float* gathered = parts + 2 * STEP;                         // [4 STEP] partial sums of y
    float* shared = gathered + 4 * STEP;                        // [32]
    bf16* stage = reinterpret_cast<bf16*>(shared + 32);
    bf16* stage_keys = stage + 2 * dim * cols;                  // [slots, dim]
    bf16* stage_values = stage_keys + slots * dim;

    // Operands that the kernel before this one does not write. The state first: it comes from farthest.
    const int across = dim / SPLIT, lanes = across / 4, groups = STEP / lanes;
    const int mine = tid / lanes, column = part_of_d * across + tid % lanes * 4, row_of_s = dim / 4;
    const bool working = STAGED || mine < groups;
    float4* s = reinterpret_cast<float4*>(p.s + ((size_t)batch * p.heads + head) * width * dim + column);
    float4 state[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int f = mine + i * groups;
        state[i] = working && (STAGED || f < width) ? __ldcg(s + (size_t)f * row_of_s) : make_float4(0, 0, 0, 0);
    }
    float* z = p.z + (((size_t)batch * p.heads + head) * SPLIT + part_of_d) * width + tid;
    float mass = tid < width ? __ldcg(z) : 0.0f;
    const size_t ring = ((size_t)batch * slots * p.kv_heads + kv) * dim;
    const int stride = p.kv_heads * dim;
    const size_t map_at = (size_t)head * dim * cols;
    const int position = *p.position;
    const float sigma = 1.0f / (1.0f + __expf(-p.factors[head])), lambda = p.affine ? 1.0f - sigma : 1.0f;
    const int begin = window_start(position, p.window, p.terraced);
    const int base = min(begin, position), count = position - begin + 1;  // keys in the window, this one included
    const int leaving = min(window_start(position + 1, p.window, p.terraced), position + 1) - base;
    const int here = slots > 0 ? position % slots : 0, oldest = slots > 0 ? base % slots : 0;
    // The `n`th key from `base` on; n never exceeds the ring.
    auto slot_of = [&](int n) { return oldest + n < slots ? oldest + n : oldest + n - slots; };
    if constexpr (STAGED) {
#pragma unroll
        for (int i = 0; i < DIM * COLS; i += STEP * 8) {
            copy16(stage + i + tid * 8, p.map_q + map_at + i + tid * 8);
            if (leaving > 0) copy16(stage + dim * cols + i + tid * 8, p.map_k + map_at + i + tid * 8);
        }
        constexpr int PER_ROW = STAGED ? DIM / 8 : 1;
        for (int i = tid; i < (position - base) * PER_ROW; i += STEP) {
            const int slot = slot_of(i / PER_ROW), at = i % PER_ROW * 8;
            copy16(stage_keys + slot * dim + at, p.ring_k + ring + (size_t)slot * stride + at);
            copy16(stage_values + slot * dim + at, p.ring_v + ring + (size_t)slot * stride + at);
        }
        copy_commit();
    }

    wait_for_previous();

    // Rotate, round as the ring does, write the ring once per key head.
    const float* row = p.qkv + (size_t)batch * (p.heads + 2 * p.kv_heads) * dim;
    bf16* slot_k = p.ring_k + ring + (size_t)here * stride;
    bf16* slot_v = p.ring_v + ring + (size_t)here * stride;
    const bool writer = slots > 0 && head % group == 0 && part_of_d == 0;
    for (int i = tid; i < 2 * dim; i += STEP) {
        if (i < dim) {
            const bool is_key = i >= dim / 2;
            const int d = is_key ? i - dim / 2 : i;
            const float* x = row + (is_key ? p.heads + kv : head) * dim;
            const float a = __ldcg(x + d), b = __ldcg(x + d + dim / 2);
            const float cosine = __ldcg(p.table + d), sine = __ldcg(p.table + dim / 2 + d);
            const float lo = a * cosine - b * sine, hi = b * cosine + a * sine;
            if (is_key) {
                key[d] = __float2bfloat16_rn(lo), key[d + dim / 2] = __float2bfloat16_rn(hi);
                if (writer) slot_k[d] = key[d], slot_k[d + dim / 2] = key[d + dim / 2];
            } else {
                q[d] = lo, q[d + dim / 2] = hi;
            }
        } else {
            const int d = i - dim;
            value[d] = __float2bfloat16_rn(__ldcg(row + (p.heads + p.kv_heads + kv) * dim + d));
            if (writer) slot_v[d] = value[d];
        }
    }
    if constexpr (STAGED) copy_wait<0>();
    __syncthreads();

    // The `n`th key from `base` on, or this position's own.
    auto key_at = [&](int n) -> const bf16* {
        if (base + n == position) return key;
        if constexpr (STAGED) return stage_keys + slot_of(n) * dim;
        else return p.ring_k + ring + (size_t)slot_of(n) * stride;
    };
    auto value_at = [&](int n) -> const bf16* {
        if (base + n == position) return value;
        if constexpr (STAGED) return stage_values + slot_of(n) * dim;
        else return p.ring_v + ring + (size_t)slot_of(n) * stride;
    };
    // Products of the maps with the query and with a key that leaves, in parts.
    constexpr int PARTS = STAGED ? STEP / (COLS > 0 ? COLS : 1) : 0;
    const int units = cols / 2, part_count = STAGED ? PARTS : max(1, min(STEP / cols, dim));
    const bool has_maps = STAGED || p.map_q != nullptr;
    auto project = [&](const bf16* leaver, bool with_query) {
        if (!has_maps) {
            for (int i = tid; i < dim; i += STEP) {
                if (with_query) parts[i] = q[i];
                parts[cols + i] = leaver == nullptr ? 0.0f : to_float(leaver[i]);
            }
            return;
        }
        const int part = tid / cols, unit = tid % cols;
        if (part >= part_count) return;
        const bool of_key = unit >= units;
        const int c = (of_key ? unit - units : unit) * 2;
        if (of_key ? leaver == nullptr : !with_query) return;
        const bf16* w = STAGED ? stage + (of_key ? dim * cols : 0) + c : (of_key ? p.map_k : p.map_q) + map_at + c;
        float a = 0.0f, b = 0.0f;
        auto add = [&](int d) {
            const float2 pair = unpack(*reinterpret_cast<const uint32_t*>(w + d * cols));
            const float x = of_key ? to_float(leaver[d]) : q[d];
            a += x * pair.x, b += x * pair.y;
        };
        if constexpr (STAGED) {
#pragma unroll
            for (int d = 0; d < DIM; d += PARTS) add(d + part);
        } else {
            for (int d = part; d < dim; d += part_count) add(d);
        }
        *reinterpret_cast<float2*>(parts + (part * 2 + of_key) * cols + c) = make_float2(a, b);
    };
    const int used = has_maps ? part_count : 1;
    auto bias_of = [&](const float* bias) { return bias == nullptr ? nullptr : bias + head * cols; };
    auto features = [&](float* out, const float* from, const float* bias) {
        activate<COLS, PARTS>(out, from, used, 2 * cols, bias_of(bias), cols, p.activation);
    };

    project(leaving > 0 ? key_at(0) : nullptr, true);
    const float scale = rsqrtf((float)dim);
    for (int j = tid / 8; j < (count + 3) / 4 * 4; j += STEP / 8) {  // eight lanes per key
        float dot = 0.0f;
        if (j < count) {
            const bf16* k = key_at(j);
#pragma unroll 2
            for (int d = tid % 8 * 8; d < dim; d += 64) {
                const uint4 packed = *reinterpret_cast<const uint4*>(k + d);
                const float4 a = *reinterpret_cast<const float4*>(q + d), b = *reinterpret_cast<const float4*>(q + d + 4);
                const float2 k0 = unpack(packed.x), k1 = unpack(packed.y), k2 = unpack(packed.z), k3 = unpack(packed.w);
                dot += a.x * k0.x + a.y * k0.y + a.z * k1.x + a.w * k1.y;
                dot += b.x * k2.x + b.y * k2.y + b.z * k3.x + b.w * k3.y;
            }
        }
        dot = warp_sum<8>(dot);
        if (tid % 8 == 0 && j < count) weights[j] = dot * scale;
    }
    __syncthreads();
    if (warp < 2) {
        if (warp == 0 || leaving > 0) features(warp == 0 ? phi_q : phi_k, parts + warp * cols, warp == 0 ? p.bias_q : p.bias_k);
    } else if (warp == 2 && count > 0) {
        float top = -INFINITY;
        for (int j = lane; j < count; j += WARP) top = fmaxf(top, weights[j]);
        top = warp_max(top);
        for (int j = lane; j < count; j += WARP) weights[j] = sigma * __expf(weights[j] - top);
    }
    __syncthreads();

    auto four = [&](const bf16* v) {
        const uint2 packed = *reinterpret_cast<const uint2*>(v + column);
        const float2 lo = unpack(packed.x), hi = unpack(packed.y);
        return make_float4(lo.x, lo.y, hi.x, hi.y);
    };
    // A key that leaves is folded into the state; without a window it is this one, and counts before the state is read.
    auto fold = [&](const float* phi_k, int n) {
        if (working) {
            const float4 v = four(value_at(n));
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int f = mine + i * groups;
                if (!STAGED && f >= width) continue;
                const float phi = phi_k[f];
                state[i].x += phi * v.x, state[i].y += phi * v.y, state[i].z += phi * v.z, state[i].w += phi * v.w;
            }
        }
        if (tid < width) mass += phi_k[tid];
    };
    int folded = 0;
    if (p.window == 0) fold(phi_k, 0), folded = 1;

    float4 y = make_float4(0, 0, 0, 0);
    if (working) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int f = mine + i * groups;
            if (!STAGED && f >= width) continue;
            const float phi = lambda * phi_q[f];
            y.x += phi * state[i].x, y.y += phi * state[i].y, y.z += phi * state[i].z, y.w += phi * state[i].w;
        }
#pragma unroll 2
        for (int j = mine; j < count; j += groups) {
            const float4 v = four(value_at(j));
            const float a = weights[j];
            y.x += a * v.x, y.y += a * v.y, y.z += a * v.z, y.w += a * v.w;
        }
    }
    int sums = groups;
    if constexpr (STAGED) {
        sums = STEP / WARP;
        constexpr int LANES = STAGED ? DIM / SPLIT / 4 : 1;
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) {
            y.x += __shfl_xor_sync(0xffffffffu, y.x, step), y.y += __shfl_xor_sync(0xffffffffu, y.y, step);
            y.z += __shfl_xor_sync(0xffffffffu, y.z, step), y.w += __shfl_xor_sync(0xffffffffu, y.w, step);
        }
        if (lane < LANES) *reinterpret_cast<float4*>(gathered + warp * across + lane * 4) = y;
    } else if (working) {
        *reinterpret_cast<float4*>(gathered + mine * across + column) = y;
    }
    float share = tid < width ? lambda * phi_q[tid] * mass : 0.0f;
    for (int j = tid; j < count; j += STEP) share += weights[j];
    const float total = fmaxf(block_sum(share, shared), FLOOR);  // its barriers also publish `gathered`
    for (int d = tid; d < across; d += STEP) {
        float sum = 0.0f;
        if constexpr (STAGED) {
#pragma unroll
            for (int i = 0; i < STEP / WARP; i++) sum += gathered[i * across + d];
        } else {
            for (int i = 0; i < sums; i++) sum += gathered[i * across + d];
        }
        p.y[((size_t)batch * p.heads + head) * dim + part_of_d * across + d] = __float2bfloat16_rn(sum / total);
    }

    if (folded == 0 && leaving > 0) fold(phi_k, 0), folded = 1;
    // More than one leave where a terraced window moves on: a warp makes the features of one, all of them at once.
    constexpr int GROUP = STAGED ? STEP / WARP : 1;
    float* phi = STAGED ? gathered : phi_k;  // [GROUP, width]
    for (; folded < leaving; folded += GROUP) {
        __syncthreads();
        if constexpr (STAGED) {
            if (folded + warp < leaving) {
                const bf16 *w = stage + dim * cols + 2 * lane, *leaver = key_at(folded + warp);
                float2 u = make_float2(0.0f, 0.0f);
#pragma unroll 8
                for (int d = 0; d < dim; d++) {
                    const float2 pair = unpack(*reinterpret_cast<const uint32_t*>(w + d * cols));
                    const float x = to_float(leaver[d]);
                    u.x += x * pair.x, u.y += x * pair.y;
                }
                *reinterpret_cast<float2*>(parts + warp * cols + 2 * lane) = u;
                __syncwarp();
                activate<COLS, 1>(phi + warp * width, parts + warp * cols, 1, 0, bias_of(p.bias_k), cols, p.activation);
            }
        } else {
            project(key_at(folded), false);
            __syncthreads();
            if (warp == 1) features(phi, parts + cols, p.bias_k);
        }
        __syncthreads();
        for (int n = 0; n < min(GROUP, leaving - folded); n++) fold(phi + n * width, folded + n);
    }
    if (leaving > 0) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int f = mine + i * groups;
            if (working && (STAGED || f < width)) __stcg(s + (size_t)f * row_of_s, state[i]);
        }
        if (tid < width) *z = mass;
    }
}

// The form with known sizes, where the window fits in shared memory.
template <int DIM, int COLS, int SPLIT> int launch_lolcats(const Lolcats& p, size_t shared, bool overlap, cudaStream_t stream) {
    constexpr int ROWS = 2 * COLS * (DIM / SPLIT / 4) / STEP;
    return start(lolcats<DIM, COLS, SPLIT, ROWS>, dim3(p.heads * SPLIT, p.batch), STEP, shared, overlap, stream, p);
}

template <int DIM, int COLS> int by_split(const Lolcats& p, size_t shared, bool overlap, cudaStream_t stream) {
    if (p.split == 4) return launch_lolcats<DIM, COLS, 4>(p, shared, overlap, stream);
    if (p.split == 2) return launch_lolcats<DIM, COLS, 2>(p, shared, overlap, stream);
    return launch_lolcats<DIM, COLS, 1>(p, shared, overlap, stream);
}

size_t staged_bytes(int dim, int cols, int slots) {
    return lolcats_floats(dim, 2 * cols, slots) * sizeof(float) + (2 * dim * cols + 2 * slots * dim) * sizeof(bf16);
}

bool known_sizes(int dim, int cols, int activation, int slots) {
    // Two blocks of 113 KB share an SM of Hopper.
    static const size_t most = [] {
        int device = 0, bytes = 0;
        cudaGetDevice(&device), cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        return bytes < 113 * 1024 ? bytes : 113 * 1024;
    }();
    return (dim == 128 || dim == 64) && cols == 64 && activation < 2 && staged_bytes(dim, cols, slots) <= most;
}

}  // namespace

// One token of causal softmax attention over a cache of rotated keys. Mirrored in src/ops/decode.rs.
//
// The keys are shared out over `splits` blocks per key head, which leave a maximum, a sum and a sum of values for each of
// the head's queries; `cached_join` puts them together in order. The cache is a ring: position i in slot i % slots.
struct Cached {
    const float* qkv;      // [batch, heads + 2 kv_heads, dim] not yet rotated
    const float* table;    // [2, dim / 2] of this position
    const int* position;
    bf16* k;               // [batch, slots, kv_heads, dim]
    bf16* v;
    float* partial;        // [batch, heads, splits, dim + 2]
    bf16* y;               // [batch, heads, dim]
    int batch, heads, kv_heads, dim, slots, splits;
};

namespace {

constexpr int CACHED = 256;  // threads
constexpr int TILE = 64;     // keys at once

// Q: query heads per key head at most.
template <int Q> __global__ void __launch_bounds__(CACHED) cached(const Cached p) {
    extern __shared__ __align__(16) float memory[];
    const int split = blockIdx.x, kv = blockIdx.y, batch = blockIdx.z, tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const int dim = p.dim, group = p.heads / p.kv_heads;
    float* q = memory;                                  // [Q, dim]
    float* gathered = q + Q * dim;                      // [2 CACHED, Q] partial sums of values
    float* scores = gathered + 2 * CACHED * Q;          // [Q, TILE]
    float* shrink = scores + Q * TILE;                  // [Q], room for 8
    bf16* key = reinterpret_cast<bf16*>(shrink + 8);    // [dim]
    bf16* value = key + dim;
    const int position = *p.position, slot = position % p.slots, count = min(position + 1, p.slots);
    const int chunk = ((count + p.splits - 1) / p.splits + TILE - 1) / TILE * TILE;
    const int from = split * chunk, to = min(from + chunk, count);
    const size_t base = ((size_t)batch * p.slots * p.kv_heads + kv) * dim;
    const int stride = p.kv_heads * dim;
    wait_for_previous();

    const float* row = p.qkv + (size_t)batch * (p.heads + 2 * p.kv_heads) * dim;
    const int half = dim / 2;
    const float scale = rsqrtf((float)dim);
    for (int i = tid; i < Q * half; i += CACHED) {
        const int h = i / half, d = i % half;
        const float cosine = __ldcg(p.table + d), sine = __ldcg(p.table + half + d);
        const float* x = row + (kv * group + min(h, group - 1)) * dim;
        const float a = __ldcg(x + d), b = __ldcg(x + d + half);
        q[h * dim + d] = (a * cosine - b * sine) * scale, q[h * dim + d + half] = (b * cosine + a * sine) * scale;
    }
    const bool owner = from <= slot && slot < to;
    for (int d = tid; owner && d < half; d += CACHED) {
        const float cosine = __ldcg(p.table + d), sine = __ldcg(p.table + half + d);
        const float *x = row + (p.heads + kv) * dim, *y = row + (p.heads + p.kv_heads + kv) * dim;
        const float a = __ldcg(x + d), b = __ldcg(x + d + half);
        key[d] = __float2bfloat16_rn(a * cosine - b * sine), key[d + half] = __float2bfloat16_rn(b * cosine + a * sine);
        value[d] = __float2bfloat16_rn(__ldcg(y + d)), value[d + half] = __float2bfloat16_rn(__ldcg(y + d + half));
        const size_t at = base + (size_t)slot * stride + d;
        p.k[at] = key[d], p.k[at + half] = key[d + half], p.v[at] = value[d], p.v[at + half] = value[d + half];
    }
    __syncthreads();

    float top = -INFINITY, sum = 0.0f;  // of head `warp`, in each of its lanes
    const int pairs = half, keepers = CACHED / pairs, keeper = tid / pairs, column = tid % pairs * 2;
    float2 y[Q] = {};
    for (int tile = from; tile < to; tile += TILE) {
#pragma unroll
        for (int pass = 0; pass < TILE * 8 / CACHED; pass++) {  // eight lanes per key
            const int j = tid / 8 + pass * (CACHED / 8), at = tile + j;
            float dot[Q] = {};
            if (at < to) {
                const bf16* k = at == slot ? key : p.k + base + (size_t)at * stride;
#pragma unroll 2
                for (int d = tid % 8 * 8; d < dim; d += 64) {
                    const uint4 packed = *reinterpret_cast<const uint4*>(k + d);
                    const float2 k0 = unpack(packed.x), k1 = unpack(packed.y), k2 = unpack(packed.z), k3 = unpack(packed.w);
#pragma unroll
                    for (int h = 0; h < Q; h++) {
                        const float4 a = *reinterpret_cast<const float4*>(q + h * dim + d);
                        const float4 b = *reinterpret_cast<const float4*>(q + h * dim + d + 4);
                        dot[h] += a.x * k0.x + a.y * k0.y + a.z * k1.x + a.w * k1.y + b.x * k2.x + b.y * k2.y + b.z * k3.x + b.w * k3.y;
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < Q; h++) {
                const float s = warp_sum<8>(dot[h]);
                if (tid % 8 == 0) scores[h * TILE + j] = at < to ? s : -INFINITY;
            }
        }
        __syncthreads();
        if (warp < Q) {
            float* mine = scores + warp * TILE;
            const float a = mine[lane], b = mine[lane + WARP];
            const float next = fmaxf(top, warp_max(fmaxf(a, b)));
            const float ea = __expf(a - next), eb = __expf(b - next), less = __expf(top - next);
            sum = sum * less + warp_sum(ea + eb), top = next;
            mine[lane] = ea, mine[lane + WARP] = eb;
            if (lane == 0) shrink[warp] = less;
        }
        __syncthreads();
        if (keeper < keepers) {
#pragma unroll
            for (int h = 0; h < Q; h++) y[h].x *= shrink[h], y[h].y *= shrink[h];
#pragma unroll 4
            for (int j = keeper; j < min(TILE, to - tile); j += keepers) {
                const bf16* v = (tile + j == slot ? value : p.v + base + (size_t)(tile + j) * stride) + column;
                const float2 x = unpack(*reinterpret_cast<const uint32_t*>(v));
#pragma unroll
                for (int h = 0; h < Q; h++) y[h].x += scores[h * TILE + j] * x.x, y[h].y += scores[h * TILE + j] * x.y;
            }
        }
        __syncthreads();
    }

    if (keeper < keepers) {
#pragma unroll
        for (int h = 0; h < Q; h++) *reinterpret_cast<float2*>(gathered + (h * keepers + keeper) * dim + column) = y[h];
    }
    float* out = p.partial + (((size_t)batch * p.heads + kv * group) * p.splits + split) * (dim + 2);
    const size_t per_head = (size_t)p.splits * (dim + 2);
    if (warp < group && lane == 0) out[warp * per_head + dim] = top, out[warp * per_head + dim + 1] = sum;
    __syncthreads();
    for (int i = tid; i < group * dim; i += CACHED) {
        const int h = i / dim, d = i % dim;
        float total = 0.0f;
        for (int n = 0; n < keepers; n++) total += gathered[(h * keepers + n) * dim + d];
        out[h * per_head + d] = total;
    }
}

__global__ void cached_join(const Cached p) {
    wait_for_previous();
    const int head = blockIdx.x, batch = blockIdx.y, dim = p.dim;
    const float* in = p.partial + ((size_t)batch * p.heads + head) * p.splits * (dim + 2);
    float top = -INFINITY;
    for (int i = 0; i < p.splits; i++) top = fmaxf(top, __ldcg(in + (size_t)i * (dim + 2) + dim));
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0.0f, y = 0.0f;
        for (int i = 0; i < p.splits; i++) {
            const float* part = in + (size_t)i * (dim + 2);
            const float weight = __expf(__ldcg(part + dim) - top);
            sum += weight * __ldcg(part + dim + 1), y += weight * __ldcg(part + d);
        }
        p.y[((size_t)batch * p.heads + head) * dim + d] = __float2bfloat16_rn(y / sum);
    }
}

template <int Q> int launch_cached(const Cached& p, bool overlap, cudaStream_t stream) {
    const size_t shared = (Q * p.dim + 2 * CACHED * Q + Q * TILE + 8 + p.dim) * sizeof(float);
    const int code = start(cached<Q>, dim3(p.splits, p.kv_heads, p.batch), CACHED, shared, overlap, stream, p);
    if (code != cudaSuccess) return code;
    return start(cached_join, dim3(p.heads, p.batch), 128, 0, overlap, stream, p);
}

}  // namespace
}  // namespace margay

// mode: 0 plain, 1 add, 2 swiglu, 3 logits. tall: row tiles per block, 1, 2 or 4 (swiglu 2 or 4). Partial results (sums of
// squares, maxima) are one per block, two where tall is 4.
extern "C" int margay_decode_product(const margay::Product* p, int mode, int tall, int overlap, void* stream) {
    using namespace margay;
    if (p->batch < 1 || p->batch > 16 || p->inner % 8 != 0 || p->rows < 1 || (mode == SWIGLU && p->rows % 2 != 0))
        return cudaErrorInvalidValue;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    switch (mode * 8 + tall) {
        case 1: return launch_product<PLAIN, 1>(*p, overlap, s);
        case 2: return launch_product<PLAIN, 2>(*p, overlap, s);
        case 9: return launch_product<ADD, 1>(*p, overlap, s);
        case 10: return launch_product<ADD, 2>(*p, overlap, s);
        case 18: return launch_product<SWIGLU, 2>(*p, overlap, s);
        case 20: return launch_product<SWIGLU, 4>(*p, overlap, s);
        case 25: return launch_product<LOGITS, 1>(*p, overlap, s);
        case 26: return launch_product<LOGITS, 2>(*p, overlap, s);
        case 28: return launch_product<LOGITS, 4>(*p, overlap, s);
        default: return cudaErrorInvalidValue;
    }
}

// Blocks of sums of squares per sequence.
extern "C" int margay_decode_embed_parts(int hidden) { return (hidden + margay::EMBED_SPAN - 1) / margay::EMBED_SPAN; }

extern "C" int margay_decode_embed(const margay::Embed* p, void* stream) {
    using namespace margay;
    if (p->batch < 1 || p->hidden < 1) return cudaErrorInvalidValue;
    const dim3 grid(margay_decode_embed_parts(p->hidden), p->batch);
    embed<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(*p);
    return cudaGetLastError();
}

extern "C" int margay_decode_choose(void* tokens, void* position, const void* best, const void* best_at, int parts,
                                    int batch, int overlap, void* stream) {
    using namespace margay;
    return start(choose, dim3(batch), 256, 0, overlap, static_cast<cudaStream_t>(stream), static_cast<uint32_t*>(tokens),
                 static_cast<int*>(position), static_cast<const float*>(best), static_cast<const uint32_t*>(best_at),
                 parts);
}

extern "C" int margay_decode_lolcats(const margay::Lolcats* p, int overlap, void* stream) {
    using namespace margay;
    const int slots = p->terraced ? 2 * p->window : p->window, groups = p->dim / 4 > 0 ? STEP / (p->dim / 4) : 0;
    if (p->dim % 8 != 0 || p->dim > 256 || p->cols % 2 != 0 || p->cols > 256 || p->width > STEP || p->batch < 1 ||
        p->heads % p->kv_heads != 0 || (p->map_q != nullptr && p->dim * p->cols % 8 != 0))
        return cudaErrorInvalidValue;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (known_sizes(p->dim, p->cols, p->activation, slots) && p->map_q != nullptr) {
        const size_t shared = staged_bytes(p->dim, p->cols, slots);
        return p->dim == 128 ? by_split<128, 64>(*p, shared, overlap, s) : by_split<64, 64>(*p, shared, overlap, s);
    }
    const size_t shared = lolcats_floats(p->dim, p->width, slots) * sizeof(float);
    if (shared > 160 * 1024 || p->split != 1) return cudaErrorInvalidValue;
    const dim3 grid(p->heads, p->batch);
    const int rows = (p->width + groups - 1) / groups;
    if (rows <= 4) return start(lolcats<0, 0, 1, 4>, grid, STEP, shared, overlap, s, *p);
    if (rows <= 8) return start(lolcats<0, 0, 1, 8>, grid, STEP, shared, overlap, s, *p);
    if (rows <= 16) return start(lolcats<0, 0, 1, 16>, grid, STEP, shared, overlap, s, *p);
    return cudaErrorInvalidValue;
}

// Parts of the value columns that a batch of this size is best run in: what `split` and the shape of z must be.
extern "C" int margay_decode_lolcats_split(int batch, int heads, int dim, int cols, int activation, int slots) {
    if (!margay::known_sizes(dim, cols, activation, slots)) return 1;
    return batch * heads <= 48 ? 4 : batch * heads <= 128 ? 2 : 1;
}

// Writes y and `partial`.
extern "C" int margay_decode_cached(const margay::Cached* p, int overlap, void* stream) {
    using namespace margay;
    if (p->dim % 8 != 0 || p->dim > 256 || p->batch < 1 || p->slots < 1 || p->splits < 1 || p->heads % p->kv_heads != 0)
        return cudaErrorInvalidValue;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const int group = p->heads / p->kv_heads;
    if (group == 1) return launch_cached<1>(*p, overlap, s);
    if (group == 2) return launch_cached<2>(*p, overlap, s);
    if (group <= 4) return launch_cached<4>(*p, overlap, s);
    if (group <= 8) return launch_cached<8>(*p, overlap, s);
    return cudaErrorInvalidValue;
}

// Per-head feature maps of rotated queries and keys, forward and backward.
//
//   z = x W + b      softmax_dim: [softmax(z), softmax(-z)]    exp_dim: [exp(z - max z), exp(min z - z)]    relu: max(z, 0)
//
// x [rows, heads, D] (rows = B T), W [maps, D, C], b [maps, C], features [rows, maps, F] with F = 2 C (relu: C); map m reads
// head sources[m]. Two-sided features are floored at 1e-12.
//
//   features   one block per map and share of the rows: W stays in shared memory, tiles of 64 rows stream through
//   weights    dW = x^T dz and db, the same division; partial sums, then
//   add        their sum in a fixed order
//   inputs     dx of one head and tile, summed over the maps that read the head in registers
//
// The backward needs no z: dz follows from the features and their gradient. 4 warps of 16 rows, mma.m16n8k16 on bf16.
#include "tiles.cuh"

namespace margay {
namespace {

constexpr int MAX_MAPS = 1024;
constexpr float FLOOR = 1e-12f;
enum Activation { SOFTMAX_DIM, EXP_DIM, RELU };

struct Maps {
    const bf16 *x, *weight, *bias;  // no bias: null
    int64_t rows;
    int heads, dim, maps, cols, width, activation;
    short sources[MAX_MAPS];

    __device__ const bf16* head(int64_t row, int h) const { return x + (row * heads + h) * dim; }
    __device__ int64_t x_row() const { return (int64_t)heads * dim; }
    __device__ int64_t phi_row() const { return (int64_t)maps * width; }
};

__device__ __forceinline__ float quad_max(float x) { return warp_max<4>(x); }

template <int DP, int CP>
__global__ void __launch_bounds__(THREADS) features(const __grid_constant__ Maps p, bf16* out) {
    extern __shared__ uint4 smem[];
    constexpr int LD = DP + SIDE, LC = CP + SIDE, N = CP / 8;
    bf16* w = reinterpret_cast<bf16*>(smem);
    bf16* x = w + DP * LC;
    float* bias = reinterpret_cast<float*>(x + 2 * ROWS * LD);
    const int m = blockIdx.y, h = p.sources[m];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, row = warp * 16;
    const int64_t tiles = (p.rows + ROWS - 1) / ROWS;
    auto left = [&](int64_t tile) { return (int)(p.rows - tile * ROWS < ROWS ? p.rows - tile * ROWS : ROWS); };
    load_tile<CP, DP>(w, p.weight + (int64_t)m * p.dim * p.cols, p.cols, p.dim, p.cols);
    int64_t tile = blockIdx.x;
    load_tile<DP>(x, p.head(tile * ROWS, h), p.x_row(), left(tile), p.dim);
    copy_commit();
    for (int c = threadIdx.x; c < CP; c += THREADS) bias[c] = p.bias && c < p.cols ? to_float(p.bias[m * p.cols + c]) : 0.0f;
    for (int stage = 0; tile < tiles; tile += gridDim.x, stage ^= 1) {
        copy_wait<0>();
        __syncthreads();
        const int64_t next = tile + gridDim.x;
        if (next < tiles) load_tile<DP>(x + (stage ^ 1) * ROWS * LD, p.head(next * ROWS, h), p.x_row(), left(next), p.dim);
        copy_commit();
        float z[N][4];
        clear(z);
        product_t<DP>(z, x + stage * ROWS * LD, LD, row, w, LC);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) z[n][c] += bias[n * 8 + t * 2 + (c & 1)];
        float top[2] = {-INFINITY, -INFINITY}, low[2] = {INFINITY, INFINITY}, up[2] = {0.0f, 0.0f}, down[2] = {0.0f, 0.0f};
        if (p.activation != RELU) {
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    if (n * 8 < p.cols) top[c >> 1] = fmaxf(top[c >> 1], z[n][c]), low[c >> 1] = fminf(low[c >> 1], z[n][c]);
#pragma unroll
            for (int r = 0; r < 2; r++) top[r] = quad_max(top[r]), low[r] = -quad_max(-low[r]);
        }
        float other[N][4];
        if (p.activation != RELU) {
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    other[n][c] = __expf(low[c >> 1] - z[n][c]);
                    z[n][c] = __expf(z[n][c] - top[c >> 1]);
                    if (n * 8 < p.cols) up[c >> 1] += z[n][c], down[c >> 1] += other[n][c];
                }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float a = quad_sum(up[r]), b = quad_sum(down[r]);
            up[r] = p.activation == SOFTMAX_DIM ? 1.0f / a : 1.0f, down[r] = p.activation == SOFTMAX_DIM ? 1.0f / b : 1.0f;
        }
        const int64_t i = tile * ROWS + row + g;
        bf16* upper = i < p.rows ? out + i * p.phi_row() + (int64_t)m * p.width : nullptr;
        bf16* lower = i + 8 < p.rows ? upper + 8 * p.phi_row() : nullptr;
        const float floor = p.activation == RELU ? 0.0f : FLOOR;
        store_rows<N>(upper, lower, p.cols, [&](int n, int r) {
            return pack(fmaxf(z[n][2 * r] * up[r], floor), fmaxf(z[n][2 * r + 1] * up[r], floor));
        });
        if (p.activation != RELU)
            store_rows<N>(upper ? upper + p.cols : nullptr, lower ? lower + p.cols : nullptr, p.cols, [&](int n, int r) {
                return pack(fmaxf(other[n][2 * r] * down[r], floor), fmaxf(other[n][2 * r + 1] * down[r], floor));
            });
    }
}

__device__ __forceinline__ float2 pair(const bf16* x) { return unpack(*reinterpret_cast<const uint32_t*>(x)); }

// dz of 16 rows from tiles of features and of their gradient, in accumulator layout; zero beyond `cols`.
template <int CP>
__device__ __forceinline__ void gradient(float (&dz)[CP / 8][4], const Maps& p, const bf16* phi, const bf16* grad, int row) {
    constexpr int N = CP / 8, LF = 2 * CP + SIDE;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    clear(dz);
    auto live = [](float phi, float grad) { return phi > FLOOR ? phi * grad : 0.0f; };
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int at = (row + g + 8 * r) * LF + t * 2;
        if (p.activation == RELU) {
#pragma unroll
            for (int n = 0; n < N; n++)
                if (n * 8 < p.cols) {
                    const float2 up = pair(phi + at + n * 8), gu = pair(grad + at + n * 8);
                    dz[n][2 * r] = up.x > 0.0f ? gu.x : 0.0f;
                    dz[n][2 * r + 1] = up.y > 0.0f ? gu.y : 0.0f;
                }
            continue;
        }
        float a = 0.0f, b = 0.0f, most[2] = {-1.0f, -1.0f};
        int where[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < N; n++)
            if (n * 8 < p.cols) {
                const float2 up = pair(phi + at + n * 8), gu = pair(grad + at + n * 8);
                const float2 down = pair(phi + at + p.cols + n * 8), gd = pair(grad + at + p.cols + n * 8);
                const float u[2] = {live(up.x, gu.x), live(up.y, gu.y)}, d[2] = {live(down.x, gd.x), live(down.y, gd.y)};
                a += u[0] + u[1], b += d[0] + d[1];
                dz[n][2 * r] = u[0] - d[0], dz[n][2 * r + 1] = u[1] - d[1];
                if (p.activation == EXP_DIM) {
                    if (up.x > most[0]) most[0] = up.x, where[0] = n * 8 + t * 2;
                    if (up.y > most[0]) most[0] = up.y, where[0] = n * 8 + t * 2 + 1;
                    if (down.x > most[1]) most[1] = down.x, where[1] = n * 8 + t * 2;
                    if (down.y > most[1]) most[1] = down.y, where[1] = n * 8 + t * 2 + 1;
                }
            }
        a = quad_sum(a), b = quad_sum(b);
        if (p.activation == SOFTMAX_DIM) {
#pragma unroll
            for (int n = 0; n < N; n++)
                if (n * 8 < p.cols) {
                    const float2 up = pair(phi + at + n * 8), down = pair(phi + at + p.cols + n * 8);
                    dz[n][2 * r] += down.x * b - up.x * a, dz[n][2 * r + 1] += down.y * b - up.y * a;
                }
        } else {
            // The extreme's own exponent is 0 whatever its value: what the others lose goes back to it, the first one.
#pragma unroll
            for (int side = 0; side < 2; side++) {
                const float all = quad_max(most[side]);
                int j = most[side] == all ? where[side] : 0x7fffffff;
                j = min(j, __shfl_xor_sync(0xffffffffu, j, 1));
                j = min(j, __shfl_xor_sync(0xffffffffu, j, 2));
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++)
                        if (n * 8 + t * 2 + c == j) dz[n][2 * r + c] += side ? b : -a;
            }
        }
    }
}

template <int DP, int CP, bool READY> constexpr int weights_bytes() {
    return READY ? 2 * 2 * ROWS * (DP + SIDE + CP + SIDE) : 2 * ROWS * (DP + SIDE + 2 * (2 * CP + SIDE) + CP + SIDE);
}

// READY: `dphi` is dz [rows, maps, C] already, and the next tile loads while this one multiplies.
template <int DP, int CP, bool READY>
__global__ void __launch_bounds__(THREADS, CP == 64 ? 3 : 2) weights(const __grid_constant__ Maps p, const bf16* phi, const bf16* dphi,
                                                                      float* partials) {
    extern __shared__ uint4 smem[];
    constexpr int LD = DP + SIDE, LC = CP + SIDE, LF = 2 * CP + SIDE, N = CP / 8, M = DP / 64;
    bf16* x = reinterpret_cast<bf16*>(smem);
    bf16 *z = x + ROWS * LD, *f = z + ROWS * LC, *df = f + ROWS * LF;
    const int m = blockIdx.y, h = p.sources[m];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int64_t tiles = (p.rows + ROWS - 1) / ROWS;
    float acc[M][N][4], db = 0.0f;
#pragma unroll
    for (int i = 0; i < M; i++) clear(acc[i]);
    auto load = [&](int64_t tile, int stage) {
        if (tile < tiles) {
            const int left = (int)(p.rows - tile * ROWS < ROWS ? p.rows - tile * ROWS : ROWS);
            load_tile<DP>(x + stage, p.head(tile * ROWS, h), p.x_row(), left, p.dim);
            if (READY) {
                load_tile<CP>(z + stage, dphi + (tile * ROWS * p.maps + m) * p.cols, (int64_t)p.maps * p.cols, left, p.cols);
            } else {
                load_tile<2 * CP>(f, phi + tile * ROWS * p.phi_row() + (int64_t)m * p.width, p.phi_row(), left, p.width);
                load_tile<2 * CP>(df, dphi + tile * ROWS * p.phi_row() + (int64_t)m * p.width, p.phi_row(), left, p.width);
            }
        }
        copy_commit();
    };
    int stage = 0;
    if (READY) load(blockIdx.x, 0);
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        if (!READY) load(tile, 0);
        copy_wait<0>();
        __syncthreads();
        if (READY) {
            load(tile + gridDim.x, stage ? 0 : ROWS * (LD + LC));
        } else {
            float dz[N][4];
            gradient<CP>(dz, p, f, df, warp * 16);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    *reinterpret_cast<uint32_t*>(z + (warp * 16 + g + 8 * r) * LC + n * 8 + t * 2) = pack(dz[n][2 * r], dz[n][2 * r + 1]);
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            uint32_t fa[M][4];
#pragma unroll
            for (int i = 0; i < M; i++) frag_a_t(fa[i], x + stage, LD, (warp * M + i) * 16, k);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t fb[4];
                frag_b_t(fb, z + stage, LC, k, n * 8);
#pragma unroll
                for (int i = 0; i < M; i++) mma(acc[i][n], fa[i], fb[0], fb[1]), mma(acc[i][n + 1], fa[i], fb[2], fb[3]);
            }
        }
        if (p.bias && threadIdx.x < CP)
            for (int r = 0; r < ROWS; r++) db += to_float(z[stage + r * LC + threadIdx.x]);
        if (READY) stage = stage ? 0 : ROWS * (LD + LC);
        __syncthreads();
    }
    copy_wait<0>();
    float* out = partials + ((int64_t)blockIdx.x * p.maps + m) * (p.dim + 1) * p.cols;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int d = (warp * M + i) * 16 + g + 8 * r, c = n * 8 + t * 2;
                if (d < p.dim && c < p.cols) *reinterpret_cast<float2*>(out + (int64_t)d * p.cols + c) = make_float2(acc[i][n][2 * r], acc[i][n][2 * r + 1]);
            }
    if (threadIdx.x < p.cols) out[(int64_t)p.dim * p.cols + threadIdx.x] = db;
}

// dW and db from `count` partial sums.
__global__ void add(const float* partials, int count, int64_t maps, int64_t weights, int64_t cols, float* dweight, float* dbias) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, each = weights + cols;
    if (i >= maps * each) return;
    float sum = 0.0f;
    for (int n = 0; n < count; n++) sum += partials[n * maps * each + i];
    const int64_t m = i / each, c = i % each;
    if (c < weights) dweight[m * weights + c] = sum;
    else if (dbias) dbias[m * cols + c - weights] = sum;
}

template <int DP, int CP> constexpr int inputs_bytes() { return 2 * (DP * (CP + SIDE) + 2 * ROWS * (2 * CP + SIDE)); }

template <int DP, int CP>
__global__ void __launch_bounds__(THREADS, CP == 64 ? 3 : 2) inputs(const __grid_constant__ Maps p, const bf16* phi, const bf16* dphi, bf16* dx) {
    extern __shared__ uint4 smem[];
    constexpr int LC = CP + SIDE, LF = 2 * CP + SIDE, N = CP / 8;
    bf16* w = reinterpret_cast<bf16*>(smem);
    bf16 *f = w + DP * LC, *df = f + ROWS * LF;
    const int h = blockIdx.y;
    const int64_t tile = blockIdx.x;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4;
    const int left = (int)(p.rows - tile * ROWS < ROWS ? p.rows - tile * ROWS : ROWS);
    float acc[DP / 8][4];
    clear(acc);
    for (int m = 0; m < p.maps; m++) {
        if (p.sources[m] != h) continue;
        __syncthreads();
        load_tile<2 * CP>(f, phi + tile * ROWS * p.phi_row() + (int64_t)m * p.width, p.phi_row(), left, p.width);
        load_tile<2 * CP>(df, dphi + tile * ROWS * p.phi_row() + (int64_t)m * p.width, p.phi_row(), left, p.width);
        load_tile<CP, DP>(w, p.weight + (int64_t)m * p.dim * p.cols, p.cols, p.dim, p.cols);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        float dz[N][4];
        gradient<CP>(dz, p, f, df, warp * 16);
#pragma unroll
        for (int k = 0; k < N / 2; k++) {
            const uint32_t fa[4] = {pack(dz[2 * k][0], dz[2 * k][1]), pack(dz[2 * k][2], dz[2 * k][3]),
                                    pack(dz[2 * k + 1][0], dz[2 * k + 1][1]), pack(dz[2 * k + 1][2], dz[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < DP / 8; n += 2) {
                uint32_t fb[4];
                frag_b(fb, w, LC, n * 8, k * 16);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
    }
    const int64_t i = tile * ROWS + warp * 16 + g;
    bf16* upper = i < p.rows ? dx + i * p.x_row() + (int64_t)h * p.dim : nullptr;
    store_rows(upper, i + 8 < p.rows ? upper + 8 * p.x_row() : nullptr, p.dim, acc);
}

bool maps(Maps& p, const void* x, const void* weight, const void* bias, const int* sources, int64_t rows, int heads, int dim, int maps,
          int cols, int activation) {
    if (rows < 1 || heads < 1 || dim < 8 || dim > 128 || dim % 8 != 0 || maps < 1 || maps > MAX_MAPS || cols < 8 || cols > 128 ||
        cols % 8 != 0 || activation < 0 || activation > RELU)
        return false;
    p.x = (const bf16*)x, p.weight = (const bf16*)weight, p.bias = (const bf16*)bias;
    p.rows = rows, p.heads = heads, p.dim = dim, p.maps = maps, p.cols = cols, p.activation = activation;
    p.width = activation == RELU ? cols : 2 * cols;
    for (int m = 0; sources && m < maps; m++) p.sources[m] = (short)sources[m];
    return true;
}

// Blocks that share a map's rows: enough for every multiprocessor, at least four tiles each.
int shares(int64_t rows, int maps) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS, wanted = (1056 + maps - 1) / maps, most = (tiles + 3) / 4;
    return (int)(wanted < most ? wanted : most);
}

template <class K> cudaError_t reserve(K kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <int DP, int CP> cudaError_t run_forward(const Maps& p, void* out, cudaStream_t stream) {
    constexpr int bytes = 2 * (DP * (CP + SIDE) + 2 * ROWS * (DP + SIDE)) + 4 * CP;
    cudaError_t error = reserve(features<DP, CP>, bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(shares(p.rows, p.maps), p.maps);
    features<DP, CP><<<grid, THREADS, bytes, stream>>>(p, (bf16*)out);
    return cudaGetLastError();
}

template <int DP, int CP, bool READY>
cudaError_t run_weights(const Maps& p, const void* phi, const void* dphi, void* dweight, void* dbias, void* scratch, cudaStream_t stream) {
    constexpr int bytes = weights_bytes<DP, CP, READY>();
    cudaError_t error = reserve(weights<DP, CP, READY>, bytes);
    if (error != cudaSuccess) return error;
    const int count = shares(p.rows, p.maps);
    const dim3 grid(count, p.maps);
    weights<DP, CP, READY><<<grid, THREADS, bytes, stream>>>(p, (const bf16*)phi, (const bf16*)dphi, (float*)scratch);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const int64_t all = (int64_t)p.maps * (p.dim + 1) * p.cols;
    const int blocks = (int)((all + 255) / 256);
    add<<<blocks, 256, 0, stream>>>((const float*)scratch, count, p.maps, (int64_t)p.dim * p.cols, p.cols, (float*)dweight, (float*)dbias);
    return cudaGetLastError();
}

template <int DP, int CP>
cudaError_t run_backward(const Maps& p, const void* phi, const void* dphi, void* dx, void* dweight, void* dbias, void* scratch,
                         cudaStream_t stream) {
    if (dweight) {
        const cudaError_t error = run_weights<DP, CP, false>(p, phi, dphi, dweight, dbias, scratch, stream);
        if (error != cudaSuccess) return error;
    }
    if (dx) {
        constexpr int bytes = inputs_bytes<DP, CP>();
        cudaError_t error = reserve(inputs<DP, CP>, bytes);
        if (error != cudaSuccess) return error;
        const dim3 grid((unsigned)((p.rows + ROWS - 1) / ROWS), p.heads);
        inputs<DP, CP><<<grid, THREADS, bytes, stream>>>(p, (const bf16*)phi, (const bf16*)dphi, (bf16*)dx);
        return cudaGetLastError();
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace margay

using namespace margay;

// Bytes; 0 where the chip's shared memory does not hold the tiles.
extern "C" size_t margay_feature_map_scratch(int64_t rows, int dim, int maps, int cols) {
    int device, most;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        most < (cols > 64 ? weights_bytes<128, 128, false>() : weights_bytes<128, 64, false>()))
        return 0;
    return (size_t)shares(rows, maps) * maps * (dim + 1) * cols * sizeof(float);
}

// `sources` [maps] lies in host memory; `bias` may be null.
extern "C" int margay_feature_map_fwd(const void* x, const void* weight, const void* bias, void* out, const int* sources, int64_t rows,
                                      int heads, int dim, int maps_count, int cols, int activation, void* stream) {
    Maps p;
    if (!maps(p, x, weight, bias, sources, rows, heads, dim, maps_count, cols, activation)) return cudaErrorInvalidValue;
    const cudaStream_t s = (cudaStream_t)stream;
    if (dim <= 64) return cols <= 64 ? run_forward<64, 64>(p, out, s) : run_forward<64, 128>(p, out, s);
    return cols <= 64 ? run_forward<128, 64>(p, out, s) : run_forward<128, 128>(p, out, s);
}

// From the features and their gradient: dx (bf16), dweight and dbias (f32); each may be null.
extern "C" int margay_feature_map_bwd(const void* x, const void* weight, const void* bias, const void* phi, const void* dphi, void* dx,
                                      void* dweight, void* dbias, void* scratch, const int* sources, int64_t rows, int heads, int dim,
                                      int maps_count, int cols, int activation, void* stream) {
    Maps p;
    if (!maps(p, x, weight, bias, sources, rows, heads, dim, maps_count, cols, activation)) return cudaErrorInvalidValue;
    const cudaStream_t s = (cudaStream_t)stream;
    if (dim <= 64)
        return cols <= 64 ? run_backward<64, 64>(p, phi, dphi, dx, dweight, dbias, scratch, s)
                          : run_backward<64, 128>(p, phi, dphi, dx, dweight, dbias, scratch, s);
    return cols <= 64 ? run_backward<128, 64>(p, phi, dphi, dx, dweight, dbias, scratch, s)
                      : run_backward<128, 128>(p, phi, dphi, dx, dweight, dbias, scratch, s);
}

// dweight [maps, D, C] (f32) from dz [rows, maps, C].
extern "C" int margay_feature_map_dweight(const void* x, const void* dz, void* dweight, void* scratch, const int* sources, int64_t rows,
                                          int heads, int dim, int maps_count, int cols, void* stream) {
    Maps p;
    if (!maps(p, x, nullptr, nullptr, sources, rows, heads, dim, maps_count, cols, SOFTMAX_DIM)) return cudaErrorInvalidValue;
    const cudaStream_t s = (cudaStream_t)stream;
    if (dim <= 64)
        return cols <= 64 ? run_weights<64, 64, true>(p, nullptr, dz, dweight, nullptr, scratch, s)
                          : run_weights<64, 128, true>(p, nullptr, dz, dweight, nullptr, scratch, s);
    return cols <= 64 ? run_weights<128, 64, true>(p, nullptr, dz, dweight, nullptr, scratch, s)
                      : run_weights<128, 128, true>(p, nullptr, dz, dweight, nullptr, scratch, s);
}

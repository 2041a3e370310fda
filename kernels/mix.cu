// y = Σ_n w_n x_n of one or two tensors [rows, H, D], the weights one per head or per row and head; forward and backward.
//
//   dx_n = w_n dy      dw_n = Σ_d dy x_n, per row, then over the rows where a head has one weight
//
// Memory-bound: 16-byte accesses, every element once.

#include "columns.cuh"

namespace margay {
namespace {

constexpr int LANES = 8;  // that share a row of D in the backward pass

struct Shape {
    uint32_t rows, heads, dim;
    uint32_t parts;
    bool by_row;  // weights [rows, parts, H], otherwise [parts, H]

    __device__ size_t weight(uint32_t row, uint32_t part, uint32_t head) const {
        return ((by_row ? (size_t)row * parts : 0) + part) * heads + head;
    }
};

template <typename T, int N> __global__ void forward(Shape p, T* y, const T* a, const T* b, const float* w) {
    using V = Vec<T, N>;
    const uint32_t units = p.dim / N, count = p.rows * p.heads * units;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const uint32_t cell = i / units, row = cell / p.heads, head = cell % p.heads;
        const float wa = w[p.weight(row, 0, head)], wb = b ? w[p.weight(row, 1, head)] : 0.0f;
        const V va = reinterpret_cast<const V*>(a)[i];
        V vb = va, o;
        if (b) vb = reinterpret_cast<const V*>(b)[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float first = wa * to_float(va.at[j]);
            o.at[j] = from_float<T>(b ? fmaf(wb, to_float(vb.at[j]), first) : first);
        }
        reinterpret_cast<V*>(y)[i] = o;
    }
}

// Gradients that are null are left out. `dw` [rows, parts, H].
template <typename T, int N>
__global__ void __launch_bounds__(256)
    backward(Shape p, T* da, T* db, float* dw, const T* a, const T* b, const T* dy, const float* w) {
    using V = Vec<T, N>;
    const uint32_t lane = threadIdx.x % LANES, units = p.dim / N, count = p.rows * p.heads, cells = blockDim.x / LANES;
    for (uint32_t base = blockIdx.x * cells; base < count; base += gridDim.x * cells) {
        const uint32_t cell = base + threadIdx.x / LANES, row = cell / p.heads, head = cell % p.heads;
        float sa = 0.0f, sb = 0.0f;
        if (cell < count) {
            const float wa = w[p.weight(row, 0, head)], wb = b ? w[p.weight(row, 1, head)] : 0.0f;
            for (uint32_t u = lane; u < units; u += LANES) {
                const size_t at = (size_t)cell * units + u;
                const V g = reinterpret_cast<const V*>(dy)[at];
                V va = g, vb = g, oa, ob;
                if (dw) va = reinterpret_cast<const V*>(a)[at];
                if (dw && b) vb = reinterpret_cast<const V*>(b)[at];
#pragma unroll
                for (int j = 0; j < N; j++) {
                    const float d = to_float(g.at[j]);
                    sa = fmaf(d, to_float(va.at[j]), sa);
                    sb = fmaf(d, to_float(vb.at[j]), sb);
                    oa.at[j] = from_float<T>(wa * d);
                    ob.at[j] = from_float<T>(wb * d);
                }
                if (da) reinterpret_cast<V*>(da)[at] = oa;
                if (db) reinterpret_cast<V*>(db)[at] = ob;
            }
        }
        sa = warp_sum<LANES>(sa);
        sb = warp_sum<LANES>(sb);
        if (dw && lane == 0 && cell < count) {
            dw[((size_t)row * p.parts) * p.heads + head] = sa;
            if (b) dw[((size_t)row * p.parts + 1) * p.heads + head] = sb;
        }
    }
}

template <typename T, int N>
int launch(Shape p, void* y, const void* a, const void* b, const float* w, cudaStream_t s) {
    const size_t blocks = ((size_t)p.rows * p.heads * (p.dim / N) + 255) / 256;
    forward<T, N><<<blocks < (1u << 16) ? blocks : 1u << 16, 256, 0, s>>>(p, static_cast<T*>(y), static_cast<const T*>(a),
                                                                         static_cast<const T*>(b), w);
    return cudaGetLastError();
}

template <typename T, int N>
int launch(Shape p, void* da, void* db, float* dw, const void* a, const void* b, const void* dy, const float* w, cudaStream_t s) {
    const size_t blocks = ((size_t)p.rows * p.heads + 256 / LANES - 1) / (256 / LANES);
    backward<T, N><<<blocks < (1u << 16) ? blocks : 1u << 16, 256, 0, s>>>(
        p, static_cast<T*>(da), static_cast<T*>(db), dw, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<const T*>(dy), w);
    return cudaGetLastError();
}

Shape shape(int rows, int heads, int dim, int parts, int by_row) {
    return {(uint32_t)rows, (uint32_t)heads, (uint32_t)dim, (uint32_t)parts, by_row != 0};
}

bool fits(int rows, int heads, int dim) { return (size_t)rows * heads * dim < (1ull << 31); }

}  // namespace
}  // namespace margay

// y, a, b [rows, H, D] in f32 (dtype 0) or bf16 (1), `b` null for one part; w [parts, H] or, with `by_row`, [rows, parts, H] f32.
extern "C" int margay_mix(void* y, const void* a, const void* b, const float* w, int rows, int heads, int dim, int by_row,
                          int dtype, void* stream) {
    if (rows == 0 || heads == 0 || dim == 0) return cudaSuccess;
    if (!margay::fits(rows, heads, dim)) return cudaErrorInvalidValue;
    const auto p = margay::shape(rows, heads, dim, b ? 2 : 1, by_row);
    const auto s = static_cast<cudaStream_t>(stream);
    if (dtype == 1) return dim % 8 == 0 ? margay::launch<margay::bf16, 8>(p, y, a, b, w, s) : margay::launch<margay::bf16, 1>(p, y, a, b, w, s);
    return dim % 4 == 0 ? margay::launch<float, 4>(p, y, a, b, w, s) : margay::launch<float, 1>(p, y, a, b, w, s);
}

// Bytes the backward needs for dw of weights per head.
extern "C" size_t margay_mix_scratch(int rows, int heads, int parts) {
    return (size_t)rows * parts * heads * sizeof(float) + margay::column_scratch((size_t)parts * heads);
}

// Gradients like what they belong to; each of them may be null. `scratch` may be null with `by_row` or without dw.
extern "C" int margay_mix_bwd(void* da, void* db, float* dw, void* scratch, const void* a, const void* b, const void* dy,
                              const float* w, int rows, int heads, int dim, int by_row, int dtype, void* stream) {
    if (rows == 0 || heads == 0 || dim == 0) return cudaSuccess;
    if (!margay::fits(rows, heads, dim)) return cudaErrorInvalidValue;
    const auto p = margay::shape(rows, heads, dim, b ? 2 : 1, by_row);
    const auto s = static_cast<cudaStream_t>(stream);
    float* each = by_row || !dw ? dw : static_cast<float*>(scratch);
    int e;
    if (dtype == 1)
        e = dim % 8 == 0 ? margay::launch<margay::bf16, 8>(p, da, db, each, a, b, dy, w, s)
                         : margay::launch<margay::bf16, 1>(p, da, db, each, a, b, dy, w, s);
    else
        e = dim % 4 == 0 ? margay::launch<float, 4>(p, da, db, each, a, b, dy, w, s)
                         : margay::launch<float, 1>(p, da, db, each, a, b, dy, w, s);
    if (e != cudaSuccess || each == dw) return e;
    const size_t count = (size_t)p.parts * heads;
    return margay::sum_columns(dw, each, each + (size_t)rows * count, rows, (int)count, s);
}

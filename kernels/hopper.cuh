// What only Hopper has (sm_90a): the bulk copy engine (TMA), its barriers, and wgmma. Everything here is compiled away for other
// targets; kernels that use it have another form for those.
//
// Tiles in shared memory are panels of [rows][64] bf16, 128 bytes a row, 16-byte chunk c of row r at chunk c ^ (r % 8): the
// layout TMA writes with SWIZZLE_128B and wgmma reads. Panels begin at multiples of 1024 bytes; wider rows are several panels.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace margay {

// A tensor [B, T, heads, D] (rows may be wider than its heads) as TMA sees it; boxes of `rows` x 64 of one head. Rows from T on
// and columns from D on read as zeros and are not written.
inline cudaError_t tile_map(CUtensorMap* map, const void* pointer, int batch, int time, int heads, int dim, int rows) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    // By the runtime, so that nothing links to the driver library.
    static Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<Encode>(function);
    }();
    if (!encode) return cudaErrorNotSupported;
    const cuuint64_t row = cuuint64_t(heads) * dim * 2;
    const cuuint64_t sizes[4] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(time), cuuint64_t(batch)};
    const cuuint64_t strides[3] = {cuuint64_t(dim) * 2, row, row * time};
    const cuuint32_t box[4] = {64, 1, cuuint32_t(rows), 1}, steps[4] = {1, 1, 1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(pointer), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival, and `bytes` more that copies will bring.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra out;\n"
        "bra again;\n"
        "out:\n}\n" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void tile_load(const CUtensorMap* map, uint64_t* barrier, void* tile, int column, int head, int row, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(
                     shared_address(tile)),
                 "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(row), "r"(batch)
                 : "memory");
}

// `bytes` (a multiple of 16) from an address that is one too.
__device__ __forceinline__ void bulk_load(uint64_t* barrier, void* to_shared, const void* from_global, int bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(shared_address(to_shared)),
                 "l"(from_global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void tile_store(const CUtensorMap* map, const void* tile, int column, int head, int row, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
                 "r"(shared_address(tile)), "r"(column), "r"(head), "r"(row), "r"(batch)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// `bytes` (a multiple of 16) of shared memory to an address that is a multiple of 16 too: written there, or added to the floats there.
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(to_global), "r"(shared_address(from_shared)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void bulk_add(float* to_global, const void* from_shared, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(to_global), "r"(shared_address(from_shared)),
                 "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// Until the shared memory of all stores may be written again.
__device__ __forceinline__ void tile_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }

// Until all stores of this thread are done.
__device__ __forceinline__ void bulk_store_done() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

// A count in global memory by which blocks tell each other what of their bulk stores is done; the copy engine's accesses are ordered
// with it on both sides. `count_wait` returns once it is `least` or more.
__device__ __forceinline__ void count_set(int* count, int value) {
    asm volatile("fence.proxy.async;\nst.release.gpu.global.s32 [%0], %1;\n" ::"l"(count), "r"(value) : "memory");
}
__device__ __forceinline__ bool count_reached(const int* count, int least) {
    int seen;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(seen) : "l"(count) : "memory");
    if (seen < least) return false;
    asm volatile("fence.proxy.async;\n" ::: "memory");
    return true;
}
__device__ __forceinline__ void count_wait(const int* count, int least) {
    while (!count_reached(count, least)) {
    }
}

// Four 8 x 8 bf16 tiles of registers; lane l gives the address of row l % 8 of tile l / 8.
__device__ __forceinline__ void store_tiles(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}

// Orders this thread's ordinary writes to shared memory before what the copy engine and wgmma read next.
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// A barrier of `threads` threads; 0 is __syncthreads.
__device__ __forceinline__ void named_sync(int barrier, int threads) { asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int barrier, int threads) { asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory"); }

// Number of this thread's warpgroup, in a way that shows the compiler that a warp agrees on it.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

template <int N> __device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N)); }

// Operand [M or N][K], K contiguous: panels of 64 K; rows in groups of 8, 1024 bytes apart.
__device__ __forceinline__ uint64_t operand_k(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Operand [K][N], N contiguous: panels of 64 N, `panel` bytes apart; K in groups of 8 rows, 1024 bytes apart.
__device__ __forceinline__ uint64_t operand_n(uint32_t address, int panel) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The same operand `bytes` further on. One addition: built anew for every product, operands take longer than small products do.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int bytes) {
    return (operand & 0xffffffff00000000) | (uint32_t(operand) + uint32_t(bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory"); }

// Keeps the compiler from moving uses of sums across a wait.
template <int N> __device__ __forceinline__ void hold(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+f"(x[i][e])::"memory");
}

#define MARGAY_R4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define MARGAY_R32(c, i) \
    MARGAY_R4(c, i), MARGAY_R4(c, i + 1), MARGAY_R4(c, i + 2), MARGAY_R4(c, i + 3), MARGAY_R4(c, i + 4), MARGAY_R4(c, i + 5), MARGAY_R4(c, i + 6), \
        MARGAY_R4(c, i + 7)
#define MARGAY_D32                                                                                                                \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MARGAY_D64                                                                                                                \
    MARGAY_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
               "%62,%63"

// c (64 x 8 N8, of a warpgroup) = a b + c, or a b where `add` is 0; 16 of the inner dimension. B_ROWS: b is [K][N]. In ss_t, a is [K][M].
template <int N8, bool B_ROWS> struct Wgmma;

#define MARGAY_WGMMA(N8, SHAPE, TRANS, REGS, D, A0, A1, A2, A3, A4, A5)                                                            \
    template <> struct Wgmma<N8, TRANS> {                                                                                         \
        __device__ __forceinline__ static void ss(float (&c)[N8][4], uint64_t a, uint64_t b, int add) {                           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A2 ", 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" D "}, %" A0 ", %" A1 ", p, 1, 1, 0, " #TRANS ";\n}\n" \
                         : REGS                                                                                                   \
                         : "l"(a), "l"(b), "r"(add));                                                                             \
        }                                                                                                                         \
        __device__ __forceinline__ static void ss_t(float (&c)[N8][4], uint64_t a, uint64_t b, int add) {                           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A2 ", 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" D "}, %" A0 ", %" A1 ", p, 1, 1, 1, " #TRANS ";\n}\n" \
                         : REGS                                                                                                   \
                         : "l"(a), "l"(b), "r"(add));                                                                             \
        }                                                                                                                         \
        __device__ __forceinline__ static void rs(float (&c)[N8][4], const uint32_t (&a)[4], uint64_t b, int add) {               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A5 ", 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" D "}, {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" A4  \
                         ", p, 1, 1, " #TRANS ";\n}\n"                                                                          \
                         : REGS                                                                                                   \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                         \
        }                                                                                                                         \
    };
#define MARGAY_C32 MARGAY_R32(c, 0)
#define MARGAY_C64 MARGAY_R32(c, 0), MARGAY_R32(c, 8)
MARGAY_WGMMA(8, "m64n64k16", 0, MARGAY_C32, MARGAY_D32, "32", "33", "34", "35", "36", "37")
MARGAY_WGMMA(8, "m64n64k16", 1, MARGAY_C32, MARGAY_D32, "32", "33", "34", "35", "36", "37")
MARGAY_WGMMA(16, "m64n128k16", 0, MARGAY_C64, MARGAY_D64, "64", "65", "66", "67", "68", "69")
MARGAY_WGMMA(16, "m64n128k16", 1, MARGAY_C64, MARGAY_D64, "64", "65", "66", "67", "68", "69")
#undef MARGAY_WGMMA
#undef MARGAY_C32
#undef MARGAY_C64
#undef MARGAY_D32
#undef MARGAY_D64
#undef MARGAY_R32
#undef MARGAY_R4

#endif

}  // namespace margay

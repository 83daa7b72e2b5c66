// Kernels with the names and a tile loop as scripts/check_cuda.py expects them, and counts that can be read off here.
//
// toy_sm_80.sass and toy_sm_90.sass are what nvcc 13.0 makes of it with -DTOY_SPILL, disassembled, encodings cut away.

namespace mmvmamba {

struct bfloat16 {
  unsigned short bits;
};

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One turn: 32 V exponentials, 16 V fused multiply-adds, two barriers, one load and V stores to memory.
template <class Element, int V, bool kOneState, int kRankTiles>
__global__ void scan2d_forward_kernel(const float* x, float* y, int tiles, int segments) {
  extern __shared__ float stage[];
  float h[V] = {};
  for (int segment = 0; segment < segments; ++segment) {
    for (int tile = 0; tile < tiles; ++tile) {
      stage[threadIdx.x] = x[tile * 32 + threadIdx.x];
      __syncthreads();
#pragma unroll
      for (int t = 0; t < 16; ++t) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float g = exp2_approx(stage[t * V + v]);
          h[v] = g * h[v] + exp2_approx(g);
        }
      }
      __syncthreads();
      for (int v = 0; v < V; ++v) y[(tile * V + v) * 32 + threadIdx.x] = h[v];
    }
    h[0] += y[segment];
  }
}

#ifdef TOY_SPILL
// 64 live values, and at most 32 registers for a thread.
#define TOY_LIVE 64
#define TOY_BOUNDS __launch_bounds__(1024, 2)
#else
#define TOY_LIVE 32
#define TOY_BOUNDS
#endif

// One turn: 64 exponentials.
template <class Element, int V, bool kOneState, int kRankTiles>
__global__ void TOY_BOUNDS scan2d_backward_kernel(const float* x, float* y, int tiles) {
  float h[TOY_LIVE];
  for (int t = 0; t < TOY_LIVE; ++t) h[t] = x[t * 32 + threadIdx.x];
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int t = 0; t < 64; ++t) h[t % TOY_LIVE] = exp2_approx(h[t % TOY_LIVE] * h[(t + 7) % TOY_LIVE]);
  }
  for (int t = 0; t < TOY_LIVE; ++t) y[t * 32 + threadIdx.x] = h[t];
}

template __global__ void scan2d_forward_kernel<bfloat16, 2, true, 1>(const float*, float*, int, int);
template __global__ void scan2d_backward_kernel<bfloat16, 2, true, 1>(const float*, float*, int);

}  // namespace mmvmamba

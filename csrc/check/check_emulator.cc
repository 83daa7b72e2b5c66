// Small kernels that try the emulator of cuda_emulator.hh: what it must compute, and the mistakes that it must find.
// tests/test_ops/test_cuda_emulator.py compiles this and runs `check_emulator <case>`, one process each.

#include <cstdio>
#include <string>
#include <vector>

#include "cuda_emulator.hh"

namespace mmvmamba {
namespace {

struct Args {
  const float* in;
  float* out;
  int count;
};

void print(const std::vector<float>& values) {
  for (const float value : values) std::printf("%.9g\n", value);
}

std::vector<float> counting(int count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i);
  return values;
}

// Sum of every block's part of `in`, by halves through shared memory.
__global__ void __launch_bounds__(256) reduction_kernel(const __grid_constant__ Args args) {
  MMVMAMBA_SHARED(float, shared);
  const int threads = static_cast<int>(blockDim.x * blockDim.y),
            thread = static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y);
  const int at = static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y) * threads + thread;
  shared[thread] = at < args.count ? args.in[at] : 0.0f;
  __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (thread < half) shared[thread] += shared[thread + half];
    __syncthreads();
  }
  if (thread == 0) args.out[blockIdx.x + gridDim.x * blockIdx.y] = shared[0];
}

void reduction() {
  const std::vector<float> in = counting(700);
  std::vector<float> out(6);
  launch(reduction_kernel, dim3(3, 2), dim3(64, 2), 128 * sizeof(float), nullptr, Args{in.data(), out.data(), 700});
  print(out);
}

// Per lane: sum of the warp, sum of its half by other lanes' masks, neighbours within segments of 8, lane 5 of each 8.
__global__ void shuffles_kernel(const Args args) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float own = args.in[threadIdx.x];
  float sum = own;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  float half = own;
  const uint32_t mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int distance = 8; distance > 0; distance /= 2) half += __shfl_xor_sync(mask, half, distance);
  if (lane < 16) half += __shfl_sync(mask, own, 3);  // only one half does this one
  __syncwarp();
  const float up = __shfl_up_sync(0xffffffffu, own, 3, 8), down = __shfl_down_sync(0xffffffffu, own, 3, 8);
  const double fifth = __shfl_sync(0xffffffffu, static_cast<double>(own) + 0.5, 5, 8);
  const float results[] = {sum, half, up, down, static_cast<float>(fifth)};
  for (int i = 0; i < 5; ++i) args.out[threadIdx.x * 5 + static_cast<unsigned>(i)] = results[i];
}

void shuffles() {
  const std::vector<float> in = counting(96);
  std::vector<float> out(96 * 5);
  launch(shuffles_kernel, dim3(1), dim3(96), 0, nullptr, Args{in.data(), out.data(), 96});
  print(out);
}

// c = a b + 1 for a (16, 8), b (8, 8), which follow each other in `in`; operands are whole numbers or `in` as it is.
__global__ void product_kernel(const Args args) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float *a = args.in, *b = args.in + 128;
  const uint32_t a_tile[4] = {__float_as_uint(a[g * 8 + t]), __float_as_uint(a[(g + 8) * 8 + t]),
                              __float_as_uint(a[g * 8 + t + 4]), __float_as_uint(a[(g + 8) * 8 + t + 4])};
  const uint32_t b_tile[2] = {__float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g])};
  float c[4] = {1, 1, 1, 1};
  mma_16x8x8_tf32(c, a_tile, b_tile);
  for (unsigned e = 0; e < 4; ++e) args.out[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = c[e];
}

void product() {
  std::vector<float> in(192), out(128);
  if (std::fread(in.data(), sizeof(float), in.size(), stdin) != in.size()) std::abort();
  launch(product_kernel, dim3(1), dim3(32), 0, nullptr, Args{in.data(), out.data(), 0});
  print(out);
}

// Every thread reads its neighbour's value; without the barrier it may come too early.
template <bool kBarrier>
__global__ void neighbour_kernel(const Args args) {
  MMVMAMBA_SHARED(float, shared);
  shared[threadIdx.x] = args.in[threadIdx.x];
  if (kBarrier) __syncthreads();
  args.out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// The same between the lanes of a warp.
template <bool kBarrier>
__global__ void lanes_kernel(const Args args) {
  MMVMAMBA_SHARED(float, shared);
  shared[threadIdx.x] = args.in[threadIdx.x];
  if (kBarrier) __syncwarp();
  args.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

void neighbours(void (*kernel)(Args)) {
  const std::vector<float> in = counting(64);
  std::vector<float> out(64);
  launch(kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, Args{in.data(), out.data(), 64});
  print(out);
}

__global__ void returned_kernel(const Args args) {
  if (threadIdx.x == 37) return;
  __syncthreads();
  args.out[threadIdx.x] = 1;
}

__global__ void returned_lane_kernel(const Args args) {
  if (threadIdx.x == 37) return;
  args.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, args.in[threadIdx.x], 1);
}

__global__ void two_operations_kernel(const Args args) {
  const float own = args.in[threadIdx.x];
  args.out[threadIdx.x] =
      threadIdx.x % 32 == 9 ? __shfl_up_sync(0xffffffffu, own, 1) : __shfl_xor_sync(0xffffffffu, own, 1);
}

__global__ void two_barriers_kernel(const Args args) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  args.out[threadIdx.x] = 1;
}

__global__ void barrier_and_shuffle_kernel(const Args args) {
  if (threadIdx.x == 3) __syncthreads();
  args.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, args.in[threadIdx.x], 1);
}

__global__ void lane_out_of_range_kernel(const Args args) {
  args.out[threadIdx.x] = __shfl_sync(0xffffffffu, args.in[threadIdx.x], 32);
}

__global__ void lane_outside_mask_kernel(const Args args) {
  if (threadIdx.x % 32 < 16) args.out[threadIdx.x] = __shfl_sync(0x0000ffffu, args.in[threadIdx.x], 20);
}

__global__ void overrun_kernel(const Args args) {
  MMVMAMBA_SHARED(float, shared);
  shared[threadIdx.x + 1] = args.in[threadIdx.x];
}

// What nobody wrote is NaN, as every type of element.
__global__ void unwritten_kernel(const Args args) {
  MMVMAMBA_SHARED(uint16_t, shared);
  const uint16_t bits = shared[threadIdx.x];
  args.out[threadIdx.x] = half_to_float(bits) + bfloat_to_float(bits);
  MMVMAMBA_SHARED(float, words);
  if (threadIdx.x < 32) args.out[threadIdx.x] += words[threadIdx.x];
}

// Floats from the standard input; for each its 8 results as floats, to the standard output.
void numbers() {
  float x = 0;
  while (std::fread(&x, sizeof x, 1, stdin) == 1) {
    const uint16_t half = float_to_half(x), bfloat = float_to_bfloat(x);
    const float results[] = {half_to_float(half), bfloat_to_float(bfloat),     exp2_approx(x),   log2_approx(x),
                             rcp_approx(x),       __uint_as_float(to_tf32(x)), min_nan(x, 1.0f), min_nan(1.0f, x)};
    std::fwrite(results, sizeof(float), 8, stdout);
  }
}

int run(const std::string& name) {
  if (name == "reduction")
    reduction();
  else if (name == "shuffles")
    shuffles();
  else if (name == "product")
    product();
  else if (name == "numbers")
    numbers();
  else if (name == "barrier")
    neighbours(neighbour_kernel<true>);
  else if (name == "no_barrier")
    neighbours(neighbour_kernel<false>);
  else if (name == "syncwarp")
    neighbours(lanes_kernel<true>);
  else if (name == "no_syncwarp")
    neighbours(lanes_kernel<false>);
  else if (name == "unwritten")
    neighbours(unwritten_kernel);
  else if (name == "returned")
    neighbours(returned_kernel);
  else if (name == "returned_lane")
    neighbours(returned_lane_kernel);
  else if (name == "two_operations")
    neighbours(two_operations_kernel);
  else if (name == "two_barriers")
    neighbours(two_barriers_kernel);
  else if (name == "barrier_and_shuffle")
    neighbours(barrier_and_shuffle_kernel);
  else if (name == "lane_out_of_range")
    neighbours(lane_out_of_range_kernel);
  else if (name == "lane_outside_mask")
    neighbours(lane_outside_mask_kernel);
  else if (name == "overrun")
    neighbours(overrun_kernel);
  else
    return 2;
  return 0;
}

}  // namespace
}  // namespace mmvmamba

int main(int count, char** arguments) { return count == 2 ? mmvmamba::run(arguments[1]) : 2; }

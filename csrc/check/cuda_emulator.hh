// CUDA kernels on the CPU: what csrc/cuda/device.cuh needs of CUDA, so that g++ compiles the kernels and their numbers
// can be tested where there is no GPU. It is slow and says nothing about speed. No PyTorch in here.
//
// | environment variable | meaning |
// |---|---|
// | MMVMAMBA_EMULATED_SCHEDULE | forward (default), reverse, random:<seed>: order of lanes, warps and blocks |
// | MMVMAMBA_EMULATED_SM_COUNT | multiprocessors that device_limits() reports (8) |
// | MMVMAMBA_EMULATED_SHARED_BYTES | shared memory of a block (101376); a launch with more is an error |
// | MMVMAMBA_EMULATED_THREADS | threads of the system that blocks are spread over (1) |
//
// Mistakes end the program with a message that names block and thread: a thread that returned while others wait at a
// barrier, lanes of a warp at different operations, a shuffle from a lane that takes no part, writes next to shared
// memory.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulator_block.hh"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define threadIdx (::mmvmamba::emulator::current->index)
#define blockIdx (::mmvmamba::emulator::current->block->index)
#define blockDim (::mmvmamba::emulator::current->block->size)
#define gridDim (::mmvmamba::emulator::current->block->grid)

#define MMVMAMBA_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::mmvmamba::emulator::current->block->shared_memory())

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace mmvmamba::emulator {

[[noreturn]] inline void refuse(const char* what, long long found, long long allowed) {
  std::fprintf(stderr, "cuda_emulator: launch with %s %lld, allowed are at most %lld\n", what, found, allowed);
  std::abort();
}

inline int64_t environment_number(const char* name, int64_t missing) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return missing;
  char* end = nullptr;
  const long long number = std::strtoll(value, &end, 10);
  if (*end == '\0' && number > 0) return number;
  std::fprintf(stderr, "cuda_emulator: %s=%s: expected a number >= 1\n", name, value);
  std::abort();
}

// The current thread meets the others of `mask` (or of the block) at `op`.
inline Thread& meet(Op op, uint32_t mask, const char* file, int line) {
  Thread& self = *current;
  self.op = op;
  self.mask = mask;
  self.site = {file, line};
  if (op != Op::kBarrier && (mask >> self.lane & 1) == 0)
    self.block->fail(self, "%s of %s:%d, but the mask 0x%08x is without its lane %d", kOpNames[static_cast<int>(op)],
                     file, line, mask, self.lane);
  self.block->wait(self);
  return self;
}

// `source` and `inside`: the lane to read within a segment of `width` lanes, and whether it exists; else one's own.
template <typename T>
T shuffle(Op op, uint32_t mask, T value, int source, bool inside, int width, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  Thread& self = *current;
  const bool known = width >= 1 && width <= kWarp && (width & (width - 1)) == 0;
  if (!known || (op == Op::kShuffle && !inside))
    self.block->fail(self, "__shfl_sync of %s:%d: lane %d of segments of %d lanes", file, line, source, width);
  self.source = inside ? (self.lane & ~(width - 1)) + source : self.lane;
  self.given = 0;
  std::memcpy(&self.given, &value, sizeof(T));
  meet(op, mask, file, line);
  std::memcpy(&value, &self.got, sizeof(T));
  return value;
}

// Every thread of the system has a block of its own, with the stacks, for all launches.
inline Block& block_of_this_thread() {
  static thread_local Block block;
  return block;
}

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes, int64_t shared_limit) {
  if (block.x > 1024 || block.y > 1024 || block.z > 64)
    refuse("block dimension", std::max({block.x, block.y, block.z}), 1024);
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  if (threads > 1024) refuse("threads per block", threads, 1024);
  if (grid.x > 2147483647u) refuse("grid.x", grid.x, 2147483647);
  if (std::max(grid.y, grid.z) > 65535u) refuse("grid.y or grid.z", std::max(grid.y, grid.z), 65535);
  if (threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0) {
    std::fprintf(stderr, "cuda_emulator: launch of an empty grid (%u, %u, %u) or block (%u, %u, %u)\n", grid.x, grid.y,
                 grid.z, block.x, block.y, block.z);
    std::abort();
  }
  if (static_cast<int64_t>(shared_bytes) > shared_limit)
    refuse("bytes of shared memory", static_cast<long long>(shared_bytes), shared_limit);
}

// The blocks in the order of the schedule.
inline std::vector<int64_t> order_of_blocks(int64_t blocks, const Schedule& schedule) {
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (int64_t i = 0; i < blocks; ++i)
    order[static_cast<size_t>(i)] = schedule.kind == Schedule::kReverse ? blocks - 1 - i : i;
  Random random{schedule.seed};
  if (schedule.kind == Schedule::kRandom) random.shuffle(order.data(), static_cast<int>(blocks));
  return order;
}

}  // namespace mmvmamba::emulator

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  mmvmamba::emulator::meet(mmvmamba::emulator::Op::kBarrier, 0, file, line);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  mmvmamba::emulator::meet(mmvmamba::emulator::Op::kSyncWarp, mask, file, line);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return mmvmamba::emulator::shuffle(mmvmamba::emulator::Op::kShuffle, mask, value, source,
                                     source >= 0 && source < width, width, file, line);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const int source = (mmvmamba::emulator::current->lane & (width - 1)) - static_cast<int>(delta);
  return mmvmamba::emulator::shuffle(mmvmamba::emulator::Op::kShuffleUp, mask, value, source, source >= 0, width, file,
                                     line);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int source = (mmvmamba::emulator::current->lane & (width - 1)) + static_cast<int>(delta);
  return mmvmamba::emulator::shuffle(mmvmamba::emulator::Op::kShuffleDown, mask, value, source, source < width, width,
                                     file, line);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const int source = (mmvmamba::emulator::current->lane & (width - 1)) ^ lane_mask;
  return mmvmamba::emulator::shuffle(mmvmamba::emulator::Op::kShuffleXor, mask, value, source,
                                     source >= 0 && source < width, width, file, line);
}

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int atomicExch(int* address, int value) { return std::atomic_ref<int>(*address).exchange(value); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace mmvmamba {

using std::max;
using std::min;

struct DeviceLimits {
  int sm_count, shared_bytes_per_block;
};

// Asked anew each time: tests change the environment to reach every way of launching.
inline DeviceLimits device_limits() {
  return {static_cast<int>(emulator::environment_number("MMVMAMBA_EMULATED_SM_COUNT", 8)),
          static_cast<int>(emulator::environment_number("MMVMAMBA_EMULATED_SHARED_BYTES", 101376))};
}

// Rounded to 22 bits of mantissa, and subnormal numbers to zero: what the approximate instructions may do.
inline float approximate(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return x;
  if (magnitude < 0x00800000u) return std::bit_cast<float>(bits & 0x80000000u);
  return std::bit_cast<float>((bits + (bits >> 1 & 1)) & ~1u);
}

inline float flush(float x) { return std::abs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

// ex2.approx.ftz.f32
inline float exp2_approx(float x) { return approximate(exp2f(flush(x))); }
// rcp.approx.ftz.f32
inline float rcp_approx(float x) { return approximate(1.0f / flush(x)); }
// lg2.approx.ftz.f32: the error is absolute, 2^-22, near 1, and relative elsewhere.
inline float log2_approx(float x) {
  const float y = log2f(flush(x));
  return std::abs(y) <= 1.0f ? std::nearbyint(y * 4194304.0f) / 4194304.0f : approximate(y);
}
// min.NaN.f32 and max.NaN.f32
inline float min_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : fminf(a, b); }
inline float max_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : fmaxf(a, b); }

// cvt.rna.tf32.f32: to 10 bits of mantissa, to nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7fffffffu) >= 0x7f800000u ? (x != x ? 0x7fffffffu : bits) : (bits + 0x1000u) & 0xffffe000u;
}

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::current->mma = {c, a, b};
  emulator::meet(emulator::Op::kMma, emulator::kAllLanes, file, line);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x0400) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  // Subnormal results: the sum with 0.5, whose last bit is worth 2^-24, is rounded where it should be.
  if (magnitude < 0x38800000u)
    return static_cast<uint16_t>(sign |
                                 (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1)) >> 13);
}

inline float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Runs the kernel to its end.
template <typename... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t /*stream*/,
            const std::type_identity_t<Args>&... args) {
  using emulator::Schedule;
  emulator::check_launch(grid, block, shared_bytes, device_limits().shared_bytes_per_block);
  const auto body = [&] { kernel(args...); };
  const auto call = [](const void* closure) { (*static_cast<const decltype(body)*>(closure))(); };
  const Schedule schedule = Schedule::from_environment();
  const int64_t count = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const std::vector<int64_t> order = emulator::order_of_blocks(count, schedule);
  std::atomic<int64_t> taken = 0;
  const auto work = [&] {
    for (int64_t i = taken++; i < count; i = taken++) {
      const int64_t at = order[static_cast<size_t>(i)];
      const uint3 index{static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                        static_cast<unsigned>(at / grid.x / grid.y)};
      emulator::block_of_this_thread().run(index, block, grid, shared_bytes, schedule, call, &body);
    }
  };
  const int64_t threads = std::min<int64_t>(count, emulator::environment_number("MMVMAMBA_EMULATED_THREADS", 1));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace mmvmamba

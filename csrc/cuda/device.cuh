// The device as the kernels see it: element types, approximate functions, tensor-core products, launches.
//
// The kernels include nothing else, so that g++ can compile them for the emulator of ../check/cuda_emulator.hh and
// their numbers can be tested where there is no GPU.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef MMVMAMBA_EMULATE_CUDA
#include "../check/cuda_emulator.hh"
namespace mmvmamba {
inline int64_t multiply_add_wide(int a, int b, int64_t c) { return static_cast<int64_t>(a) * b + c; }
inline void store_global(int64_t address, float value) { *reinterpret_cast<float*>(address) = value; }
template <typename Object>
int64_t hidden(const Object* pointer) {
  return reinterpret_cast<int64_t>(pointer);
}
template <typename Object>
Object load_constant(int64_t address) {
  return *reinterpret_cast<const Object*>(address);
}
}  // namespace mmvmamba
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The dynamic shared memory of the block.
#define MMVMAMBA_SHARED(type, name) extern __shared__ __align__(16) type name[]

namespace mmvmamba {

// 2^x, relative error 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a b + c in one instruction, where the compiler would take it apart into the steps of an index.
__device__ __forceinline__ int64_t multiply_add_wide(int a, int b, int64_t c) {
  int64_t y;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(y) : "r"(a), "r"(b), "l"(c));
  return y;
}

// An address whose origin the compiler does not see, so that it stays in registers and is not computed again and again.
template <typename Object>
__device__ __forceinline__ int64_t hidden(const Object* pointer) {
  int64_t address = static_cast<int64_t>(__cvta_generic_to_global(pointer));
  asm("" : "+l"(address));
  return address;
}

// Read an object from global memory that nobody writes meanwhile.
template <typename Object>
__device__ __forceinline__ Object load_constant(int64_t address) {
  if constexpr (sizeof(Object) == 2) {
    uint16_t word;
    asm("ld.global.nc.b16 %0, [%1];" : "=h"(word) : "l"(address));
    return __builtin_bit_cast(Object, word);
  } else if constexpr (sizeof(Object) == 4) {
    uint32_t word;
    asm("ld.global.nc.b32 %0, [%1];" : "=r"(word) : "l"(address));
    return __builtin_bit_cast(Object, word);
  } else {
    static_assert(sizeof(Object) == 8);
    uint64_t word;
    asm("ld.global.nc.b64 %0, [%1];" : "=l"(word) : "l"(address));
    return __builtin_bit_cast(Object, word);
  }
}

__device__ __forceinline__ void store_global(int64_t address, float value) {
  asm volatile("st.global.f32 [%0], %1;" : : "l"(address), "f"(value) : "memory");
}

// The smaller one; NaN if one is NaN (fminf drops it).
__device__ __forceinline__ float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Rounded to the 11 bits that the tensor cores read.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// c += a b for a (16, 8), b (8, 8). With g = lane / 4 and t = lane % 4, a lane holds of a the elements (g, t),
// (g + 8, t), (g, t + 4), (g + 8, t + 4); of b (t, g), (t + 4, g); of c (g, 2 t), (g, 2 t + 1), (g + 8, 2 t),
// (g + 8, 2 t + 1).
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ float bfloat_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ uint16_t float_to_bfloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

template <typename... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Args&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
}

}  // namespace mmvmamba
#endif

namespace mmvmamba {

// Memory formats of 16 bits; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The part of a number that the tensor cores read, 11 bits; what is left is read as a second part. Rounded to nearest:
// what is left then has one bit less than if it were cut off, so that 23 bits are read of both and not 22.
__device__ __forceinline__ float first_part(float x) { return __uint_as_float(to_tf32(x)); }

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bfloat_to_float(x.bits); }
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {float_to_bfloat(x)};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {float_to_half(x)};
}

// V adjacent elements as they lie in memory, to be loaded at once and converted when they are used.
template <typename T, int V>
struct alignas(V * sizeof(T)) Packed {
  T element[V];
  __device__ __forceinline__ float operator[](int v) const { return to_float(element[v]); }
};

// A pair of bfloat16 in one register: each is one instruction away from being a float.
template <>
struct Packed<BFloat16, 2> {
  uint32_t word;
  __device__ __forceinline__ float operator[](int v) const {
    return __uint_as_float(v == 0 ? word << 16 : word & 0xffff0000u);
  }
};

template <typename T, int V>
__device__ __forceinline__ Packed<T, V> load_packed(const T* source, bool valid) {
  Packed<T, V> zero{};
  return valid ? *reinterpret_cast<const Packed<T, V>*>(source) : zero;
}

template <int V>
__device__ __forceinline__ void load_vector(const float* source, float (&value)[V]) {
  const Packed<float, V> packed = *reinterpret_cast<const Packed<float, V>*>(source);
#pragma unroll
  for (int v = 0; v < V; ++v) value[v] = packed[v];
}

template <int V>
__device__ __forceinline__ void store_vector(float* target, const float (&value)[V]) {
  Packed<float, V> packed;
#pragma unroll
  for (int v = 0; v < V; ++v) packed.element[v] = value[v];
  *reinterpret_cast<Packed<float, V>*>(target) = packed;
}

}  // namespace mmvmamba

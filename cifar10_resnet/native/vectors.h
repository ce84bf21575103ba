// Vectors of values that are computed as float, and stored as float or bfloat16.

#ifndef CIFAR10_RESNET_NATIVE_VECTORS_H_
#define CIFAR10_RESNET_NATIVE_VECTORS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "tensorflow/core/framework/op_kernel.h"

namespace {

using tensorflow::bfloat16;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::thread::ThreadPool;

constexpr int kWidth = 16;  // The compiler maps a vector to the registers that the processor has.
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <typename V, typename T>
inline V Read(const T* from) {
  V values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

template <typename V, typename T>
inline void Write(V values, T* to) {
  std::memcpy(to, &values, sizeof(values));
}

// This reads one value (V is float) or a vector, from float or bfloat16.
template <typename V, typename T>
inline V Load(const T* from) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*from);
  } else if constexpr (std::is_same_v<T, float>) {
    return Read<Floats>(from);
  } else {
    return (Floats)(__builtin_convertvector(Read<Halves>(from), Words) << 16);
  }
}

// These write values, and return them as they will be read again.
inline Floats Store(Floats values, float* to) {
  std::memcpy(to, &values, sizeof(values));
  return values;
}
inline float Store(float value, float* to) { return *to = value; }
inline float Store(float value, bfloat16* to) {
  return static_cast<float>(*to = static_cast<bfloat16>(value));
}
inline Floats Store(Floats values, bfloat16* to) {
#ifdef __AVX512BF16__
  const Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)values);
  std::memcpy(to, &halves, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
#else
  const Words bits = (Words)values;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = (values == values) ? rounded : (bits >> 16) | 64;  // NaN stays NaN.
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(to, &halves, sizeof(halves));
  return (Floats)(rounded << 16);
#endif
}

// Calls compute(i) for i from 0 to count - 1, in all threads.
template <typename F>
void InParallel(OpKernelContext* context, int64_t count, const F& compute) {
  ThreadPool* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
  const int64_t block = std::max<int64_t>(1, count / (4 * pool->NumThreads()));
  pool->ParallelFor(count, ThreadPool::SchedulingParams::Fixed(block),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) compute(i);
                    });
}

}  // namespace

#endif  // CIFAR10_RESNET_NATIVE_VECTORS_H_

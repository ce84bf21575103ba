// Batches of images, and how the threads share them.

#ifndef CIFAR10_RESNET_NATIVE_IMAGES_H_
#define CIFAR10_RESNET_NATIVE_IMAGES_H_

#include <vector>

#include "batch_norm.h"

namespace {

constexpr int kTaps = 9;    // of a 3x3 kernel
constexpr int kImages = 8;  // A thread takes a group of this many images at a time.

// Memory for values, all zero at first. A vector of them never crosses the lines of a cache.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_((size * sizeof(T) + sizeof(Floats) - 1) / sizeof(Floats)) {}
  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(memory_.data()); }

 private:
  std::vector<Floats> memory_;
};

// The shape of a batch of images.
struct Images {
  explicit Images(const Tensor& x)
      : count(x.dim_size(0)), height(x.dim_size(1)), width(x.dim_size(2)), depth(x.dim_size(3)) {}

  int64_t size() const { return height * width * depth; }  // of an image
  int64_t groups() const { return (count + kImages - 1) / kImages; }

  const int64_t count, height, width, depth;
};

// Calls compute(group, first image, one after the last) for each group of images, in all threads.
template <typename F>
void ForEachGroup(OpKernelContext* context, const Images& images, const F& compute) {
  InParallel(context, images.groups(), [&](int64_t group) {
    const int64_t first = group * kImages;
    compute(group, first, std::min(images.count, first + kImages));
  });
}

// Copies an image into the middle of a larger one, whose border of one pixel stays zero. If there is
// a norm, it copies the activation. 16 divides the depth.
template <typename T>
void CopyInside(const Images& images, const T* image, const Norm* norm, T* padded) {
  const int64_t depth = images.depth, row = images.width * depth;
  for (int64_t i = 0; i < images.height; ++i, image += row) {
    T* to = padded + (i + 1) * (row + 2 * depth) + depth;
    if (norm)
      for (int64_t p = 0; p < row; p += depth)
        for (int64_t c = 0; c < depth; c += kWidth)
          Store(norm->Activation(Load<Floats>(image + p + c), c), to + p + c);
    else
      std::memcpy(to, image, row * sizeof(T));
  }
}

// Writes the totals of the groups' values. The order of additions does not depend on the threads.
inline void AddGroups(OpKernelContext* context, const Images& images, const float* values,
                      Tensor* output) {
  float* totals = output->flat<float>().data();
  const int64_t size = output->NumElements(), part = size / kTaps;
  InParallel(context, kTaps, [&](int64_t tap) {
    float* total = totals + tap * part;
    std::fill_n(total, part, 0.0f);
    for (int64_t group = 0; group < images.groups(); ++group)
      for (int64_t i = 0; i < part; ++i) total[i] += values[group * size + tap * part + i];
  });
}

}  // namespace

#endif  // CIFAR10_RESNET_NATIVE_IMAGES_H_

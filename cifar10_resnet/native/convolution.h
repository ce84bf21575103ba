// 3x3 convolutions with a stride of 1 and as many channels out as in, and their gradients.

#ifndef CIFAR10_RESNET_NATIVE_CONVOLUTION_H_
#define CIFAR10_RESNET_NATIVE_CONVOLUTION_H_

#include <optional>

#include "amx.h"
#include "winograd.h"
#include "words.h"

namespace {

// A thread computes images with an object of one of these classes: WithTiles, WithWords, WithMatrices.
template <typename W>
struct Chosen {
  using Way = W;
};

// These call `compute` with the chosen class, or refuse the shape.
template <typename F>
void ChooseWay(OpKernelContext* context, const Images& images, float, const F& compute) {
  const bool fits = images.height % 2 == 0 && images.width % 2 == 0 &&
                    images.height * images.width % 64 == 0;
  OP_REQUIRES(context, fits && (images.depth == 16 || images.depth == 32 || images.depth == 64),
              absl::InvalidArgumentError("There is no kernel for this shape."));
  if (images.depth == 16) compute(Chosen<WithTiles<16>>());
  if (images.depth == 32) compute(Chosen<WithTiles<32>>());
  if (images.depth == 64) compute(Chosen<WithTiles<64>>());
}

#ifdef __AVX512BF16__
template <typename F>
void ChooseWay(OpKernelContext* context, const Images& images, bfloat16, const F& compute) {
  const int64_t width = images.width, depth = images.depth;
  OP_REQUIRES(context, width % 16 == 0 ? depth % 16 == 0 : width % 8 == 0 && depth % 32 == 0,
              absl::InvalidArgumentError("There is no kernel for this shape."));
#ifdef __AMX_BF16__
  if (HasMatrices()) return compute(Chosen<WithMatrices>());
#endif
  compute(Chosen<WithWords>());
}
#endif

// The batch norm and its ReLU that an operation computes before the convolution, or nothing.
class Before {
 public:
  Before(OpKernelContext* context, int first, const Tensor& x, bool relu) {
    if (first < context->num_inputs()) norm_.emplace(context, first, Lines(x), relu, memory_);
  }
  const Norm* norm() const { return norm_ ? &*norm_ : nullptr; }

 private:
  std::vector<float> memory_;
  std::optional<Norm> norm_;
};

template <typename T>
class Convolution3x3 : public ReluKernel {
 public:
  using ReluKernel::ReluKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor &input = context->input(0), &kernel = context->input(1);
    const Images images(input);
    OP_REQUIRES(context, kernel.NumElements() == kTaps * images.depth * images.depth,
                absl::InvalidArgumentError("The kernel does not fit the images."));
    const Before before(context, 2, input, relu_);
    if (!context->status().ok()) return;
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, input.shape(), &output));
    const T* x = input.flat<T>().data();
    T* y = output->flat<T>().data();

    ChooseWay(context, images, T(), [&](auto chosen) {
      using Way = typename decltype(chosen)::Way;
      const auto packed = Way::Pack(kernel.flat<float>().data(), images.depth, false);
      ForEachGroup(context, images, [&](int64_t, int64_t first, int64_t last) {
        Way way(images, false);
        for (int64_t i = first * images.size(); i < last * images.size(); i += images.size())
          way.Convolve(x + i, before.norm(), packed, y + i);
      });
    });
  }
};

template <typename T>
class Convolution3x3Grad : public ReluKernel {
 public:
  using ReluKernel::ReluKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor &input = context->input(0), &kernel = context->input(1);
    const Images images(input);
    const int64_t size = kTaps * images.depth * images.depth;
    OP_REQUIRES(context,
                kernel.NumElements() == size && context->input(2).shape() == input.shape(),
                absl::InvalidArgumentError("The kernel or the gradient does not fit the images."));
    const Before before(context, 3, input, relu_);
    if (!context->status().ok()) return;
    Tensor *for_x, *for_kernel, groups;
    OP_REQUIRES_OK(context, context->allocate_output(0, input.shape(), &for_x));
    OP_REQUIRES_OK(context, context->allocate_output(1, kernel.shape(), &for_kernel));
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_FLOAT,
                                                   {images.groups(), size}, &groups));
    const T* x = input.flat<T>().data();
    const T* upstream = context->input(2).flat<T>().data();
    T* to = for_x->flat<T>().data();
    float* of_groups = groups.flat<float>().data();

    ChooseWay(context, images, T(), [&](auto chosen) {
      using Way = typename decltype(chosen)::Way;
      const auto turned = Way::Pack(kernel.flat<float>().data(), images.depth, true);
      ForEachGroup(context, images, [&](int64_t group, int64_t first, int64_t last) {
        Way way(images, true);
        for (int64_t i = first * images.size(); i < last * images.size(); i += images.size())
          way.Differentiate(x + i, before.norm(), upstream + i, turned, to + i);
        way.WriteForKernel(of_groups + group * size);
      });
      AddGroups(context, images, of_groups, for_kernel);
    });
  }
};

}  // namespace

#endif  // CIFAR10_RESNET_NATIVE_CONVOLUTION_H_

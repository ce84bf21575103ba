// 3x3 convolutions in bfloat16 with a stride of 1 and as many channels out as in, and their gradients.
//
// They are for processors that multiply pairs of bfloat16 (AVX-512 BF16) but no matrices (AMX).
// There, they take 0.65 to 0.95 of the time of oneDNN's.
//
// A word is a pair of bfloat16. An instruction adds the products of one word with 16 others to 16
// sums: from two input channels to 16 output channels or, in the kernel's gradient, from two pixels.

#ifndef CIFAR10_RESNET_NATIVE_CONVOLUTION_H_
#define CIFAR10_RESNET_NATIVE_CONVOLUTION_H_

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define HAS_CONVOLUTION

#include "images.h"

namespace {

// Returns a word with two channels or pixels.
inline uint32_t Pair(bfloat16 low, bfloat16 high) {
  return Read<uint16_t>(&low) | uint32_t{Read<uint16_t>(&high)} << 16;
}

// Returns the sums, plus the products of one word with each of 16.
inline Floats MultiplyAdd(Floats sums, uint32_t one, Words words) {
  const __m512i same = _mm512_set1_epi32(one);
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)same, (__m512bh)words);
}

// --- The convolution -----------------------------------------------------------------------------

// Returns the kernel as words: [tap, channels in / 2, channels out]. With `turned`, it is the
// kernel that leads from the gradient of the output to the gradient of the input.
Buffer<uint32_t> PackKernel(const float* kernel, int64_t depth, bool turned) {
  Buffer<uint32_t> packed(kTaps * depth * depth / 2);
  uint32_t* word = packed.data();
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const float* from = kernel + (turned ? kTaps - 1 - tap : tap) * depth * depth;
    const int64_t in = turned ? 1 : depth, out = turned ? depth : 1;
    for (int64_t i = 0; i < depth; i += 2) {
      for (int64_t o = 0; o < depth; ++o, ++word) {
        const float* first = from + i * in + o * out;
        *word = Pair(static_cast<bfloat16>(first[0]), static_cast<bfloat16>(first[in]));
      }
    }
  }
  return packed;
}

// Computes kPixels pixels of a row, for kOut * 16 of its channels.
template <int kPixels, int kOut>
void ConvolvePixels(const uint32_t* padded, const uint32_t* kernel, int64_t row_words,
                    int64_t depth, bfloat16* y) {
  const int64_t words = depth / 2;
  Floats sums[kPixels][kOut] = {};
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const uint32_t* x = padded + tap / 3 * row_words + tap % 3 * words;
    for (int64_t i = 0; i < words; ++i, kernel += depth) {
      Words weights[kOut];
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) weights[o] = Read<Words>(kernel + o * kWidth);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
        for (int o = 0; o < kOut; ++o)
          sums[p][o] = MultiplyAdd(sums[p][o], x[p * words + i], weights[o]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) Store(sums[p][o], y + p * depth + o * kWidth);
}

// Computes the rows of one image. kPixels divides the width, and 16 * kOut divides the depth.
template <int kPixels, int kOut>
void ConvolveImage(const Images& images, const uint32_t* padded, const uint32_t* kernel,
                   bfloat16* y) {
  const int64_t words = images.depth / 2, row_words = (images.width + 2) * words;
  for (int64_t out = 0; out < images.depth; out += kOut * kWidth)
    for (int64_t row = 0; row < images.height; ++row)
      for (int64_t pixel = 0; pixel < images.width; pixel += kPixels)
        ConvolvePixels<kPixels, kOut>(padded + row * row_words + pixel * words, kernel + out,
                                      row_words, images.depth,
                                      y + (row * images.width + pixel) * images.depth + out);
}

class Convolution3x3 : public OpKernel {
 public:
  explicit Convolution3x3(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("turned", &turned_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const Images images(input);
    const int64_t depth = images.depth, width = images.width;
    OP_REQUIRES(context, context->input(1).NumElements() == kTaps * depth * depth,
                absl::InvalidArgumentError("The kernel does not fit the images."));
    OP_REQUIRES(context, width % 16 == 0 ? depth % 16 == 0 : width % 8 == 0 && depth % 32 == 0,
                absl::InvalidArgumentError("There is no kernel for this shape."));
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, input.shape(), &output));
    const bfloat16* x = input.flat<bfloat16>().data();
    bfloat16* y = output->flat<bfloat16>().data();
    const auto kernel = PackKernel(context->input(1).flat<float>().data(), depth, turned_);

    ForEachGroup(context, images, [&](int64_t, int64_t first, int64_t last) {
      Buffer<uint32_t> memory((images.height + 2) * (width + 2) * depth / 2);
      for (int64_t n = first; n < last; ++n) {
        CopyInside(images, x + n * images.size(), reinterpret_cast<bfloat16*>(memory.data()));
        bfloat16* result = y + n * images.size();
        if (depth % 32 == 0)
          ConvolveImage<8, 2>(images, memory.data(), kernel.data(), result);
        else
          ConvolveImage<16, 1>(images, memory.data(), kernel.data(), result);
      }
    });
  }

 private:
  bool turned_;
};

// --- The gradient of the kernel ------------------------------------------------------------------

// An image and the gradient of its output, in words of two pixels of a row. In `x`, which has a border
// of zeros, a word starts at each pixel. In `gradient`, a word starts at every other pixel.
struct PixelWords {
  explicit PixelWords(const Images& images)
      : images(images),
        zeros(images.depth),
        x((images.height + 2) * (images.width + 2) * images.depth),
        gradient(images.size() / 2) {}

  void Fill(const bfloat16* image, const bfloat16* upstream) {
    const int64_t width = images.width, depth = images.depth, row = width * depth;
    for (int64_t i = 0; i < images.height; ++i, image += row, upstream += row) {
      uint32_t* to = x.data() + (i + 1) * (width + 2) * depth;
      Interleave(zeros.data(), image, depth, to);
      for (int64_t p = depth; p < row; p += depth)
        Interleave(image + p - depth, image + p, depth, to + p);
      Interleave(image + row - depth, zeros.data(), depth, to + row);
      for (int64_t p = 0; p < row; p += 2 * depth)
        Interleave(upstream + p, upstream + p + depth, depth, gradient.data() + (i * row + p) / 2);
    }
  }

  static void Interleave(const bfloat16* low, const bfloat16* high, int64_t depth, uint32_t* to) {
    for (int64_t c = 0; c < depth; c += kWidth) {
      const Words words = __builtin_convertvector(Read<Halves>(low + c), Words) |
                          __builtin_convertvector(Read<Halves>(high + c), Words) << 16;
      std::memcpy(to + c, &words, sizeof(words));
    }
  }

  const Images images;
  const Buffer<bfloat16> zeros;
  Buffer<uint32_t> x, gradient;
};

// Adds the products of some rows to kIn * kOut * 16 values of the kernel's gradient.
template <int kIn, int kOut>
void AddProducts(const PixelWords& words, int64_t first_row, int64_t last_row, int64_t tap,
                 int64_t in, int64_t out, float* gradient) {
  const int64_t width = words.images.width, depth = words.images.depth;
  gradient += (tap * depth + in) * depth + out;
  Floats sums[kIn][kOut];
#pragma GCC unroll 16
  for (int i = 0; i < kIn; ++i)
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) sums[i][o] = Read<Floats>(gradient + i * depth + o * kWidth);
  for (int64_t row = first_row; row < last_row; ++row) {
    const uint32_t* x = words.x.data() + ((row + tap / 3) * (width + 2) + tap % 3) * depth + in;
    const uint32_t* upstream = words.gradient.data() + row * width / 2 * depth + out;
    for (int64_t p = 0; p < width; p += 2, upstream += depth, x += 2 * depth) {
      Words factors[kOut];
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) factors[o] = Read<Words>(upstream + o * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kIn; ++i)
#pragma GCC unroll 4
        for (int o = 0; o < kOut; ++o) sums[i][o] = MultiplyAdd(sums[i][o], x[i], factors[o]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kIn; ++i)
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) Store(sums[i][o], gradient + i * depth + o * kWidth);
}

// Adds the products of an image. 16 * kOut divides the depth, and so does kIn.
template <int kIn, int kOut>
void AddImage(const PixelWords& words, float* gradient) {
  constexpr int64_t kRows = 8;  // They stay in the processor's first cache for all taps.
  const int64_t height = words.images.height, depth = words.images.depth;
  for (int64_t row = 0; row < height; row += kRows)
    for (int64_t tap = 0; tap < kTaps; ++tap)
      for (int64_t in = 0; in < depth; in += kIn)
        for (int64_t out = 0; out < depth; out += kOut * kWidth)
          AddProducts<kIn, kOut>(words, row, std::min(row + kRows, height), tap, in, out,
                                 gradient);
}

class Convolution3x3KernelGrad : public OpKernel {
 public:
  explicit Convolution3x3KernelGrad(OpKernelConstruction* context) : OpKernel(context) {}

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const Images images(input);
    const int64_t depth = images.depth, size = kTaps * depth * depth;
    OP_REQUIRES(context,
                context->input(1).shape() == input.shape() && depth % 16 == 0 &&
                    images.width % 2 == 0,
                absl::InvalidArgumentError("There is no kernel for these shapes."));
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, {3, 3, depth, depth}, &output));
    const bfloat16* x = input.flat<bfloat16>().data();
    const bfloat16* upstream = context->input(1).flat<bfloat16>().data();

    std::vector<float> sums(images.groups() * size);
    ForEachGroup(context, images, [&](int64_t group, int64_t first, int64_t last) {
      PixelWords words(images);
      float* gradient = sums.data() + group * size;
      for (int64_t n = first; n < last; ++n) {
        words.Fill(x + n * images.size(), upstream + n * images.size());
        if (depth % 32 == 0)
          AddImage<8, 2>(words, gradient);
        else
          AddImage<16, 1>(words, gradient);
      }
    });
    AddGroups(images, sums, output);
  }
};

}  // namespace

#endif  // HAS_CONVOLUTION
#endif  // CIFAR10_RESNET_NATIVE_CONVOLUTION_H_

// 3x3 convolutions of bfloat16 images, and their gradients, on processors that multiply pairs of
// bfloat16 (AVX-512 BF16).
//
// A word is a pair of bfloat16. An instruction adds the products of one word with 16 others to 16
// sums: from two input channels to 16 output channels or, in the kernel's gradient, from two pixels.

#ifndef CIFAR10_RESNET_NATIVE_WORDS_H_
#define CIFAR10_RESNET_NATIVE_WORDS_H_

#ifdef __AVX512BF16__

#include "images.h"

namespace {

// Returns 16 words, each of two values.
inline Words Interleave(Halves low, Halves high) {
  return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}

// Writes a word for each channel of two pixels.
inline void InterleavePixels(const bfloat16* low, const bfloat16* high, int64_t depth,
                             uint32_t* to) {
  for (int64_t c = 0; c < depth; c += kWidth)
    Write(Interleave(Read<Halves>(low + c), Read<Halves>(high + c)), to + c);
}

// Writes words of two pixels of a padded image. One starts at each pixel of the image's rows.
inline void InterleaveImage(const Images& images, const bfloat16* padded, uint32_t* words) {
  const int64_t depth = images.depth, row = (images.width + 2) * depth;
  for (int64_t p = row; p < (images.height + 1) * row; p += depth)
    InterleavePixels(padded + p, padded + p + depth, depth, words + p);
}

// Returns the sums, plus the products of one word with each of 16.
inline Floats MultiplyAdd(Floats sums, uint32_t one, Words words) {
  const __m512i same = _mm512_set1_epi32(one);
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)same, (__m512bh)words);
}

// --- The convolution -----------------------------------------------------------------------------

// Returns the kernel as words, for one or two pixels of the output: [row of the kernel, values in a
// row that lead to them / 2, values out]. With `turned`, it is the kernel that leads from the
// gradient of the output to the gradient of the input.
Buffer<uint32_t> PackKernel(const float* kernel, int64_t depth, bool turned, int64_t pixels = 1) {
  const int64_t matrix = depth * depth, columns = pixels * depth;
  Buffer<bfloat16> rounded(kTaps * matrix);
  for (int64_t i = 0; i < kTaps * matrix; i += kWidth)
    Store(Read<Floats>(kernel + i), rounded.data() + i);

  Buffer<uint32_t> packed(3 * (2 + pixels) * depth / 2 * columns);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const bfloat16* from = rounded.data() + (turned ? kTaps - 1 - tap : tap) * matrix;
      const int64_t row = tap / 3 * (2 + pixels) + tap % 3 + pixel;
      uint32_t* to = packed.data() + row * depth / 2 * columns + pixel * depth;
      for (int64_t i = 0; i < depth; i += 2, to += columns) {
        if (turned)
          for (int64_t o = 0; o < depth; ++o) to[o] = Read<uint32_t>(from + o * depth + i);
        else
          InterleavePixels(from + i * depth, from + (i + 1) * depth, depth, to);
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

// --- The gradient of the kernel ------------------------------------------------------------------

// A padded image and the gradient of its output, in words of two pixels of a row. In `x`, a word
// starts at each pixel. In `gradient`, a word starts at every other pixel.
struct PixelWords {
  PixelWords(const Images& images, bool for_gradients)
      : images(images),
        x(for_gradients * (images.height + 2) * (images.width + 2) * images.depth),
        gradient(for_gradients * images.size() / 2) {}

  void Fill(const bfloat16* padded, const bfloat16* upstream) {
    const int64_t depth = images.depth;
    InterleaveImage(images, padded, x.data());
    for (int64_t p = 0; p < images.size(); p += 2 * depth)
      InterleavePixels(upstream + p, upstream + p + depth, depth, gradient.data() + p / 2);
  }

  const Images images;
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

// The memory of a thread that computes images.
class WithWords {
 public:
  WithWords(const Images& images, bool for_gradients)
      : images_(images),
        padded_((images.height + 2) * (images.width + 2) * images.depth),
        words_(images, for_gradients),
        sums_(for_gradients * kTaps * images.depth * images.depth) {}

  static Buffer<uint32_t> Pack(const float* kernel, int64_t depth, bool turned) {
    return PackKernel(kernel, depth, turned);
  }

  void Convolve(const bfloat16* x, const Norm* norm, const Buffer<uint32_t>& kernel, bfloat16* y) {
    CopyInside(images_, x, norm, padded_.data());
    const uint32_t* from = reinterpret_cast<const uint32_t*>(padded_.data());
    if (images_.depth % 32 == 0)
      ConvolveImage<8, 2>(images_, from, kernel.data(), y);
    else
      ConvolveImage<16, 1>(images_, from, kernel.data(), y);
  }

  // Computes the gradient of the image, and adds to the gradient of the kernel.
  void Differentiate(const bfloat16* x, const Norm* norm, const bfloat16* upstream,
                     const Buffer<uint32_t>& turned, bfloat16* for_x) {
    Convolve(upstream, nullptr, turned, for_x);
    CopyInside(images_, x, norm, padded_.data());
    words_.Fill(padded_.data(), upstream);
    if (images_.depth % 32 == 0)
      AddImage<8, 2>(words_, sums_.data());
    else
      AddImage<16, 1>(words_, sums_.data());
  }

  void WriteForKernel(float* to) const {
    std::copy_n(sums_.data(), kTaps * images_.depth * images_.depth, to);
  }

 private:
  const Images images_;
  Buffer<bfloat16> padded_;
  PixelWords words_;
  Buffer<float> sums_;
};

}  // namespace

#endif  // __AVX512BF16__
#endif  // CIFAR10_RESNET_NATIVE_WORDS_H_

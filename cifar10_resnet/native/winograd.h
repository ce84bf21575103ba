// 3x3 convolutions in float with a stride of 1 and as many channels out as in, and their gradients.
//
// They are Winograd's minimal filtering (Lavin and Gray, 2015): 16 multiplications give 2x2 pixels
// of the output, where the definition takes 36. A tile is the 4x4 pixels of the input that lead to
// 2x2 pixels of the output. For each channel, additions turn a tile into 16 other numbers, one at
// each place. At each place, the kernel is a matrix from channels to channels. More additions turn
// the products into the pixels of the output. The gradients are the same steps, transposed.

#ifndef CIFAR10_RESNET_NATIVE_WINOGRAD_H_
#define CIFAR10_RESNET_NATIVE_WINOGRAD_H_

#include "images.h"

namespace {

constexpr int kPlaces = 16;

// The vectors are registers, because GCC keeps arrays of larger ones in memory. A product of matrices
// keeps kRows rows and kColumns vectors of columns in them.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kColumns = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4, kColumns = 2;
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 2;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

// --- The transformations -------------------------------------------------------------------------

// Computes the rows (or columns) of a tile of the input from its four rows (or columns).
inline void FilterInput(const Lanes (&d)[4], Lanes (&to)[4]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// Transforms one tile of the input. The pixels of a tile's next row are `row` values further on.
template <int64_t kDepth>
void TransformInput(const float* x, int64_t row, float* to, int64_t place) {
  for (int64_t c = 0; c < kDepth; c += kLanes) {
    Lanes half[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Lanes column[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) column[i] = Read<Lanes>(x + i * row + j * kDepth + c);
      FilterInput(column, half[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Lanes filtered[4];
      FilterInput({half[0][i], half[1][i], half[2][i], half[3][i]}, filtered);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) Write(filtered[j], to + (4 * i + j) * place + c);
    }
  }
}

// Transforms products back into the 2x2 pixels of a tile of the output.
template <int64_t kDepth>
void TransformOutput(const float* products, int64_t place, float* y, int64_t row) {
  for (int64_t c = 0; c < kDepth; c += kLanes) {
    Lanes half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Lanes m[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) m[i] = Read<Lanes>(products + (4 * i + j) * place + c);
      half[0][j] = m[0] + m[1] + m[2];
      half[1][j] = m[1] - m[2] - m[3];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Write(half[i][0] + half[i][1] + half[i][2], y + i * row + c);
      Write(half[i][1] - half[i][2] - half[i][3], y + i * row + kDepth + c);
    }
  }
}

// Transforms the gradient of 2x2 pixels of the output into the gradient of the products.
template <int64_t kDepth>
void TransformGradient(const float* gradient, int64_t row, float* to, int64_t place) {
  for (int64_t c = 0; c < kDepth; c += kLanes) {
    Lanes half[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Lanes first = Read<Lanes>(gradient + j * kDepth + c);
      const Lanes second = Read<Lanes>(gradient + row + j * kDepth + c);
      half[0][j] = first;
      half[1][j] = first + second;
      half[2][j] = first - second;
      half[3][j] = -second;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* at = to + 4 * i * place + c;
      Write(half[i][0], at);
      Write(half[i][0] + half[i][1], at + place);
      Write(half[i][0] - half[i][1], at + 2 * place);
      Write(-half[i][1], at + 3 * place);
    }
  }
}

// Returns the kernel's matrix at each place: [place, channels in, channels out]. With `turned`, it
// is the kernel that leads from the gradient of the output to the gradient of the input.
template <int64_t kDepth>
Buffer<float> TransformKernel(const float* kernel, bool turned) {
  constexpr int64_t kMatrix = kDepth * kDepth;
  Buffer<float> places(kPlaces * kMatrix);
  for (int64_t from = 0; from < kMatrix; from += kLanes) {
    const int64_t in = from / kDepth, out = from % kDepth;
    Lanes taps[3][3], half[4][3];
    for (int i = 0; i < kTaps; ++i) {
      if (!turned) {
        taps[i / 3][i % 3] = Read<Lanes>(kernel + i * kMatrix + from);
      } else {
        const float* tap = kernel + (kTaps - 1 - i) * kMatrix + in;
        for (int o = 0; o < kLanes; ++o) taps[i / 3][i % 3][o] = tap[(out + o) * kDepth];
      }
    }
    for (int j = 0; j < 3; ++j) {
      half[0][j] = taps[0][j];
      half[1][j] = (taps[0][j] + taps[1][j] + taps[2][j]) / 2;
      half[2][j] = (taps[0][j] - taps[1][j] + taps[2][j]) / 2;
      half[3][j] = taps[2][j];
    }
    for (int i = 0; i < 4; ++i) {
      float* at = places.data() + 4 * i * kMatrix + from;
      Write(half[i][0], at);
      Write((half[i][0] + half[i][1] + half[i][2]) / 2, at + kMatrix);
      Write((half[i][0] - half[i][1] + half[i][2]) / 2, at + 2 * kMatrix);
      Write(half[i][2], at + 3 * kMatrix);
    }
  }
  return places;
}

// Transforms the gradient of the kernel's matrices into the gradient of the kernel.
template <int64_t kDepth>
void TransformKernelGradient(const float* places, float* gradient) {
  constexpr int64_t kMatrix = kDepth * kDepth;
  for (int64_t at = 0; at < kMatrix; at += kLanes) {
    Lanes half[3][4];
    for (int j = 0; j < 4; ++j) {
      Lanes m[4];
      for (int i = 0; i < 4; ++i) m[i] = Read<Lanes>(places + (4 * i + j) * kMatrix + at);
      half[0][j] = m[0] + (m[1] + m[2]) / 2;
      half[1][j] = (m[1] - m[2]) / 2;
      half[2][j] = (m[1] + m[2]) / 2 + m[3];
    }
    for (int i = 0; i < 3; ++i) {
      float* to = gradient + 3 * i * kMatrix + at;
      Write(half[i][0] + (half[i][1] + half[i][2]) / 2, to);
      Write((half[i][1] - half[i][2]) / 2, to + kMatrix);
      Write((half[i][1] + half[i][2]) / 2 + half[i][3], to + 2 * kMatrix);
    }
  }
}

// --- The products of matrices --------------------------------------------------------------------

// Writes the products of kRows tiles with a matrix, for kOut vectors of its columns.
template <int64_t kDepth, int kOut>
void Multiply(const float* tiles, const float* matrix, float* products) {
  Lanes sums[kRows][kOut] = {};
  for (int64_t c = 0; c < kDepth; ++c) {
    Lanes row[kOut];
#pragma GCC unroll 2
    for (int o = 0; o < kOut; ++o) row[o] = Read<Lanes>(matrix + c * kDepth + o * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
      for (int o = 0; o < kOut; ++o) sums[t][o] += tiles[t * kDepth + c] * row[o];
  }
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
    for (int o = 0; o < kOut; ++o) Write(sums[t][o], products + t * kDepth + o * kLanes);
}

// Adds the products of kTiles tiles with the gradients of theirs, for kRows rows of a matrix and
// kOut vectors of its columns.
template <int64_t kDepth, int kOut, int kTiles>
void AddProducts(const float* tiles, const float* gradients, float* matrix) {
  Lanes sums[kRows][kOut];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int o = 0; o < kOut; ++o) sums[i][o] = Read<Lanes>(matrix + i * kDepth + o * kLanes);
  for (int64_t t = 0; t < kTiles * kDepth; t += kDepth) {
    Lanes row[kOut];
#pragma GCC unroll 2
    for (int o = 0; o < kOut; ++o) row[o] = Read<Lanes>(gradients + t + o * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int o = 0; o < kOut; ++o) sums[i][o] += tiles[t + i] * row[o];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int o = 0; o < kOut; ++o) Write(sums[i][o], matrix + i * kDepth + o * kLanes);
}

// --- The operations ------------------------------------------------------------------------------

// The memory of a thread that computes images of kDepth channels.
template <int64_t kDepth>
class WithTiles {
 public:
  WithTiles(const Images& images, bool for_gradients)
      : images_(images),
        across_(images.width / 2),
        row_(images.width * kDepth),
        padded_row_(row_ + 2 * kDepth),
        padded_((images.height + 2) * padded_row_),
        tiles_(kPlaces * kPlace),
        products_(kPlaces * kPlace),
        matrices_(for_gradients * kPlaces * kMatrix) {}

  static Buffer<float> Pack(const float* kernel, int64_t, bool turned) {
    return TransformKernel<kDepth>(kernel, turned);
  }

  void Convolve(const float* x, const Norm* norm, const Buffer<float>& kernel, float* y) {
    CopyInside(images_, x, norm, padded_.data());
    for (int64_t first = 0; first < count(); first += kTiles) {
      Transform(first);
      for (int64_t p = 0; p < kPlaces; ++p)
        for (int64_t t = 0; t < kTiles; t += kRows)
          for (int64_t out = 0; out < kDepth; out += kOut * kLanes)
            Multiply<kDepth, kOut>(tiles_.data() + p * kPlace + t * kDepth,
                                   kernel.data() + p * kMatrix + out,
                                   products_.data() + p * kPlace + t * kDepth + out);
      ForEach(first, row_, [&](int64_t tile, int64_t pixel) {
        TransformOutput<kDepth>(products_.data() + tile, kPlace, y + pixel, row_);
      });
    }
  }

  // Computes the gradient of the image, and adds to the gradient of the kernel.
  void Differentiate(const float* x, const Norm* norm, const float* upstream,
                     const Buffer<float>& turned, float* for_x) {
    Convolve(upstream, nullptr, turned, for_x);
    CopyInside(images_, x, norm, padded_.data());
    for (int64_t first = 0; first < count(); first += kTiles) {
      Transform(first);
      ForEach(first, row_, [&](int64_t tile, int64_t pixel) {
        TransformGradient<kDepth>(upstream + pixel, row_, products_.data() + tile, kPlace);
      });
      for (int64_t p = 0; p < kPlaces; ++p)
        for (int64_t in = 0; in < kDepth; in += kRows)
          for (int64_t out = 0; out < kDepth; out += kOut * kLanes)
            AddProducts<kDepth, kOut, kTiles>(tiles_.data() + p * kPlace + in,
                                              products_.data() + p * kPlace + out,
                                              matrices_.data() + p * kMatrix + in * kDepth + out);
    }
  }

  void WriteForKernel(float* to) const { TransformKernelGradient<kDepth>(matrices_.data(), to); }

 private:
  static constexpr int64_t kMatrix = kDepth * kDepth;
  static constexpr int kOut = kDepth % (kColumns * kLanes) ? 1 : kColumns;
  static constexpr int kTiles = kDepth == 16 ? 8 : 16;  // They stay in the first cache.
  // The places do not start at the same distance from the lines of the cache.
  static constexpr int64_t kPlace = kTiles * kDepth + 16;

  int64_t count() const { return images_.height / 2 * across_; }

  // Calls compute(tile's place in the batch of tiles, the first of its pixels in an image).
  template <typename F>
  void ForEach(int64_t first, int64_t row_length, const F& compute) const {
    for (int t = 0; t < kTiles; ++t)
      compute(t * kDepth,
              (first + t) / across_ * 2 * row_length + (first + t) % across_ * 2 * kDepth);
  }

  void Transform(int64_t first) {
    ForEach(first, padded_row_, [&](int64_t tile, int64_t pixel) {
      TransformInput<kDepth>(padded_.data() + pixel, padded_row_, tiles_.data() + tile, kPlace);
    });
  }

  const Images images_;
  const int64_t across_, row_, padded_row_;
  Buffer<float> padded_, tiles_, products_, matrices_;
};

}  // namespace

#endif  // CIFAR10_RESNET_NATIVE_WINOGRAD_H_

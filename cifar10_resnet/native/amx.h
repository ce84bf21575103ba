// 3x3 convolutions of bfloat16 images, and their gradients, on processors that multiply matrices
// (AMX).
//
// A register has a matrix: 16 rows of 64 bytes. An instruction multiplies a matrix of 16x32 bfloat16
// with one of 32x16, and adds the product to 16x16 sums. The second matrix consists of words: two of
// its rows are one row of the register. Rows that cross the lines of the cache take six times as
// long to load, so all rows start at a line.

#ifndef CIFAR10_RESNET_NATIVE_AMX_H_
#define CIFAR10_RESNET_NATIVE_AMX_H_

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "words.h"

namespace {

constexpr int kSide = 16;  // the rows of a matrix, and its words in a row

// The shapes of the eight matrices, as the processor reads them: all of them as large as can be.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};

// Lets this thread use matrices, and leaves their shapes as they were. oneDNN uses them, too.
class UseMatrices {
 public:
  UseMatrices() {
    const Shapes shapes;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~UseMatrices() { asm volatile("ldtilecfg %0" : : "m"(before_)); }

 private:
  Shapes before_;
};

// Returns whether Linux lets this process use matrices. It wants to be asked.
bool HasMatrices() {
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return has;
}

// An instruction names its registers, so that the number of a matrix is a constant.
template <int kNumber>
void Clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kNumber));
}
template <int kNumber>
void Load(const void* from, int64_t row) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(from), "r"(row * 4), "i"(kNumber) : "memory");
}
template <int kNumber>
void Save(void* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(to), "r"(row * 4), "i"(kNumber) : "memory");
}
template <int kSums, int kOne, int kOther>
void AddProduct() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kOne), "i"(kOther));
}

template <typename F, int... kNumber>
inline void ForEach(std::integer_sequence<int, kNumber...>, const F& compute) {
  (compute(std::integral_constant<int, kNumber>()), ...);
}

// Calls compute(0), compute(1) and so on. The types of the numbers are constants.
template <int kCount, typename F>
inline void Repeat(const F& compute) {
  ForEach(std::make_integer_sequence<int, kCount>(), compute);
}

// Some matrices in memory: the first words of each, from row to row, and on to the next ones.
template <int kCount>
struct Matrices {
  const uint32_t* first[kCount];
  int64_t row, step;
};

// Adds the products of each of kRows matrices with each of kColumns others, and of the next ones.
// The sums are in the first kRows * kColumns registers.
template <int kRows, int kColumns>
inline void AddProducts(int64_t steps, const Matrices<kRows>& ones,
                        const Matrices<kColumns>& others) {
  constexpr int kOnes = kRows * kColumns, kOthers = kOnes + kRows;
  static_assert(kOthers + kColumns <= 8);
  for (int64_t step = 0; step < steps; ++step) {
    Repeat<kRows>([&](auto r) {
      Load<kOnes + decltype(r)::value>(ones.first[r] + step * ones.step, ones.row);
    });
    Repeat<kColumns>([&](auto c) {
      Load<kOthers + decltype(c)::value>(others.first[c] + step * others.step, others.row);
    });
    Repeat<kRows * kColumns>([&](auto i) {
      constexpr int kSum = decltype(i)::value;
      AddProduct<kSum, kOnes + kSum / kColumns, kOthers + kSum % kColumns>();
    });
  }
}

// Exchanges rows and columns.
inline void Transpose(Words (&rows)[kSide]) {
#pragma GCC unroll 4
  for (int size = 1; size < kSide; size *= 2) {
    Words low, high;
    for (int i = 0; i < kSide; ++i) {
      low[i] = i & size ? kSide + i - size : i;
      high[i] = i & size ? kSide + i : i + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      if (i & size) continue;
      const __m512i one = (__m512i)rows[i], other = (__m512i)rows[i + size];
      rows[i] = (Words)_mm512_permutex2var_epi32(one, (__m512i)low, other);
      rows[i + size] = (Words)_mm512_permutex2var_epi32(one, (__m512i)high, other);
    }
  }
}

// The memory of a thread that computes images. The matrices have the pixels of a padded image in
// sequence, so that those of the border are computed, too.
class WithMatrices {
 public:
  WithMatrices(const Images& images, bool for_gradients)
      : images_(images),
        depth_(images.depth),
        width_(images.width + 2),
        steps_((images.height * width_ + 2 * kSide - 1) / (2 * kSide)),
        padded_(((images.height + 2) * width_ + kBeyond) * depth_),
        pixels_(for_gradients * (2 * kSide * steps_ + 2 * width_ + 2) * depth_),
        channels_(for_gradients * steps_ * kSide * depth_),
        sums_(for_gradients * kTaps * depth_ * depth_) {}

  // A row of a matrix has 32 channels. Two pixels of 16 are like one of 32.
  static int64_t PixelsAtOnce(int64_t depth) { return depth % 32 ? 2 : 1; }

  static Buffer<uint32_t> Pack(const float* kernel, int64_t depth, bool turned) {
    return PackKernel(kernel, depth, turned, PixelsAtOnce(depth));
  }

  void Convolve(const bfloat16* x, const Norm* norm, const Buffer<uint32_t>& kernel, bfloat16* y) {
    CopyInside(images_, x, norm, padded_.data());
    const int64_t at_once = PixelsAtOnce(depth_), depth = at_once * depth_;
    const int64_t words = depth / 2, width = width_ / at_once, inside = images_.width / at_once;
    const int64_t steps = (at_once + 2) * depth_ / (2 * kSide);  // in a row of the kernel
    const uint32_t* padded = reinterpret_cast<const uint32_t*>(padded_.data());
    for (int64_t out = 0; out < depth; out += 2 * kSide) {
      int64_t row = 0, column = 0;
      for (int64_t first = 0; first < images_.height * width; first += 2 * kSide) {
        Repeat<4>([](auto i) { Clear<decltype(i)::value>(); });
        for (int64_t i = 0; i < 3; ++i) {
          const uint32_t* from = padded + (first + i * width) * words;
          const uint32_t* of_row = kernel.data() + i * steps * kSide * depth + out;
          AddProducts<2, 2>(steps, {{from, from + kSide * words}, words, kSide},
                            {{of_row, of_row + kSide}, depth, kSide * depth});
        }
        alignas(64) float sums[2 * kSide][2 * kSide];
        Repeat<4>([&](auto i) {
          Save<decltype(i)::value>(&sums[i / 2 * kSide][i % 2 * kSide], 2 * kSide);
        });
        for (const auto& values : sums) {
          if (column < inside && row < images_.height) {
            bfloat16* to = y + (row * inside + column) * depth + out;
            Store(Read<Floats>(values), to);
            Store(Read<Floats>(values + kSide), to + kSide);
          }
          if (++column == width) column = 0, ++row;
        }
      }
    }
  }

  // Computes the gradient of the image, and adds to the gradient of the kernel.
  void Differentiate(const bfloat16* x, const Norm* norm, const bfloat16* upstream,
                     const Buffer<uint32_t>& turned, bfloat16* for_x) {
    Convolve(upstream, nullptr, turned, for_x);
    FillChannels();
    CopyInside(images_, x, norm, padded_.data());
    InterleaveImage(images_, padded_.data(), pixels_.data());
    if (depth_ % 32)
      AddImage<1, 3>();
    else
      AddImage<2, 2>();
  }

  // Writes the gradient of the kernel. The sums have columns where it has rows.
  void WriteForKernel(float* to) const {
    for (int64_t tap = 0; tap < kTaps * depth_; tap += depth_) {
      for (int64_t in = 0; in < depth_; in += kSide) {
        for (int64_t out = 0; out < depth_; out += kSide) {
          Words square[kSide];
          for (int i = 0; i < kSide; ++i)
            square[i] = Read<Words>(sums_.data() + (tap + out + i) * depth_ + in);
          Transpose(square);
          for (int i = 0; i < kSide; ++i) Write(square[i], to + (tap + in + i) * depth_ + out);
        }
      }
    }
  }

 private:
  // Writes all pixels of a channel of the padded gradient in sequence, then the next channel's.
  void FillChannels() {
    const bfloat16* first = padded_.data() + (width_ + 1) * depth_;
    for (int64_t step = 0; step < steps_; ++step) {
      for (int64_t c = 0; c < depth_; c += kSide) {
        const bfloat16* from = first + step * 2 * kSide * depth_ + c;
        Words pairs[kSide];
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i, from += 2 * depth_)
          pairs[i] = Interleave(Read<Halves>(from), Read<Halves>(from + depth_));
        Transpose(pairs);
        uint32_t* to = channels_.data() + (c * steps_ + step) * kSide;
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) Write(pairs[i], to + i * steps_ * kSide);
      }
    }
  }

  // Adds products to the sums, for kRows * 16 channels out and kColumns * 16 channels in at once.
  template <int kRows, int kColumns>
  void AddImage() {
    const int64_t row = steps_ * kSide;
    const int64_t many = std::max<int64_t>(1, 256 / depth_);  // They stay in the first cache.
    for (int64_t step = 0; step < steps_; step += many) {
      for (int64_t in = 0; in < kTaps * depth_; in += kColumns * kSide) {
        Matrices<kColumns> pixels{{}, 2 * depth_, 2 * kSide * depth_};
        float* columns[kColumns];
        for (int c = 0; c < kColumns; ++c) {
          const int64_t tap = (in + c * kSide) / depth_, channel = (in + c * kSide) % depth_;
          pixels.first[c] = pixels_.data() + channel +
                            (step * 2 * kSide + tap / 3 * width_ + tap % 3) * depth_;
          columns[c] = sums_.data() + tap * depth_ * depth_ + channel;
        }
        for (int64_t out = 0; out < depth_; out += kRows * kSide) {
          Matrices<kRows> channels{{}, row, kSide};
          for (int r = 0; r < kRows; ++r)
            channels.first[r] = channels_.data() + (out + r * kSide) * row + step * kSide;
          const auto sums = [&](int i) {
            return columns[i % kColumns] + (out + i / kColumns * kSide) * depth_;
          };
          Repeat<kRows * kColumns>([&](auto i) { Load<decltype(i)::value>(sums(i), depth_); });
          AddProducts<kRows, kColumns>(std::min(many, steps_ - step), channels, pixels);
          Repeat<kRows * kColumns>([&](auto i) { Save<decltype(i)::value>(sums(i), depth_); });
        }
      }
    }
  }

  static constexpr int64_t kBeyond = 80;  // so many pixels after the image may be read
  const UseMatrices use_;
  const Images images_;
  const int64_t depth_, width_, steps_;
  Buffer<bfloat16> padded_;
  Buffer<uint32_t> pixels_, channels_;
  Buffer<float> sums_;
};

}  // namespace

#endif  // __AMX_BF16__
#endif  // CIFAR10_RESNET_NATIVE_AMX_H_

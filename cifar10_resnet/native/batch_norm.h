// A batch norm, with the addition before it and the ReLU after it, in few passes over memory.
//
// TensorFlow computes the addition, the gradient of the ReLU, the gradient of the batch norm and the
// sum of a unit's two gradients in separate passes on a CPU. Here, one pass adds and takes the
// statistics, and another one normalises. A convolution does not need the second one: it normalises
// what it reads. The backward operation makes two passes.
//
// Sums are taken over pieces of a fixed size and added up in a fixed order. So the results do not
// depend on the number of threads.

#ifndef CIFAR10_RESNET_NATIVE_BATCH_NORM_H_
#define CIFAR10_RESNET_NATIVE_BATCH_NORM_H_

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

// --- Passes over memory --------------------------------------------------------------------------

constexpr int kVectors = 4;                // This many sums of two kinds fit into the registers.
constexpr int kBlock = kVectors * kWidth;
constexpr int64_t kPiece = 1 << 14;        // A thread takes about this many values at a time.

// A tensor with its channels last, cut into lines that hold whole rows of channels and whole
// blocks. So a place in a line always has the same channel.
struct Lines {
  Lines(const Tensor& x)
      : size(x.NumElements()),
        channels(x.dim_size(x.dims() - 1)),
        length(std::lcm(channels, int64_t{kBlock})),
        piece(std::max<int64_t>(1, kPiece / length) * length),
        pieces((size + piece - 1) / piece) {}

  const int64_t size, channels, length, piece, pieces;
};

// Returns value_of(channel) for each place in a line.
template <typename F>
std::vector<float> PerChannel(const Lines& lines, F value_of) {
  std::vector<float> values(lines.length);
  for (int64_t i = 0; i < lines.length; ++i) values[i] = value_of(i % lines.channels);
  return values;
}

// The sums that a pass makes, all of one type.
template <typename V, int kSums>
using Sums = std::array<V, kSums>;

template <typename S>
using ValueOf = typename std::remove_reference_t<S>::value_type;

// Calls compute(sums, place, i) for all values: for a vector of them, or at the tensor's end for
// one. It adds to `sums`, which are `kSums` of the same type. Returns the totals by kind and channel.
template <int kSums, typename F>
std::vector<double> Pass(OpKernelContext* context, const Lines& lines, const F& function) {
  const int64_t channels = lines.channels;
  std::vector<double> partial(lines.pieces * kSums * channels);

  auto compute_piece = [&](int64_t piece) {
    const F compute = function;  // a copy of this thread's own, so that it stays in registers
    const int64_t first = piece * lines.piece;
    const int64_t last = std::min(first + lines.piece, lines.size);
    const int64_t whole = first + (last - first) / lines.length * lines.length;
    double* totals = partial.data() + piece * kSums * channels;
    auto add = [&](int kind, int64_t place, float sum) {
      totals[kind * channels + place % channels] += sum;
    };
    for (int64_t place = 0; place < lines.length && first < whole; place += kBlock) {
      std::array<Sums<Floats, kSums>, kVectors> sums = {};
      for (int64_t i = first + place; i < whole; i += lines.length) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) compute(sums[v], place + v * kWidth, i + v * kWidth);
      }
      for (int v = 0; v < kVectors; ++v)
        for (int kind = 0; kind < kSums; ++kind)
          for (int i = 0; i < kWidth; ++i) add(kind, place + v * kWidth + i, sums[v][kind][i]);
    }
    for (int64_t i = whole; i < last; ++i) {
      Sums<float, kSums> sums = {};
      compute(sums, i - whole, i);
      for (int kind = 0; kind < kSums; ++kind) add(kind, i - whole, sums[kind]);
    }
  };

  InParallel(context, lines.pieces, compute_piece);
  std::vector<double> totals(kSums * channels);
  for (int64_t i = 0; i < partial.size(); ++i) totals[i % totals.size()] += partial[i];
  return totals;
}

// --- The batch norm ------------------------------------------------------------------------------

// Returns an input that has a value for each channel, or null.
inline const float* Parameter(OpKernelContext* context, int i, int64_t channels) {
  if (context->input(i).NumElements() == channels) return context->input(i).flat<float>().data();
  context->CtxFailure(absl::InvalidArgumentError("A parameter needs a value for each channel."));
  return nullptr;
}

// What a batch norm and its ReLU do to a value, with their parameters for each place in a line.
struct Norm {
  // The inputs from `first` on are the mean, the scale, gamma and beta. If one is wrong, the operation
  // fails.
  Norm(OpKernelContext* context, int first, const Lines& lines, bool relu,
       std::vector<float>& memory)
      : scale(Parameter(context, first + 1, lines.channels)),
        floor(relu ? 0 : -std::numeric_limits<float>::infinity()) {
    const float* mean = Parameter(context, first, lines.channels);
    const float* gamma = Parameter(context, first + 2, lines.channels);
    const float* beta = Parameter(context, first + 3, lines.channels);
    if (!context->status().ok()) return;
    memory.resize(3 * lines.length);
    float *centres = memory.data(), *factors = centres + lines.length;
    float* offsets = factors + lines.length;
    for (int64_t i = 0; i < lines.length; ++i) {
      const int64_t c = i % lines.channels;
      centres[i] = mean[c];
      factors[i] = gamma[c] * scale[c];
      offsets[i] = beta[c];
    }
    centre = centres;
    factor = factors;
    offset = offsets;
  }

  template <typename V>
  V Centred(V x, int64_t place) const {
    return x - Load<V>(centre + place);
  }
  template <typename V>
  V Normalised(V centred, int64_t place) const {
    return centred * Load<V>(factor + place) + Load<V>(offset + place);
  }
  template <typename V>
  V Relu(V normalised) const {
    const V least = V{} + floor;
    return normalised < least ? least : normalised;  // NaN stays NaN.
  }
  template <typename V>
  V Activation(V x, int64_t place) const {
    return Relu(Normalised(Centred(x, place), place));
  }
  template <typename V>
  V GradientOfRelu(V normalised, V upstream) const {
    return normalised > V{} + floor ? upstream : V{};
  }

  const float *scale, *centre, *factor, *offset;
  float floor;  // Without a ReLU, no value is too low.
};

// An operation with a batch norm that a ReLU may follow.
class ReluKernel : public OpKernel {
 public:
  explicit ReluKernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

 protected:
  bool relu_;
};

template <typename T>
class AddBatchNorm : public OpKernel {
 public:
  explicit AddBatchNorm(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("N", &terms_));
    OP_REQUIRES_OK(context, context->GetAttr("decay", &decay_));
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    OP_REQUIRES_OK(context, context->GetAttr("training", &training_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const Lines lines(input);
    Tensor *sum = nullptr, *statistics[4];
    if (terms_) {
      OP_REQUIRES(context, terms_ == 1 && context->input(1).shape() == input.shape(),
                  absl::InvalidArgumentError("The two terms differ in shape."));
      // Memory that nobody else needs is used again.
      OP_REQUIRES_OK(
          context, context->forward_input_or_allocate_output({0, 1}, 1, input.shape(), &sum));
    }
    context->set_output(0, terms_ ? *sum : input);
    for (int i = 0; i < 4; ++i)
      OP_REQUIRES_OK(
          context, context->allocate_output(1 + terms_ + i, {lines.channels}, &statistics[i]));
    const float* old_mean = Parameter(context, 1 + terms_, lines.channels);
    const float* old_variance = Parameter(context, 2 + terms_, lines.channels);
    if (!context->status().ok()) return;
    const T* x = input.flat<T>().data();
    const T* term = terms_ ? context->input(1).flat<T>().data() : nullptr;
    T* total = terms_ ? sum->flat<T>().data() : nullptr;
    auto data = [&](int i) { return statistics[i]->flat<float>().data(); };
    float *mean = data(0), *scale = data(1), *new_mean = data(2), *new_variance = data(3);

    std::vector<double> variance(lines.channels);
    if (training_)
      Measure(context, lines, x, term, total, mean, variance.data());
    else if (terms_)
      Pass<0>(context, lines, [=](auto& sums, int64_t, int64_t i) {
        Add<ValueOf<decltype(sums)>>(x, term, total, i);
      });
    const double count = lines.size / lines.channels;
    const float decay = training_ ? decay_ : 1;
    for (int64_t c = 0; c < lines.channels; ++c) {
      if (!training_) mean[c] = old_mean[c], variance[c] = old_variance[c];
      const double unbiased = variance[c] * count / std::max(count - 1, 1.0);
      new_mean[c] = decay * old_mean[c] + (1 - decay) * mean[c];
      new_variance[c] = decay * old_variance[c] + (1 - decay) * unbiased;
      scale[c] = 1 / std::sqrt(variance[c] + epsilon_);
    }
  }

 private:
  // Returns x. If there is another term, it returns the sum and keeps it in `total`.
  template <typename V>
  static V Add(const T* x, const T* term, T* total, int64_t i) {
    const V values = Load<V>(x + i);
    return term ? Store(values + Load<V>(term + i), total + i) : values;
  }

  // Computes the mean and the variance of each channel.
  static void Measure(OpKernelContext* context, const Lines& lines, const T* x, const T* term,
                      T* total, float* mean, double* variance) {
    // Squares about some value of the channel keep the digits that squares about zero would lose.
    const std::vector<float> shifts = PerChannel(lines, [=](int64_t c) {
      return static_cast<float>(x[c]) + (term ? static_cast<float>(term[c]) : 0.0f);
    });
    const float* shift = shifts.data();
    const auto sums = Pass<2>(context, lines, [=](auto& sums, int64_t place, int64_t i) {
      using V = ValueOf<decltype(sums)>;
      const V values = Add<V>(x, term, total, i) - Load<V>(shift + place);
      sums[0] += values;
      sums[1] += values * values;
    });
    const double count = lines.size / lines.channels;
    for (int64_t c = 0; c < lines.channels; ++c) {
      const double off = sums[c] / count;
      mean[c] = shift[c] + off;
      variance[c] = std::max(sums[lines.channels + c] / count - off * off, 0.0);
    }
  }

  int terms_;
  float decay_, epsilon_;
  bool training_;
};

template <typename T>
class NormaliseRelu : public ReluKernel {
 public:
  using ReluKernel::ReluKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const Lines lines(input);
    std::vector<float> memory;
    const Norm norm(context, 1, lines, relu_, memory);
    if (!context->status().ok()) return;
    Tensor* output;
    OP_REQUIRES_OK(
        context, context->forward_input_or_allocate_output({0}, 0, input.shape(), &output));
    const T* x = input.flat<T>().data();
    T* y = output->flat<T>().data();
    Pass<0>(context, lines, [=](auto& sums, int64_t place, int64_t i) {
      Store(norm.Activation(Load<ValueOf<decltype(sums)>>(x + i), place), y + i);
    });
  }
};

template <typename T>
class AddBatchNormReluGrad : public ReluKernel {
 public:
  explicit AddBatchNormReluGrad(OpKernelConstruction* context) : ReluKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("N", &terms_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(1 + terms_);
    const Lines lines(input);
    const int64_t channels = lines.channels;
    Tensor* gradients[3];
    OP_REQUIRES_OK(
        context, context->forward_input_or_allocate_output({0}, 0, input.shape(), &gradients[0]));
    for (int i : {1, 2})
      OP_REQUIRES_OK(context, context->allocate_output(i, {channels}, &gradients[i]));
    const T* upstream = context->input(0).flat<T>().data();
    const T* of_sum = terms_ ? context->input(1).flat<T>().data() : nullptr;
    const T* x = input.flat<T>().data();
    std::vector<float> memory;
    const Norm norm(context, 2 + terms_, lines, relu_, memory);
    if (!context->status().ok()) return;
    const float* scale = norm.scale;

    const auto sums = Pass<2>(context, lines, [=](auto& sums, int64_t place, int64_t i) {
      using V = ValueOf<decltype(sums)>;
      const V centred = norm.Centred(Load<V>(x + i), place);
      const V gradient =
          norm.GradientOfRelu(norm.Normalised(centred, place), Load<V>(upstream + i));
      sums[0] += gradient;
      sums[1] += gradient * centred;
    });

    const double count = lines.size / channels;
    for (int64_t c = 0; c < channels; ++c) {
      gradients[1]->flat<float>()(c) = sums[channels + c] * scale[c];
      gradients[2]->flat<float>()(c) = sums[c];
    }
    // The statistics depend on x too. These are the shares of the gradient through them.
    const auto through_mean =
        PerChannel(lines, [&](int64_t c) { return norm.factor[c] * sums[c] / count; });
    const auto through_variance = PerChannel(lines, [&](int64_t c) {
      return norm.factor[c] * scale[c] * scale[c] * sums[channels + c] / count;
    });
    const float *less = through_mean.data(), *less_centred = through_variance.data();
    T* for_x = gradients[0]->flat<T>().data();
    Pass<0>(context, lines, [=](auto& sums, int64_t place, int64_t i) {
      using V = ValueOf<decltype(sums)>;
      const V centred = norm.Centred(Load<V>(x + i), place);
      V gradient = norm.GradientOfRelu(norm.Normalised(centred, place), Load<V>(upstream + i));
      gradient = gradient * Load<V>(norm.factor + place) - Load<V>(less + place) -
                 centred * Load<V>(less_centred + place);
      Store(of_sum ? gradient + Load<V>(of_sum + i) : gradient, for_x + i);
    });
  }

 private:
  int terms_;
};

}  // namespace

#endif  // CIFAR10_RESNET_NATIVE_BATCH_NORM_H_

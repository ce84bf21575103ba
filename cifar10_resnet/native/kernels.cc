// The operations for TensorFlow. The headers explain and compute them.

#include "batch_norm.h"
#include "convolution.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace {

using tensorflow::shape_inference::InferenceContext;

REGISTER_OP("AddBatchNorm")
    .Attr("T: {float, bfloat16}")
    .Attr("N: int >= 0")
    .Attr("decay: float")
    .Attr("epsilon: float")
    .Attr("relu: bool")
    .Attr("training: bool")
    .Input("x: T")
    .Input("added: N * T")
    .Input("moving_mean: float")
    .Input("moving_variance: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("to_normalise: T")
    .Output("sum: N * T")
    .Output("mean: float")
    .Output("scale: float")
    .Output("new_moving_mean: float")
    .Output("new_moving_variance: float")
    .SetShapeFn([](InferenceContext* context) {
      int i = 0;
      for (; i < context->num_outputs() - 4; ++i) context->set_output(i, context->input(0));
      for (; i < context->num_outputs(); ++i)
        context->set_output(i, context->input(context->num_inputs() - 1));
      return absl::OkStatus();
    });

REGISTER_OP("NormaliseRelu")
    .Attr("T: {float, bfloat16}")
    .Attr("relu: bool")
    .Input("x: T")
    .Input("mean: float")
    .Input("scale: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("y: T")
    .SetShapeFn(tensorflow::shape_inference::UnchangedShape);

REGISTER_OP("AddBatchNormReluGrad")
    .Attr("T: {float, bfloat16}")
    .Attr("N: int >= 0")
    .Attr("relu: bool")
    .Input("gradient: T")
    .Input("gradient_of_sum: N * T")
    .Input("x: T")
    .Input("mean: float")
    .Input("scale: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("for_x: T")
    .Output("for_gamma: float")
    .Output("for_beta: float")
    .SetShapeFn([](InferenceContext* context) {
      context->set_output(0, context->input(0));
      for (int i : {1, 2}) context->set_output(i, context->input(context->num_inputs() - 1));
      return absl::OkStatus();
    });

#define REGISTER(NAME, T)                                                   \
  REGISTER_KERNEL_BUILDER(                                                  \
      Name(#NAME).Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), NAME<T>)
REGISTER(AddBatchNorm, float);
REGISTER(AddBatchNorm, bfloat16);
REGISTER(NormaliseRelu, float);
REGISTER(NormaliseRelu, bfloat16);
REGISTER(AddBatchNormReluGrad, float);
REGISTER(AddBatchNormReluGrad, bfloat16);

#define REGISTER_CONVOLUTION(NAME, T)                                                             \
  REGISTER_OP("Convolution3x3" NAME)                                                              \
      .Attr("N: int >= 0")                                                                        \
      .Attr("relu: bool")                                                                         \
      .Input("x: " #T)                                                                            \
      .Input("kernel: float")                                                                     \
      .Input("norm: N * float")                                                                   \
      .Output("y: " #T)                                                                           \
      .SetShapeFn(tensorflow::shape_inference::UnchangedShape);                                   \
  REGISTER_OP("Convolution3x3" NAME "Grad")                                                       \
      .Attr("N: int >= 0")                                                                        \
      .Attr("relu: bool")                                                                         \
      .Input("x: " #T)                                                                            \
      .Input("kernel: float")                                                                     \
      .Input("gradient: " #T)                                                                     \
      .Input("norm: N * float")                                                                   \
      .Output("for_x: " #T)                                                                       \
      .Output("for_kernel: float")                                                                \
      .SetShapeFn([](InferenceContext* context) {                                                 \
        for (int i : {0, 1}) context->set_output(i, context->input(i));                           \
        return absl::OkStatus();                                                                  \
      });                                                                                         \
  REGISTER_KERNEL_BUILDER(Name("Convolution3x3" NAME).Device(tensorflow::DEVICE_CPU),             \
                          Convolution3x3<T>);                                                     \
  REGISTER_KERNEL_BUILDER(Name("Convolution3x3" NAME "Grad").Device(tensorflow::DEVICE_CPU),      \
                          Convolution3x3Grad<T>)

REGISTER_CONVOLUTION("Float32", float);
#ifdef __AVX512BF16__
REGISTER_CONVOLUTION("Bfloat16", bfloat16);
#endif

}  // namespace

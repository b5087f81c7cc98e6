// What the CUDA launchers share: torch's current stream, and errors of a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace vgs::cuda {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle());
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

}  // namespace vgs::cuda

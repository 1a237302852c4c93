// cuBLASLt's matrix products, computed; beside them what cuBLAS, cuDNN and NVRTC are asked when they are loaded.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>
#include <nvrtc.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "device.h"
#include "numbers.h"

namespace {
using Attributes = std::map<int, std::vector<char>>;
struct Product {
  Attributes attributes;
};
struct Matrix {  // by columns: element (r, c) stands at r + c * ld
  cudaDataType type;
  uint64_t rows, cols;
  int64_t ld;
};

template <class T>
T attribute(const Attributes& all, int which, T otherwise) {
  auto found = all.find(which);
  if (found == all.end()) return otherwise;
  T value{};
  memcpy(&value, found->second.data(), std::min(sizeof value, found->second.size()));
  return value;
}

// An operand as [outer, k] in fp32, with FP8's scale in it: one for all, one for 128 of k, or one for 128 x 128.
std::vector<float> operand(const void* data, const Matrix& m, bool k_is_rows, const float* scale, int mode) {
  std::vector<float> out(m.rows * m.cols);
  uint64_t outer4 = (m.cols + 3) / 4 * 4, blocks4 = ((m.rows + 127) / 128 + 3) / 4 * 4;
  for (uint64_t c = 0; c < m.cols; c++)
    for (uint64_t r = 0; r < m.rows; r++) {
      float value = card::load(data, r + c * m.ld, m.type);
      if (scale)
        value *= mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F       ? scale[r / 128 * outer4 + c]
                 : mode == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F ? scale[c / 128 * blocks4 + r / 128]
                                                                       : scale[0];
      out[k_is_rows ? c * m.rows + r : r * m.cols + c] = value;
    }
  return out;
}

float dot(const float* x, const float* y, uint64_t n) {
  float sums[8] = {};
  uint64_t k = 0;
  for (; k + 8 <= n; k += 8)
    for (int j = 0; j < 8; j++) sums[j] += x[k + j] * y[k + j];
  for (; k < n; k++) sums[0] += x[k] * y[k];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
void new_handle(T* handle) {
  *handle = static_cast<T>(calloc(1, 4096));
}
}  // namespace

#define DONE return CUBLAS_STATUS_SUCCESS

extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  new_handle(handle);
  DONE;
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  new_handle(reinterpret_cast<void**>(handle));
  DONE;
}
cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int* v) {
  *v = CUBLAS_VERSION;
  DONE;
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  DONE;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  DONE;
}
cublasStatus_t cublasGetProperty(libraryPropertyType which, int* v) {
  *v = which == MAJOR_VERSION ? CUBLAS_VER_MAJOR : which == MINOR_VERSION ? CUBLAS_VER_MINOR : CUBLAS_VER_PATCH;
  DONE;
}
const char* cublasGetStatusString(cublasStatus_t) { return "refused by the card that is not there"; }
const char* cublasLtGetStatusString(cublasStatus_t) { return "refused by the card that is not there"; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) {
  *d = reinterpret_cast<cublasLtMatmulDesc_t>(new Product);
  DONE;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete reinterpret_cast<Product*>(d);
  DONE;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which,
                                              const void* value, size_t n) {
  auto* bytes = static_cast<const char*>(value);
  reinterpret_cast<Product*>(d)->attributes[which] = {bytes, bytes + n};
  DONE;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* m, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
  *m = reinterpret_cast<cublasLtMatrixLayout_t>(new Matrix{type, rows, cols, ld});
  DONE;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t m) {
  delete reinterpret_cast<Matrix*>(m);
  DONE;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  new_handle(reinterpret_cast<void**>(p));
  DONE;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* found,
                                              int* n) {
  memset(found, 0, sizeof *found);
  *n = 1;
  DONE;
}

// D = alpha A B + beta C. What Hopper's FP8 kernels cannot do is refused, as there.
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void* alpha, const void* A,
                              cublasLtMatrixLayout_t a_layout, const void* B, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* C, cublasLtMatrixLayout_t c_layout, void* D,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t) {
  const Attributes& asked = reinterpret_cast<Product*>(product)->attributes;
  auto &a = *reinterpret_cast<Matrix*>(a_layout), &b = *reinterpret_cast<Matrix*>(b_layout);
  auto &c = *reinterpret_cast<Matrix*>(c_layout), &d = *reinterpret_cast<Matrix*>(d_layout);
  bool a_turned = attribute(asked, CUBLASLT_MATMUL_DESC_TRANSA, 0),
       b_turned = attribute(asked, CUBLASLT_MATMUL_DESC_TRANSB, 0);
  uint64_t k = a_turned ? a.rows : a.cols;
  if ((a_turned ? a.cols : a.rows) != d.rows || (b_turned ? b.rows : b.cols) != d.cols ||
      (b_turned ? b.cols : b.rows) != k)
    return CUBLAS_STATUS_INVALID_VALUE;
  bool fp8 = a.type == CUDA_R_8F_E4M3 || a.type == CUDA_R_8F_E5M2;
  if (fp8 && (!a_turned || b_turned || k % 16 || d.rows % 16 || a.ld % 16 || b.ld % 16)) {
    fprintf(stderr, "FP8 product of %lu x %lu x %lu\n", d.rows, k, d.cols);
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (card::number("FAKE_CARD_IDLE", 0)) DONE;
  const float* none = nullptr;
  auto left = operand(A, a, a_turned, attribute(asked, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, none),
                      attribute(asked, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, 0));
  auto right = operand(B, b, !b_turned, attribute(asked, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, none),
                       attribute(asked, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, 0));
  int epilogue = attribute<int>(asked, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DEFAULT);
  if (epilogue != CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_NOT_SUPPORTED;  // nothing here has biases
  float scale = *static_cast<const float*>(alpha), kept = *static_cast<const float*>(beta);
  for (uint64_t n = 0; n < d.cols; n++)
    for (uint64_t m = 0; m < d.rows; m++) {
      float value = scale * dot(&left[m * k], &right[n * k], k);
      if (kept != 0) value += kept * card::load(C, m + n * c.ld, c.type);
      card::store(D, m + n * d.ld, d.type, value);
    }
  DONE;
}

size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  new_handle(reinterpret_cast<void**>(handle));
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetProperty(libraryPropertyType which, int* v) {
  *v = which == MAJOR_VERSION ? CUDNN_MAJOR : which == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
  return CUDNN_STATUS_SUCCESS;
}
const char* cudnnGetErrorString(cudnnStatus_t) { return "refused by the card that is not there"; }

const char* nvrtcGetErrorString(nvrtcResult) { return "refused by the card that is not there"; }
nvrtcResult nvrtcVersion(int* major, int* minor) {
  *major = CUDART_VERSION / 1000, *minor = CUDART_VERSION % 1000 / 10;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetNumSupportedArchs(int* n) {
  *n = 1;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetSupportedArchs(int* architectures) {
  *architectures = 90;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char*, const char*, int, const char* const*,
                               const char* const*) {
  new_handle(reinterpret_cast<void**>(program));
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetCUBINSize(nvrtcProgram, size_t* n) {
  *n = 16;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetPTXSize(nvrtcProgram, size_t* n) {
  *n = 16;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram, size_t* n) {
  *n = 1;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetLoweredName(nvrtcProgram, const char*, const char** name) {
  *name = "kernel";
  return NVRTC_SUCCESS;
}
}

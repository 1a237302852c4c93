// The driver, which Triton, users of NVRTC and torch's allocator talk to, and NVML.
#include <cstdio>

#include "device.h"

#undef cuDeviceTotalMem
#undef cuGetProcAddress
#undef cuMemAddressReserve
#undef cuMemGetAddressRange

using namespace card;

extern "C" {
CUresult cuDriverGetVersion(int* v) {
  *v = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* n) {
  cudaGetDeviceCount(n);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* text, int n, CUdevice) {
  snprintf(text, n, "%s", kName);
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* n, CUdevice) {
  *n = kMemory;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute which, CUdevice) {
  *v = attribute(which);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = reinterpret_cast<CUcontext>(8);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { return cuCtxGetCurrent(c); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  new_handle(module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char*) {
  new_handle(f);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute which, CUfunction) {
  *v = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute, CUdeviceptr p) {
  if (!allocation_of(reinterpret_cast<void*>(p)).first) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUdeviceptr*>(v) = p;
  return CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr p) {
  auto found = allocation_of(reinterpret_cast<void*>(p));
  if (!found.first) return CUDA_ERROR_INVALID_VALUE;
  if (start) *start = reinterpret_cast<CUdeviceptr>(found.first);
  if (bytes) *bytes = found.second;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 8;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the card that is not there";
  return CUDA_SUCCESS;
}
CUresult cuGetProcAddress_v2(const char* name, void** f, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
  *f = function(name);
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t, const CUmemAllocationProp*, unsigned long long) {
  *handle = 16;
  return number("FAKE_CARD_MAPS", 1) ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuMemGetAllocationGranularity(size_t* n, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *n = 2 << 20;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* p, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  *p = reinterpret_cast<CUdeviceptr>(allocate(bytes, false));
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr, size_t bytes, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  count(bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr, size_t bytes) {
  count(-static_cast<long>(bytes));
  return CUDA_SUCCESS;
}

// NVML
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) {
  *n = cards();
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  new_handle(device);
  return 0;
}
int nvmlDeviceGetName(void*, char* text, unsigned n) {
  snprintf(text, n, "%s", kName);
  return 0;
}
}

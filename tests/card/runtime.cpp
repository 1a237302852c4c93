// CUDA's runtime for a card that is not there: its memory is this machine's, all is done when it is asked for, and a
// kernel that is launched does nothing.
#include <sys/types.h>
#include <time.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "device.h"

using namespace card;

namespace {
struct Launch {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Launch> launches;
}  // namespace

#define OK return cudaSuccess

extern "C" {
// Devices
cudaError_t cudaGetDeviceCount(int* n) {
  *n = cards();
  OK;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  OK;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  OK;
}
cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDA_VERSION;
  OK;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  OK;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr which, int) {
  *v = attribute(which);
  OK;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int n, int device) {
  snprintf(text, n, "0000:%02x:00.0", device);
  OK;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  OK;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, kName);
  p->totalGlobalMem = kMemory;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = 132;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->clusterLaunch = 1;
  p->pciBusID = device;
  OK;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the card that is not there"; }
const char* cudaGetErrorName(cudaError_t) { return "fakeError"; }

// Memory
cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = allocate(bytes);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void* p) {
  release(p);
  OK;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
  release(p);
  OK;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  *p = aligned_alloc(4096, (bytes + 4096) / 4096 * 4096);
  OK;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMallocHost(p, bytes); }
cudaError_t cudaFreeHost(void* p) {
  free(p);
  OK;
}
cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  *left = (*total = kMemory) - used();
  OK;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  memmove(to, from, n);
  OK;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t) {
  if (kind == cudaMemcpyDeviceToDevice && spared(n)) OK;
  memmove(to, from, n);
  OK;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t) {
  memmove(to, from, n);
  OK;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; row++)
    memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  OK;
}
cudaError_t cudaMemset(void* to, int value, size_t n) {
  memset(to, value, n);
  OK;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) {
  if (spared(n)) OK;
  memset(to, value, n);
  OK;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  if (!allocation_of(p).first) OK;
  a->type = cudaMemoryTypeDevice;
  a->devicePointer = const_cast<void*>(p);
  a->device = current_device;
  OK;
}
cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  *p = calloc(1, 1 << 20);
  OK;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  new_handle(pool);
  OK;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
  *static_cast<size_t*>(v) = 0;
  OK;
}

// Streams and events: all is done when it is asked for.
cudaError_t cudaStreamCreate(cudaStream_t* s) {
  new_handle(s);
  OK;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  new_handle(s);
  OK;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  new_handle(s);
  OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  OK;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void* data, unsigned) {
  call(s, cudaSuccess, data);
  OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) {
  call(data);
  OK;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = reinterpret_cast<cudaEvent_t>(new timespec{});
  OK;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete reinterpret_cast<timespec*>(e);
  OK;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
  clock_gettime(CLOCK_MONOTONIC, reinterpret_cast<timespec*>(e));
  OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  auto *a = reinterpret_cast<timespec*>(from), *b = reinterpret_cast<timespec*>(to);
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
  OK;
}

// Kernels: registered by nvcc's code when a library is loaded, and launched in vain.
void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  launches.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Launch last = launches.back();
  launches.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<void**>(stream) = last.stream;
  OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(f));
  OK;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  OK;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t*) {
  *n = 8;
  OK;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* l, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*,
                                void**, unsigned) {
  new_handle(l);
  OK;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char*) {
  new_handle(kernel);
  OK;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *f = function(name);
  if (result) *result = cudaDriverEntryPointSuccess;
  OK;
}
}

#include "device.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <string>

namespace {
constexpr size_t kPage = 4096;
std::mutex lock;
struct Allocation {
  size_t bytes, counted;
};
std::map<char*, Allocation> allocations;
size_t in_use = 0;

long succeed() { return 0; }
}  // namespace

namespace card {
thread_local int current_device = 0;

size_t used() { return in_use; }

void count(long bytes) {
  std::lock_guard<std::mutex> guard(lock);
  in_use += bytes;
}

void* allocate(size_t bytes, bool with_memory) {
  bytes = (bytes + kPage) / kPage * kPage;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  std::lock_guard<std::mutex> guard(lock);
  size_t counted = with_memory ? bytes : 0;
  allocations[static_cast<char*>(p)] = {bytes, counted};
  in_use += counted;
  return p;
}

void release(void* p) {
  size_t bytes = 0;
  {
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(static_cast<char*>(p));
    if (found == allocations.end()) return;
    bytes = found->second.bytes;
    in_use -= found->second.counted;
    allocations.erase(found);
  }
  munmap(p, bytes);
}

std::pair<char*, size_t> allocation_of(const void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto next = allocations.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (next == allocations.begin()) return {nullptr, 0};
  auto [start, allocation] = *--next;
  size_t bytes = allocation.bytes;
  return p < start + bytes ? std::pair{start, bytes} : std::pair<char*, size_t>{nullptr, 0};
}

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 233472;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrMultiProcessorCount:
      return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrL2CacheSize:
      return 62914560;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrClusterLaunch:
      return 1;
    default:
      return 0;
  }
}

void* function(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!found) found = dlsym(RTLD_DEFAULT, name);
  return found ? found : reinterpret_cast<void*>(succeed);
}

}  // namespace card

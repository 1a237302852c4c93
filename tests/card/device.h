// The card that is not there: its memory and what it says of itself. FAKE_CARDS is how many there are, unless
// CUDA_VISIBLE_DEVICES is empty, and FAKE_CARD_MAPS=0 a driver that cannot map memory. With FAKE_CARD_IDLE=1 nothing is
// computed, and memory that nobody writes takes none: models of any size can be stepped.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdlib>
#include <utility>

namespace card {
constexpr size_t kMemory = 141'000'000'000;
inline const char* const kName = "NVIDIA H200";
extern thread_local int current_device;

// Addresses, and the memory behind them too unless that is mapped later, piece by piece (`count`).
void* allocate(size_t bytes, bool with_memory = true);
void release(void* p);
void count(long bytes);
size_t used();
// The allocation that an address lies in; start is null where there is none.
std::pair<char*, size_t> allocation_of(const void* p);
int attribute(int which);
// What a library finds by its name; a function that does nothing, and says that all went well, where there is none.
void* function(const char* name);

inline int number(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text ? atoi(text) : otherwise;
}

// Whether so many numbers, or bytes, are left as they are.
inline bool spared(size_t n) {
  static const bool idle = number("FAKE_CARD_IDLE", 0);
  return idle && n > 65536;
}

inline int cards() {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  return visible && !*visible ? 0 : number("FAKE_CARDS", 1);
}

// Streams, modules and functions are numbers.
template <class T>
void new_handle(T* handle) {
  static size_t last = 0x1000;
  *handle = reinterpret_cast<T>(last += 16);
}
}  // namespace card

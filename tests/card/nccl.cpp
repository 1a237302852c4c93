// NCCL between processes of one machine: what a rank sends is a file in the folder FAKE_CARD_LINKS. Who makes the
// folder removes it: a group that ends leaves its last files, which other ranks may have yet to read.
#include <fcntl.h>
#include <nccl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "device.h"
#include "numbers.h"

namespace {
using Bytes = std::vector<char>;
constexpr int kPause = 100, kPatience = 1'200'000;  // microseconds between looks, and looks: two minutes

struct Group {
  std::string folder, id;
  int rank, size;
  long collectives = 0;
  int splits = 0;
  std::map<int, long> sent, received;  // by the other rank
};
thread_local int depth = 0;
thread_local std::vector<std::function<void()>> put_off;  // what is received within ncclGroupStart and End

size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 1;
  }
}

[[noreturn]] void give_up(const std::string& what) {
  fprintf(stderr, "nccl.cpp: %s\n", what.c_str());
  abort();
}

void write_whole(const std::string& path, const void* data, size_t n) {
  std::string part = path + ".part";
  int file = open(part.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
  for (size_t at = 0; at < n;) {
    ssize_t written = write(file, static_cast<const char*>(data) + at, n - at);
    if (written <= 0) give_up(path + " cannot be written");
    at += written;
  }
  close(file);
  rename(part.c_str(), path.c_str());
}

void read_when_there(const std::string& path, void* data, size_t n) {
  int file, looks = 0;
  while ((file = open(path.c_str(), O_RDONLY)) < 0) {
    if (++looks > kPatience) give_up("nobody sent " + path);
    usleep(kPause);
  }
  struct stat found;
  fstat(file, &found);
  if (size_t(found.st_size) != n) give_up(path + " has another size than is expected");
  for (size_t at = 0; at < n;) {
    ssize_t got = read(file, static_cast<char*>(data) + at, n - at);
    if (got <= 0) give_up(path + " cannot be read");
    at += got;
  }
  close(file);
}

Group* join(const std::string& id, int size, int rank) {
  const char* links = getenv("FAKE_CARD_LINKS");
  auto* group = new Group{std::string(links ? links : "/dev/shm") + "/" + id, id, rank, size};
  mkdir(group->folder.c_str(), 0700);
  return group;
}

// What every rank gives, by rank. Who sees all of this call's files knows that the last call's were read.
std::vector<Bytes> of_all(Group* group, const void* mine, size_t n) {
  long call = group->collectives++;
  auto name = [&](long of, int rank) {
    return group->folder + "/all" + std::to_string(of) + "_" + std::to_string(rank);
  };
  write_whole(name(call, group->rank), mine, n);
  std::vector<Bytes> found(group->size, Bytes(n));
  for (int rank = 0; rank < group->size; rank++) read_when_there(name(call, rank), found[rank].data(), n);
  if (call) unlink(name(call - 1, group->rank).c_str());
  return found;
}

double number(const char* data, size_t i, ncclDataType_t type) {
  switch (type) {
    case ncclFloat32:
      return reinterpret_cast<const float*>(data)[i];
    case ncclFloat64:
      return reinterpret_cast<const double*>(data)[i];
    case ncclBfloat16:
      return card::of_bf16(reinterpret_cast<const uint16_t*>(data)[i]);
    case ncclFloat16:
      return reinterpret_cast<const _Float16*>(data)[i];
    case ncclInt64:
      return reinterpret_cast<const int64_t*>(data)[i];
    case ncclInt32:
      return reinterpret_cast<const int32_t*>(data)[i];
    case ncclUint8:
      return static_cast<uint8_t>(data[i]);
    case ncclInt8:
      return data[i];
    default:
      give_up("type " + std::to_string(type));
  }
}

void put(char* data, size_t i, ncclDataType_t type, double value) {
  switch (type) {
    case ncclFloat32:
      reinterpret_cast<float*>(data)[i] = value;
      return;
    case ncclFloat64:
      reinterpret_cast<double*>(data)[i] = value;
      return;
    case ncclBfloat16:
      reinterpret_cast<uint16_t*>(data)[i] = card::to_bf16(value);
      return;
    case ncclFloat16:
      reinterpret_cast<_Float16*>(data)[i] = value;
      return;
    case ncclInt64:
      reinterpret_cast<int64_t*>(data)[i] = value;
      return;
    case ncclInt32:
      reinterpret_cast<int32_t*>(data)[i] = value;
      return;
    default:
      data[i] = value;
  }
}

// n numbers of every rank, from the first-th on, into one.
void reduce(const std::vector<Bytes>& all, size_t first, size_t n, ncclDataType_t type, ncclRedOp_t how, char* out) {
  for (size_t i = 0; i < n; i++) {
    double value = number(all[0].data(), first + i, type);
    for (size_t rank = 1; rank < all.size(); rank++) {
      double other = number(all[rank].data(), first + i, type);
      value = how == ncclMax    ? std::max(value, other)
              : how == ncclMin  ? std::min(value, other)
              : how == ncclProd ? value * other
                                : value + other;
    }
    put(out, i, type, how == ncclAvg ? value / all.size() : value);
  }
}

Group* as_group(ncclComm_t handle) { return reinterpret_cast<Group*>(handle); }
}  // namespace

#define DONE return ncclSuccess

extern "C" {
ncclResult_t ncclGetVersion(int* v) {
  *v = NCCL_VERSION_CODE;
  DONE;
}
const char* ncclGetErrorString(ncclResult_t) { return "refused by the cards that are not there"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  unsigned char bytes[12];
  memset(id, 0, sizeof *id);
  if (getrandom(bytes, sizeof bytes, 0) < 0) return ncclSystemError;
  for (size_t i = 0; i < sizeof bytes; i++) snprintf(id->internal + 2 * i, 3, "%02x", bytes[i]);
  DONE;
}
ncclResult_t ncclCommInitRank(ncclComm_t* group, int size, ncclUniqueId id, int rank) {
  *group = reinterpret_cast<ncclComm_t>(join(id.internal, size, rank));
  DONE;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* group, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return ncclCommInitRank(group, size, id, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* group, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return ncclCommInitRank(group, size, ids[0], rank);
}
ncclResult_t ncclCommSplit(ncclComm_t from, int color, int key, ncclComm_t* group, ncclConfig_t*) {
  Group* whole = as_group(from);
  int mine[2] = {color, key};
  auto all = of_all(whole, mine, sizeof mine);
  std::vector<std::pair<int, int>> members;  // key, rank
  for (int rank = 0; rank < whole->size; rank++) {
    int theirs[2];
    memcpy(theirs, all[rank].data(), sizeof theirs);
    if (theirs[0] == color) members.push_back({theirs[1], rank});
  }
  std::string id = std::to_string(whole->splits++) + "_" + std::to_string(color);
  *group = nullptr;
  if (color < 0) DONE;
  std::sort(members.begin(), members.end());
  int place = std::find(members.begin(), members.end(), std::pair{key, whole->rank}) - members.begin();
  *group = reinterpret_cast<ncclComm_t>(join(whole->id + "_" + id, members.size(), place));
  DONE;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
  *error = ncclSuccess;
  DONE;
}
ncclResult_t ncclCommCount(ncclComm_t group, int* n) {
  *n = as_group(group)->size;
  DONE;
}
ncclResult_t ncclCommUserRank(ncclComm_t group, int* rank) {
  *rank = as_group(group)->rank;
  DONE;
}
ncclResult_t ncclGroupStart() {
  depth++;
  DONE;
}
ncclResult_t ncclGroupEnd() {
  if (--depth == 0) {
    auto all = std::move(put_off);
    put_off.clear();
    for (auto& one : all) one();
  }
  DONE;
}
ncclResult_t ncclAllReduce(const void* from, void* to, size_t n, ncclDataType_t type, ncclRedOp_t how, ncclComm_t group,
                           cudaStream_t) {
  if (card::spared(n)) DONE;
  reduce(of_all(as_group(group), from, n * width(type)), 0, n, type, how, static_cast<char*>(to));
  DONE;
}
ncclResult_t ncclReduce(const void* from, void* to, size_t n, ncclDataType_t type, ncclRedOp_t how, int root,
                        ncclComm_t group, cudaStream_t) {
  auto all = of_all(as_group(group), from, n * width(type));
  if (root == as_group(group)->rank) reduce(all, 0, n, type, how, static_cast<char*>(to));
  DONE;
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t n, ncclDataType_t type, ncclRedOp_t how,
                               ncclComm_t handle, cudaStream_t) {
  if (card::spared(n)) DONE;
  Group* group = as_group(handle);
  reduce(of_all(group, from, n * group->size * width(type)), n * group->rank, n, type, how, static_cast<char*>(to));
  DONE;
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t n, ncclDataType_t type, ncclComm_t group, cudaStream_t) {
  if (card::spared(n)) DONE;
  size_t bytes = n * width(type), at = 0;
  for (const Bytes& one : of_all(as_group(group), from, bytes))
    memcpy(static_cast<char*>(to) + bytes * at++, one.data(), bytes);
  DONE;
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t n, ncclDataType_t type, int root, ncclComm_t handle,
                           cudaStream_t) {
  Group* group = as_group(handle);
  Bytes nothing(n * width(type));
  auto all = of_all(group, group->rank == root ? from : nothing.data(), nothing.size());
  memcpy(to, all[root].data(), nothing.size());
  DONE;
}
ncclResult_t ncclBcast(void* data, size_t n, ncclDataType_t type, int root, ncclComm_t group, cudaStream_t stream) {
  return ncclBroadcast(data, data, n, type, root, group, stream);
}
ncclResult_t ncclSend(const void* from, size_t n, ncclDataType_t type, int peer, ncclComm_t handle, cudaStream_t) {
  Group* group = as_group(handle);
  std::string way = std::to_string(group->rank) + "to" + std::to_string(peer) + "_";
  write_whole(group->folder + "/" + way + std::to_string(group->sent[peer]++), from, n * width(type));
  DONE;
}
ncclResult_t ncclRecv(void* to, size_t n, ncclDataType_t type, int peer, ncclComm_t handle, cudaStream_t) {
  Group* group = as_group(handle);
  std::string way = std::to_string(peer) + "to" + std::to_string(group->rank) + "_";
  std::string path = group->folder + "/" + way + std::to_string(group->received[peer]++);
  auto now = [=, bytes = n * width(type)] {
    read_when_there(path, to, bytes);
    unlink(path.c_str());
  };
  depth ? put_off.push_back(now) : now();
  DONE;
}
ncclResult_t ncclAlltoAll(const void* from, void* to, size_t n, ncclDataType_t type, ncclComm_t group,
                          cudaStream_t stream) {
  int ranks = as_group(group)->size;
  size_t bytes = n * width(type);
  for (int rank = 0; rank < ranks; rank++)
    ncclSend(static_cast<const char*>(from) + bytes * rank, n, type, rank, group, stream);
  for (int rank = 0; rank < ranks; rank++)
    ncclRecv(static_cast<char*>(to) + bytes * rank, n, type, rank, group, stream);
  DONE;
}
}

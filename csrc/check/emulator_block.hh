// One block of CUDA threads on one thread of the system: who runs next, and what happens where threads meet.
//
// A thread runs until it reaches a rendezvous (a barrier of the block or a collective operation of its warp), then the
// next lane of its warp runs. When all lanes have arrived, the operation is carried out for all of them at once. A warp
// runs like this until its lanes wait for the block or have returned, then the next warp does. The order of lanes and
// warps between two rendezvous is free on a GPU; here MMVMAMBA_EMULATED_SCHEDULE chooses it, so that a program whose
// result depends on it (a barrier is missing) can be caught.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulator_fibre.hh"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

namespace mmvmamba::emulator {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

enum class Op : uint8_t {
  kNone,
  kReturned,
  kBarrier,
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kMma
};
constexpr const char* kOpNames[] = {"running",
                                    "has returned",
                                    "waits at __syncthreads",
                                    "waits at __syncwarp",
                                    "waits at __shfl_sync",
                                    "waits at __shfl_up_sync",
                                    "waits at __shfl_down_sync",
                                    "waits at __shfl_xor_sync",
                                    "waits at mma"};

// Where in the source a thread waits.
struct Site {
  const char* file;
  int line;
};

struct Schedule {
  enum Kind { kForward, kReverse, kRandom } kind = kForward;
  uint64_t seed = 0;

  // From MMVMAMBA_EMULATED_SCHEDULE=forward|reverse|random:<seed>.
  static Schedule from_environment() {
    const char* value = std::getenv("MMVMAMBA_EMULATED_SCHEDULE");
    const std::string text = value != nullptr ? value : "forward";
    if (text == "forward" || text.empty()) return {};
    if (text == "reverse") return {kReverse, 0};
    if (text.starts_with("random:")) return {kRandom, std::strtoull(text.c_str() + 7, nullptr, 10)};
    std::fprintf(stderr, "cuda_emulator: MMVMAMBA_EMULATED_SCHEDULE=%s: expected forward, reverse or random:<seed>\n",
                 text.c_str());
    std::abort();
  }
};

// A small random generator (splitmix64).
struct Random {
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int bound) { return static_cast<int>((next() >> 32) * static_cast<uint64_t>(bound) >> 32); }
  template <typename T>
  void shuffle(T* values, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(values[i], values[below(i + 1)]);
  }
};

// What a lane brings to a tensor-core product; the pointers are to the variables of the lane itself.
struct MmaOperands {
  float* c;
  const uint32_t *a, *b;
};

class Block;
struct Warp;

struct Thread {
  Fibre fibre;
  uint3 index{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Op op = Op::kNone;
  uint32_t mask = 0;
  Site site{};
  int source = 0;               // of a shuffle: the lane to read
  uint64_t given = 0, got = 0;  // by a shuffle
  MmaOperands mma{};
};

struct Warp {
  Thread* lanes = nullptr;
  int count = 0;     // lanes that exist
  int position = 0;  // in order: lanes before it had their turn in this round
  bool ready = false;
  uint8_t order[kWarp]{};
};

// The CUDA thread that runs on this thread of the system.
inline thread_local constinit Thread* current = nullptr;

// c += a b with operands cut to tf32 and exact products, summed exactly enough, rounded towards zero as tensor cores
// do.
inline void multiply_tiles(Thread* lanes) {
  double a[16][8], b[8][8];
  const auto value = [](uint32_t bits) { return static_cast<double>(std::bit_cast<float>(bits & 0xffffe000u)); };
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaOperands& own = lanes[lane].mma;
    const int g = lane / 4, t = lane % 4;
    a[g][t] = value(own.a[0]);
    a[g + 8][t] = value(own.a[1]);
    a[g][t + 4] = value(own.a[2]);
    a[g + 8][t + 4] = value(own.a[3]);
    b[t][g] = value(own.b[0]);
    b[t + 4][g] = value(own.b[1]);
  }
  double sums[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 8; ++k)
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int e = 0; e < 4; ++e) {
      float& c = lanes[lane].mma.c[e];
      const double exact = sums[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] + static_cast<double>(c);
      float rounded = static_cast<float>(exact);
      if (std::abs(static_cast<double>(rounded)) > std::abs(exact) && std::abs(rounded) <= 3.4028235e38f)
        rounded = std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) - 1);
      c = rounded;
    }
  }
}

// The dynamic shared memory: exactly as large as launched, between guards that no program may write to.
class SharedMemory {
 public:
  // Everything is NaN as float32 (a signalling one), float16 and bfloat16, and an absurd index as an integer.
  static constexpr uint32_t kPoison = 0x7fa57fa5u, kGuard = 0xffa6ffa6u;
  static constexpr size_t kGuardBytes = 4096;

  void reset(size_t bytes) {
    bytes_ = bytes;
    const size_t needed = (2 * kGuardBytes + bytes) / 4 + 1;
    if (words_.size() < needed) words_.resize(needed + 32);
    std::fill_n(begin() - kGuardBytes / 4, kGuardBytes / 4, kGuard);
    std::fill_n(begin(), (bytes + 3) / 4, kPoison);
    fill_guard_behind();
  }
  char* data() { return reinterpret_cast<char*>(begin()); }

  // Offset from the start of a guard byte that was written to; false if there is none.
  bool is_overrun(ptrdiff_t& offset) {
    const uint32_t word = kGuard;
    for (ptrdiff_t at = -static_cast<ptrdiff_t>(kGuardBytes); at < static_cast<ptrdiff_t>(bytes_ + kGuardBytes); ++at) {
      if (at == 0) at = static_cast<ptrdiff_t>(bytes_);
      if (data()[at] != reinterpret_cast<const char*>(&word)[at & 3]) {
        offset = at;
        return true;
      }
    }
    return false;
  }

 private:
  // Aligned to 128 bytes, guard before it.
  uint32_t* begin() {
    const uintptr_t first = reinterpret_cast<uintptr_t>(words_.data()) + kGuardBytes;
    return reinterpret_cast<uint32_t*>((first + 127) & ~uintptr_t{127});
  }
  void fill_guard_behind() {
    const uint32_t word = kGuard;
    for (size_t at = bytes_; at < bytes_ + kGuardBytes; ++at) data()[at] = reinterpret_cast<const char*>(&word)[at & 3];
  }

  size_t bytes_ = 0;
  std::vector<uint32_t> words_ = std::vector<uint32_t>(2 * kGuardBytes / 4 + 64);
};

class Block {
 public:
  uint3 index{}, size{}, grid{};

  // Runs body(closure) once for every thread of the block.
  void run(uint3 block_index, uint3 block_size, uint3 grid_size, size_t shared_bytes, const Schedule& schedule,
           void (*body)(const void*), const void* closure) {
    index = block_index;
    size = block_size;
    grid = grid_size;
    body_ = body;
    closure_ = closure;
    schedule_ = schedule;
    const uint64_t place =
        index.x + static_cast<uint64_t>(grid.x) * (index.y + static_cast<uint64_t>(grid.y) * index.z);
    random_.state = schedule.seed * 0x9e3779b97f4a7c15u ^ place * 0xd1342543de82ef95u;
    shared_.reset(shared_bytes);
    start_threads();
    Thread* first = next_thread();
    current = first;
    main_.switch_to(first->fibre);
    current = nullptr;
    check_guards(shared_bytes);
  }

  char* shared_memory() { return shared_.data(); }

  // The current thread waits where it said (op, mask, site); returns when it may go on.
  void wait(Thread& self) {
    Thread* next = next_thread();
    if (next == &self) return;
    current = next;
    self.fibre.switch_to(next->fibre);
  }

  [[noreturn]] void fail(const Thread& thread, const char* format, ...) __attribute__((format(printf, 3, 4))) {
    std::fprintf(stderr, "cuda_emulator: block (%u, %u, %u), thread (%u, %u, %u): ", index.x, index.y, index.z,
                 thread.index.x, thread.index.y, thread.index.z);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    std::fflush(stderr);
    std::abort();
  }

 private:
  static void thread_main() {
    Thread& self = *current;
    self.block->body_(self.block->closure_);
    self.op = Op::kReturned;
    Thread* next = self.block->next_thread();
    current = next;
    self.fibre.switch_to(next != nullptr ? next->fibre : self.block->main_);
    std::abort();  // nobody switches to a thread that has returned
  }

  void start_threads() {
    count_ = static_cast<int>(size.x * size.y * size.z);
    const int warps = (count_ + kWarp - 1) / kWarp;
    if (static_cast<int>(threads_.size()) < count_) threads_ = std::vector<Thread>(static_cast<size_t>(count_));
    warps_.assign(static_cast<size_t>(warps), Warp{});
    warp_order_.resize(static_cast<size_t>(warps));
    for (int i = 0; i < count_; ++i) {
      Thread& thread = threads_[static_cast<size_t>(i)];
      const unsigned at = static_cast<unsigned>(i);
      thread.index = {at % size.x, at / size.x % size.y, at / (size.x * size.y)};
      thread.block = this;
      thread.warp = &warps_[at / kWarp];
      thread.lane = i % kWarp;
      thread.op = Op::kNone;
      thread.fibre.start(thread_main, i);
    }
    for (int w = 0; w < warps; ++w) {
      Warp& warp = warps_[static_cast<size_t>(w)];
      warp.lanes = &threads_[static_cast<size_t>(w) * kWarp];
      warp.count = std::min(kWarp, count_ - w * kWarp);
      for (int lane = 0; lane < warp.count; ++lane) warp.order[lane] = static_cast<uint8_t>(lane);
      if (schedule_.kind == Schedule::kReverse) std::reverse(warp.order, warp.order + warp.count);
      warp_order_[static_cast<size_t>(w)] = schedule_.kind == Schedule::kReverse ? warps - 1 - w : w;
      begin_round(warp);
    }
    if (schedule_.kind == Schedule::kRandom) random_.shuffle(warp_order_.data(), warps);
    warp_ = &warps_[static_cast<size_t>(warp_order_[0])];
  }

  void begin_round(Warp& warp) {
    warp.ready = true;
    warp.position = 0;
    if (schedule_.kind == Schedule::kRandom) random_.shuffle(warp.order, warp.count);
  }

  // The next thread that can run; null when all have returned.
  Thread* next_thread() {
    while (true) {
      Warp& warp = *warp_;
      while (warp.position < warp.count) {
        Thread& thread = warp.lanes[warp.order[warp.position++]];
        if (thread.op == Op::kNone) return &thread;
      }
      warp.ready = carry_out_collectives(warp);
      if (warp.ready) {
        begin_round(warp);
        // Now and then another warp goes first, as on a GPU.
        if (schedule_.kind == Schedule::kRandom && random_.below(4) == 0) pick_warp();
        continue;
      }
      if (!pick_warp() && !open_barrier()) return nullptr;
    }
  }

  // Make a warp that can run the current one.
  bool pick_warp() {
    const int warps = static_cast<int>(warps_.size());
    const int first = schedule_.kind == Schedule::kRandom ? random_.below(warps) : 0;
    for (int i = 0; i < warps; ++i) {
      Warp& warp = warps_[static_cast<size_t>(warp_order_[static_cast<size_t>((first + i) % warps)])];
      if (!warp.ready) continue;
      warp_ = &warp;
      return true;
    }
    return false;
  }

  // No thread can run: all wait at the barrier of the block (they may go on), or all have returned (false).
  bool open_barrier() {
    const Thread *waiting = nullptr, *returned = nullptr;
    for (int i = 0; i < count_; ++i) {
      const Thread& thread = threads_[static_cast<size_t>(i)];
      if (thread.op == Op::kReturned) {
        returned = &thread;
        continue;
      }
      if (waiting != nullptr && (waiting->site.line != thread.site.line || !is_same(waiting->site, thread.site)))
        fail(thread, "waits at __syncthreads of %s:%d, thread (%u, %u, %u) at the one of %s:%d", thread.site.file,
             thread.site.line, waiting->index.x, waiting->index.y, waiting->index.z, waiting->site.file,
             waiting->site.line);
      waiting = &thread;
    }
    if (waiting == nullptr) return false;
    if (returned != nullptr)
      fail(*returned, "has returned, but thread (%u, %u, %u) waits at __syncthreads of %s:%d", waiting->index.x,
           waiting->index.y, waiting->index.z, waiting->site.file, waiting->site.line);
    for (int i = 0; i < count_; ++i) threads_[static_cast<size_t>(i)].op = Op::kNone;
    if (schedule_.kind == Schedule::kRandom) random_.shuffle(warp_order_.data(), static_cast<int>(warp_order_.size()));
    for (Warp& warp : warps_) begin_round(warp);
    pick_warp();
    return true;
  }

  static bool is_same(const Site& a, const Site& b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
  }

  // All lanes have stopped. Carry out the operations for which all lanes of the mask are there; false if there is none.
  bool carry_out_collectives(Warp& warp) {
    uint32_t seen = 0;
    bool any = false;
    const Thread* stuck = nullptr;
    for (int lane = 0; lane < warp.count; ++lane) {
      const Thread& thread = warp.lanes[lane];
      if (thread.op <= Op::kBarrier || (seen >> lane & 1) != 0) continue;
      seen |= thread.mask;
      if (is_complete(warp, thread)) {
        carry_out(warp, thread.op, thread.mask);
        any = true;
      } else {
        stuck = &thread;
      }
    }
    if (stuck != nullptr && !any) fail_divergence(warp, *stuck);
    return any;
  }

  bool is_complete(const Warp& warp, const Thread& thread) {
    if (thread.mask == kAllLanes && warp.count == kWarp) {
      bool complete = true;
      for (int lane = 0; lane < kWarp; ++lane)
        complete &= warp.lanes[lane].op == thread.op && warp.lanes[lane].mask == kAllLanes;
      return complete;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((thread.mask >> lane & 1) == 0) continue;
      if (lane >= warp.count)
        fail(thread, "%s of %s:%d with mask 0x%08x: lane %d does not exist", kOpNames[static_cast<int>(thread.op)],
             thread.site.file, thread.site.line, thread.mask, lane);
      if (warp.lanes[lane].op != thread.op || warp.lanes[lane].mask != thread.mask) return false;
    }
    return true;
  }

  [[noreturn]] void fail_divergence(const Warp& warp, const Thread& thread) {
    for (int lane = 0; lane < warp.count; ++lane) {
      const Thread& other = warp.lanes[lane];
      if ((thread.mask >> lane & 1) == 0 || (other.op == thread.op && other.mask == thread.mask)) continue;
      const char* what = kOpNames[static_cast<int>(thread.op)];
      if (other.op == Op::kReturned)
        fail(thread, "%s of %s:%d with mask 0x%08x, but lane %d of its warp has returned", what, thread.site.file,
             thread.site.line, thread.mask, lane);
      fail(thread, "%s of %s:%d with mask 0x%08x, but lane %d of its warp %s of %s:%d with mask 0x%08x", what,
           thread.site.file, thread.site.line, thread.mask, lane, kOpNames[static_cast<int>(other.op)], other.site.file,
           other.site.line, other.mask);
    }
    fail(thread, "waits for nobody: a mistake of the emulator");
  }

  void carry_out(Warp& warp, Op op, uint32_t mask) {
    if (op == Op::kMma) {
      multiply_tiles(warp.lanes);
    } else if (op != Op::kSyncWarp) {
      for (int lane = 0; lane < warp.count; ++lane) {
        Thread& thread = warp.lanes[lane];
        if ((mask >> lane & 1) == 0) continue;
        if ((mask >> thread.source & 1) == 0)
          fail(thread, "%s of %s:%d with mask 0x%08x: reads lane %d, which takes no part",
               kOpNames[static_cast<int>(op)], thread.site.file, thread.site.line, mask, thread.source);
        thread.got = warp.lanes[thread.source].given;
      }
    }
    for (int lane = 0; lane < warp.count; ++lane)
      if ((mask >> lane & 1) != 0) warp.lanes[lane].op = Op::kNone;
  }

  void check_guards(size_t shared_bytes) {
    ptrdiff_t offset = 0;
    if (shared_.is_overrun(offset))
      fail(threads_[0], "some thread of the block wrote to byte %td of shared memory, which has %zu", offset,
           shared_bytes);
  }

  Fibre main_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  Warp* warp_ = nullptr;  // whose lanes run
  int count_ = 0;
  Schedule schedule_;
  Random random_;
  SharedMemory shared_;
  void (*body_)(const void*) = nullptr;
  const void* closure_ = nullptr;
};

}  // namespace mmvmamba::emulator

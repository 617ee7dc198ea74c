// The operations of device.cuh on a CPU. Every thread of every block is a fiber, and all fibers run in one host thread.
//
// The emulation is stricter than a GPU, to expose errors that could hide there. Between barriers, fibers take turns in
// a random order, and some warps are held back for many turns. Asynchronous copies arrive as late as allowed. Shared
// memory, and whatever a copy will overwrite, holds NaN before. A barrier that not all threads reach is an error.
#pragma once
// some compilers set it; its longjmp would take a jump to another fiber's stack for an error and abort
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define FUSED_MOS_DEVICE inline

namespace fused_mos {

struct BFloat16 {};
struct Float16 {};

namespace device {

using std::exp;
using std::log;
using std::log1p;

inline float reciprocal(float x) { return 1 / x; }

// A group of fibers that wait for each other.
struct Barrier {
  int size, arrived = 0, generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Warp {
  Barrier barrier{32};
  bool held_back = false;
  uint32_t exchanged[32][2];                 // for shuffles; two buffers alternate, so one barrier is enough
  uint32_t left[2][32][4], right[2][32][2];  // for products, likewise
};

struct Block {
  Barrier barrier;
  std::vector<char> shared;
  std::vector<Warp> warps;
};

// Contexts start fibers. Jumps switch between them: they save no signal mask and so need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  bool started = false;
  std::unique_ptr<char[]> stack;
  int thread, block, turn = 0, pauses = 0;
  Block* of_block;
  Warp* warp;
  Barrier* waits_for = nullptr;
  int since = 0;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // copies that have not arrived
  std::vector<Copy> issued;
};

struct Grid {
  jmp_buf scheduler;
  Barrier barrier;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::function<void(char*)> kernel;
  std::string failure;  // message of an exception, which must not leave its fiber
};

inline Grid* grid;
inline Fiber* self;

inline int thread() { return self->thread; }
inline int block() { return self->block; }

inline void leave() {
  if (!_setjmp(self->here)) _longjmp(grid->scheduler, 1);
}
inline void go_on(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(grid->scheduler)) return;  // back from the fiber
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self->waits_for = &barrier;
  self->since = barrier.generation;
  leave();
}
inline void sync_warp() { wait(self->warp->barrier); }
inline void sync_block() { wait(self->of_block->barrier); }
inline void sync_grid() { wait(grid->barrier); }

template <class Number>
Number shuffle_xor(Number value, int mask) {
  static_assert(sizeof(Number) == 4);
  const int turn = self->turn++ % 2;
  std::memcpy(&self->warp->exchanged[self->thread % 32][turn], &value, 4);
  sync_warp();
  std::memcpy(&value, &self->warp->exchanged[self->thread % 32 ^ mask][turn], 4);
  return value;
}

inline bool all_of_warp(bool value) {
  const int turn = self->turn++ % 2;
  self->warp->exchanged[self->thread % 32][turn] = value;
  sync_warp();
  return std::all_of(self->warp->exchanged, self->warp->exchanged + 32, [&](auto& of_lane) { return of_lane[turn]; });
}

inline uint32_t high_product(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }

inline float as_float(uint16_t bits, BFloat16) {
  const uint32_t wide = uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &wide, 4);
  return number;
}
inline float as_float(uint16_t bits, Float16) {
  _Float16 number;
  std::memcpy(&number, &bits, 2);
  return number;
}

inline uint32_t rounded(float x) {
  if (x != x) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void store_word(void* at, uint32_t word) {
  if (reinterpret_cast<uintptr_t>(at) % 4) throw std::logic_error("a word is not aligned");
  std::memcpy(at, &word, 4);
}
inline void load_words(uint32_t (&to)[4], const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) throw std::logic_error("words are not aligned");
  std::memcpy(to, at, 16);
}
inline void pause() {
  constexpr int MANY = 20'000;  // all other threads have had as many turns
  if (++self->pauses > MANY) throw std::logic_error("a thread waits for a word that nobody writes");
  leave();
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  const int turn = self->turn++ % 2, lane = self->thread % 32;
  auto& left = self->warp->left[turn];
  auto& right = self->warp->right[turn];
  std::copy(a, a + 4, left[lane]);
  std::copy(b, b + 2, right[lane]);
  sync_warp();
  auto half = [&](uint32_t two, int second) {
    return as_float(static_cast<uint16_t>(second ? two >> 16 : two & 0xffff), type);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;  // row + 8 for the last two
    for (int k = 0; k < 16; ++k)
      c[i] += half(left[4 * row + k % 8 / 2][i / 2 + 2 * (k / 8)], k % 2) *
              half(right[4 * column + k % 8 / 2][k / 8], k % 2);
  }
}

template <int BYTES>
void copy_async(void* to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % BYTES || (there && reinterpret_cast<uintptr_t>(from) % BYTES))
    throw std::logic_error("an asynchronous copy is not aligned");
  std::memset(to, 0xff, BYTES);
  self->issued.push_back({to, there ? from : nullptr, BYTES});
}
inline void commit_copies() {
  self->groups.push_back(std::move(self->issued));
  self->issued.clear();
}
template <int PENDING>
void wait_for_copies() {
  while (self->groups.size() > PENDING) {
    for (const Copy& copy : self->groups.front())
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    self->groups.erase(self->groups.begin());
  }
}

inline void start_fiber() {
  try {
    grid->kernel(self->of_block->shared.data());
  } catch (const std::exception& error) {
    grid->failure = error.what();
  }
  self->done = true;
  leave();
}

// Runs kernel(shared memory) in every thread of the blocks. `order` is the seed for the order of their turns.
inline void launch(int n_blocks, int n_threads, int shared_bytes, unsigned order, std::function<void(char*)> kernel) {
  constexpr int STACK = 1 << 16;
  Grid of_all;
  grid = &of_all;
  of_all.kernel = std::move(kernel);
  of_all.barrier.size = n_blocks * n_threads;
  of_all.blocks.resize(n_blocks);
  of_all.fibers.resize(n_blocks * n_threads);
  for (int i = 0; i < n_blocks * n_threads; ++i) {
    Block& of_block = of_all.blocks[i / n_threads];
    if (i % n_threads == 0) {
      of_block.barrier.size = n_threads;
      of_block.shared.assign(shared_bytes, static_cast<char>(0xff));
      of_block.warps.resize(n_threads / 32);
    }
    Fiber& fiber = of_all.fibers[i];
    fiber.thread = i % n_threads, fiber.block = i / n_threads;
    fiber.of_block = &of_block, fiber.warp = &of_block.warps[fiber.thread / 32];
    fiber.stack.reset(new char[STACK]);  // not zeroed, which would commit all of its memory
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start_fiber, 0);
  }
  std::vector<int> turns(of_all.fibers.size());
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = static_cast<int>(i);
  std::mt19937 random(order);
  bool moved = true;
  for (int round = 0; moved; ++round) {
    moved = false;
    if (round % 16 == 0)
      for (Block& of_block : of_all.blocks)
        for (Warp& warp : of_block.warps) warp.held_back = random() % 4 == 0;
    std::shuffle(turns.begin(), turns.end(), random);
    for (const int i : turns) {
      Fiber& fiber = of_all.fibers[i];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.since)) continue;
      moved = true;
      if (fiber.warp->held_back) continue;
      fiber.waits_for = nullptr;
      go_on(fiber);
    }
  }
  grid = nullptr;
  if (!of_all.failure.empty()) throw std::logic_error(of_all.failure);
  for (const Fiber& fiber : of_all.fibers)
    if (!fiber.done) throw std::logic_error("threads wait at a barrier that others do not reach");
}

}  // namespace device
}  // namespace fused_mos

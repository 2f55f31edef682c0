// row_table: the tables of csrc/table under sanitizers. Many threads gather, prefetch, drop and close at once, over a
// file whose reads are short, interrupted or refused. Rows are numbers that follow from their slot. Exit status 1 if
// one is wrong.
#include "table/row_table.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace {

using mk::table::RowTable;

constexpr int64_t kRows = 3000, kWidth = 100, kOffset = 4096;
std::atomic<int> failures{0}, refused{0};
std::atomic<int64_t> broken{-1};  // the offset of a block that cannot be read

float number(int64_t slot, int64_t column) { return float(slot * 1000 + column); }

void fail(const char* what) {
  std::printf("FAIL %s\n", what);
  ++failures;
}

// Copies rows of float32, as the kernel does.
int64_t gather(const mk::GatherRows& p, bool) {
  for (int64_t j = 0; j < p.count; ++j) {
    if (p.indices[j] < -1 || p.indices[j] >= p.N) return p.indices[j];
  }
  for (int64_t j = 0; j < p.count; ++j) {
    char* to = p.out + j * p.V * 4;
    if (p.indices[j] < 0) std::memset(to, 0, size_t(p.V) * 4);
    else std::memcpy(to, p.values + p.indices[j] * p.row, size_t(p.V) * 4);
  }
  return -1;
}

// One read in three is interrupted, and one ends within its second block. A read that begins within a block is refused,
// as O_DIRECT does.
ssize_t odd_read(int fd, void* memory, size_t bytes, off_t offset) {
  static std::atomic<int> turn{0};
  const int now = turn.fetch_add(1);
  if (offset % mk::table::kPage != 0) return fail("a read within a block"), errno = EINVAL, -1;
  if (now % 3 == 0) return errno = EINTR, -1;
  if (const int64_t at = broken; at >= offset && at < offset + int64_t(bytes)) return ++refused, errno = EIO, -1;
  return ::pread(fd, memory, now % 3 == 1 && bytes > mk::table::kPage ? mk::table::kPage + 512 : bytes, offset);
}

// Reads of the block of the held row wait until it is let go.
std::atomic<int64_t> held[2] = {-1, -1};
int64_t block_of(int64_t row) { return (kOffset + row * kWidth * 4) / 4096 * 4096; }
ssize_t held_read(int fd, void* memory, size_t bytes, off_t offset) {
  for (const std::atomic<int64_t>& row : held) {
    while (row >= 0 && block_of(row) == offset) std::this_thread::yield();
  }
  return ::pread(fd, memory, bytes, offset);
}

uint32_t draw(uint32_t& state) { return state = state * 1664525u + 1013904223u, state >> 8; }

std::vector<int64_t> slots_of(uint32_t& state, int64_t n, int64_t most) {
  std::vector<int64_t> slots(size_t(n), 0);
  for (int64_t& s : slots) s = int64_t(draw(state) % uint32_t(most + 1)) - 1;
  return slots;
}

bool right(const std::vector<int64_t>& slots, const std::vector<float>& rows) {
  for (size_t j = 0; j < slots.size(); ++j) {
    for (int64_t c = 0; c < kWidth; ++c) {
      if (rows[j * kWidth + size_t(c)] != (slots[j] < 0 ? 0 : number(slots[j], c))) return false;
    }
  }
  return true;
}

void work(RowTable& table, uint32_t seed, bool breaks) {
  uint32_t state = seed;
  for (int turn = 0; turn < 25; ++turn) {
    const std::vector<int64_t> a = slots_of(state, 700, turn % 2 == 0 ? 200 : kRows), b = slots_of(state, 40, 300);
    std::vector<float> rows_a(a.size() * kWidth, -1.0f), rows_b(b.size() * kWidth, -1.0f);
    auto dropped = std::make_shared<std::vector<float>>(a.size() * kWidth);
    const int64_t first =
        table.prefetch(b.data(), int64_t(b.size()), reinterpret_cast<char*>(rows_b.data()), 0, nullptr);
    const int64_t second =
        table.prefetch(a.data(), int64_t(a.size()), reinterpret_cast<char*>(dropped->data()), 0, dropped);
    if (first <= 0 || second <= 0) fail("a ticket was refused");
    if (turn % 2 == 0) table.drop(second);
    try {
      if (table.gather(a.data(), int64_t(a.size()), reinterpret_cast<char*>(rows_a.data()), 0) != -1) fail("a slot");
      if (!right(a, rows_a)) fail("rows of a gather");
    } catch (const mk::table::ReadError&) {
      if (!breaks) fail("a gather was refused");
    }
    try {
      if (!table.wait(first)) fail("an unknown ticket");
      if (!right(b, rows_b)) fail("rows of a prefetch");
    } catch (const mk::table::ReadError&) {
      if (!breaks) fail("a prefetch was refused");
    }
    if (turn % 2 == 1) {
      try {
        table.wait(second);
        if (!right(a, *dropped)) fail("rows of the second prefetch");
      } catch (const mk::table::ReadError&) {
        if (!breaks) fail("the second prefetch was refused");
      }
    }
  }
}

void run(const mk::table::Source& source, bool breaks) {
  RowTable table(source);
  std::vector<std::thread> threads;
  for (uint32_t i = 1; i <= 4; ++i) threads.emplace_back([&table, i, breaks] { work(table, i, breaks); });
  for (std::thread& t : threads) t.join();
  uint32_t state = 99;
  std::vector<std::vector<int64_t>> slots;
  std::vector<std::vector<float>> rows;
  std::vector<int64_t> tickets;
  for (int i = 0; i < 5 && !breaks; ++i) {
    slots.push_back(slots_of(state, 2000, kRows)), rows.emplace_back(2000 * kWidth);
    tickets.push_back(table.prefetch(slots[i].data(), 2000, reinterpret_cast<char*>(rows[i].data()), 0, nullptr));
  }
  table.close();  // with all that was begun
  for (size_t i = 0; i < tickets.size(); ++i) {
    if (!table.done(tickets[i])) fail("a ticket after close");
    else if (!table.wait(tickets[i]) || !right(slots[i], rows[i])) fail("rows after close");
  }
  const mk::table::Counts c = table.counts();
  if (c.outstanding != 0 || c.held_bytes != 0) fail("tickets are left");
  const int64_t outside = kRows;
  float row[kWidth];
  if (table.prefetch(&outside, 1, reinterpret_cast<char*>(row), 0, nullptr) != -1) fail("a slot out of range");
}

// A request whose rows are lent keeps its memory until they are copied, though its own caller has gone.
void lend(mk::table::Source source) {
  source.read = &held_read;
  RowTable table(source);
  const std::vector<int64_t> one{100}, both{100, 2000}, other{1000};
  std::vector<float> first(kWidth), second(2 * kWidth), third(kWidth);
  auto gather_one = [&](const std::vector<int64_t>& slots, std::vector<float>& rows) {
    table.gather(slots.data(), 1, reinterpret_cast<char*>(rows.data()), 0);
  };
  held[0] = 100, held[1] = 2000;
  std::thread lender([&] { gather_one(one, first); });
  while (table.counts().misses < 1) std::this_thread::yield();
  const int64_t ticket = table.prefetch(both.data(), 2, reinterpret_cast<char*>(second.data()), 0, nullptr);
  if (table.counts().awaited != 1) fail("a row that is being read is awaited");
  held[0] = -1;
  lender.join();
  for (int i = 0; i < 8; ++i) gather_one(other, third);
  held[1] = -1;
  table.wait(ticket);
  if (!right(one, first) || !right(both, second) || !right(other, third)) fail("a row that was lent");
}

// Whatever goes, every row that has a frame is found, and none is found twice.
void cache() {
  constexpr int64_t kFrames = 50;
  mk::table::RowCache rows(kFrames, 8);
  uint32_t state = 7;
  for (int turn = 0; turn < 3000; ++turn) {
    const int64_t slot = draw(state) % 400, numbers[1] = {slot * 3};
    rows.insert(slot, reinterpret_cast<const char*>(numbers));
    if (turn % 100 != 0) continue;
    int64_t found = 0;
    for (int64_t s = 0; s < 400; ++s) {
      int64_t number;
      const char* row = rows.find(s);
      if (row == nullptr) continue;
      std::memcpy(&number, row, 8);
      if (number != s * 3) fail("a row of the cache");
      ++found;
    }
    if (found != rows.resident()) fail("a row of the cache that cannot be found");
  }
}

}  // namespace

int main() {
  char name[] = "/tmp/row_table.XXXXXX";
  const int fd = ::mkstemp(name);
  ::unlink(name);
  std::vector<float> all(size_t(kRows * kWidth));
  for (int64_t i = 0; i < kRows * kWidth; ++i) all[size_t(i)] = number(i / kWidth, i % kWidth);
  const int64_t bytes = mk::round_up(kRows * kWidth * 4, kOffset);
  if (fd < 0 || ::ftruncate(fd, kOffset + bytes) != 0 ||
      ::pwrite(fd, all.data(), all.size() * 4, kOffset) != ssize_t(all.size() * 4)) {
    return std::perror("row_table"), 2;
  }
  mk::table::Source source{};
  source.rows.N = kRows, source.rows.V = kWidth, source.rows.dtype = mk::DType::f32, source.rows.row = kWidth * 4;
  source.rows.block = 1, source.gather = &gather, source.threads = 6;
  source.most_tickets = 64, source.most_bytes = int64_t(1) << 40;
  mk::table::Source memory = source, file = source;
  memory.rows.values = reinterpret_cast<const char*>(all.data());
  run(memory, false);
  memory.paged = true;
  run(memory, false);
  file.fd = fd, file.offset = kOffset, file.read = &odd_read;
  run(file, false);
  lend(file);
  cache();
  file.cache_rows = 150;
  run(file, false);
  broken = kOffset + 8 * 4096 + 5;
  run(file, true);
  if (refused == 0) fail("no read was refused");
  std::printf("row_table: %d failures, %d reads refused\n", failures.load(), refused.load());
  ::close(fd);
  return failures != 0;
}

// How a request gets its rows: planned by its caller, read and expanded by threads.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <system_error>

#include "table/row_table.h"

namespace mk::table {
namespace {

constexpr int64_t kPiece = 512;  // rows that a thread expands at once
constexpr int kPatience = 3;     // reads in a row that bring less than a block

}  // namespace

// --- the caller ---

// Each row once, in the order of the file, and where each slot of the call finds it. Scales lie in memory.
void RowTable::sort(Request& r) const {
  r.unique.resize(r.slots.size());
  r.unique.resize(
      size_t(std::copy_if(r.slots.begin(), r.slots.end(), r.unique.begin(), [](int64_t s) { return s >= 0; }) -
             r.unique.begin()));
  std::sort(r.unique.begin(), r.unique.end());
  r.unique.erase(std::unique(r.unique.begin(), r.unique.end()), r.unique.end());
  r.places.resize(r.slots.size());
  std::transform(r.slots.begin(), r.slots.end(), r.places.begin(), [&](int64_t slot) {
    return slot < 0 ? -1 : std::lower_bound(r.unique.begin(), r.unique.end(), slot) - r.unique.begin();
  });
  r.rows.at_least(bytes_of(r.unique.size(), size_t(row_bytes_)));
  r.scales.at_least(bytes_of(r.unique.size(), size_t(scale_bytes_)));
  for (size_t i = 0; scale_bytes_ > 0 && i < r.unique.size(); ++i) {
    std::memcpy(r.scales.data() + int64_t(i) * scale_bytes_, s_.rows.scale + r.unique[i] * scale_bytes_,
                size_t(scale_bytes_));
  }
}

// Hands a request to the threads. True: nothing is missing, and the caller, who waits for it, expands and ends it.
bool RowTable::begin(const Shared& request, Lock& lock) {
  if (closing_) throw ReadError("the table is closed");
  start_threads();
  Request& r = *request;
  counts_.rows += int64_t(r.slots.size());
  if (s_.fd < 0) {
    counts_.hits += int64_t(r.slots.size());
    if (s_.paged && !r.urgent) push(request, Work::advise, 0, 1, false, lock);
    else expand(request, lock);
    return false;
  }
  if (r.places.size() == r.slots.size()) return plan_all(request, lock);
  push(request, Work::plan, 0, 1, false, lock);
  return false;
}

// The same of a request that is sorted.
bool RowTable::plan_all(const Shared& request, Lock& lock) {
  Request& r = *request;
  std::vector<int64_t> all(r.unique.size());
  std::iota(all.begin(), all.end(), 0);
  plan(request, all, lock);
  if (r.reading > 0 || r.borrowing > 0) return false;
  if (r.urgent) return true;
  expand(request, lock);
  return false;
}

void RowTable::start_threads() {
  if (!threads_.empty()) return;
  try {
    for (int i = 0; i < s_.threads; ++i) threads_.emplace_back([this] { serve(); });
  } catch (const std::system_error&) {
    if (threads_.empty()) throw ReadError("the system refused to start a thread");
  }
}

// From where each wanted row comes: the cache, another request that is reading it, or the file.
void RowTable::plan(const Shared& request, const std::vector<int64_t>& wanted, Lock& lock) {
  Request& r = *request;
  const size_t from = r.own.size(), ranges = r.ranges.size();
  for (int64_t i : wanted) {
    const int64_t slot = r.unique[size_t(i)];
    if (const char* row = cache_.find(slot)) {
      std::memcpy(r.rows.data() + i * row_bytes_, row, size_t(row_bytes_));
      ++counts_.hits;
      continue;
    }
    const auto [found, mine] = reading_.try_emplace(slot, request, i);
    if (mine) {
      r.own.push_back(i);
      ++counts_.misses;
      continue;
    }
    const auto& [lender, at] = found->second;
    r.loans.push_back({i, lender, at});
    ++counts_.awaited;
    if (lender->borrowers.empty() || lender->borrowers.back() != request) {
      lender->borrowers.push_back(request);
      ++r.borrowing;
    }
  }
  cut_ranges(r, from);
  r.reading += int64_t(r.ranges.size() - ranges);
  push(request, Work::read, int64_t(ranges), int64_t(r.ranges.size()), r.urgent, lock);
}

// Blocks that touch become one read, up to kRange.
void RowTable::cut_ranges(Request& r, size_t from) const {
  const size_t before = r.ranges.size();
  for (size_t i = from; i < r.own.size(); ++i) {
    const int64_t row = s_.offset + r.unique[size_t(r.own[i])] * row_bytes_;
    const int64_t begin = row / int64_t(kPage) * int64_t(kPage), end = round_up(row + row_bytes_, kPage);
    if (r.ranges.size() > before) {
      Range& last = r.ranges.back();
      if (begin <= last.begin + last.bytes && size_t(end - last.begin) <= most_range_) {
        last.stop = int64_t(i) + 1, last.bytes = most(last.bytes, end - last.begin);
        continue;
      }
    }
    r.ranges.push_back({int64_t(i), int64_t(i) + 1, begin, end - begin});
  }
}

void RowTable::push(const Shared& request, Work work, int64_t first, int64_t stop, bool urgent, Lock&) {
  std::deque<Job>& queue = urgent ? urgent_ : later_;
  for (int64_t i = first; i < stop; ++i) queue.push_back({request, work, i});
  if (stop - first == 1) work_.notify_one();
  else if (stop > first) work_.notify_all();
}

// --- the threads ---

// Ends where the table is closed and nothing is left to do: what a job begins is in the queue before it ends.
void RowTable::serve() {
  Bytes memory;
  for (;;) {
    Job job;
    {
      Lock lock(mutex_);
      work_.wait(lock, [&] { return stop_ || !urgent_.empty() || !later_.empty(); });
      std::deque<Job>& queue = urgent_.empty() ? later_ : urgent_;
      if (queue.empty()) return;
      job = std::move(queue.front());
      queue.pop_front();
    }
    run(std::move(job), memory);
  }
}

void RowTable::run(Job job, Bytes& memory) {
  std::vector<std::shared_ptr<void>> ended;  // goes after the lock
  Request& r = *job.request;
  std::string error;
  if (job.work == Work::read) {
    error = read(r, r.ranges[size_t(job.index)], memory);
  } else if (job.work == Work::plan) {
    try {
      sort(r);
    } catch (const std::bad_alloc&) {
      error = "out of memory";
    }
  } else if (job.work == Work::advise) {
    advise(r);
  } else {
    const int64_t n = int64_t(r.slots.size());
    s_.gather(call(r, job.index * kPiece, least(n, (job.index + 1) * kPiece)), true);
  }
  Lock lock(mutex_);
  if (job.work == Work::read) {
    ++counts_.reads, counts_.bytes_read += r.ranges[size_t(job.index)].bytes;
    if (r.error.empty()) r.error = error;
    if (--r.reading == 0) finish_reads(job.request, lock);
  } else if (job.work == Work::plan) {
    r.error = error;
    if (error.empty()) plan_all(job.request, lock);
    else end(job.request, lock);
  } else if (job.work == Work::advise) {
    expand(job.request, lock);
  } else if (--r.expanding == 0) {
    end(job.request, lock);
  }
  job.request.reset();
  ended.swap(ended_);
}

// Rows that were read go to the cache and to those who wait for them.
void RowTable::finish_reads(const Shared& request, Lock& lock) {
  Request& r = *request;
  for (; r.finished < r.own.size(); ++r.finished) {
    const int64_t i = r.own[r.finished], slot = r.unique[size_t(i)];
    if (r.error.empty()) cache_.insert(slot, r.rows.data() + i * row_bytes_);
    reading_.erase(slot);
  }
  std::vector<Shared> borrowers;
  borrowers.swap(r.borrowers);
  for (const Shared& b : borrowers) {
    if (--b->borrowing == 0 && b->reading == 0) settle(b, lock);
  }
  if (r.borrowing == 0) settle(request, lock);
}

// All rows are here, or were to come from a request that failed: then they are planned again.
void RowTable::settle(const Shared& request, Lock& lock) {
  Request& r = *request;
  if (!r.error.empty()) return end(request, lock);
  std::vector<Loan> loans;
  loans.swap(r.loans);
  std::vector<int64_t> again;
  for (const Loan& loan : loans) {
    if (!loan.lender->error.empty()) again.push_back(loan.at);
    else
      std::memcpy(r.rows.data() + loan.at * row_bytes_, loan.lender->rows.data() + loan.from * row_bytes_,
                  size_t(row_bytes_));
  }
  if (!again.empty()) {
    plan(request, again, lock);
    if (r.reading > 0 || r.borrowing > 0) return;
  }
  expand(request, lock);
}

void RowTable::expand(const Shared& request, Lock& lock) {
  Request& r = *request;
  r.expanding = div_up(int64_t(r.slots.size()), kPiece);
  if (r.expanding == 0) return end(request, lock);
  push(request, Work::expand, 0, r.expanding, true, lock);
}

void RowTable::end(const Shared& request, Lock&) {
  Request& r = *request;
  r.done = true;
  r.loans.clear();
  if (r.keep) ended_.push_back(std::move(r.keep));
  if (r.taken) --counts_.outstanding, counts_.held_bytes -= r.held;
  done_.notify_all();
}

GatherRows RowTable::call(const Request& r, int64_t first, int64_t stop) const {
  GatherRows p = s_.rows;
  p.count = stop - first, p.indices = (s_.fd < 0 ? r.slots : r.places).data() + first;
  p.out_dtype = DType(r.out_dtype), p.out = r.out + first * p.V * size_of(p.out_dtype);
  if (s_.fd >= 0) {
    p.N = int64_t(r.unique.size()), p.values = r.rows.data(), p.row = row_bytes_;
    if (p.scale != nullptr) p.scale = r.scales.data(), p.scale_row = scale_bytes_;
  }
  return p;
}

// Lets the system begin to read the pages of all rows.
void RowTable::advise(const Request& r) const {
  std::vector<int64_t> sorted(r.slots);
  std::sort(sorted.begin(), sorted.end());
  const auto base = reinterpret_cast<uintptr_t>(s_.rows.values);
  uintptr_t begin = 0, end = 0;
  auto ask = [&] {
    if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
  };
  for (int64_t slot : sorted) {
    if (slot < 0) continue;
    const uintptr_t row = base + uintptr_t(slot * s_.rows.row), first = row & ~(kPage - 1);
    const uintptr_t stop = (row + uintptr_t(row_bytes_) + kPage - 1) & ~(kPage - 1);
    if (first > end || end == 0) {
      ask();
      begin = first;
    }
    end = std::max(end, stop);
  }
  ask();
}

// Reads the blocks of a range and copies its rows. Returns "" or why that is impossible.
std::string RowTable::read(Request& r, const Range& range, Bytes& memory) const {
  try {
    memory.at_least(most_range_);
  } catch (const OutOfMemory&) {
    return "out of memory";
  }
  int64_t got = 0;
  for (int short_reads = 0; got < range.bytes;) {
    const ssize_t n = s_.read(s_.fd, memory.data() + got, size_t(range.bytes - got), range.begin + got);
    if (n < 0 && errno == EINTR) continue;
    const std::string where = std::to_string(range.bytes) + " bytes at " + std::to_string(range.begin);
    if (n < 0) return "the system refused to read " + where + " (" + std::generic_category().message(errno) + ")";
    // The next read must begin at a block again.
    const int64_t whole = got + n == range.bytes ? n : n / int64_t(kPage) * int64_t(kPage);
    if (whole == 0 && ++short_reads == kPatience) {
      return "the file ended within " + where + ", after " + std::to_string(got + n) + " bytes";
    }
    got += whole;
  }
  for (int64_t i = range.first; i < range.stop; ++i) {
    const int64_t at = r.own[size_t(i)], row = s_.offset + r.unique[size_t(at)] * row_bytes_;
    std::memcpy(r.rows.data() + at * row_bytes_, memory.data() + (row - range.begin), size_t(row_bytes_));
  }
  return "";
}

}  // namespace mk::table

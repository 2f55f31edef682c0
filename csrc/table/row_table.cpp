#include "table/row_table.h"

#include <algorithm>

namespace mk::table {
namespace {

constexpr int64_t kPlanned = 256;          // slots of a prefetch that the caller plans; a thread plans more
constexpr int64_t kInPlace = 32;           // rows of a mapped file that the caller touches itself
constexpr int64_t kChunkRows = 1 << 15;    // of a gather from a file: two chunks are under way
constexpr int64_t kChunkBytes = 16 << 20;  // of their rows
constexpr size_t kRange = 128 << 10;       // bytes of one read, or what one row needs
constexpr size_t kSpare = 4, kSpareBytes = 1 << 20;

}  // namespace

RowTable::RowTable(const Source& source)
    : s_(source),
      row_bytes_(source.rows.V * size_of(source.rows.dtype)),
      scale_bytes_(source.rows.scale == nullptr ? 0 : source.rows.scale_row),
      most_range_(std::max(kRange, size_t(round_up(row_bytes_, kPage)) + kPage)),
      cache_(source.fd < 0 ? 0 : source.cache_rows, row_bytes_) {}

RowTable::~RowTable() { close(); }

int64_t RowTable::wrong(const int64_t* slots, int64_t n) const {
  for (int64_t j = 0; j < n; ++j) {
    if (slots[j] < -1 || slots[j] >= s_.rows.N) return slots[j];
  }
  return -1;
}

int64_t RowTable::gather(const int64_t* slots, int64_t n, char* out, int8_t out_dtype) {
  if (s_.fd < 0 && (!s_.paged || n <= kInPlace)) {
    GatherRows p = s_.rows;
    p.count = n, p.indices = slots, p.out = out, p.out_dtype = DType(out_dtype);
    const int64_t bad = s_.gather(p, false);
    if (bad == -1) {
      const Lock lock(mutex_);
      counts_.rows += n, counts_.hits += n;
    }
    return bad;
  }
  if (const int64_t bad = wrong(slots, n); bad != -1) return bad;
  if (s_.fd >= 0) {
    gather_from_file(slots, n, out, out_dtype);
    return -1;
  }
  Shared request = made(slots, n, out, out_dtype);
  request->urgent = true;
  {
    Lock lock(mutex_);
    begin(request, lock);
  }
  complete(request);
  return -1;
}

// In chunks, so that the memory of a gather is bounded; the next chunk is read while one is expanded.
void RowTable::gather_from_file(const int64_t* slots, int64_t n, char* out, int8_t out_dtype) {
  const int64_t chunk = std::clamp(kChunkBytes / most(row_bytes_, 1), int64_t(1), kChunkRows);
  const int64_t out_bytes = s_.rows.V * size_of(DType(out_dtype));
  Shared before;
  std::string error;
  auto end_of = [&](Shared& request) {
    if (!request) return;
    try {
      complete(request);
    } catch (const ReadError& e) {
      error = e.what();
    }
  };
  for (int64_t j = 0; j < n && error.empty(); j += chunk) {
    Shared request;
    try {
      request = made(slots + j, least(chunk, n - j), out + j * out_bytes, out_dtype);
      request->urgent = true;
      sort(*request);
    } catch (...) {
      end_of(before);  // it writes to memory of the caller's
      throw;
    }
    bool ready;
    {
      Lock lock(mutex_);
      ready = begin(request, lock);
    }
    if (ready) {
      s_.gather(call(*request, 0, int64_t(request->slots.size())), false);
      Lock lock(mutex_);
      end(request, lock);
    }
    end_of(before);
    before = std::move(request);
  }
  end_of(before);
  if (!error.empty()) throw ReadError(error);
}

// Waits for a request of this thread's, and keeps its memory for another.
void RowTable::complete(const Shared& request) {
  Lock lock(mutex_);
  done_.wait(lock, [&] { return request->done; });
  const std::string error = request->error;
  Shared used = request;
  give_back(used, lock);
  if (!error.empty()) throw ReadError(error);
}

RowTable::Shared RowTable::made(const int64_t* slots, int64_t n, char* out, int8_t out_dtype) {
  Shared request;
  {
    const Lock lock(mutex_);
    if (closing_) throw ReadError("the table is closed");
    if (!spare_.empty()) request = std::move(spare_.back()), spare_.pop_back();
  }
  if (!request) request = std::make_shared<Request>();
  request->slots.assign(slots, slots + n);
  request->out = out, request->out_dtype = out_dtype, request->held = -1;
  return request;
}

// A request that a borrower or a worker still holds goes with the last of them.
void RowTable::give_back(Shared& request, Lock&) {
  if (spare_.size() >= kSpare || request.use_count() > 2 || request->rows.size() > kSpareBytes) return;
  request->clear();
  spare_.push_back(std::move(request));
}

int64_t RowTable::prefetch(const int64_t* slots, int64_t n, char* out, int8_t out_dtype, std::shared_ptr<void> keep) {
  if (wrong(slots, n) != -1) return -1;
  const int64_t held = n * (s_.rows.V * size_of(DType(out_dtype)) + (s_.fd < 0 ? 0 : row_bytes_ + scale_bytes_));
  Shared request = made(slots, n, out, out_dtype);
  request->keep = std::move(keep);
  {
    const Lock lock(mutex_);
    const bool first = counts_.outstanding == 0;  // one alone may be larger
    if (counts_.outstanding >= s_.most_tickets || (!first && counts_.held_bytes + held > s_.most_bytes)) return 0;
    ++counts_.outstanding, counts_.held_bytes += held, request->held = held;
  }
  int64_t ticket = 0;
  try {
    if (s_.fd >= 0 && n <= kPlanned) sort(*request);
    Lock lock(mutex_);
    ticket = next_ticket_++;
    tickets_.emplace(ticket, request);
    begin(request, lock);
    ++counts_.tickets;
  } catch (...) {
    const Lock lock(mutex_);
    tickets_.erase(ticket);
    --counts_.outstanding, counts_.held_bytes -= held;
    throw;
  }
  return ticket;
}

bool RowTable::wait(int64_t ticket) {
  Lock lock(mutex_);
  const auto found = tickets_.find(ticket);
  if (found == tickets_.end()) return false;
  const Shared request = found->second;
  done_.wait(lock, [&] { return request->done; });
  const std::string error = request->error;
  lock.unlock();
  drop(ticket);
  if (!error.empty()) throw ReadError(error);
  return true;
}

bool RowTable::done(int64_t ticket) {
  const Lock lock(mutex_);
  const auto found = tickets_.find(ticket);
  return found == tickets_.end() || found->second->done;
}

void RowTable::drop(int64_t ticket) {
  Shared request;  // goes after the lock: it may own the last reference to memory of the caller's
  const Lock lock(mutex_);
  const auto found = tickets_.find(ticket);
  if (found == tickets_.end()) return;
  request = std::move(found->second);
  tickets_.erase(found);
  request->taken = true;
  if (request->done) --counts_.outstanding, counts_.held_bytes -= request->held;
}

void RowTable::close() {
  Lock lock(mutex_);
  closing_ = true;
  stop_ = true;
  std::vector<std::thread> threads;
  threads.swap(threads_);
  lock.unlock();
  work_.notify_all();
  for (std::thread& t : threads) t.join();
  ended_.clear();
}

Counts RowTable::counts() {
  const Lock lock(mutex_);
  Counts c = counts_;
  c.resident = cache_.resident(), c.evictions = cache_.evictions();
  return c;
}

}  // namespace mk::table

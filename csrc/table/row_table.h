// The rows of a table in memory or in a file, gathered by the caller or by threads of the table.
//
// A table in memory is expanded where it lies, a large request in pieces. From a file each row is read once: slots are
// sorted, blocks that touch are merged into one read, O_DIRECT, by a pool of threads; a row of the cache is copied, and
// one that another request is reading is awaited. Every path ends in the same kernel, so all give the same bits.
//
// Nothing here knows torch or Python, and every function may be called from any thread. A request holds its slots and
// its memory until it is done, whoever lost interest in it.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include "params/gather_rows.h"
#include "table/request.h"
#include "table/row_cache.h"

namespace mk::table {

// The system refused a read, or the file ends early.
class ReadError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Gathers rows; returns -1, or a slot outside of [-1, N). `here`: on the calling thread alone.
using Gather = int64_t (*)(const GatherRows&, bool here);
using ReadFunction = ssize_t (*)(int fd, void* memory, size_t bytes, off_t offset);

struct Source {
  GatherRows rows;  // what does not depend on a call; `values` is null where the rows lie in a file
  Gather gather;
  int fd = -1;         // opened with O_DIRECT; the caller's
  int64_t offset = 0;  // of the first row in the file, a multiple of kPage
  int64_t cache_rows = 0;
  int threads = 1;
  bool paged = false;  // memory that the system reads from a disk when it is touched
  int64_t most_tickets = 1, most_bytes = 0;
  ReadFunction read = ::pread;
};

struct Counts {
  int64_t rows = 0, hits = 0, misses = 0, awaited = 0, reads = 0, bytes_read = 0, tickets = 0;
  int64_t outstanding = 0, held_bytes = 0, resident = 0, evictions = 0;
};

class RowTable {
 public:
  explicit RowTable(const Source& source);
  ~RowTable();

  // Fills `out` [n, V]. Returns -1, or a slot outside of [-1, N), and then nothing was written. Throws ReadError.
  int64_t gather(const int64_t* slots, int64_t n, char* out, int8_t out_dtype);

  // Begins to fill `out`, which `keep` owns. Returns a ticket > 0; 0: too many are outstanding; -1: a slot is out of
  // range.
  int64_t prefetch(const int64_t* slots, int64_t n, char* out, int8_t out_dtype, std::shared_ptr<void> keep);
  // Waits until the memory of a ticket is filled, and forgets it. Throws ReadError. False: there is no such ticket.
  bool wait(int64_t ticket);
  bool done(int64_t ticket);
  // Forgets a ticket that nobody waits for. What it began goes on.
  void drop(int64_t ticket);
  // Refuses further calls and waits for what has begun; tickets can still be waited for.
  void close();
  Counts counts();
  int64_t width() const { return s_.rows.V; }
  DType dtype() const { return s_.rows.dtype; }

 private:
  enum class Work : uint8_t { plan, advise, read, expand };
  struct Job {
    std::shared_ptr<Request> request;
    Work work;
    int64_t index;
  };
  using Lock = std::unique_lock<std::mutex>;
  using Shared = std::shared_ptr<Request>;

  int64_t wrong(const int64_t* slots, int64_t n) const;
  Shared made(const int64_t* slots, int64_t n, char* out, int8_t out_dtype);
  void give_back(Shared& request, Lock&);
  void gather_from_file(const int64_t* slots, int64_t n, char* out, int8_t out_dtype);
  void complete(const Shared& request);
  GatherRows call(const Request& r, int64_t first, int64_t stop) const;

  void sort(Request& r) const;
  bool begin(const Shared& request, Lock&);
  bool plan_all(const Shared& request, Lock&);
  void start_threads();
  void plan(const Shared& request, const std::vector<int64_t>& wanted, Lock&);
  void cut_ranges(Request& r, size_t from) const;
  void push(const Shared& request, Work work, int64_t first, int64_t stop, bool urgent, Lock&);
  void settle(const Shared& request, Lock&);
  void finish_reads(const Shared& request, Lock&);
  void expand(const Shared& request, Lock&);
  void end(const Shared& request, Lock&);

  void serve();
  void run(Job job, Bytes& memory);
  void advise(const Request& r) const;
  std::string read(Request& r, const Range& range, Bytes& memory) const;

  const Source s_;
  const int64_t row_bytes_, scale_bytes_;
  size_t most_range_;  // bytes of one read
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job> urgent_, later_;
  std::vector<std::thread> threads_;
  bool closing_ = false, stop_ = false;
  RowCache cache_;
  std::unordered_map<int64_t, std::pair<Shared, int64_t>> reading_;  // slot: who reads it, and to which place
  std::unordered_map<int64_t, Shared> tickets_;
  std::vector<Shared> spare_;                 // for the next calls, with their memory
  std::vector<std::shared_ptr<void>> ended_;  // memory of the caller's, let go without the lock: torch may want its own
  int64_t next_ticket_ = 1;
  Counts counts_;
};

}  // namespace mk::table

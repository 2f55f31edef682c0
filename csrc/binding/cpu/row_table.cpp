// The tables of csrc/table as operators: a table is a number, and a call with one that is not open is an error.
#include "table/row_table.h"

#include <algorithm>
#include <memory>
#include <shared_mutex>
#include <unordered_map>

#include "binding/binding.h"
#include "cpu/tiles/parallel.h"

namespace mk {
namespace {

using table::RowTable;

// Never destroyed: threads of a table that nobody closed may outlive the end of the program.
struct Tables {
  std::shared_mutex mutex;
  struct Entry {
    std::shared_ptr<RowTable> table;
    std::vector<Tensor> memory;  // what it points into
  };
  std::unordered_map<int64_t, Entry> open;
  int64_t next = 1;
};
Tables& tables() {
  static Tables& all = *new Tables;
  return all;
}

std::shared_ptr<RowTable> find(const char* op, int64_t number) {
  Tables& all = tables();
  const std::shared_lock lock(all.mutex);
  const auto found = all.open.find(number);
  check(found != all.open.end(), op, ": there is no open table ", number);
  return found->second.table;
}

// A read error becomes an error of the operator.
template <class Call>
auto reading(const char* op, Call&& call) {
  try {
    return call();
  } catch (const table::ReadError& e) {
    fail(op, ": cannot read: ", e.what());
  }
}

int64_t gather(const GatherRows& p, bool here) {
  if (!here) return MK_CALL(gather_rows, p);
  struct Call {
    const GatherRows& p;
    int64_t wrong;
  } call{p, -1};
  run_tasks_here(1, 0, &call, [](void* context, int64_t, char*) {
    auto& c = *static_cast<Call*>(context);
    c.wrong = MK_CALL(gather_rows, c.p);
  });
  return call.wrong;
}

const char* rows_of(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check(t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), op, ": ", name,
        " must be contiguous, [", rows, ", ", columns, "], in memory");
  check_storage(op, name, t);
  return static_cast<const char*>(t.data_ptr());
}

// What a table of memory and one of a file have in common: rows like `like` [?, V], and their scales.
int64_t opened(const char* op, table::Source& s, const Tensor& like, const std::optional<Tensor>& scale, int64_t block,
               int64_t threads, int64_t tickets, int64_t bytes) {
  GatherRows& p = s.rows;
  Tables::Entry entry{nullptr, {like}};
  check(p.N >= 0 && p.N <= kMaxSize && double(p.N) * double(p.V) < double(int64_t(1) << 58), op,
        ": the table is too large");
  check(block >= 1 && block <= kMaxSize, op, ": block must be in [1, 2^40], got ", block);
  check(threads >= 1 && threads <= 4096, op, ": threads must be in [1, 4096], got ", threads);
  check(tickets >= 1 && bytes >= 0, op, ": tickets must be at least 1 and bytes at least 0");
  p.dtype = dtype_of(op, "values", like), p.row = p.V * size_of(p.dtype), p.block = block;
  check(p.dtype <= DType::f64 || is_compressed(p.dtype), op, ": rows must be floats, int8 or float8_e4m3fn");
  check(is_compressed(p.dtype) == scale.has_value(), op, ": 8-bit rows must have a scale, others must not");
  if (scale.has_value()) {
    const int64_t columns = div_up(p.V, block);
    p.scale = rows_of(op, "scale", *scale, p.N, columns), entry.memory.push_back(*scale);
    p.scale_dtype = dtype_of(op, "scale", *scale);
    check(p.scale_dtype == DType::f32 || p.scale_dtype == DType::e8m0, op,
          ": scale must be float32, or float8_e8m0fnu as uint8");
    p.scale_row = columns * size_of(p.scale_dtype);
  }
  s.gather = &gather, s.threads = int(threads), s.most_tickets = tickets, s.most_bytes = bytes;
  entry.table = std::make_shared<RowTable>(s);
  Tables& all = tables();
  const std::unique_lock lock(all.mutex);
  all.open.emplace(all.next, std::move(entry));
  return all.next++;
}

int64_t open_memory(const Tensor& values, const std::optional<Tensor>& scale, int64_t block, bool paged,
                    int64_t threads, int64_t tickets, int64_t bytes) {
  constexpr const char* op = "row_table_memory";
  table::Source s{};
  s.rows.N = size_at(op, "values", values, 0), s.rows.V = size_at(op, "values", values, 1), s.paged = paged;
  s.rows.values = rows_of(op, "values", values, s.rows.N, s.rows.V);
  return opened(op, s, values, scale, block, threads, tickets, bytes);
}

int64_t open_file(int64_t fd, int64_t offset, int64_t rows, const Tensor& like, const std::optional<Tensor>& scale,
                  int64_t block, int64_t cache_rows, int64_t threads, int64_t tickets, int64_t bytes) {
  constexpr const char* op = "row_table_file";
  table::Source s{};
  s.rows.N = rows, s.rows.V = size_at(op, "like", like, 1), s.fd = int(fd), s.offset = offset,
  s.cache_rows = cache_rows;
  check(fd >= 0 && fd < (1 << 30) && offset >= 0 && offset % int64_t(table::kPage) == 0, op,
        ": fd must be a file, and offset a multiple of ", table::kPage);
  check(cache_rows >= 0 && cache_rows <= kMaxSize && s.rows.V <= kMaxSize, op, ": cache_rows must be in [0, 2^40]");
  return opened(op, s, like, scale, block, threads, tickets, bytes);
}

// Checks the tensors of a call, and returns where the result lies. [..., ] and [..., V].
struct Call {
  const int64_t* slots;
  int64_t n;
  char* out;
  int8_t out_dtype;
};
Call checked(const char* op, const RowTable& table, const Tensor& slots, const Tensor& out) {
  check(slots.is_cpu() && slots.scalar_type() == ScalarType::Long && slots.is_contiguous(), op,
        ": slots must be contiguous int64 in memory");
  const auto shape = slots.sizes(), got = out.sizes();
  bool fits = got.size() == shape.size() + 1 && got[shape.size()] == table.width();
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = got[d] == shape[d];
  const DType dtype = dtype_of(op, "out", out);
  check(fits && out.is_cpu() && out.is_contiguous() && dtype <= DType::f64 &&
            (is_compressed(table.dtype()) || (dtype == DType::f64) == (table.dtype() == DType::f64)),
        op, ": out must be contiguous [..., ", table.width(), "] floats in memory, float64 beside float64 alone");
  check_storage(op, "slots", slots), check_storage(op, "out", out);
  return {static_cast<const int64_t*>(slots.data_ptr()), slots.numel(), static_cast<char*>(out.mutable_data_ptr()),
          int8_t(dtype)};
}

int64_t gather_into(int64_t number, const Tensor& slots, const Tensor& out) {
  constexpr const char* op = "row_table_gather";
  const std::shared_ptr<RowTable> table = find(op, number);
  const Call c = checked(op, *table, slots, out);
  return reading(op, [&] { return table->gather(c.slots, c.n, c.out, c.out_dtype); });
}

int64_t prefetch(int64_t number, const Tensor& slots, const Tensor& out) {
  constexpr const char* op = "row_table_prefetch";
  const std::shared_ptr<RowTable> table = find(op, number);
  const Call c = checked(op, *table, slots, out);
  return reading(op, [&] { return table->prefetch(c.slots, c.n, c.out, c.out_dtype, std::make_shared<Tensor>(out)); });
}

bool wait(int64_t number, int64_t ticket) {
  const std::shared_ptr<RowTable> table = find("row_table_wait", number);
  return reading("row_table_wait", [&] { return table->wait(ticket); });
}

bool done(int64_t number, int64_t ticket) { return find("row_table_done", number)->done(ticket); }

void drop(int64_t number, int64_t ticket) { find("row_table_drop", number)->drop(ticket); }

// Waits for what has begun, and forgets the table.
void close(int64_t number) {
  Tables& all = tables();
  Tables::Entry entry;
  {
    const std::unique_lock lock(all.mutex);
    const auto found = all.open.find(number);
    if (found == all.open.end()) return;
    entry = std::move(found->second);
    all.open.erase(found);
  }
  entry.table->close();
}

// Fills `counts` with those of Counts, in their order.
void counted(int64_t number, const Tensor& counts) {
  constexpr const char* op = "row_table_counts";
  const table::Counts c = find(op, number)->counts();
  const int64_t all[] = {c.rows,    c.hits,        c.misses,     c.awaited,  c.reads,    c.bytes_read,
                         c.tickets, c.outstanding, c.held_bytes, c.resident, c.evictions};
  const int64_t n = int64_t(sizeof all / sizeof *all);
  check(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 1 &&
            counts.size(0) == n,
        op, ": counts must be contiguous int64 [", n, "]");
  check_storage(op, "counts", counts);
  std::copy_n(all, n, static_cast<int64_t*>(counts.mutable_data_ptr()));
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_FRAGMENT(memkernels_cpu, m) {
  m.def(
      "row_table_memory(Tensor values, Tensor? scale, int block, bool paged, int threads, int tickets, int bytes) "
      "-> int");
  m.def(
      "row_table_file(int fd, int offset, int rows, Tensor like, Tensor? scale, int block, int cache_rows, "
      "int threads, int tickets, int bytes) -> int");
  m.def("row_table_gather(int table, Tensor slots, Tensor(a!) out) -> int");
  m.def("row_table_prefetch(int table, Tensor slots, Tensor(a!) out) -> int");
  m.def("row_table_wait(int table, int ticket) -> bool");
  m.def("row_table_done(int table, int ticket) -> bool");
  m.def("row_table_drop(int table, int ticket) -> ()");
  m.def("row_table_close(int table) -> ()");
  m.def("row_table_counts(int table, Tensor(a!) counts) -> ()");
}
MK_REGISTER_IN(memkernels_cpu, CompositeExplicitAutograd, m) {
  MK_OPERATOR(m, "row_table_memory", &mk::open_memory);
  MK_OPERATOR(m, "row_table_file", &mk::open_file);
  MK_OPERATOR(m, "row_table_gather", &mk::gather_into);
  MK_OPERATOR(m, "row_table_prefetch", &mk::prefetch);
  MK_OPERATOR(m, "row_table_wait", &mk::wait);
  MK_OPERATOR(m, "row_table_done", &mk::done);
  MK_OPERATOR(m, "row_table_drop", &mk::drop);
  MK_OPERATOR(m, "row_table_close", &mk::close);
  MK_OPERATOR(m, "row_table_counts", &mk::counted);
}

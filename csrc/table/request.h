// One gather or prefetch: where its rows come from, and how far it is.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "table/bytes.h"

namespace mk::table {

// Rows of a file that one read brings: whole blocks around them.
struct Range {
  int64_t first, stop;   // of Request::own
  int64_t begin, bytes;  // of the file
};

struct Request;

// A row that an earlier request is reading.
struct Loan {
  int64_t at;  // where it is wanted
  std::shared_ptr<Request> lender;
  int64_t from;  // where it will lie there
};

struct Request {
  // The call. `keep` owns the memory of `out`.
  std::vector<int64_t> slots;  // [n]
  char* out = nullptr;
  int8_t out_dtype = 0;
  std::shared_ptr<void> keep;
  int64_t held = 0;     // bytes that count against the most that tickets hold; < 0: no ticket
  bool urgent = false;  // somebody waits for it

  // Of a table on disk: each row once, then expanded by place.
  std::vector<int64_t> unique;  // [m] slots, ascending
  std::vector<int64_t> places;  // [n] into `unique`, -1: zeros
  Bytes rows, scales;           // [m, bytes of a row], [m, bytes of its scales]
  std::vector<int64_t> own;     // places in `unique` that this request reads
  std::vector<Range> ranges;
  std::vector<Loan> loans;
  std::vector<std::shared_ptr<Request>> borrowers;

  // Under the table's lock.
  int64_t reading = 0, borrowing = 0, expanding = 0;  // ranges, lenders and pieces that are not done
  size_t finished = 0;                                // of `own`: read, and lent no more
  bool done = false, taken = false;
  std::string error;

  void clear() {
    slots.clear(), unique.clear(), places.clear(), own.clear(), ranges.clear(), loans.clear(), borrowers.clear();
    keep.reset(), error.clear();
    out = nullptr, held = reading = borrowing = expanding = 0, finished = 0, urgent = done = taken = false;
  }
};

}  // namespace mk::table

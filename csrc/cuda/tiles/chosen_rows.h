// Shared by the ops on chosen slots: rows are gathered, multiplied, summed into slots, and written in the order of
// slots.
#pragma once

#include "cuda/tiles/device.h"
#include "params/indexer_search.h"

namespace mk::cuda {

// out[t] = factor * sum_j weights[t, j] rows[index[t, j]]; a row is `width` numbers. (sparse_read.cu)
struct Gather {
  Choice choice;
  int64_t width;
  View rows, weights, out;
  float factor;
};
void gather_chosen(const Device& device, const char* name, const Gather& g);

// out[t, j] = <tokens[t], rows[index[t, j]]>, 0 where there is no slot. (sparse_read.cu)
struct Products {
  Choice choice;
  int64_t width;
  View rows, tokens, out;
};
void multiply_chosen(const Device& device, const char* name, const Products& p);

// A bit for every head of an entry (t, j), at (batch * tokens + t) * k + j.
struct Signs {
  static constexpr int kBits = 16;  // of a word: the heads of a product of 16 rows
  uint16_t* words = nullptr;
  int64_t per_entry = 0;

  MK_BOTH uint16_t* of(int64_t entry) const { return words + entry * per_entry; }
  MK_BOTH bool has(int64_t entry, int64_t head) const { return of(entry)[head / kBits] >> head % kBits & 1; }
};

// out[i] = factor * sum over entries (t, j) with index[t, j] = i, in the order of the tokens, of weights[t, j]
// tokens[t]. Where there are `signs`, a token has a row for every head, and those whose sign is set are summed, times
// their head's weight. Writes all of `out`, if that is wanted. (segments.cu)
struct ChosenSum {
  Choice choice;
  int64_t width;
  MemoryGradient out;
  View tokens;   // null: only the weights are summed, width 1
  View weights;  // [lead, T, k]
  float factor;
  Heads heads = {};
  Signs signs = {};
};
void sum_chosen(const Device& device, const char* name, const ChosenSum& s);

// The entries (t, j) of all batches, sorted by the row that they name; those of one row stay in the order of the
// tokens.
struct SortedEntries {
  uint32_t* rows;    // entries that name no slot have row `end` and come last
  uint32_t* places;  // (batch * tokens + t) * k + j
  int64_t count, end;
};
// `result`: a view with `rows` rows; batches that share its memory share rows. Null: batch b has the rows from b N on.
// The entries of tokens whose `token_mask` is not set name no slot.
// (segments.cu)
SortedEntries sort_entries(const Device& device, const char* name, const Choice& choice, const View& result,
                           int64_t rows, const View& token_mask = {});

}  // namespace mk::cuda

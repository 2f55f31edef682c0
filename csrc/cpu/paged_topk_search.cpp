// paged_topk_search:  topk_search over frames of S slots, s[t, f, j] = scale <q_t, k_fj> + mask_fj, where (f, j) is
// slot S pages[f] + j. The search is in cpu/tiles/search.h: a frame is a run of blocks, and slot numbers take the place
// of positions, so the cost is that of topk_search. What an earlier call found sets the first thresholds.
//
// Gradient: the position of a slot is found again by bisection among the pages. Then it is that of topk_search over
// N = F S slots; what came from the earlier call goes back to its scores.
#include "params/paged_topk_search.h"

#include <algorithm>

#include "cpu/tiles/search.h"
#include "cpu/tiles/search_gradient.h"

namespace mk::MK_ISA {
namespace {

template <class F>
void forward(const PagedTopkSearch& p) {
  const TopkSearch& s = p.search;
  search(
      s, size_t(s.k) * sizeof(F) + 64,
      [&](int64_t batch, int64_t t, const F* scores, const int64_t* slots, int64_t n, Arena) {
        auto* score = reinterpret_cast<F*>(TokenRows(s.scores, s.lead, batch, s.T).row(t));
        auto* slot = reinterpret_cast<int64_t*>(TokenRows(s.indices, s.lead, batch, s.T).row(t));
        for (int64_t j = 0; j < s.k; ++j) {
          score[j] = j < n ? scores[j] : -kInf<F>;
          slot[j] = j < n ? slots[j] : -1;
        }
      },
      &p.frames);
}

// A frame and its page. Sorted by page, they tell the position of a slot.
struct Held {
  int64_t page, frame;
  bool operator<(const Held& other) const { return page < other.page; }
};

// Sorts the frames of a batch that hold a page. Returns their number.
int64_t by_page(const Frames& frames, const Lead& lead, int64_t batch, Held* held) {
  const auto* pages = reinterpret_cast<const int64_t*>(frames.pages.batch(lead, batch));
  int64_t n = 0;
  for (int64_t f = 0; f < frames.F; ++f) {
    if (pages[f] >= 0) held[n++] = {pages[f], f};
  }
  std::sort(held, held + n);
  return n;
}

// f * S + j of a slot, or -1.
int64_t position_of(int64_t slot, const Held* held, int64_t n, int64_t S) {
  if (slot < 0 || n == 0 || S == 0) return -1;
  const Held* at = std::lower_bound(held, held + n, Held{slot / S, 0});
  return at == held + n || at->page != slot / S ? -1 : at->frame * S + slot % S;
}

// View of contiguous int64 [lead..., T, k].
View contiguous(int64_t* data, const Choice& c) {
  View v;
  v.data = reinterpret_cast<char*>(data), v.dtype = DType::i64, v.row = c.k * int64_t(sizeof(int64_t));
  int64_t bytes = c.T * v.row;
  for (int d = c.lead.rank - 1; d >= 0; --d) v.lead[d] = bytes, bytes *= c.lead.size[d];
  return v;
}

const int64_t* slots_of(const View& v, const Choice& c, int64_t batch, int64_t t) {
  return reinterpret_cast<const int64_t*>(TokenRows(v, c.lead, batch, c.T).row(t));
}

// d_best[t, i] = d_scores[t, j] where slot j of the result is slot i of the earlier call.
template <class F>
void best_gradient(const PagedTopkSearchBackward& p, const Choice& c) {
  const int64_t tokens = c.tokens();
  parallel(c.all_tokens(), size_t(c.k) * sizeof(F) + 64, [&](int64_t task, char* memory) {
    const int64_t batch = task / tokens, t = task % tokens;
    F* d = Arena(memory).take<F>(c.k);
    read_row<F>(TokenRows(p.search.d_scores, c.lead, batch, c.T).row(t), p.search.d_scores.dtype, c.k, d);
    const int64_t *places = slots_of(c.indices, c, batch, t), *slots = slots_of(p.slots, c, batch, t);
    const int64_t* best = slots_of(p.frames.best_slots, c, batch, t);
    auto* out = reinterpret_cast<F*>(TokenRows(p.d_best, c.lead, batch, c.T).row(t));
    std::fill_n(out, c.k, F(0));
    for (int64_t j = 0; j < c.k; ++j) {
      if (slots[j] < 0 || places[j] >= 0) continue;
      const int64_t i = std::find(best, best + c.k, slots[j]) - best;
      if (i < c.k) out[i] += d[j];
    }
  });
}

template <class F>
void backward(PagedTopkSearchBackward p) {
  Choice& c = p.search.choice;
  const int64_t tokens = c.tokens(), frames = p.frames.F;
  Buffer<int64_t> places(c.all_tokens() * c.k), counts(c.lead.batches());
  Buffer<Held> held(c.lead.batches() * frames);
  parallel(c.lead.batches(), 0, [&](int64_t batch, char*) {
    counts.data()[batch] = by_page(p.frames, c.lead, batch, held.data() + batch * frames);
  });
  c.indices = contiguous(places.data(), c);
  parallel(c.all_tokens(), 0, [&](int64_t task, char*) {
    const int64_t batch = task / tokens, t = task % tokens;
    const int64_t* slots = slots_of(p.slots, c, batch, t);
    auto* row = reinterpret_cast<int64_t*>(TokenRows(c.indices, c.lead, batch, c.T).row(t));
    std::transform(slots, slots + c.k, row, [&](int64_t slot) {
      return position_of(slot, held.data() + batch * frames, counts.data()[batch], p.frames.S);
    });
  });
  if (p.d_best) best_gradient<F>(p, c);
  Buffer<F> ds(c.all_tokens() * c.k);
  search_gradient(p.search, ds.data(), Sum<F>{}, 0, [&](int64_t batch, int64_t t, F* d, Arena) {
    const int64_t* position = slots_of(c.indices, c, batch, t);
    read_row<F>(TokenRows(p.search.d_scores, c.lead, batch, c.T).row(t), p.search.d_scores.dtype, c.k, d);
    for (int64_t j = 0; j < c.k; ++j) d[j] = position[j] < 0 ? F(0) : d[j];
  });
}

}  // namespace

void paged_topk_search(const PagedTopkSearch& p) {
  if (p.search.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void paged_topk_search_backward(const PagedTopkSearchBackward& p) {
  if (p.search.query.dtype == DType::f64) backward<double>(p);
  else backward<float>(p);
}

}  // namespace mk::MK_ISA

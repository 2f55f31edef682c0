// A read of the slots chosen by a search, and its gradient. Shared by topk_read and product_key_read.
//   forward:   p[t, j] = softmax_j(s[t, j]),   r_t = sum_j p[t, j] v_{i_j},   lse_t = log sum_j exp(s[t, j])
//   backward:  dp[t, j] = <dr_t, v_{i_j}> + d_weights[t, j],   ds = p (dp - sum_j p dp + dlse_t),
//              dv_i = sum_{i_j = i} p[t, j] dr_t
//
// A token is read as soon as its search ends: scores stay in float32, and scores and weights are still in cache. The
// backward needs only indices and weights and touches only chosen rows.
#pragma once

#include "cpu/tiles/segments.h"

namespace mk::MK_ISA {

// w = softmax of scores in descending order, padded to whole registers. If any score is NaN, the first is. Returns the
// logarithm of the sum of their exponentials.
template <class F>
F softmax_row(F* w, int64_t n) {
  constexpr int W = kLanes<F>;
  if (n == 0) return -kInf<F>;
  for (int64_t j = n; j < round_up(n, W); ++j) w[j] = -kInf<F>;
  const F top = w[0];
  Vec<F> total = fill<F>(0);
  for (int64_t j = 0; j < n; j += W) {
    const Vec<F> e = exp<F>(load<F>(w + j) - top);
    total += e;
    store<F>(w + j, e);
  }
  if (std::isinf(top)) return top;  // beside an infinite score, finite scores have weight 0, and its own weight is NaN
  const F whole = sum<F>(total), inverse = F(1) / whole;
  for (int64_t j = 0; j < n; ++j) w[j] *= inverse;
  return top + std::log(whole);
}

// Called at the end of a token's search: writes its read, indices, weights and lse.
template <class F>
class ChosenRead {
 public:
  // choice.indices are an output.
  ChosenRead(const Choice& choice, int64_t V, const SlotView& values, const View& read, const View& weights,
             const View& lse)
      : c_(choice), V_(V), values_(values), read_(read), weights_(weights), lse_(lse) {}
  // The scratch memory of a call.
  size_t bytes() const {
    Arena measure;
    Memory(measure, c_.k, V_);
    return measure.used();
  }
  void operator()(int64_t batch, int64_t t, const F* scores, const int64_t* slots, int64_t n, Arena arena) const {
    Memory m(arena, c_.k, V_);
    auto* index = reinterpret_cast<int64_t*>(TokenRows(c_.indices, c_.lead, batch, c_.T).row(t));
    for (int64_t j = 0; j < n; ++j) m.weights[j] = scores[j], index[j] = slots[j];
    *reinterpret_cast<F*>(TokenRows(lse_, c_.lead, batch, c_.T).row(t)) = softmax_row<F>(m.weights, n);
    const char* values = values_.batch(c_.lead, batch);
    const RowScale scale(values_, c_.lead, batch);
    for (int64_t j = 0; j < n; ++j) {
      m.list.push(values + index[j] * values_.row, m.weights[j] * scale.template at<F>(index[j]));
    }
    for (int64_t j = n; j < c_.k; ++j) m.weights[j] = 0, index[j] = -1;
    m.list.close();
    std::memcpy(TokenRows(weights_, c_.lead, batch, c_.T).row(t), m.weights, size_t(c_.k) * sizeof(F));
    weighted_sum(values_.dtype, m.list.rows, m.list.weights, n, V_, m.read);
    write_row<F>(m.read, V_, read_.dtype, TokenRows(read_, c_.lead, batch, c_.T).row(t));
  }

 private:
  struct Memory {
    RowList<F> list;
    F *weights, *read;
    Memory(Arena& arena, int64_t k, int64_t V)
        : list(RowList<F>::take(arena, k)),
          weights(arena.take<F>(round_up(k, kLanes<F>))),
          read(arena.take<F>(round_up(V, kLanes<F>))) {}
  };
  const Choice& c_;
  int64_t V_;
  const SlotView& values_;
  const View &read_, &weights_, &lse_;
};

// The gradient of such a read: ds token by token, then the terms of the gradient of the values. A missing d_read,
// d_weights or d_lse is zero.
template <class F>
class ChosenReadGradient {
 public:
  ChosenReadGradient(const Choice& choice, int64_t V, const SlotView& values, const View& weights, const View& d_read,
                     const View& d_weights, const View& d_lse, const MemoryGradient& d_values)
      : c_(choice),
        V_(V),
        values_(values),
        weights_(weights),
        d_read_(d_read),
        d_weights_(d_weights),
        d_lse_(d_lse),
        d_values_(d_read ? d_values : MemoryGradient{}),
        summed_(d_values_ ? c_.all_tokens() * c_.k : 0),
        rows_(d_values_ ? d_read : View{}, c_.lead, c_.T) {
    if (d_values && !d_values_) std::memset(d_values.view.data, 0, size_t(d_values.rows * V * size_of(values.dtype)));
  }
  // The scratch memory of ds().
  size_t bytes() const {
    Arena measure;
    Memory(measure, c_.k, V_);
    return measure.used();
  }
  void ds(int64_t batch, int64_t t, F* d, Arena arena) {
    Memory m(arena, c_.k, V_);
    const auto* index = reinterpret_cast<const int64_t*>(TokenRows(c_.indices, c_.lead, batch, c_.T).row(t));
    const auto* w = reinterpret_cast<const F*>(TokenRows(weights_, c_.lead, batch, c_.T).row(t));
    if (d_values_) std::copy(w, w + c_.k, summed_.data() + (batch * c_.tokens() + t) * c_.k);
    for (int64_t j = 0; j < c_.k; ++j) d[j] = 0;
    if (d_read_) {
      const char* values = values_.batch(c_.lead, batch);
      const RowScale scale(values_, c_.lead, batch);
      for (int64_t j = 0; j < c_.k; ++j) {
        if (index[j] >= 0) m.list.push(values + index[j] * values_.row, F(0));
      }
      m.list.close();
      for (int64_t v = V_; v < round_up(V_, kLanes<F>); ++v) m.read[v] = 0;
      const TokenRows d_read(d_read_, c_.lead, batch, c_.T);
      read_row<F>(d_read.row(t), d_read.dtype, V_, m.read);
      row_products(values_.dtype, m.list.rows, m.list.n, V_, m.read, m.products);
      const F* product = m.products;
      for (int64_t j = 0; j < c_.k; ++j) d[j] = index[j] >= 0 ? *product++ * scale.template at<F>(index[j]) : F(0);
    }
    if (d_weights_) {
      const auto* dw = reinterpret_cast<const F*>(TokenRows(d_weights_, c_.lead, batch, c_.T).row(t));
      for (int64_t j = 0; j < c_.k; ++j) d[j] += dw[j];
    }
    F mean = 0;
    for (int64_t j = 0; j < c_.k; ++j) mean += index[j] < 0 ? F(0) : w[j] * d[j];
    if (d_lse_) mean -= *reinterpret_cast<const F*>(TokenRows(d_lse_, c_.lead, batch, c_.T).row(t));
    for (int64_t j = 0; j < c_.k; ++j) d[j] = index[j] < 0 ? F(0) : w[j] * (d[j] - mean);
  }
  // Valid once ds() of every token has run. If the gradient of the values is not wanted, it has no `out`.
  Sum<F> values() { return {d_values_, V_, summed_.data(), F(1), rows_.data(), d_read_.dtype}; }

 private:
  struct Memory {
    RowList<F> list;
    F *read, *products;
    Memory(Arena& arena, int64_t k, int64_t V)
        : list(RowList<F>::take(arena, k)), read(arena.take<F>(round_up(V, kLanes<F>))), products(arena.take<F>(k)) {}
  };
  const Choice& c_;
  int64_t V_;
  const SlotView& values_;
  const View &weights_, &d_read_, &d_weights_, &d_lse_;
  const MemoryGradient d_values_;
  Buffer<F> summed_;
  TokenPointers rows_;
};

}  // namespace mk::MK_ISA

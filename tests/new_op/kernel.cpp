// decay_read:  r_t = g sum_i d_i <q_t, k_i> v_i
// backward:    dq_t = g sum_i d_i <dr_t, v_i> k_i,  dk_i = g d_i sum_t <dr_t, v_i> q_t,
//              dv_i = g d_i sum_t <q_t, k_i> dr_t,  dd_i = g sum_t <q_t, k_i> <dr_t, v_i>
//
// Plain loops on one thread, sums in double: only the places of the files of this op matter.
#include <vector>

#include "cpu/tiles/rows.h"
#include "params/decay_read.h"

namespace mk::MK_ISA {
namespace {

using Numbers = std::vector<double>;

// The rows of a tensor as double.
template <class F>
std::vector<Numbers> rows(const char* first, int64_t stride, DType dtype, int64_t count, int64_t width) {
  std::vector<Numbers> result(size_t(count), Numbers(size_t(width), 0.0));
  std::vector<F> row(size_t(width) + 1);
  for (int64_t i = 0; i < count; ++i) {
    read_row<F>(first + i * stride, dtype, width, row.data());
    for (int64_t c = 0; c < width; ++c) result[size_t(i)][size_t(c)] = double(row[size_t(c)]);
  }
  return result;
}

double dot(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

void add(double factor, const Numbers& x, Numbers& to) {
  for (size_t c = 0; c < x.size(); ++c) to[c] += factor * x[c];
}

// to += x, numbers of F.
template <class F>
void accumulate(const Numbers& x, char* to) {
  for (size_t c = 0; c < x.size(); ++c) reinterpret_cast<F*>(to)[c] += F(x[c]);
}

template <class F>
struct Memory {
  std::vector<Numbers> keys, values, decay;

  Memory(const DecayRead& p, int64_t b)
      : keys(rows<F>(p.keys.batch(p.lead, b), p.keys.row, p.keys.dtype, p.N, p.K)),
        values(rows<F>(p.values.batch(p.lead, b), p.values.row, p.values.dtype, p.N, p.V)),
        decay(rows<F>(p.decay.batch(p.lead, b), p.decay.row, p.decay.dtype, p.N, 1)) {}
};

template <class F>
void forward(const DecayRead& p) {
  std::vector<F> out(size_t(p.V));
  for (int64_t b = 0; b < p.lead.batches(); ++b) {
    const Memory<F> memory(p, b);
    const TokenRows query(p.query, p.lead, b, p.T), read(p.read, p.lead, b, p.T);
    for (int64_t t = 0; t < p.lead.folded() * p.T; ++t) {
      const Numbers q = rows<F>(query.row(t), 0, query.dtype, 1, p.K)[0];
      Numbers sum(size_t(p.V), 0.0);
      for (size_t i = 0; i < size_t(p.N); ++i) {
        add(p.gain * memory.decay[i][0] * dot(q, memory.keys[i]), memory.values[i], sum);
      }
      for (size_t c = 0; c < sum.size(); ++c) out[c] = F(sum[c]);
      write_row<F>(out.data(), p.V, read.dtype, read.row(t));
    }
  }
}

template <class F>
void backward(const DecayReadBackward& d) {
  const DecayRead& p = d.forward;
  const size_t N = size_t(p.N);
  for (int64_t b = 0; b < p.lead.batches(); ++b) {
    const Memory<F> memory(p, b);
    const TokenRows query(p.query, p.lead, b, p.T), d_read(d.d_read, p.lead, b, p.T);
    const TokenRows d_query(d.d_query, p.lead, b, p.T);
    std::vector<Numbers> d_keys(N, Numbers(size_t(p.K))), d_values(N, Numbers(size_t(p.V))), d_decay(N, Numbers(1));
    for (int64_t t = 0; t < p.lead.folded() * p.T; ++t) {
      const Numbers q = rows<F>(query.row(t), 0, query.dtype, 1, p.K)[0];
      const Numbers dr = rows<F>(d_read.row(t), 0, d_read.dtype, 1, p.V)[0];
      Numbers dq(size_t(p.K), 0.0);
      for (size_t i = 0; i < N; ++i) {
        const double decay = p.gain * memory.decay[i][0];
        const double score = dot(q, memory.keys[i]), gradient = dot(dr, memory.values[i]);
        add(decay * gradient, memory.keys[i], dq), add(decay * gradient, q, d_keys[i]);
        add(decay * score, dr, d_values[i]), d_decay[i][0] += p.gain * score * gradient;
      }
      if (d_query) accumulate<F>(dq, d_query.row(t));
    }
    for (int64_t i = 0; i < p.N; ++i) {
      if (d.d_keys) accumulate<F>(d_keys[size_t(i)], d.d_keys.batch(p.lead, b) + i * d.d_keys.row);
      if (d.d_values) accumulate<F>(d_values[size_t(i)], d.d_values.batch(p.lead, b) + i * d.d_values.row);
      if (d.d_decay) accumulate<F>(d_decay[size_t(i)], d.d_decay.batch(p.lead, b) + i * d.d_decay.row);
    }
  }
}

}  // namespace

void decay_read(const DecayRead& p) {
  if (p.query.dtype == DType::f64) forward<double>(p);
  else forward<float>(p);
}

void decay_read_backward(const DecayReadBackward& d) {
  if (d.forward.query.dtype == DType::f64) backward<double>(d);
  else backward<float>(d);
}

}  // namespace mk::MK_ISA

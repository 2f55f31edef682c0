#include "params/additive_read.h"

#include "binding/saved_read.h"

namespace mk {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs and fills in `p`, except for the results.
struct Inputs {
  Arguments args;
  const Tensor *query, *keys, *values, *vector, *mask, *range;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& u,
         const std::optional<Tensor>& m, const std::optional<Tensor>& r, AdditiveRead& p)
      : args(op) {
    p.T = size_at(op, "query", q, -2), p.K = size_at(op, "query", q, -1);
    p.N = size_at(op, "keys", k, -2), p.V = size_at(op, "values", v, -1);
    query = &args.add("query", q, Side::tokens, {p.T, p.K});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    vector = &args.add("score_vector", u, Side::memory, {p.K});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    range = args.ranges(r, p.T);
    args.floats({query, keys, values, vector});
    args.mask(mask, *query);
  }
  void fill(AdditiveRead& p) {
    p.lead = args.lead();
    p.query = args.view(query, 2), p.keys = args.view(keys, 2), p.values = args.view(values, 2);
    p.vector = args.view(vector, 1), p.mask = args.view(mask, 1);
    p.range = args.view(range, 2);
  }
};

Three forward(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& score_vector,
              const std::optional<Tensor>& slot_mask, const std::optional<Tensor>& slot_range) {
  AdditiveRead p;
  Inputs in("additive_read", query, keys, values, score_vector, slot_mask, slot_range, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.T, p.V}), query.scalar_type());
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  Tensor rest = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(query.scalar_type()));
  p.read = in.args.view(read, 2), p.lse = in.args.view(lse, 1), p.lse_rest = in.args.view(rest, 1);
  MK_CALL(additive_read, p);
  return {read, lse, rest};
}

Five backward(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& score_vector,
              const std::optional<Tensor>& slot_mask, const std::optional<Tensor>& slot_range, const Tensor& read,
              const Tensor& lse, const Tensor& lse_rest, const std::optional<Tensor>& d_read,
              const std::optional<Tensor>& d_lse, const std::vector<bool>& wants) {
  AdditiveReadBackward p;
  AdditiveRead& f = p.forward;
  Inputs in("additive_read_backward", query, keys, values, score_vector, slot_mask, slot_range, f);
  in.args.require(wants.size() == 5, "wants must have 5 entries");
  const SavedRead saved(in.args, *in.query, f.T, f.V, read, lse, lse_rest, d_read, d_lse);
  in.fill(f);
  saved.fill(in.args, p);
  Gradient d_query(in.args, in.query, wants[0], Side::tokens, 2), d_keys(in.args, in.keys, wants[1], Side::memory, 2);
  Gradient d_values(in.args, in.values, wants[2], Side::memory, 2);
  Gradient d_vector(in.args, in.vector, wants[3], Side::memory, 1), d_mask(in.args, in.mask, wants[4], Side::memory, 1);
  p.d_query = d_query.view(), p.d_keys = d_keys.view(), p.d_values = d_values.view();
  p.d_vector = d_vector.view(), p.d_mask = d_mask.view();
  if (f.lead.batches() * f.lead.folded() * f.T * f.N == 0) {
    for (Gradient* g : {&d_query, &d_keys, &d_values, &d_vector, &d_mask}) g->zero();
  } else {
    MK_CALL(additive_read_backward, p);
  }
  return {d_query.result(), d_keys.result(), d_values.result(), d_vector.result(), d_mask.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "additive_read", &mk::forward);
  MK_OPERATOR(m, "additive_read_backward", &mk::backward);
}

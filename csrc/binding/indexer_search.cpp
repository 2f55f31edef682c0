#include "params/indexer_search.h"

#include "binding/chosen_slots.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs.
struct Inputs {
  Arguments args;
  int64_t T, H, K, N;
  const Tensor *query, *weights, *keys, *mask, *range;

  Inputs(const char* op, const Tensor& q, const Tensor& w, const Tensor& k, const Optional& m, const Optional& r)
      : args(op) {
    T = size_at(op, "query", q, -3), H = size_at(op, "query", q, -2), K = size_at(op, "query", q, -1);
    N = size_at(op, "keys", k, -2);
    args.require(K == 0 || H <= kMaxSize / K, "the queries of a token are too large");
    query = &args.add("query", q, Side::tokens, {T, H, K});
    weights = &args.add("head_weights", w, Side::tokens, {T, H});
    keys = &args.add("keys", k, Side::memory, {N, K});
    mask = args.add("slot_mask", m, Side::memory, {N});
    range = args.ranges(r, T);
    args.floats({query, weights, keys});
    args.mask(mask, *query);
  }
  Heads heads() const {
    const int64_t bytes = size_of(dtype_of(args.op(), "query", *query));
    return {H, query->stride(query->dim() - 2) * bytes, args.view(weights, 2)};
  }
};

Two forward(const Tensor& query, const Tensor& head_weights, const Tensor& keys, const Optional& slot_mask,
            const Optional& slot_range, int64_t k, double scale) {
  Inputs in("indexer_search", query, head_weights, keys, slot_mask, slot_range);
  in.args.require(k >= 1, "k must be at least 1");
  IndexerSearch p;
  TopkSearch& s = p.search;
  s.lead = in.args.lead();
  s.T = in.T, s.N = in.N, s.K = in.K, s.k = k, s.scale = scale;
  s.query = in.args.view(in.query, 3), s.keys = in.args.view(in.keys, 2);
  s.mask = in.args.view(in.mask, 1), s.range = in.args.view(in.range, 2);
  p.heads = in.heads();
  Tensor scores = empty(in.args.sizes(Side::tokens, {in.T, k}), query.scalar_type());
  Tensor indices = empty(in.args.sizes(Side::tokens, {in.T, k}), ScalarType::Long);
  s.scores = in.args.view(scores, 2), s.indices = in.args.view(indices, 2);
  MK_CALL(indexer_search, p);
  return {scores, indices};
}

Four backward(const Tensor& query, const Tensor& head_weights, const Tensor& keys, const Optional& slot_mask,
              const Optional& slot_range, const Tensor& indices, const Optional& d_scores, int64_t k, double scale,
              const std::vector<bool>& wants) {
  Inputs in("indexer_search_backward", query, head_weights, keys, slot_mask, slot_range);
  in.args.require(wants.size() == 4, "wants must have 4 entries");
  in.args.require(d_scores.has_value(), "d_scores must be given");
  IndexerSearchBackward p;
  TopkSearchBackward& s = p.search;
  Choice& c = s.choice;
  c.T = in.T, c.k = k, c.N = in.N, s.K = in.K, s.scale = scale;
  const Tensor* chosen = &in.args.add("indices", indices, Side::tokens, {in.T, k});
  const Tensor* ds = in.args.add("d_scores", d_scores, Side::tokens, {in.T, k});
  in.args.require(chosen->scalar_type() == ScalarType::Long, "indices must be int64");
  in.args.floats({in.query, ds});
  c.lead = in.args.lead();
  c.indices = in.args.view(chosen, 2);
  check_indices(in.args.op(), c);
  s.query = in.args.view(in.query, 3), s.keys = in.args.view(in.keys, 2), s.d_scores = in.args.view(ds, 2);
  p.heads = in.heads();
  const bool masked = in.mask != nullptr && in.mask->scalar_type() != ScalarType::Bool;
  const Gradient d_query(in.args, in.query, wants[0], Side::tokens, 3),
      d_weights(in.args, in.weights, wants[1], Side::tokens, 2);
  const ChosenGradient d_keys(in.args, in.keys, wants[2], 2, *chosen),
      d_mask(in.args, in.mask, wants[3] && masked, 1, *chosen);
  s.d_query = d_query.view(), p.d_weights = d_weights.view(), s.d_keys = d_keys.out(), s.d_mask = d_mask.out();
  p.d_stride = in.K * size_of(s.d_query.dtype);
  MK_CALL(indexer_search_backward, p);
  return {d_query.result(), d_weights.result(), d_keys.result(), d_mask.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "indexer_search", &mk::forward);
  MK_OPERATOR(m, "indexer_search_backward", &mk::backward);
}

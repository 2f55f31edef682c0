#include "params/selected_scores.h"

#include "binding/chosen_slots.h"
#include "params/topk_search.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;

// Checks the inputs.
struct Inputs {
  Arguments args;
  Choice choice;
  int64_t K;
  const Tensor *query, *keys, *indices, *key_scale;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& i, const std::optional<Tensor>& scale)
      : args(op) {
    K = size_at(op, "query", q, -1);
    choice.T = size_at(op, "query", q, -2), choice.N = size_at(op, "keys", k, -2);
    choice.k = size_at(op, "indices", i, -1);
    query = &args.add("query", q, Side::tokens, {choice.T, K});
    keys = &args.add("keys", k, Side::memory, {choice.N, K});
    indices = &args.add("indices", i, Side::tokens, {choice.T, choice.k});
    key_scale = args.add("key_scale", scale, Side::memory, {choice.N});
    args.floats({query});
    args.slots(*keys, key_scale, *query);
    args.require(indices->scalar_type() == ScalarType::Long, "indices must be int64");
  }
  // To be called once all arguments have been added.
  const Choice& checked() {
    choice.lead = args.lead();
    choice.indices = args.view(indices, 2);
    check_indices(args.op(), choice);
    return choice;
  }
};

Tensor run(const Tensor& query, const Tensor& keys, const Tensor& indices, const std::optional<Tensor>& key_scale,
           double scale) {
  Inputs in("selected_scores", query, keys, indices, key_scale);
  SelectedScores p;
  p.choice = in.checked(), p.K = in.K, p.scale = scale;
  p.query = in.args.view(in.query, 2), p.keys = in.args.slot_view(in.keys, in.key_scale);
  Tensor scores = empty(in.args.sizes(Side::tokens, {in.choice.T, in.choice.k}), query.scalar_type());
  p.scores = in.args.view(scores, 2);
  MK_CALL(selected_scores, p);
  return scores;
}

Two run_backward(const Tensor& query, const Tensor& keys, const Tensor& indices, const std::optional<Tensor>& key_scale,
                 const std::optional<Tensor>& d_scores, double scale, bool wants_query, bool wants_keys) {
  Inputs in("selected_scores_backward", query, keys, indices, key_scale);
  in.args.require(d_scores.has_value(), "d_scores must be given");
  const Tensor* ds = in.args.add("d_scores", d_scores, Side::tokens, {in.choice.T, in.choice.k});
  in.args.floats({in.query, ds});
  TopkSearchBackward p;
  p.choice = in.checked(), p.K = in.K, p.scale = scale;
  p.query = in.args.view(in.query, 2), p.keys = in.args.slot_view(in.keys, in.key_scale);
  p.d_scores = in.args.view(ds, 2);
  const Gradient d_query(in.args, in.query, wants_query, Side::tokens, 2);
  const ChosenGradient d_keys(in.args, in.keys, wants_keys, 2, *in.indices);
  p.d_query = d_query.view(), p.d_keys = d_keys.out();
  MK_CALL(topk_search_backward, p);
  return {d_query.result(), d_keys.result()};
}

Tensor forward(const Tensor& query, const Tensor& keys, const Tensor& indices, double scale) {
  return run(query, keys, indices, std::nullopt, scale);
}

Two backward(const Tensor& query, const Tensor& keys, const Tensor& indices, const std::optional<Tensor>& d_scores,
             double scale, const std::vector<bool>& wants) {
  check(wants.size() == 2, "selected_scores_backward: wants must have 2 entries");
  return run_backward(query, keys, indices, std::nullopt, d_scores, scale, wants[0], wants[1]);
}

// Compressed keys have no gradient.
Tensor backward_compressed(const Tensor& query, const Tensor& keys, const Tensor& indices,
                           const std::optional<Tensor>& key_scale, const std::optional<Tensor>& d_scores, double scale,
                           const std::vector<bool>& wants) {
  check(wants.size() == 1, "selected_scores_compressed_backward: wants must have 1 entry");
  return std::get<0>(run_backward(query, keys, indices, key_scale, d_scores, scale, wants[0], false));
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "selected_scores", &mk::forward);
  MK_OPERATOR(m, "selected_scores_backward", &mk::backward);
  if (mk::kCompressedSlots) {
    MK_OPERATOR(m, "selected_scores_compressed", &mk::run);
    MK_OPERATOR(m, "selected_scores_compressed_backward", &mk::backward_compressed);
  }
}

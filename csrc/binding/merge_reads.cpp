#include "params/merge_reads.h"

#include "binding/binding.h"

namespace mk {
namespace {

using Two = std::tuple<Tensor, Tensor>;

// Guards the inputs and fills everything of `p` but the results.
struct Inputs {
  Arguments args;
  const Tensor *reads, *lses;

  Inputs(const char* op, const Tensor& r, const Tensor& l, MergeReads& p) : args(op) {
    p.S = size_at(op, "reads", r, -3), p.T = size_at(op, "reads", r, -2), p.V = size_at(op, "reads", r, -1);
    reads = &args.add("reads", r, Side::tokens, {p.S, p.T, p.V});
    lses = &args.add("lses", l, Side::tokens, {p.S, p.T});
    args.floats({reads, lses});
    args.require(lses->scalar_type() == stats_type(reads->scalar_type()), "lses must be float32 (float64 for float64)");
  }
  void fill(MergeReads& p) {
    p.lead = args.lead();
    p.reads = parts(*reads, 3, p.reads_part);
    p.lses = parts(*lses, 2, p.lses_part);
  }
  // A view of the tokens of part 0.
  View parts(const Tensor& t, int tail, int64_t& part) const {
    View v = args.view(t, tail);
    part = v.row;
    v.row = size_of(v.dtype) * (tail == 2 ? 1 : t.size(t.dim() - 2) > 1 ? t.stride(t.dim() - 2) : t.size(t.dim() - 1));
    return v;
  }
};

Two forward(const Tensor& reads, const Tensor& lses) {
  MergeReads p;
  Inputs in("merge_reads", reads, lses, p);
  in.fill(p);
  Tensor read = empty(in.args.sizes(Side::tokens, {p.T, p.V}), reads.scalar_type());
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.T}), lses.scalar_type());
  p.read = in.args.view(read, 2), p.lse = in.args.view(lse, 1);
  MK_CALL(merge_reads, p);
  return {read, lse};
}

Two backward(const Tensor& reads, const Tensor& lses, const std::optional<Tensor>& d_read,
             const std::optional<Tensor>& d_lse, std::vector<bool> wants) {
  MergeReadsBackward b;
  MergeReads& p = b.forward;
  Inputs in("merge_reads_backward", reads, lses, p);
  in.args.require(wants.size() == 2, "wants must have 2 entries");
  const Tensor* dr = in.args.add("d_read", d_read, Side::tokens, {p.T, p.V});
  const Tensor* dl = in.args.add("d_lse", d_lse, Side::tokens, {p.T});
  in.args.floats({in.reads, dr, dl});
  in.args.require(dl == nullptr || dl->scalar_type() == lses.scalar_type(), "d_lse must have the dtype of lses");
  in.fill(p);
  b.d_read = in.args.view(dr, 2), b.d_lse = in.args.view(dl, 1);
  Gradient d_reads(in.args, in.reads, wants[0], Side::tokens, 3), d_lses(in.args, in.lses, wants[1], Side::tokens, 2);
  b.d_reads = d_reads.view(), b.d_lses = d_lses.view();
  b.d_reads_part = b.d_reads.row, b.d_reads.row = p.V * size_of(b.d_reads.dtype);
  b.d_lses_part = b.d_lses.row, b.d_lses.row = size_of(b.d_lses.dtype);
  MK_CALL(merge_reads_backward, b);
  return {d_reads.result(), d_lses.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "merge_reads", &mk::forward);
  MK_OPERATOR(m, "merge_reads_backward", &mk::backward);
}

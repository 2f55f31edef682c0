#include "params/memory_scan.h"

#include "binding/write.h"

namespace mk {
namespace {

using Optional = std::optional<Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks the inputs and fills in `m`, except for the results.
struct Inputs {
  Arguments args;
  const Tensor *values, *keys, *read_query, *write_query, *write, *mask, *token_mask;

  Inputs(const char* op, const Tensor& v, const Tensor& k, const Tensor& r, const Tensor& q, const Tensor& w,
         const Optional& m, const Optional& t, double scale, bool read_first, MemoryScan& scan)
      : args(op) {
    GatedWrite& p = scan.write;
    p.T = size_at(op, "write_query", q, -2), p.K = size_at(op, "write_query", q, -1);
    p.N = size_at(op, "values", v, -2), p.V = size_at(op, "values", v, -1);
    p.scale = scale, p.erase_scale = 1, scan.read_first = read_first;
    values = &args.add("values", v, Side::memory, {p.N, p.V});
    keys = &args.add("keys", k, Side::memory, {p.N, p.K});
    read_query = &args.add("read_query", r, Side::tokens, {p.T, p.K});
    write_query = &args.add("write_query", q, Side::tokens, {p.T, p.K});
    write = &args.add("write", w, Side::tokens, {p.T, p.V});
    mask = args.add("slot_mask", m, Side::memory, {p.N});
    token_mask = args.add("token_mask", t, Side::tokens, {p.T});
    args.floats({values, keys, read_query, write_query, write});
    args.mask(mask, *read_query);
    check_write(args, t, 1);
  }
  void fill(MemoryScan& scan) {
    GatedWrite& p = scan.write;
    p.lead = args.lead();
    p.values = args.view(values, 2), p.keys = args.view(keys, 2), p.query = args.view(write_query, 2);
    p.write = args.view(write, 2), p.mask = args.view(mask, 1), p.token_mask = args.view(token_mask, 1);
    scan.read_query = args.view(read_query, 2);
  }
};

Four forward(const Tensor& values, const Tensor& keys, const Tensor& read_query, const Tensor& write_query,
             const Tensor& write, const Optional& slot_mask, const Optional& token_mask, double scale,
             bool read_first) {
  MemoryScan m;
  const GatedWrite& p = m.write;
  Inputs in("memory_scan", values, keys, read_query, write_query, write, slot_mask, token_mask, scale, read_first, m);
  in.fill(m);
  Tensor reads = empty(in.args.sizes(Side::tokens, {p.T, p.V}), read_query.scalar_type());
  Tensor out = empty(in.args.sizes(Side::memory, {p.N, p.V}), values.scalar_type());
  Tensor lse = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(read_query.scalar_type()));
  Tensor rest = empty(in.args.sizes(Side::tokens, {p.T}), stats_type(read_query.scalar_type()));
  m.reads = in.args.view(reads, 2), m.write.out = in.args.view(out, 2);
  m.lse = in.args.view(lse, 1), m.lse_rest = in.args.view(rest, 1);
  MK_CALL(memory_scan, m);
  return {reads, out, lse, rest};
}

Six backward(const Tensor& values, const Tensor& keys, const Tensor& read_query, const Tensor& write_query,
             const Tensor& write, const Optional& slot_mask, const Optional& token_mask, const Tensor& reads,
             const Tensor& lse, const Tensor& lse_rest, const Optional& d_reads, const Optional& d_values, double scale,
             bool read_first, const std::vector<bool>& wants) {
  MemoryScanBackward b;
  MemoryScan& m = b.forward;
  const GatedWrite& p = m.write;
  Inputs in("memory_scan_backward", values, keys, read_query, write_query, write, slot_mask, token_mask, scale,
            read_first, m);
  in.args.require(wants.size() == 6, "wants must have 6 entries");
  in.args.require(d_reads.has_value() || d_values.has_value(), "d_reads or d_values must be given");
  const Tensor& r = in.args.add("reads", reads, Side::tokens, {p.T, p.V});
  const Tensor& l = in.args.add("lse", lse, Side::tokens, {p.T});
  const Tensor& lr = in.args.add("lse_rest", lse_rest, Side::tokens, {p.T});
  const Tensor* dr = in.args.add("d_reads", d_reads, Side::tokens, {p.T, p.V});
  const Tensor* du = in.args.add("d_values", d_values, Side::memory, {p.N, p.V});
  in.args.floats({in.read_query, &r, dr, du});
  in.args.stats({&l, &lr}, read_query);
  in.fill(m);
  m.reads = in.args.view(r, 2), m.lse = in.args.view(l, 1), m.lse_rest = in.args.view(lr, 1);
  b.d_reads = in.args.view(dr, 2), b.d_out = in.args.view(du, 2);
  Gradient dv(in.args, in.values, wants[0], Side::memory, 2), dk(in.args, in.keys, wants[1], Side::memory, 2);
  Gradient drq(in.args, in.read_query, wants[2], Side::tokens, 2);
  Gradient dwq(in.args, in.write_query, wants[3], Side::tokens, 2), dw(in.args, in.write, wants[4], Side::tokens, 2);
  Gradient dm(in.args, in.mask, wants[5], Side::memory, 1);
  b.d_values = dv.view(), b.d_keys = dk.view(), b.d_read_query = drq.view(), b.d_write_query = dwq.view();
  b.d_write = dw.view(), b.d_mask = dm.view();
  if (p.lead.batches() * p.N == 0) {
    for (Gradient* g : {&dv, &dk, &drq, &dwq, &dw, &dm}) g->zero();
  } else {
    if (p.lead.folded() * p.T == 0) {  // no tokens: d_values is d_out, the gradients of keys and mask are zero
      for (Gradient* g : {&dk, &dm}) g->zero();
    }
    MK_CALL(memory_scan_backward, b);
  }
  return {dv.result(), dk.result(), drq.result(), dwq.result(), dw.result(), dm.result()};
}

}  // namespace
}  // namespace mk

MK_REGISTER(m) {
  MK_OPERATOR(m, "memory_scan", &mk::forward);
  MK_OPERATOR(m, "memory_scan_backward", &mk::backward);
}

// ngram_slots:  mix_n[t] = XOR_{j < n} x[t - j] multipliers[j],  slots[t, m] = offset_m + mix_{n(m)}[t] mod sizes[m]
//
// Tiles of tokens run in parallel: first what stands for each token of the tile and for those before it, then a mix per
// order, then the remainders, bound by their multiplications. A remainder by a size d that is known in advance takes
// two products in place of a division: with c = floor(2^64 / d) the quotient is high(u c) or one more.
#include "params/ngram_slots.h"

#include <atomic>

#include "cpu/tiles/parallel.h"
#include "cpu/tiles/scores.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t kTile = 256;  // tokens of a task

// Division by d: high(u * inverse) is the quotient of a 64-bit u, or one less.
struct Divisor {
  uint64_t d, inverse, wrap;  // wrap = 2^64 mod d, by which a negative number is too large when taken as unsigned
  int64_t offset;

  Divisor() = default;
  Divisor(int64_t size, int64_t first) : d(uint64_t(size)), offset(first) {
    inverse = d == 1 ? ~uint64_t(0) : uint64_t((static_cast<unsigned __int128>(1) << 64) / d);
    wrap = d == 1 ? 0 : uint64_t(0) - inverse * d;  // below d, for d * inverse is the largest multiple up to 2^64
  }
  // offset + x mod d, never negative.
  int64_t slot(int64_t x) const {
    const auto u = uint64_t(x);
    uint64_t r = u - uint64_t(static_cast<unsigned __int128>(u) * inverse >> 64) * d;
    r -= r >= d ? d : 0;
    const uint64_t less = x < 0 ? wrap : 0;
    r = r >= less ? r - less : r + d - less;
    return offset + int64_t(r);
  }
};

bool is_ignored(const NgramSlots& p, int64_t token) {
  for (int64_t i = 0; i < p.ignored; ++i) {
    if (p.ignore[i] == token) return true;
  }
  return token < 0;
}

// The tokens [t0 - before, t0 + n) of a stream: what stands for each, and which of the last n are ignored. Returns one
// that has no place in the map, or -1.
int64_t read_tokens(const NgramSlots& p, const int64_t* tokens, const int64_t* history, int64_t t0, int64_t n,
                    int64_t* x, bool* none) {
  const int64_t before = p.n_max - 1;
  for (int64_t i = 0; i < before + n; ++i) {
    const int64_t t = t0 - before + i;
    int64_t token = -1;
    if (t >= 0) token = tokens[t];
    else if (history != nullptr && t >= -before) token = history[t + before];
    const bool gone = is_ignored(p, token);
    if (!gone && p.token_map != nullptr && token >= p.vocabulary) return token;
    x[i] = gone ? p.pad : p.token_map != nullptr ? p.token_map[token] : token;
    if (i >= before) none[i - before] = gone;
  }
  return -1;
}

// What the tasks of a call share.
struct Tables {
  const NgramSlots& p;
  TokenRows tokens, history, first;
  Buffer<Divisor> divisors;
  int64_t groups, longest = 0;

  explicit Tables(const NgramSlots& call)
      : p(call),
        tokens(p.tokens, p.lead, 0, 1),
        history(p.history, p.lead, 0, 1),
        first(p.first, p.lead, 0, 1),
        divisors(p.M),
        groups(p.M / p.heads) {
    for (int64_t m = 0, offset = 0; m < p.M; offset += p.sizes[m++]) divisors.data()[m] = Divisor(p.sizes[m], offset);
    for (int64_t g = 0; g < groups; ++g) longest = most(longest, p.orders[g]);
  }
};

struct Memory {
  int64_t *x, *mix;
  bool* none;
  Memory(Arena& arena, int64_t before)
      : x(arena.take<int64_t>(before + kTile)), mix(arena.take<int64_t>(kTile)), none(arena.take<bool>(kTile)) {}
};

// The slots of n tokens of a stream from t0 on; `m.x` and `m.none` are filled.
void hash_tokens(Tables& tables, const Memory& m, int64_t stream, int64_t t0, int64_t n) {
  const NgramSlots& p = tables.p;
  const auto* begin = tables.first ? reinterpret_cast<const int64_t*>(tables.first.row(stream)) : nullptr;
  int64_t* out = p.slots + (stream * p.T + t0) * p.M;
  for (int64_t t = 0; t < n; ++t) m.mix[t] = 0;
  for (int64_t j = 0; j < tables.longest; ++j) {
    const auto factor = uint64_t(p.multipliers[j]);
    const int64_t* x = m.x + p.n_max - 1 - j;
    for (int64_t t = 0; begin == nullptr && t < n; ++t) m.mix[t] ^= int64_t(uint64_t(x[t]) * factor);
    for (int64_t t = 0; begin != nullptr && t < n; ++t) {
      m.mix[t] ^= int64_t(uint64_t(t0 + t - j < begin[t0 + t] ? p.pad : x[t]) * factor);
    }
    for (int64_t g = 0; g < tables.groups; ++g) {
      if (p.orders[g] != j + 1) continue;
      const Divisor* divisors = tables.divisors.data() + g * p.heads;
      for (int64_t t = 0; t < n; ++t) {
        int64_t* slots = out + t * p.M + g * p.heads;
        for (int64_t h = 0; h < p.heads; ++h) slots[h] = m.none[t] ? -1 : divisors[h].slot(m.mix[t]);
      }
    }
  }
}

}  // namespace

int64_t ngram_slots(const NgramSlots& p) {
  const int64_t streams = p.lead.folded(), tiles = div_up(p.T, kTile);
  const int64_t together = most(1, kTile / most(p.T, 1));  // short streams of one task
  Tables tables(p);
  Arena measure;
  Memory(measure, p.n_max - 1);
  std::atomic<int64_t> wrong{-1};
  parallel(div_up(streams, together) * tiles, measure.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    const Memory m(arena, p.n_max - 1);
    const int64_t t0 = task % tiles * kTile, n = least(kTile, p.T - t0), last = task / tiles * together + together;
    for (int64_t stream = last - together; stream < least(streams, last); ++stream) {
      const auto* tokens = reinterpret_cast<const int64_t*>(tables.tokens.row(stream));
      const auto* history = tables.history ? reinterpret_cast<const int64_t*>(tables.history.row(stream)) : nullptr;
      const int64_t bad = read_tokens(p, tokens, history, t0, n, m.x, m.none);
      if (bad == -1) hash_tokens(tables, m, stream, t0, n);
      else wrong = bad;
    }
  });
  return wrong;
}

}  // namespace mk::MK_ISA

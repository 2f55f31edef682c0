// Multiply-add peak: every thread runs chains acc_j = acc_j * x + y that stay in registers. A fused multiply-add has a
// latency of 4-5 cycles on two ports, so at least 10 chains must be in flight. AVX-512 has registers for 24 chains,
// AVX2 for 12.
//
// Read bandwidth: every thread sums its own contiguous part as four interleaved streams with four accumulators each.
// Then neither the latency of additions nor the range of one hardware prefetcher is the bound.
//
// Each loop is written once and compiled per instruction set through function attributes, chosen at run time.
#include "host/ceilings.h"

#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <functional>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(MK_HAVE_avx512)
#include <immintrin.h>
#endif

#include "host/processor.h"

namespace memkernels::host {
namespace {

using Clock = std::chrono::steady_clock;

// Hardware prefetch stops at the end of a page. On Zen 4 with pages of 4 KiB, software prefetch makes a sum up to 1.2
// times as fast. Other processors may be faster without it, so both are measured.
constexpr int64_t kSumAhead = 384;

constexpr double kRoundSeconds = 0.005;  // short, so that some rounds are not interrupted; long compared with a barrier

using PeakLoop = double (*)(int64_t steps);
using SumLoop = float (*)(const float* data, int64_t count, int64_t ahead);

thread_local volatile double sink;  // every result goes here, so that no loop is optimised away

// One loop with CHAINS independent accumulators of BYTES bytes. The start values are opaque to the compiler.
#define MK_PEAK(NAME, SCALAR, BYTES, CHAINS)                                             \
  double NAME(int64_t steps) {                                                           \
    typedef SCALAR Vector __attribute__((vector_size(BYTES)));                           \
    SCALAR factor = SCALAR(0.5), term = SCALAR(1);                                       \
    __asm__ volatile("" : "+m"(factor), "+m"(term));                                     \
    const Vector x = factor - Vector{}, y = term - Vector{};                             \
    Vector acc[CHAINS];                                                                  \
    _Pragma("GCC unroll 24") for (int j = 0; j < CHAINS; ++j) acc[j] = y * SCALAR(j);    \
    for (int64_t i = 0; i < steps; ++i) {                                                \
      _Pragma("GCC unroll 24") for (int j = 0; j < CHAINS; ++j) acc[j] = acc[j] * x + y; \
    }                                                                                    \
    Vector total{};                                                                      \
    _Pragma("GCC unroll 24") for (int j = 0; j < CHAINS; ++j) total += acc[j];           \
    SCALAR result = 0;                                                                   \
    for (int l = 0; l < int(BYTES / sizeof(SCALAR)); ++l) result += total[l];            \
    return result;                                                                       \
  }

// Four streams with four accumulators of BYTES bytes each. A rest shorter than a step of all streams (< 4 KiB) is left
// out. With every load goes a prefetch `ahead` numbers further on; 0 prefetches the address being loaded, which does
// nothing.
#define MK_SUM(NAME, BYTES)                                               \
  float NAME(const float* data, int64_t count, int64_t ahead) {           \
    typedef float Vector __attribute__((vector_size(BYTES)));             \
    constexpr int64_t kLanes = BYTES / sizeof(float), kStep = 4 * kLanes; \
    const int64_t stream = count / (4 * kStep) * kStep;                   \
    Vector acc[4][4] = {};                                                \
    for (int64_t i = 0; i < stream; i += kStep) {                         \
      _Pragma("GCC unroll 4") for (int s = 0; s < 4; ++s) {               \
        _Pragma("GCC unroll 4") for (int u = 0; u < 4; ++u) {             \
          const float* p = data + s * stream + i + u * kLanes;            \
          __builtin_prefetch(p + ahead, 0, 2);                            \
          acc[s][u] += *reinterpret_cast<const Vector*>(p);               \
        }                                                                 \
      }                                                                   \
    }                                                                     \
    float result = 0;                                                     \
    for (auto& of_stream : acc) {                                         \
      for (auto& v : of_stream) {                                         \
        for (int l = 0; l < int(kLanes); ++l) result += v[l];             \
      }                                                                   \
    }                                                                     \
    return result;                                                        \
  }

MK_PEAK(peak_float_baseline, float, 16, 12)
MK_PEAK(peak_double_baseline, double, 16, 12)
MK_SUM(sum_baseline, 16)
#if defined(MK_HAVE_avx2)
__attribute__((target("avx2,fma"))) MK_PEAK(peak_float_avx2, float, 32, 12) __attribute__((target("avx2,fma")))
MK_PEAK(peak_double_avx2, double, 32, 12) __attribute__((target("avx2,fma"))) MK_SUM(sum_avx2, 32)
#endif
#if defined(MK_HAVE_avx512)
    __attribute__((target("avx512f"))) MK_PEAK(peak_float_avx512, float, 64, 24) __attribute__((target("avx512f")))
    MK_PEAK(peak_double_avx512, double, 64, 24) __attribute__((target("avx512f"))) MK_SUM(sum_avx512, 64)

        __attribute__((target("avx512f,avx512bf16"))) double peak_bfloat16_avx512(int64_t steps) {
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  __m512 acc[24];
  _Pragma("GCC unroll 24") for (int j = 0; j < 24; ++j) acc[j] = _mm512_set1_ps(float(j));
  for (int64_t i = 0; i < steps; ++i) {
    _Pragma("GCC unroll 24") for (int j = 0; j < 24; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], x, x);
  }
  _Pragma("GCC unroll 24") for (int j = 1; j < 24; ++j) acc[0] = _mm512_add_ps(acc[0], acc[j]);
  return acc[0][0];
}
#endif

struct Peak {
  PeakLoop loop = nullptr;
  double flops_per_step = 0;  // 2 * chains * lanes; 0 if the processor lacks the instruction
};

// The best instruction set of this processor, at most the one named `isa` (empty: no limit).
Peak choose_peak(const std::string& dtype, const std::string& isa) {
  if (!isa.empty() && isa != "baseline" && isa != "avx2" && isa != "avx512" && isa != "avx512bf16") {
    throw std::invalid_argument("multiply_add_peak: isa must be baseline, avx2, avx512 or avx512bf16, got " + isa);
  }
  const bool wide = dtype == "float64", dots = dtype == "bfloat16";
  if (!wide && !dots && dtype != "float32") {
    throw std::invalid_argument("multiply_add_peak: dtype must be float32, float64 or bfloat16, got " + dtype);
  }
  [[maybe_unused]] auto has = features();
  [[maybe_unused]] const double lane = wide ? 8 : 4;
#if defined(MK_HAVE_avx512)
  if (has["avx512f"] && isa != "avx2" && isa != "baseline") {
    if (!dots) return {wide ? peak_double_avx512 : peak_float_avx512, 2 * 24 * 64 / lane};
    if (has["avx512_bf16"] && isa != "avx512") return {peak_bfloat16_avx512, 2.0 * 24 * 32};
  }
#endif
  if (dots) return {};
#if defined(MK_HAVE_avx2)
  if (has["avx2"] && has["fma"] && isa != "baseline") {
    return {wide ? peak_double_avx2 : peak_float_avx2, 2 * 12 * 32 / lane};
  }
#endif
  return {wide ? peak_double_baseline : peak_float_baseline, 2 * 12 * 16 / lane};
}

SumLoop choose_sum() {
  [[maybe_unused]] auto has = features();
#if defined(MK_HAVE_avx512)
  if (has["avx512f"]) return sum_avx512;
#endif
#if defined(MK_HAVE_avx2)
  if (has["avx2"]) return sum_avx2;
#endif
  return sum_baseline;
}

// Seconds of the fastest round, of at least four, in which every thread runs work(thread) once. The threads take the
// times themselves, from the first start to the last end: on a busy machine a controlling thread can leave the barrier
// late.
double best_round(int threads, double seconds, const std::function<void(int)>& work) {
  const std::vector<int> cores = usable_cores();
  std::vector<Clock::time_point> begin(threads), end(threads);
  bool done = false;
  std::barrier<> gate(threads + 1);
  std::vector<std::thread> pool;
  pool.reserve(threads);
  auto start = [&](int t) {
    pool.emplace_back([&, t] {
      pin(cores[t % cores.size()]);
      for (;;) {
        gate.arrive_and_wait();
        if (done) return;
        begin[t] = Clock::now();
        work(t);
        end[t] = Clock::now();
        gate.arrive_and_wait();
      }
    });
  };
  try {
    for (int t = 0; t < threads; ++t) start(t);
  } catch (const std::system_error&) {  // the threads that started wait for the others; stop them before rethrowing
    done = true;
    (void)gate.arrive(threads + 1 - int(pool.size()));
    for (auto& thread : pool) thread.join();
    throw;
  }
  double best = 1e300;
  const auto deadline = Clock::now() + std::chrono::duration<double>(seconds);
  for (int round = 0; round < 4 || Clock::now() < deadline; ++round) {
    gate.arrive_and_wait();
    gate.arrive_and_wait();
    const auto first = *std::min_element(begin.begin(), begin.end());
    const auto last = *std::max_element(end.begin(), end.end());
    best = std::min(best, std::chrono::duration<double>(last - first).count());
  }
  done = true;
  gate.arrive_and_wait();
  for (auto& thread : pool) thread.join();
  return best;
}

void check(const char* name, int threads, double seconds) {
  if (threads < 1) throw std::invalid_argument(std::string(name) + ": threads must be at least 1");
  if (!(seconds > 0)) throw std::invalid_argument(std::string(name) + ": seconds must be positive");
}

// Anonymous memory with the page size that the system chooses for a large tensor, which is part of the limit. Zen 4 in
// a virtual machine, two threads, interleaved runs: a sum over 1 GiB reads 20 to 24 GB/s with pages of 4 KiB, 27 to 32
// with pages of 2 MiB.
class Pages {
 public:
  explicit Pages(int64_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  float* data() const { return static_cast<float*>(data_); }

 private:
  void* data_;
  int64_t bytes_;
};

}  // namespace

double multiply_add_peak(const std::string& dtype, int threads, double seconds, const std::string& isa) {
  check("multiply_add_peak", threads, seconds);
  const Peak peak = choose_peak(dtype, isa);
  if (peak.flops_per_step == 0) return 0;
  int64_t steps = 1000;
  for (;;) {  // finds the number of steps that fills a round
    const auto begin = Clock::now();
    sink = peak.loop(steps);
    if (std::chrono::duration<double>(Clock::now() - begin).count() > kRoundSeconds) break;
    steps *= 2;
  }
  const double best = best_round(threads, seconds, [&](int) { sink = peak.loop(steps); });
  return peak.flops_per_step * double(steps) * threads / best;
}

int64_t default_bandwidth_bytes() {
  return std::clamp<int64_t>(4 * caches()["l3"], int64_t(1) << 28, int64_t(1) << 30);
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  check("read_bandwidth", threads, seconds);
  if (bytes < 0) throw std::invalid_argument("read_bandwidth: bytes must not be negative");
  if (bytes == 0) bytes = default_bandwidth_bytes();
  const int64_t part = std::max<int64_t>(bytes / threads / 4096, 1) * 4096;  // whole pages for every thread
  const Pages pages(part * threads);
  const int64_t count = part / int64_t(sizeof(float));
  const SumLoop sum = choose_sum();
  std::vector<int> rounds(threads, 0);
  const double best = best_round(threads, seconds, [&](int t) {
    float* own = pages.data() + t * count;
    const int round = rounds[t]++;
    // First touch by the thread that will read it puts the pages near it.
    if (round == 0) std::fill(own, own + count, 1.0f);
    else sink = sum(own, count, round % 2 == 0 ? kSumAhead : 0);
  });
  return double(part) * threads / best;
}

}  // namespace memkernels::host

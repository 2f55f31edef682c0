// Compares the runtime's matrix instructions with plain products. Fragments are built and read here by the formulas of
// the PTX ISA, element by element (sections "Matrix Fragments for mma.m16n8k16 with floating point type", "...
// mma.m16n8k8 with .tf32", "ldmatrix").
#include <cstdio>
#include <cstdlib>

#include "cuda/tiles/device.h"
#include "cuda/tiles/numbers.h"

namespace {

using namespace mk::cuda;

int faults = 0;

void expect(bool right, const char* what) {
  if (right) return;
  if (faults++ < 10) std::printf("wrong: %s\n", what);
}

// Small integers are exact in every type and sum.
int a_at(int i, int k) { return (i * 7 + k * 3) % 11 - 5; }
int b_at(int k, int j) { return (k * 5 + j * 2) % 9 - 4; }
int c_at(int i, int j) { return i - 2 * j; }

void check_product(const float (&d)[4], int depth, const char* what) {
  const int groupID = simt::lane() >> 2, threadID_in_group = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? groupID : groupID + 8, col = threadID_in_group * 2 + (i & 1);
    int wanted = c_at(row, col);
    for (int k = 0; k < depth; ++k) wanted += a_at(row, k) * b_at(k, col);
    expect(d[i] == float(wanted), what);
  }
}

void start(float (&d)[4]) {
  const int groupID = simt::lane() >> 2, threadID_in_group = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) d[i] = float(c_at(i < 2 ? groupID : groupID + 8, threadID_in_group * 2 + (i & 1)));
}

void products() {
  const int groupID = simt::lane() >> 2, threadID_in_group = simt::lane() % 4;
  float d[4];
  for (bool half : {false, true}) {
    uint16_t a[8], b[4];
    auto bits = [&](int x) { return half ? from_float<f16>(float(x)).bits : from_float<bf16>(float(x)).bits; };
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? groupID : groupID + 8;
      a[i] = bits(a_at(row, threadID_in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)));
    }
    for (int i = 0; i < 4; ++i) b[i] = bits(b_at(threadID_in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), groupID));
    uint32_t as[4], bs[2];
    std::memcpy(as, a, sizeof a), std::memcpy(bs, b, sizeof b);
    start(d);
    (half ? mma_f16 : mma_bf16)(d, as, bs[0], bs[1]);
    check_product(d, 16, half ? "mma_f16" : "mma_bf16");
  }
  uint32_t as[4], bs[2];
  for (int i = 0; i < 4; ++i) {
    const float x = float(a_at(i == 0 || i == 2 ? groupID : groupID + 8, threadID_in_group + (i < 2 ? 0 : 4)));
    as[i] = std::bit_cast<uint32_t>(x) | 0x1fff;  // bits that tf32 drops
  }
  for (int i = 0; i < 2; ++i) bs[i] = std::bit_cast<uint32_t>(float(b_at(threadID_in_group + 4 * i, groupID)));
  start(d);
  mma_tf32(d, as, bs[0], bs[1]);
  check_product(d, 8, "mma_tf32");
}

void loads() {
  // Four matrices one below the other, with a pitch of 24 numbers.
  auto* rows = reinterpret_cast<uint16_t*>(simt::shared());
  for (int i = 0; i < 8; ++i) rows[simt::lane() * 24 + i] = uint16_t(simt::lane() * 100 + i);
  __syncthreads();
  uint32_t plain[4], transposed[4];
  ldmatrix(plain, rows + simt::lane() * 24);
  ldmatrix_transposed(transposed, rows + simt::lane() * 24);
  for (int m = 0; m < 4; ++m) {
    for (int e = 0; e < 2; ++e) {
      const int row = simt::lane() / 4, column = 2 * (simt::lane() % 4) + e;
      expect((plain[m] >> 16 * e & 0xffff) == unsigned((8 * m + row) * 100 + column), "ldmatrix");
      expect((transposed[m] >> 16 * e & 0xffff) == unsigned((8 * m + column) * 100 + row), "ldmatrix_transposed");
    }
  }
}

void conversions() {
  expect(bf16_pair(1.f, -2.f) == 0xc0003f80 && half_pair(1.f, -2.f) == 0xc0003c00, "pairs");
  const float between = std::bit_cast<float>(0x3f801fffu);
  expect(tf32_nearest(between) == 0x3f802000, "tf32_nearest");
}

void kernel() { products(), loads(), conversions(); }

}  // namespace

int main() {
  launch(mk::cuda::Device{}, "fragments", kernel, 2, 64, 64 * 48);
  if (faults == 0) std::puts("DONE");
  return faults != 0;
}

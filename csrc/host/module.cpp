// memkernels._host: what is not an operator. Does not know torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/ceilings.h"
#include "host/probes.h"
#include "host/processor.h"

namespace py = pybind11;
using namespace memkernels::host;

namespace {

// The memory of a contiguous array of integers, or of bytes.
py::buffer_info contiguous(const char* op, const char* name, const py::buffer& array, int64_t item, bool writable) {
  py::buffer_info info = array.request(writable);
  int64_t stride = info.itemsize;
  bool fits = info.itemsize == item;
  for (int64_t d = info.ndim - 1; d >= 0; stride *= info.shape[d--]) fits = fits && info.strides[d] == stride;
  if (!fits) {
    throw std::invalid_argument(std::string(op) + ": " + name + " must be contiguous, with items of " +
                                std::to_string(item) + " bytes");
  }
  return info;
}

void rows_of(const py::buffer& table, int64_t row_bytes, const py::buffer& rows, const py::buffer& out, int threads,
             int64_t ahead) {
  const auto from = contiguous("random_rows", "table", table, 1, false);
  const auto at = contiguous("random_rows", "rows", rows, 8, false);
  const auto to = contiguous("random_rows", "out", out, 1, true);
  const py::gil_scoped_release released;
  random_rows(static_cast<const char*>(from.ptr), from.size, row_bytes, static_cast<const int64_t*>(at.ptr), at.size,
              static_cast<char*>(to.ptr), to.size, threads, ahead);
}

py::tuple reads_of(const std::string& path, const py::buffer& offsets, const py::buffer& sizes, int threads) {
  const auto at = contiguous("direct_reads", "offsets", offsets, 8, false);
  const auto bytes = contiguous("direct_reads", "sizes", sizes, 8, false);
  if (at.size != bytes.size) throw std::invalid_argument("direct_reads: sizes must be as many as offsets");
  Reads found;
  {
    const py::gil_scoped_release released;
    found = direct_reads(path, static_cast<const int64_t*>(at.ptr), static_cast<const int64_t*>(bytes.ptr), at.size,
                         threads);
  }
  return py::make_tuple(found.seconds, found.bytes, found.mark);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Processor features, cache sizes and measured ceilings. Does not import torch.";

  m.def("processor", &processor_name, "Model name of the processor.");
  m.def("features", &features,
        "Instruction-set extension -> usable (the processor has it and the operating system saves its registers),\n"
        "by the names of /proc/cpuinfo on x86; {'neon': True} on 64-bit Arm; empty elsewhere.");
  m.def("caches", &caches,
        "Bytes of {'l1d', 'l2'} of one core, of the shared 'l3' in all, and of a cache 'line'. 0 = unknown or none.");
  m.def("cores", [] { return usable_cores().size(); }, "Number of processors this process may run on.");

  m.def("multiply_add_peak", &multiply_add_peak, py::arg("dtype"), py::arg("threads"), py::arg("seconds") = 0.5,
        py::arg("isa") = "", py::call_guard<py::gil_scoped_release>(),
        "Multiply-add peak in FLOP/s of `threads` threads together, from registers alone, best of many 5 ms\n"
        "rounds.\n\n"
        "dtype: 'float32', 'float64', or 'bfloat16' (AVX512-BF16 dot products; 0.0 where the processor has none).\n"
        "isa: the widest instruction set to use ('baseline', 'avx2', 'avx512', 'avx512bf16'); by default the widest "
        "there is.\n"
        "Raises ValueError for another dtype or isa, threads < 1 or seconds <= 0.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes") = 0, py::arg("threads") = 1, py::arg("seconds") = 0.5,
        py::call_guard<py::gil_scoped_release>(),
        "Read bandwidth in bytes per second: `threads` threads sum an array of `bytes` bytes, best pass of those\n"
        "that fit into `seconds` (at least two). bytes=0: four times the last-level cache, within [256 MiB, 1 GiB].\n"
        "Raises ValueError for bytes < 0, threads < 1 or seconds <= 0.");

  m.def("random_rows", &rows_of, py::arg("table"), py::arg("row_bytes"), py::arg("rows"), py::arg("out"),
        py::arg("threads") = 1, py::arg("ahead") = 16,
        "Random rows of memory, read and streamed out at twice their width: the bound of a gather that dequantises.\n\n"
        "table: bytes, rows of `row_bytes` bytes, a multiple of 64. rows: int64 [n]. out: bytes [n * 2 * row_bytes],\n"
        "aligned to 64, filled with each 64 bytes of a row twice, by non-temporal stores. ahead: rows, the prefetch "
        "distance.\n"
        "Raises ValueError for a size that does not fit, or a row outside of the table.");
  m.def(
      "direct_reads", &reads_of, py::arg("path"), py::arg("offsets"), py::arg("sizes"), py::arg("threads") = 1,
      "Ranges of a file, read with O_DIRECT by `threads` threads: (seconds, bytes, XOR of the first 8 bytes of each).\n"
      "offsets, sizes: int64 [n], multiples of 4096.\n"
      "Raises ValueError for a range that is not in blocks, RuntimeError where the system refuses or the file ends.");
}

// memkernels._host: what is not an operator. Does not know torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/ceilings.h"
#include "host/processor.h"

namespace py = pybind11;
using namespace memkernels::host;

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
}

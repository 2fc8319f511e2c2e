// The emulator as Python steers it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "memory.h"
#include "races.h"
#include "reports.h"
#include "scheduler.h"

namespace py = pybind11;

PYBIND11_MODULE(emulator_runtime, m) {
  using emulator::Report;
  m.doc() = "Threads, memory and detectors of the CUDA kernels that are compiled for the host.";
#ifdef __SANITIZE_ADDRESS__
  m.attr("address_sanitizer") = true;  // which then watches the memory, and takes the place of the detectors
#else
  m.attr("address_sanitizer") = false;
#endif

  py::class_<Report>(m, "Report")
      .def_readonly("kind", &Report::kind)
      .def_readonly("kernel", &Report::kernel)
      .def_readonly("text", &Report::text)
      .def_readonly("library", &Report::library)
      .def_readonly("places", &Report::places)
      .def_readonly("count", &Report::count);
  m.def("reports", [] { return emulator::reports; });
  m.def("clear", [] { emulator::reports.clear(); });

  m.def("set_seed", &emulator::scheduler::set_seed, py::arg("seed"),
        "Draw the order of threads and blocks from this seed; with None they run one after the other.");
  m.def("detect_races", [](bool enabled) { emulator::races::enabled = enabled; }, py::arg("enabled"));
  m.def("serve_torch", &emulator::memory::serve_torch,
        "Give torch its CPU memory from here on, so that reads and writes of kernels can be checked.");

  m.def(
      "allocate", [](size_t size) { return reinterpret_cast<uintptr_t>(emulator::memory::allocate(size)); },
      "Address of `size` bytes, which count as written.");
  m.def("release", [](uintptr_t data) { emulator::memory::release(reinterpret_cast<void*>(data)); });
  m.def(
      "made_empty",
      [](uintptr_t data, size_t size) {
        emulator::made_empty(reinterpret_cast<void*>(data), size, emulator::Where::current());
      },
      "Let memory count as written by nobody.");
}

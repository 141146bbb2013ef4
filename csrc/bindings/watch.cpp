// Notices when what a prepared call was made of has changed.
#include "bindings/watch.h"

namespace halfbyte {
namespace {

constexpr int64_t identity = -2, length = -3;  // see Watch::Watch

}  // namespace

const Names& names() {
  static const Names* const made = new Names;
  return *made;
}

int64_t to_int64(PyObject* number) {
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

uintptr_t address(PyObject* tensor) {
  PyObject* arguments[] = {tensor};
  const Reference pointer(PyObject_VectorcallMethod(names().data_ptr, arguments, 1, nullptr));
  const unsigned long long value = PyLong_AsUnsignedLongLong(pointer.object);
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<uintptr_t>(value);
}

Watch::Watch(const py::list& entries, py::list empty) : empty_(std::move(empty)) {
  for (const py::handle row : entries) {
    auto [holder, name, object, version] = row.cast<std::tuple<py::dict, py::object, py::object, int64_t>>();
    const bool tensor = !object.is_none() && version > identity;
    const auto size = static_cast<uintptr_t>(PyDict_GET_SIZE(holder.ptr()));
    const uintptr_t memory = version == length ? size : tensor ? address(object.ptr()) : 0;
    if (!tensor && version != length) version = identity;
    entries_.push_back({std::move(holder), std::move(name), std::move(object), memory, version});
  }
}

bool Watch::same_entries() const {
  for (const Entry& e : entries_) {
    if (e.version == length) {
      if (static_cast<uintptr_t>(PyDict_GET_SIZE(e.holder.ptr())) != e.memory) return false;
      continue;
    }
    PyObject* const found = PyDict_GetItemWithError(e.holder.ptr(), e.name.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    PyObject* const now = found ? found : Py_None;
    if (now != e.object.ptr()) return false;
    if (e.version == identity) continue;
    if (address(now) != e.memory) return false;
    if (e.version >= 0 && to_int64(Reference(PyObject_GetAttr(now, names().version)).object) != e.version) return false;
  }
  return true;
}

bool Watch::all_empty() const {
  for (const py::handle dictionary : empty_) {
    if (PyDict_GET_SIZE(dictionary.ptr()) != 0) return false;
  }
  return true;
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const Entry& e : entries_) {
    Py_VISIT(e.holder.ptr());
    Py_VISIT(e.object.ptr());
  }
  Py_VISIT(empty_.ptr());
  return 0;
}

void Watch::clear() {
  entries_.clear();
  empty_ = py::list();
}

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch", collectable<Watch>())
      .def(py::init<py::list, py::list>(), py::arg("entries"), py::arg("empty"))
      .def("unchanged", &Watch::unchanged);
}

}  // namespace halfbyte

// Notices when what a prepared call was made of has changed. torch is met as Python objects only: nothing of it is linked.
#pragma once
#include <vector>

#include "bindings/bind.h"

namespace halfbyte {

// Attribute and method names, made once.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* current_level = PyUnicode_InternFromString("_current_level");
};
const Names& names();

struct Reference {
  explicit Reference(PyObject* object) : object(object) {
    if (!object) throw py::error_already_set();
  }
  Reference(const Reference&) = delete;
  ~Reference() { Py_DECREF(object); }
  PyObject* const object;
};

int64_t to_int64(PyObject* number);
uintptr_t address(PyObject* tensor);

// Entries of dictionaries (the buffers of a module, its children, its attributes) and the objects that were there, None for an
// entry that is None or missing; and dictionaries, of hooks, that must be empty.
class Watch {
 public:
  // Rows of (dictionary, key, object, version). version >= 0: of a tensor, compared with its memory, which changes under the
  // same tensor by `tensor.data = other`; -1: its memory only; -2: the object only; -3: how many entries the dictionary has.
  Watch(const py::list& entries, py::list empty);

  bool unchanged() const { return same_entries() && all_empty(); }
  bool same_entries() const;
  bool all_empty() const;

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Entry {
    py::dict holder;
    py::object name, object;
    uintptr_t memory;
    int64_t version;
  };
  std::vector<Entry> entries_;
  py::list empty_;
};

// What lets the garbage collector see through a class with traverse() and clear(): a hook may hold the model that holds it.
template <class T>
py::custom_type_setup collectable() {
  return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* const type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<T&>(py::handle(self)).traverse(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<T&>(py::handle(self)).clear();
      return 0;
    };
  });
}

}  // namespace halfbyte

// The short way of calling a QLinear: one call from Python that reads the tensor's attributes through the C API, allocates
// the output and runs the kernel. A layer asks for a dozen, and for a small one that is most of the time: the
// same in Python took 0.7 us longer of 2.8. torch is met as Python objects only: nothing of it is linked.
//
// Whatever is not the plain case (another tensor type, a gradient, a changed buffer, a hook, a dispatch mode, a wrong
// shape) returns None, and Python takes the way with all checks.
#include <array>
#include <memory>
#include <vector>

#include "bindings/bind.h"
#include "core/linear.h"

namespace halfbyte {
namespace {

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

const Names& names() {
  static const Names* const made = new Names;
  return *made;
}

struct Reference {
  explicit Reference(PyObject* object) : object(object) {
    if (!object) throw py::error_already_set();
  }
  Reference(const Reference&) = delete;
  ~Reference() { Py_DECREF(object); }
  PyObject* const object;
};

bool is_true(PyObject* tensor, PyObject* name) {
  return Reference(PyObject_GetAttr(tensor, name)).object == Py_True;
}

// tensor.name() is expected?
bool answers(PyObject* tensor, PyObject* name, PyObject* expected) {
  PyObject* arguments[] = {tensor};
  return Reference(PyObject_VectorcallMethod(name, arguments, 1, nullptr)).object == expected;
}

int64_t to_int64(PyObject* number) {
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

uintptr_t address(PyObject* tensor) {
  PyObject* arguments[] = {tensor};
  const Reference pointer(PyObject_VectorcallMethod(names().data_ptr, arguments, 1, nullptr));
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(pointer.object));
}

// A buffer of the module, by name, with the tensor, memory and version that the packed weight was made from.
struct Watched {
  py::object name, tensor;  // None for a buffer that is not there
  uintptr_t memory;         // changes under the same tensor by `tensor.data = other`
  int64_t version;          // -1: not compared
};

class LinearPlan {
 public:
  LinearPlan(std::shared_ptr<PackedWeight> packed, py::dict buffers, py::list watched, py::object tensor_type,
             py::tuple dtypes, py::list recorders, py::list hooks, py::dict forward_ad, uintptr_t bias,
             float static_scale, int32_t static_zero)
      : packed_(std::move(packed)),
        buffers_(std::move(buffers)),
        tensor_type_(std::move(tensor_type)),
        recorders_(std::move(recorders)),
        hooks_(std::move(hooks)),
        forward_ad_(std::move(forward_ad)),
        bias_(bias),
        static_scale_(static_scale),
        static_zero_(static_zero),
        columns_(py::int_(packed_->n)) {
    for (const py::handle row : watched) {
      const auto entry = row.cast<std::tuple<py::object, py::object, int64_t>>();
      const py::object& tensor = std::get<1>(entry);
      watched_.push_back({std::get<0>(entry), tensor, tensor.is_none() ? 0 : address(tensor.ptr()), std::get<2>(entry)});
    }
    for (size_t i = 0; i < dtypes_.size(); ++i) dtypes_[i] = dtypes[i];
  }

  // The output, or None where the long way is called for.
  py::object operator()(const py::object& x, int activation_code, int threads, bool hooks_checked) const {
    LinearArgs args{};
    py::object out;
    try {
      out = prepare(x.ptr(), args, hooks_checked);
    } catch (py::error_already_set& unusual) {  // a tensor that cannot even answer; the long way says so
      return py::none();
    }
    if (out.is_none() || activation_code < 0) return py::none();
    args.activation = activation(activation_code);
    args.threads = threads;
    const py::gil_scoped_release release;
    run_linear(*packed_, args);
    return out;
  }

  int traverse(visitproc visit, void* arg) const {
    for (const Watched& w : watched_) Py_VISIT(w.tensor.ptr());
    for (PyObject* object : {buffers_.ptr(), recorders_.ptr(), hooks_.ptr(), forward_ad_.ptr()}) Py_VISIT(object);
    return 0;
  }

  void clear() {
    watched_.clear();
    buffers_ = py::dict();
    recorders_ = hooks_ = py::list();
    forward_ad_ = py::dict();
  }

 private:
  static constexpr Py_ssize_t max_dims = 8;

  // The output tensor with `args` filled in, or None.
  py::object prepare(PyObject* tensor, LinearArgs& args, bool hooks_checked) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type_.ptr() || !unchanged(hooks_checked)) return py::none();
    const Reference dtype_object(PyObject_GetAttr(tensor, names().dtype));
    int type = 0;
    while (type < 3 && dtypes_[type].ptr() != dtype_object.object) ++type;
    if (type == 3 || is_true(tensor, names().requires_grad) || !is_true(tensor, names().is_cpu)) return py::none();
    if (!answers(tensor, names().is_neg, Py_False)) return py::none();
    const Reference shape(PyObject_GetAttr(tensor, names().shape));
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.object);
    if (dims < 1 || dims > max_dims || to_int64(PyTuple_GET_ITEM(shape.object, dims - 1)) != packed_->k) {
      return py::none();
    }
    std::array<PyObject*, max_dims + 1> arguments{tensor};
    int64_t m = 1;
    for (Py_ssize_t i = 0; i + 1 < dims; ++i) {
      arguments[i + 1] = PyTuple_GET_ITEM(shape.object, i);
      m *= to_int64(arguments[i + 1]);
    }
    arguments[dims] = columns_.ptr();
    args.lda = packed_->k;
    if (!answers(tensor, names().is_contiguous, Py_True)) {
      // The rows of a matrix may lie apart, as in hidden[:, 0].
      const Reference strides(PyObject_CallMethodNoArgs(tensor, names().stride));
      if (dims != 2 || to_int64(PyTuple_GET_ITEM(strides.object, 1)) != 1) return py::none();
      args.lda = to_int64(PyTuple_GET_ITEM(strides.object, 0));
      if (args.lda < packed_->k) return py::none();
    }
    const uintptr_t a = address(tensor);
    if (m != 0 && a == 0) return py::none();  // a tensor without memory
    py::object out = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(names().new_empty, arguments.data(), static_cast<size_t>(dims + 1), nullptr));
    if (!out) throw py::error_already_set();
    args.m = m;
    args.a = pointer<const void>(a);
    args.a_type = args.c_type = static_cast<DType>(type);
    args.c = pointer<void>(address(out.ptr()));
    args.ldc = packed_->n;
    args.bias = pointer<const float>(bias_);
    args.static_scale = static_scale_;
    args.static_zero = static_zero_;
    return out;
  }

  bool unchanged(bool hooks_checked) const {
    for (const Watched& w : watched_) {
      PyObject* const now = PyDict_GetItemWithError(buffers_.ptr(), w.name.ptr());
      if (now != w.tensor.ptr()) return false;
      if (now != Py_None && address(now) != w.memory) return false;
      if (w.version >= 0 && to_int64(Reference(PyObject_GetAttr(now, names().version)).object) != w.version) return false;
    }
    for (const py::handle hooks : hooks_) {
      if (!hooks_checked && PyDict_GET_SIZE(hooks.ptr()) != 0) return false;
    }
    PyObject* const level = PyDict_GetItemWithError(forward_ad_.ptr(), names().current_level);
    if (!level || to_int64(level) >= 0) return false;
    for (const py::handle count : recorders_) {
      const Reference value(PyObject_CallNoArgs(count.ptr()));
      if (value.object != Py_None && PyObject_IsTrue(value.object)) return false;
    }
    return true;
  }

  std::shared_ptr<PackedWeight> packed_;
  py::dict buffers_;
  std::vector<Watched> watched_;
  py::object tensor_type_;
  std::array<py::object, 3> dtypes_;
  py::list recorders_, hooks_;
  py::dict forward_ad_;
  uintptr_t bias_;
  float static_scale_;
  int32_t static_zero_;
  py::int_ columns_;
};

}  // namespace

void bind_torch_call(py::module_& m) {
  // A hook may hold the model that holds this plan: the garbage collector has to see through it.
  const auto collectable = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* const type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<LinearPlan&>(py::handle(self)).traverse(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<LinearPlan&>(py::handle(self)).clear();
      return 0;
    };
  });
  py::class_<LinearPlan>(m, "LinearPlan", collectable)
      .def(py::init<std::shared_ptr<PackedWeight>, py::dict, py::list, py::object, py::tuple, py::list, py::list, py::dict,
                    uintptr_t, float, int32_t>())
      .def("__call__", &LinearPlan::operator());
}

}  // namespace halfbyte

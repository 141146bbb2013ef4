// The short way of calling a QLinear: one call from Python that reads the tensor's attributes through the C API, allocates
// the output and runs the kernel. Each attribute costs about 40 ns here and 100 ns in Python, and a layer asks for a dozen;
// on a 64x64 layer that is half of the time. torch is met as Python objects only: nothing of it is linked.
//
// Whatever is not the plain case (another tensor type, a gradient, a changed buffer, a hook, a dispatch mode, a wrong
// shape) returns None, and Python takes the way with all checks.
#include <array>
#include <memory>
#include <vector>

#include "bindings/bind.h"
#include "ops/linear_w8a8/op.h"

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

// A buffer of the module, by name, with the tensor and version that the packed weight was made from.
struct Watched {
  py::object name, tensor;  // None for a buffer that is not there
  int64_t version;          // -1: not compared
};

class LinearPlan {
 public:
  LinearPlan(std::shared_ptr<PackedWeight> packed, py::dict buffers, py::list watched, py::object tensor_type,
             py::tuple dtypes, py::list recorders, py::list hooks, uintptr_t bias, float static_scale, int32_t static_zero)
      : packed_(std::move(packed)),
        buffers_(std::move(buffers)),
        tensor_type_(std::move(tensor_type)),
        recorders_(std::move(recorders)),
        hooks_(std::move(hooks)),
        bias_(bias),
        static_scale_(static_scale),
        static_zero_(static_zero),
        last_(py::int_(packed_->n)) {
    for (const py::handle row : watched) {
      const auto entry = row.cast<std::tuple<py::object, py::object, int64_t>>();
      watched_.push_back({std::get<0>(entry), std::get<1>(entry), std::get<2>(entry)});
    }
    for (size_t i = 0; i < dtypes_.size(); ++i) dtypes_[i] = dtypes[i];
  }

  // The output, or None where the long way is called for.
  py::object operator()(const py::object& x, int activation_code, int threads) const {
    PyObject* const tensor = x.ptr();
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type_.ptr() || activation_code < 0 || !unchanged()) {
      return py::none();
    }
    const Reference dtype_object(PyObject_GetAttr(tensor, names().dtype));
    int type = 0;
    while (type < 3 && dtypes_[type].ptr() != dtype_object.object) ++type;
    if (type == 3 || is_true(tensor, names().requires_grad) || !is_true(tensor, names().is_cpu)) return py::none();
    PyObject* self[] = {tensor};
    if (Reference(PyObject_VectorcallMethod(names().is_contiguous, self, 1, nullptr)).object != Py_True) {
      return py::none();
    }
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
    arguments[dims] = last_.ptr();
    py::object out = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(names().new_empty, arguments.data(), static_cast<size_t>(dims + 1), nullptr));
    if (!out) throw py::error_already_set();
    linear_w8a8::Args args{};
    args.m = m;
    args.a = pointer<const void>(address(tensor));
    args.lda = packed_->k;
    args.a_type = args.c_type = static_cast<DType>(type);
    args.c = pointer<void>(address(out.ptr()));
    args.ldc = packed_->n;
    args.bias = pointer<const float>(bias_);
    args.activation = activation(activation_code);
    args.static_scale = static_scale_;
    args.static_zero = static_zero_;
    args.threads = threads;
    {
      const py::gil_scoped_release release;
      linear_w8a8::run(*packed_, args);
    }
    return out;
  }

 private:
  static constexpr Py_ssize_t max_dims = 8;

  bool unchanged() const {
    for (const Watched& w : watched_) {
      PyObject* const now = PyDict_GetItemWithError(buffers_.ptr(), w.name.ptr());
      if (now != w.tensor.ptr()) return false;
      if (w.version >= 0 && to_int64(Reference(PyObject_GetAttr(now, names().version)).object) != w.version) return false;
    }
    for (const py::handle hooks : hooks_) {
      if (PyDict_GET_SIZE(hooks.ptr()) != 0) return false;
    }
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
  uintptr_t bias_;
  float static_scale_;
  int32_t static_zero_;
  py::int_ last_;
};

}  // namespace

void bind_torch_call(py::module_& m) {
  py::class_<LinearPlan>(m, "LinearPlan")
      .def(py::init<std::shared_ptr<PackedWeight>, py::dict, py::list, py::object, py::tuple, py::list, py::list,
                    uintptr_t, float, int32_t>())
      .def("__call__", &LinearPlan::operator());
}

}  // namespace halfbyte

// The short way of calling a QLinear: one call from Python that reads the tensor's attributes through the C API, allocates
// the output and runs the kernel. A layer asks for a dozen, and for a small one that is most of the time: the
// same in Python took 0.7 us longer of 2.8. torch is met as Python objects only: nothing of it is linked.
//
// Whatever is not the plain case (another tensor type, a gradient, a changed buffer, a hook, a dispatch mode, a wrong
// shape) returns None, and Python takes the way with all checks.
#include <array>
#include <memory>
#include <vector>

#include "bindings/watch.h"
#include "core/linear.h"

namespace halfbyte {
namespace {

bool is_true(PyObject* tensor, PyObject* name) {
  return Reference(PyObject_GetAttr(tensor, name)).object == Py_True;
}

// tensor.name() is expected?
bool answers(PyObject* tensor, PyObject* name, PyObject* expected) {
  PyObject* arguments[] = {tensor};
  return Reference(PyObject_VectorcallMethod(name, arguments, 1, nullptr)).object == expected;
}

class LinearPlan {
 public:
  // watched: as Watch takes it; hooks: dictionaries that must be empty
  LinearPlan(std::shared_ptr<PackedWeight> packed, const py::list& watched, py::object tensor_type, py::tuple dtypes,
             py::list recorders, py::list hooks, py::dict forward_ad, uintptr_t bias, float static_scale, int32_t static_zero)
      : packed_(std::move(packed)),
        watch_(watched, std::move(hooks)),
        tensor_type_(std::move(tensor_type)),
        recorders_(std::move(recorders)),
        forward_ad_(std::move(forward_ad)),
        bias_(bias),
        static_scale_(static_scale),
        static_zero_(static_zero),
        columns_(py::int_(packed_->n)) {
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
    for (PyObject* object : {recorders_.ptr(), forward_ad_.ptr()}) Py_VISIT(object);
    return watch_.traverse(visit, arg);
  }

  void clear() {
    watch_.clear();
    recorders_ = py::list();
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
    if (!watch_.same_entries() || (!hooks_checked && !watch_.all_empty())) return false;
    PyObject* const level = PyDict_GetItemWithError(forward_ad_.ptr(), names().current_level);
    if (!level || to_int64(level) >= 0) return false;
    for (const py::handle count : recorders_) {
      const Reference value(PyObject_CallNoArgs(count.ptr()));
      if (value.object != Py_None && PyObject_IsTrue(value.object)) return false;
    }
    return true;
  }

  std::shared_ptr<PackedWeight> packed_;
  Watch watch_;
  py::object tensor_type_;
  std::array<py::object, 3> dtypes_;
  py::list recorders_;
  py::dict forward_ad_;
  uintptr_t bias_;
  float static_scale_;
  int32_t static_zero_;
  py::int_ columns_;
};

}  // namespace

void bind_torch_call(py::module_& m) {
  py::class_<LinearPlan>(m, "LinearPlan", collectable<LinearPlan>())
      .def(py::init<std::shared_ptr<PackedWeight>, py::list, py::object, py::tuple, py::list, py::list, py::dict, uintptr_t, float,
                    int32_t>())
      .def("__call__", &LinearPlan::operator());
}

}  // namespace halfbyte

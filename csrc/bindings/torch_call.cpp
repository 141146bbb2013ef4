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
#include "core/multiply.h"

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
      Rows rows;
      if (activation_code < 0 || !unchanged(hooks_checked) || !read(x.ptr(), packed_->k, rows)) return py::none();
      out = prepare(rows, args);
    } catch (py::error_already_set& unusual) {  // a tensor that cannot even answer; the long way says so
      return py::none();
    }
    args.activation = activation(activation_code);
    args.threads = threads;
    const py::gil_scoped_release release;
    run_linear(*packed_, args);
    return out;
  }

  // What several layers make of one x, through a norm where one is given: (rms, weight, bias, eps). given: (plan, activation,
  // plan of the gate or None, residual or None) of each. A list of the outputs, or None.
  static py::object together(const py::object& x, const py::tuple& given, const py::object& norm_given, int threads) {
    check(given.size() >= 1 && given.size() <= max_products, "linears: takes 1 to ", max_products, " layers, not ", given.size());
    norm::Parameters through;
    if (!norm_given.is_none()) {
      const auto [rms, weight, bias, eps] = norm_given.cast<std::tuple<bool, uintptr_t, uintptr_t, float>>();
      const auto kind = rms ? norm::Kind::rms : norm::Kind::layer;
      through = {kind, pointer<const float>(weight), pointer<const float>(bias), eps};
    }
    std::array<LinearCall, max_products> calls{};
    size_t count = 0;
    py::list outs;
    try {
      Rows rows;
      const LinearPlan* first = nullptr;
      for (const py::handle row : given) {
        const auto [plan, code, gate, residual] = row.cast<std::tuple<const LinearPlan*, int, const LinearPlan*, py::object>>();
        check(plan, "linears: a layer without a plan");
        if (!first) {
          first = plan;
          if (!plan->unchanged(false) || !plan->read(x.ptr(), plan->packed_->k, rows)) return py::none();
        } else if (!plan->watch_.unchanged() || !plan->quantizes_like(*first)) {
          return py::none();
        }
        if (gate && !(gate->watch_.unchanged() && gate->quantizes_like(*plan) && gate->packed_->n == plan->packed_->n)) {
          return py::none();
        }
        LinearArgs args{};
        Rows added;
        if (!residual.is_none()) {
          if (!plan->read(residual.ptr(), plan->packed_->n, added) || !added.lie_beside(rows)) return py::none();
          args.residual = added.memory;
          args.ldr = added.stride;
          args.residual_type = added.type;
        }
        outs.append(plan->prepare(rows, args));
        args.activation = activation(code);
        args.threads = threads;
        args.gate = gate ? gate->packed_.get() : nullptr;
        args.gate_bias = gate ? pointer<const float>(gate->bias_) : nullptr;
        args.norm = norm_given.is_none() ? nullptr : &through;
        calls[count++] = {plan->packed_.get(), args};
      }
    } catch (py::error_already_set& unusual) {
      return py::none();
    }
    {
      const py::gil_scoped_release release;
      run_linears({calls.data(), count});
    }
    return outs;
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

  // A tensor as the core reads it.
  struct Rows {
    py::object shape;  // owns its numbers
    Py_ssize_t dims;
    std::array<PyObject*, max_dims + 1> arguments;  // of new_empty: the tensor and all numbers but the last
    int64_t count, stride;
    DType type;
    const void* memory;

    // Whether only the last number differs.
    bool lie_beside(const Rows& other) const {
      if (dims != other.dims || type != other.type) return false;
      for (Py_ssize_t i = 1; i < dims; ++i) {
        if (to_int64(arguments[i]) != to_int64(other.arguments[i])) return false;
      }
      return true;
    }
  };

  // Reads [..., k] into `rows`; false where that is not plain.
  bool read(PyObject* tensor, int64_t k, Rows& rows) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type_.ptr()) return false;
    const Reference dtype_object(PyObject_GetAttr(tensor, names().dtype));
    int type = 0;
    while (type < 3 && dtypes_[type].ptr() != dtype_object.object) ++type;
    if (type == 3 || is_true(tensor, names().requires_grad) || !is_true(tensor, names().is_cpu)) return false;
    if (!answers(tensor, names().is_neg, Py_False)) return false;
    rows.shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().shape));
    if (!rows.shape) throw py::error_already_set();
    PyObject* const shape = rows.shape.ptr();
    const Py_ssize_t dims = rows.dims = PyTuple_GET_SIZE(shape);
    if (dims < 1 || dims > max_dims || to_int64(PyTuple_GET_ITEM(shape, dims - 1)) != k) return false;
    rows.arguments[0] = tensor;
    rows.count = 1;
    for (Py_ssize_t i = 0; i + 1 < dims; ++i) {
      rows.arguments[i + 1] = PyTuple_GET_ITEM(shape, i);
      rows.count *= to_int64(rows.arguments[i + 1]);
    }
    rows.stride = k;
    if (!answers(tensor, names().is_contiguous, Py_True)) {
      // The rows of a matrix may lie apart, as in hidden[:, 0].
      const Reference strides(PyObject_CallMethodNoArgs(tensor, names().stride));
      if (dims != 2 || to_int64(PyTuple_GET_ITEM(strides.object, 1)) != 1) return false;
      rows.stride = to_int64(PyTuple_GET_ITEM(strides.object, 0));
      if (rows.stride < k) return false;
    }
    rows.type = static_cast<DType>(type);
    rows.memory = pointer<const void>(address(tensor));
    return rows.count == 0 || rows.memory;  // or it is a tensor without memory
  }

  // The output tensor, with `args` filled in.
  py::object prepare(Rows& rows, LinearArgs& args) const {
    rows.arguments[rows.dims] = columns_.ptr();
    py::object out = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(names().new_empty, rows.arguments.data(), static_cast<size_t>(rows.dims + 1), nullptr));
    if (!out) throw py::error_already_set();
    args.m = rows.count;
    args.a = rows.memory;
    args.lda = rows.stride;
    args.a_type = args.c_type = rows.type;
    args.c = pointer<void>(address(out.ptr()));
    args.ldc = packed_->n;
    args.bias = pointer<const float>(bias_);
    args.static_scale = static_scale_;
    args.static_zero = static_zero_;
    return out;
  }

  // Whether codes of x for one are codes for the other.
  bool quantizes_like(const LinearPlan& other) const {
    return same_codes(*packed_, *other.packed_) && static_scale_ == other.static_scale_ && static_zero_ == other.static_zero_;
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
      .def("__call__", &LinearPlan::operator())
      .def_static("together", &LinearPlan::together);
}

}  // namespace halfbyte

// Python binding of stacks of transformer blocks. What a stack points to (norms, biases) is kept alive by its caller.
#include <string>

#include "bindings/bind.h"
#include "fused/stack.h"

namespace halfbyte {
namespace {

using namespace fused;

Norm norm_of(const py::handle given, bool rms) {
  const auto [weight, bias, eps] = given.cast<std::tuple<uintptr_t, uintptr_t, float>>();
  return {rms ? norm::Kind::rms : norm::Kind::layer, pointer<const float>(weight), pointer<const float>(bias), eps};
}

std::optional<Norm> optional_norm(const py::object& given, bool rms) {
  return given.is_none() ? std::nullopt : std::optional(norm_of(given, rms));
}

Linear linear_of(const py::dict& block, const char* name) {
  if (!block.contains(name) || block[name].is_none()) return {};
  const auto [packed, bias, scale, zero] =
      block[name].cast<std::tuple<std::shared_ptr<PackedWeight>, uintptr_t, float, int32_t>>();
  return {packed, pointer<const float>(bias), scale, zero};
}

std::shared_ptr<Stack> make_stack(int64_t hidden, int heads, int kv_heads, int head_size, float scale, bool pre_norm, bool rms,
                                  bool causal, int64_t window, int activation_code, int rotary_dims, bool interleaved,
                                  const py::object& first_norm, const py::object& last_norm, const py::list& blocks) {
  auto stack = std::make_shared<Stack>(Stack{hidden, heads, kv_heads, head_size, scale, pre_norm, causal, window,
                                             activation(activation_code), rotary_dims, interleaved,
                                             optional_norm(first_norm, rms), optional_norm(last_norm, rms), {}});
  for (const py::handle given : blocks) {
    const auto b = given.cast<py::dict>();
    stack->blocks.push_back({norm_of(b["attention_norm"], rms), norm_of(b["mlp_norm"], rms), linear_of(b, "q"),
                             linear_of(b, "k"), linear_of(b, "v"), linear_of(b, "o"), linear_of(b, "gate"),
                             linear_of(b, "up"), linear_of(b, "down")});
  }
  check_stack(*stack);
  return stack;
}

// (address, kind, strides of batch, head, row and key)
Mask mask_of(const py::object& given) {
  if (given.is_none()) return {};
  const auto [data, kind, batch, head, row, key] =
      given.cast<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>>();
  check(kind == 1 || kind == 2, "unknown kind of mask ", kind);
  return {pointer<const void>(data), static_cast<attention::Mask>(kind), batch, head, row, key};
}

// One call after the other of the same shape takes the same arguments: they are parsed once.
class StackCall {
 public:
  StackCall(std::shared_ptr<Stack> stack, const py::object& cache) : stack_(std::move(stack)) {
    if (cache.is_none()) return;
    const auto c = cache.cast<py::dict>();
    const auto number = [&](const char* name) { return c[name].cast<int64_t>(); };
    const auto address = [&](const char* name) { return c[name].cast<uintptr_t>(); };
    const int64_t type = number("type");
    check(type >= 0 && type <= 3, "unknown type of cache ", type);
    cache_ = Cache{pointer<void>(address("k")), pointer<void>(address("v")), static_cast<attention::Storage>(type),
                   number("block"), number("batch"), number("head"), number("row"), number("positions"),
                   pointer<float>(address("k_scale")), pointer<float>(address("v_scale")), number("scale_block"),
                   number("scale_batch"), number("scale_head")};
    sequences_ = number("sequences");
    const int64_t blocks = number("blocks");
    check(blocks == static_cast<int64_t>(stack_->blocks.size()), "the cache is of ", blocks, " blocks, the stack of ",
          stack_->blocks.size());
    check(number("kv_heads") == stack_->kv_heads && number("head_size") == stack_->head_size, "the cache is of ",
          number("kv_heads"), " heads of ", number("head_size"), ", the stack of ", stack_->kv_heads, " of ", stack_->head_size);
  }

  // Returns the events as (block, phase, rank, begin ns, end ns) where profiled, else None.
  py::object operator()(uintptr_t x, int64_t ldx, int x_type, uintptr_t out, int64_t ldo, int out_type, int64_t batch,
                        int64_t tokens, const py::object& mask, int64_t past, uintptr_t positions, uintptr_t cos, uintptr_t sin,
                        int64_t table_rows, int64_t first_block, int64_t last_block, int64_t profiled, int threads) const {
    check(!cache_ || batch <= sequences_, "the cache is of ", sequences_, " sequences, the call of ", batch);
    Timeline timeline{nullptr, profiled, {0}};
    std::vector<Event> events(static_cast<size_t>(profiled));
    timeline.events = events.data();
    const Call call{batch, tokens, pointer<const void>(x), ldx, dtype(x_type), pointer<void>(out), ldo, dtype(out_type),
                    mask_of(mask), first_block, last_block, pointer<const float>(cos), pointer<const float>(sin), table_rows,
                    pointer<const int64_t>(positions), cache_ ? &*cache_ : nullptr, past, profiled ? &timeline : nullptr,
                    threads};
    {
      const py::gil_scoped_release release;
      run(*stack_, call);
    }
    if (!profiled) return py::none();
    py::list rows;
    for (int64_t i = 0; i < std::min(timeline.count.load(), profiled); ++i) {
      const Event& e = events[static_cast<size_t>(i)];
      rows.append(py::make_tuple(e.block, e.phase, e.rank, e.begin, e.end));
    }
    return rows;
  }

 private:
  std::shared_ptr<Stack> stack_;
  std::optional<Cache> cache_;
  int64_t sequences_ = 0;
};

}  // namespace

void bind_fused(py::module_& m) {
  py::class_<Stack, std::shared_ptr<Stack>>(m, "Stack")
      .def(py::init(&make_stack), py::kw_only(), py::arg("hidden"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_size"),
           py::arg("scale"), py::arg("pre_norm"), py::arg("rms"), py::arg("causal"), py::arg("window"), py::arg("activation"),
           py::arg("rotary_dims"), py::arg("interleaved"), py::arg("first_norm"), py::arg("last_norm"), py::arg("blocks"));
  py::class_<StackCall>(m, "StackCall")
      .def(py::init<std::shared_ptr<Stack>, py::object>(), py::arg("stack"), py::arg("cache") = py::none())
      .def("__call__", &StackCall::operator());
  m.def("buffer_allocations", [] { return Buffer::allocations(); });
}

}  // namespace halfbyte

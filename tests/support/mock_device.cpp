// A device that is not the CPU, for machines without one: torch's key for devices from outside, PrivateUse1.
//
// Its memory is the CPU's behind addresses that no processor can follow, so that whoever takes a data pointer for one of
// the host ends as with a GPU. Kernels are the CPU's. What a GPU refuses is refused here: tensors of two devices in one
// operator (also those indices that torch would move by itself), generators of another device, and copies to the host
// that do not wait. Whatever makes the host wait for the device is reported to a listener, which may refuse it.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

namespace {

constexpr auto mock = c10::DeviceType::PrivateUse1;
const c10::Device first(mock, 0);
constexpr uintptr_t apart = uintptr_t{1} << 60;  // no address of a process has this bit

using Listener = int (*)(const char* what);
std::atomic<Listener> listener{nullptr};
thread_local bool in_kernel = false;

struct InKernel {
  bool before = in_kernel;
  InKernel() { in_kernel = true; }
  ~InKernel() { in_kernel = before; }
};

void host_waits(const std::string& what) {
  auto told = listener.load();
  if (told && !in_kernel) TORCH_CHECK(!told(what.c_str()), "the host waits for the device here: ", what);
}

void* on_host(const void* address) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(address) & ~apart);
}

// ---- memory ----

void release(void* context) { c10::free_cpu(context); }

struct MockAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, first};
    void* memory = c10::alloc_cpu(bytes);
    return {reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) | apart), memory, &release, first};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(on_host(to), on_host(from), bytes);
  }
};
MockAllocator allocator;
REGISTER_ALLOCATOR(mock, &allocator);

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto grown = allocator.allocate(bytes);
  if (auto kept = std::min(bytes, storage.nbytes())) allocator.copy_data(grown.get(), storage.data(), kept);
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

// ---- what torch asks of a device ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return mock; }
  c10::Device exchangeDevice(c10::Device) const override { return first; }
  c10::Device getDevice() const override { return first; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, first); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(c10::DeviceIndex) const override { host_waits("synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

// ---- operators of its own: memory, views and copies ----

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  auto bytes = (tensor->storage_offset() + tensor->numel()) * tensor->itemsize();
  if (bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  return self;
}

at::Tensor& set_to_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                           c10::SymIntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  tensor->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_to_whole_storage(at::Tensor& self, at::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_to_storage(self, std::move(source), 0, {c10::SymInt(count)}, {c10::SymInt(1)});
}

at::Tensor& set_to_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_to_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

at::Tensor& set_to_nothing(at::Tensor& self) {
  return set_to_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &allocator, true), 0,
                        {c10::SymInt(0)}, {c10::SymInt(1)});
}

at::Tensor shown_to_host(const at::Tensor& tensor) {
  if (!tensor.is_privateuseone()) return tensor;
  auto options = tensor.options().device(c10::kCPU).requires_grad(false);
  return at::from_blob(on_host(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), options);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (to.is_cpu()) {
    host_waits("copy to the host");
    TORCH_CHECK(!non_blocking, "a copy to the host that does not wait may be read before it is there");
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  shown_to_host(to).copy_(shown_to_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) resize_(to, self.sym_sizes(), std::nullopt);
  return copy_from(self, to, false);
}

c10::Scalar local_scalar_dense(const at::Tensor& self) {
  host_waits("item");
  return at::_local_scalar_dense(shown_to_host(self));
}

int64_t plain_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                        double, bool, std::optional<double>, bool) {
  return 0;  // by products and a softmax
}

bool may_become(const at::Tensor&, const at::Tensor&) { return true; }  // parameter.data = tensor, as with other devices

// ---- all other operators: the CPU's kernels, after a look at the arguments ----

bool selects(const c10::OperatorHandle& op) {
  const auto& name = op.schema().name();
  return name == "aten::index" || name.rfind("aten::index_put", 0) == 0 || name == "aten::_index_put_impl_" ||
         name == "aten::_unsafe_index";
}

void check(const c10::OperatorHandle& op, const at::Tensor& tensor, const std::string& argument) {
  if (!tensor.defined() || tensor.is_privateuseone()) return;
  // As in torch's kernels for GPUs, a number may be a CPU tensor without dimensions.
  bool number = tensor.unsafeGetTensorImpl()->is_wrapped_number() ||
                (tensor.dim() == 0 && !selects(op) && op.hasTag(at::Tag::pointwise));
  bool value = tensor.dim() == 0 && argument == "values" && selects(op);
  const auto& operation = op.schema().name();
  bool filling = tensor.dim() == 0 && argument == "value" &&
                 (operation.rfind("aten::masked_fill", 0) == 0 || operation.rfind("aten::fill", 0) == 0);
  TORCH_CHECK(number || value || filling, "Expected all tensors to be on the same device, but got ", argument, " on ",
              tensor.device(), " and another argument on ", first, " (when checking arguments of ", op.schema().name(),
              ")");
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto given = torch::jit::last(*stack, arguments.size());
  bool by_mask = false;
  for (size_t place = 0; place < arguments.size(); ++place) {
    const auto& value = given[place];
    const auto& name = arguments[place].name();
    if (value.isTensor()) {
      check(op, value.toTensor(), name);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) check(op, tensor, name);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        if (!tensor || !tensor->defined()) continue;
        check(op, *tensor, name);
        by_mask |= tensor->scalar_type() == at::kBool || tensor->scalar_type() == at::kByte;
      }
    } else if (value.isGenerator()) {
      TORCH_CHECK(!value.toGenerator().defined() || value.toGenerator().device().type() == mock,
                  "Expected a 'mock' device type for generator but found 'cpu' (", op.schema().name(), ")");
    }
  }
  bool depends = op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
  if (selects(op) ? by_mask : depends) host_waits(op.schema().name() + (by_mask ? " by a mask" : ""));
  InKernel inside;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_to_storage);
  m.impl("set_.source_Storage", &set_to_whole_storage);
  m.impl("set_.source_Tensor", &set_to_tensor);
  m.impl("set_", &set_to_nothing);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("_fused_sdp_choice", &plain_attention);
  m.impl("_has_compatible_shallow_copy_type", &may_become);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

}  // namespace

extern "C" void mock_device_listen(Listener told) { listener = told; }
extern "C" void mock_device_register() { at::RegisterPrivateUse1HooksInterface(new Hooks); }

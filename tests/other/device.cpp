// A device of its own whose kernels are those of the CPU: what a test assumes about the CPU shows without an accelerator.
//
// Memory is the CPU's, wrapped. Autograd runs backward in a thread of the device, tensors of two devices do not mix, `.numpy()`
// raises, and random numbers come from a generator of its own, as on CUDA. `tests/other/__init__.py` builds and registers it.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;

const Device CPU(c10::kCPU), HERE(c10::kPrivateUse1, 0);

// -- memory

void let_go(void* kept) { delete static_cast<Storage*>(kept); }

c10::DataPtr alias(const Storage& of, Device device) {
  return {const_cast<void*>(of.data()), new Storage(of), &let_go, device};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    Storage host(Storage::use_byte_size_t(), n, c10::GetCPUAllocator()->allocate(n), c10::GetCPUAllocator(), true);
    return alias(host, HERE);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &let_go; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &memory)

Storage wrap(const Storage& of, Device device, c10::Allocator* allocator) {
  return Storage(Storage::use_byte_size_t(), of.nbytes(), alias(of, device), allocator, true);
}

// -- the device

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kPrivateUse1> {
  Device exchangeDevice(Device) const override { return HERE; }
  Device getDevice() const override { return HERE; }
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getNewStream(Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Random final : c10::GeneratorImpl {
  at::Generator host;
  explicit Random(at::Generator host) : GeneratorImpl(HERE, DispatchKeySet(DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offset"); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(host).seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(host.clone()); }
};

at::Generator& standard() {
  static at::Generator generator = at::make_generator<Random>(at::detail::createCPUGenerator());
  return generator;
}

at::Generator host_of(const at::Generator& generator) {
  return generator.device() == HERE ? static_cast<Random*>(generator.unsafeGetGeneratorImpl())->host : generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return standard(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(at::detail::createCPUGenerator()); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Device getDeviceFromPtr(void*) const override { return HERE; }
  void resizePrivateUse1Bytes(const Storage& storage, size_t n) const override {
    c10::DataPtr data = memory.allocate(n);
    if (storage.nbytes()) memory.copy_data(data.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

// -- an operation: on the CPU, with the same memory

bool ours(const Tensor& t) { return t.defined() && t.device().type() == c10::kPrivateUse1; }

void set_geometry(const Tensor& t, const Tensor& like) {
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
}

struct Call {
  std::vector<std::pair<Tensor, Tensor>> given;  // here, on the CPU
  std::unordered_map<c10::StorageImpl*, Storage> known;  // by the CPU's
  bool host = false;

  Tensor enter(const Tensor& t) {
    if (!ours(t)) {
      host |= t.defined() && t.device() == CPU && t.dim() > 0;
      return t;
    }
    Storage storage = wrap(t.storage(), CPU, c10::GetCPUAllocator());
    for (auto& [cpu, here] : known)
      if (here.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) storage = Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu));
    known.emplace(storage.unsafeGetStorageImpl(), t.storage());
    Tensor cpu = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), t.dtype());
    set_geometry(cpu, t);
    cpu._set_conj(t.is_conj());
    cpu._set_neg(t.is_neg());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) cpu.unsafeGetTensorImpl()->set_wrapped_number(true);
    given.emplace_back(t, cpu);
    return cpu;
  }

  Tensor leave(const Tensor& t) {
    if (!t.defined() || t.device() != CPU || t.layout() != c10::kStrided) return t;
    for (auto& [here, cpu] : given)
      if (cpu.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return here;
    c10::StorageImpl* key = t.storage().unsafeGetStorageImpl();
    if (!known.count(key)) known.emplace(key, wrap(t.storage(), HERE, &memory));
    Storage storage = known.at(key);
    Tensor here;
    for (auto& [of, cpu] : given)  // a view is of the same kind in inference mode, too
      if (cpu.storage().unsafeGetStorageImpl() == key)
        here = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, Storage(storage), of.key_set(), t.dtype());
    if (!here.defined()) here = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::PrivateUse1), t.dtype());
    set_geometry(here, t);
    here._set_conj(t.is_conj());
    here._set_neg(t.is_neg());
    return here;
  }

  void settle() {  // what was changed in place: memory, geometry
    for (auto& [here, cpu] : given) {
      c10::StorageImpl* key = cpu.storage().unsafeGetStorageImpl();
      if (!known.count(key)) {
        known.emplace(key, wrap(cpu.storage(), HERE, &memory));
        here.unsafeGetTensorImpl()->set_storage_keep_dtype(known.at(key));
      } else if (cpu.storage().data() != here.storage().data()) {
        here.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(alias(cpu.storage(), HERE));
        here.storage().unsafeGetStorageImpl()->set_nbytes(cpu.storage().nbytes());
      }
      if (here.sizes() != cpu.sizes() || here.strides() != cpu.strides() || here.storage_offset() != cpu.storage_offset()) set_geometry(here, cpu);
    }
  }
};

const std::unordered_set<std::string> MIXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index",
                                               "aten::_unsafe_index_put"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n = schema.arguments().size(), start = stack->size() - n;
  Call call;
  for (size_t i = 0; i < n; ++i) {
    IValue& value = (*stack)[start + i];
    if (value.isTensor()) {
      value = call.enter(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(call.enter(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional<Tensor>(call.enter(*t)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == c10::kPrivateUse1) {
      value = CPU;
    } else if (value.isGenerator()) {
      value = host_of(value.toGenerator());
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      value = host_of(standard());
    }
  }
  TORCH_CHECK(!call.host || call.given.empty() || MIXED.count(schema.name()), "Expected all tensors to be on the same device, but found at least two devices, ",
              HERE, " and cpu! (", schema.name(), ")");
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.settle();
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.leave(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(call.leave(t));
      value = list;
    }
  }
}

// -- what the CPU has not, or has another way for

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  Tensor target = call.enter(to);
  target.copy_(call.enter(self));
  return to;
}

std::tuple<Tensor, Tensor> dropout(const Tensor& x, double p, std::optional<bool> train) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  Tensor cpu = call.enter(x), mask = at::empty_like(cpu, cpu.options().dtype(at::kBool));
  if (!train.value_or(true)) return {call.leave(cpu.clone()), call.leave(mask.fill_(true))};
  mask.bernoulli_(1 - p, host_of(standard()));
  return {call.leave(cpu.mul(mask).mul_(p < 1 ? 1 / (1 - p) : 0.0)), call.leave(mask)};
}

using Ints = c10::SymIntArrayRef;

Tensor& set_part(Tensor& self, Storage source, c10::SymInt offset, Ints size, Ints stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty()) {
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride));
  }
  return self;
}

Tensor& set_whole(Tensor& self, Storage source) {
  std::vector<c10::SymInt> size{static_cast<int64_t>(source.nbytes() / self.itemsize())};
  return set_part(self, std::move(source), 0, size, {});
}

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, Ints stride, Ints padding, Ints dilation, bool transposed,
                   Ints output_padding, c10::SymInt groups) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  std::optional<Tensor> bias = b && b->defined() ? std::optional<Tensor>(call.enter(*b)) : std::nullopt;
  Tensor cpu = call.enter(x), weight = call.enter(w);
  TORCH_CHECK(!call.host, "Input type (", HERE, ") and weight type (cpu) should be the same");
  return call.leave(at::convolution_symint(cpu, weight, bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w, Ints stride, Ints padding, Ints dilation,
                                                        bool transposed, Ints output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  c10::SymInt out = grad.sym_size(1);
  std::vector<c10::SymInt> bias{out};
  auto [a, b, c] = at::convolution_backward_symint(call.enter(grad), call.enter(x), call.enter(w), c10::SymIntArrayRef(bias), stride, padding, dilation,
                                                   transposed, output_padding, groups, mask);
  return {call.leave(a), call.leave(b), call.leave(c)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_part);
  m.impl("native_dropout", &dropout);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  for (const char* name : {"native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// a copy resolves these; their fallback would copy to do so
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define HIGH(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(HIGH)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("seed", [](uint64_t seed) { standard().set_current_seed(seed); });
  m.def("initial_seed", [] { return standard().current_seed(); });
  m.def("state", [] { return standard().get_state(); });
  m.def("set_state", [](const Tensor& state) { standard().set_state(state); });
}

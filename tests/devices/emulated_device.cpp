// An accelerator whose tensors lie in the CPU's memory: see emulated_device.py.

#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/copy.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using c10::IValue;
using c10::Storage;
using c10::StorageImpl;

const c10::Device kHere(c10::kPrivateUse1, 0);

// ---- memory

void drop(void* storage) { delete static_cast<Storage*>(storage); }

// The memory of `storage`, which it keeps alive, as that of another device.
Storage on(c10::Device device, const Storage& storage) {
  c10::DataPtr data(storage.mutable_data(), new Storage(storage), drop, device);
  return c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data),
      c10::GetAllocator(device.type()), /*resizable=*/true);
}

struct Allocator : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    c10::DataPtr data = c10::GetCPUAllocator()->allocate(n);
    return c10::DataPtr(data.get(), data.release_context(), data.get_deleter(), kHere);
  }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &allocator)

at::Tensor tensor_of(const Storage& storage, const at::Tensor& shape, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      Storage(storage), c10::DispatchKeySet(key), shape.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
      shape.sizes(), shape.strides(), shape.storage_offset());
  return tensor;
}

// ---- random numbers: the CPU's, from generators that belong to the device

struct Generator : c10::GeneratorImpl {
  explicit Generator(at::Generator cpu)
      : GeneratorImpl(kHere, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(cpu.clone()); }
  at::Generator cpu;
};

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator =
        at::make_generator<Generator>(at::detail::getDefaultCPUGenerator());
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>(at::detail::createCPUGenerator());
  }
};

// A guard that knows its one device by number, as CUDA's does.
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::kPrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kHere);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kHere);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- what the host waited for

std::mutex mutex;
std::vector<std::string> waits;

void wait_for(const std::string& why) {
  std::lock_guard<std::mutex> lock(mutex);
  waits.push_back(why);
}

bool is_here(const at::Tensor& t) { return t.defined() && t.device() == kHere; }
bool is_elsewhere(const at::Tensor& t) { return t.defined() && t.device() != kHere; }
bool is_mask(const at::Tensor& t) {
  return t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
}

bool starts_with(const std::string& name, const char* start) { return name.rfind(start, 0) == 0; }

// ---- a call of the CPU's kernel on the same memory

struct Call {
  const c10::OperatorHandle& op;
  const std::string name = op.schema().name();
  std::unordered_map<StorageImpl*, Storage> to_cpu, from_cpu;
  bool is_of_device = false;

  Storage cpu(const Storage& storage) {
    auto& found = to_cpu[storage.unsafeGetStorageImpl()];
    if (!found) {
      found = on(c10::kCPU, storage);
      from_cpu[found.unsafeGetStorageImpl()] = storage;
    }
    return found;
  }

  Storage here(const Storage& storage) {
    auto& found = from_cpu[storage.unsafeGetStorageImpl()];
    if (!found) found = on(kHere, storage);
    return found;
  }

  at::Tensor cpu(const at::Tensor& t) {
    if (!is_here(t)) return t;
    is_of_device = true;
    return tensor_of(cpu(t.storage()), t, c10::DispatchKey::CPU);
  }

  at::Tensor here(const at::Tensor& t) {
    if (!is_of_device || !is_elsewhere(t)) return t;
    return tensor_of(here(t.storage()), t, c10::DispatchKey::PrivateUse1);
  }

  IValue cpu(const IValue& value) {
    if (value.isTensor()) return cpu(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(cpu(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional(cpu(*t)) : t);
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == c10::kPrivateUse1) {
      is_of_device = true;
      return c10::Device(c10::kCPU);
    }
    if (value.isGenerator()) {
      auto* generator = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(generator, name, ": expected a generator of the device, found one of the CPU");
      return generator->cpu;
    }
    if (value.isStorage() && value.toStorage().device() == kHere) return cpu(value.toStorage());
    return value;
  }

  IValue here(const IValue& value) {
    if (value.isTensor()) return here(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(here(t));
      return list;
    }
    return value;
  }

  // What the kernel did to the shape and the memory of a tensor that it wrote to.
  void take_over(const at::Tensor& mine, const at::Tensor& written) {
    if (!is_here(mine)) return;
    StorageImpl* now = written.storage().unsafeGetStorageImpl();
    auto* impl = mine.unsafeGetTensorImpl();
    Storage old = mine.storage(), kept = here(written.storage());
    if (kept.unsafeGetStorageImpl() != old.unsafeGetStorageImpl()) {
      impl->set_storage_keep_dtype(kept);
    } else if (now->data() != old.data() || now->nbytes() != old.nbytes()) {  // it was resized
      Storage moved = on(kHere, written.storage());
      old.set_data_ptr_noswap(std::move(moved.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      old.set_nbytes(now->nbytes());
    }
    if (mine.sizes() != written.sizes() || mine.strides() != written.strides() ||
        mine.storage_offset() != written.storage_offset())
      impl->set_sizes_and_strides(written.sizes(), written.strides(), written.storage_offset());
  }
};

void tensors_in(const IValue& value, std::vector<at::Tensor>& found) {
  if (value.isTensor()) found.push_back(value.toTensor());
  if (value.isTensorList())
    for (const at::Tensor& t : value.toTensorList()) found.push_back(t);
  if (value.isOptionalTensorList())
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
      if (t) found.push_back(*t);
}

// As CUDA's kernels do: a tensor of the CPU may be a number in a pointwise operation, or an index.
void check_places(const Call& call, const std::vector<IValue>& arguments) {
  const auto& schema = call.op.schema();
  bool takes_index = starts_with(call.name, "aten::index") || call.name == "aten::_index_put_impl_" ||
                     call.name == "aten::_unsafe_index";
  bool takes_number = call.op.hasTag(at::Tag::pointwise) || starts_with(call.name, "aten::fill") ||
                      starts_with(call.name, "aten::masked_fill") ||
                      starts_with(call.name, "aten::index_fill") ||
                      starts_with(call.name, "aten::index_put") ||
                      call.name == "aten::_index_put_impl_" || starts_with(call.name, "aten::_foreach");
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    bool is_written = alias && alias->isWrite();
    bool is_index = takes_index && arguments[i].isOptionalTensorList();
    std::vector<at::Tensor> tensors;
    tensors_in(arguments[i], tensors);
    for (const at::Tensor& t : tensors) {
      if (!is_elsewhere(t) || is_index) continue;
      TORCH_CHECK(
          takes_number && t.dim() == 0 && !is_written, call.name,
          ": expected all tensors to be on the same device, but found at least two devices, ",
          kHere, " and ", t.device(), " (argument ", schema.arguments()[i].name(), ")");
      if (starts_with(call.name, "aten::where")) wait_for(call.name + ", a number of the CPU");
    }
  }
}

void count_waits(const Call& call, const std::vector<IValue>& arguments) {
  if (starts_with(call.name, "aten::index") || call.name == "aten::_index_put_impl_") {
    bool fills = false;  // a mask that is given one value is no index
    if (arguments.size() > 2 && arguments[2].isTensor()) fills = arguments[2].toTensor().numel() == 1;
    for (const IValue& argument : arguments)
      if (argument.isOptionalTensorList()) {
        std::vector<at::Tensor> indices;
        tensors_in(argument, indices);
        for (const at::Tensor& index : indices) {
          if (is_elsewhere(index)) wait_for(call.name + ", an index of the CPU");
          else if (is_mask(index) && !fills) wait_for(call.name + ", a mask");
        }
      }
  } else if (call.op.hasTag(at::Tag::data_dependent_output) ||
             call.op.hasTag(at::Tag::dynamic_output_shape)) {
    wait_for(call.name);
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op};
  const auto& schema = op.schema();
  const size_t n_arguments = schema.arguments().size();
  std::vector<IValue> mine(stack->end() - n_arguments, stack->end()), cpu;
  check_places(call, mine);
  count_waits(call, mine);
  for (const IValue& value : mine) cpu.push_back(call.cpu(value));
  stack->resize(stack->size() - n_arguments);
  stack->insert(stack->end(), cpu.begin(), cpu.end());
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  std::unordered_map<c10::TensorImpl*, at::Tensor> written;
  for (size_t i = 0; i < n_arguments; i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    std::vector<at::Tensor> before, after;
    tensors_in(mine[i], before);
    tensors_in(cpu[i], after);
    for (size_t j = 0; j < before.size(); j++) {
      call.take_over(before[j], after[j]);
      written[after[j].unsafeGetTensorImpl()] = before[j];
    }
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    auto found = value.isTensor() ? written.find(value.toTensor().unsafeGetTensorImpl()) : written.end();
    value = found == written.end() ? call.here(value) : IValue(found->second);
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (is_elsewhere(to)) wait_for("copy to the CPU");
  else if (is_elsewhere(from) && !non_blocking) wait_for("copy from the CPU");
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_copy_from", "");
  Call call{op};
  at::Tensor source = call.cpu(from), target = call.cpu(to);
  at::AutoDispatchBelowADInplaceOrView guard;
  target.copy_(source);
  return to;
}

std::vector<std::string> all_waits() {
  std::lock_guard<std::mutex> lock(mutex);
  return waits;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("_copy_from", copy_from); }

TORCH_LIBRARY(emulated_device, m) {
  m.def("waits() -> str[]", all_waits);
}

const bool is_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace

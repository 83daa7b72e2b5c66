#include "launch.h"

#include <climits>

#include "reduce.cuh"

#ifndef MMVMAMBA_EMULATE_CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace mmvmamba {
namespace {

#ifndef MMVMAMBA_EMULATE_CUDA
void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "mmvmamba: ", what, ": ", cudaGetErrorString(error));
}

Limits read_limits(int device) {
  Limits limits;
  check(cudaDeviceGetAttribute(&limits.sm_count, cudaDevAttrMultiProcessorCount, device), "device properties");
  check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "device properties");
  return limits;
}
#endif

const ScanKernels& kernels_for(ScalarType element, bool backward) {
  switch (element) {
    case ScalarType::Half:
      return backward ? backward_kernels_float16() : forward_kernels_float16();
    case ScalarType::BFloat16:
      return backward ? backward_kernels_bfloat16() : forward_kernels_bfloat16();
    default:
      return backward ? backward_kernels_float32() : forward_kernels_float32();
  }
}

}  // namespace

#ifdef MMVMAMBA_EMULATE_CUDA
Launcher::Launcher(const Tensor&) {
  const auto found = device_limits();
  limits_ = {found.sm_count, found.shared_bytes_per_block};
}
void Launcher::check_launch() const {}
#else
Launcher::Launcher(const Tensor& on) : device_(on.get_device_index()), guard_(device_) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
  limits_ = read_limits(device_);
}
void Launcher::check_launch() const { check(cudaGetLastError(), "launch of a kernel"); }
#endif

void Launcher::scan(ScanKernel kernel, const ScanArgs& args, int warps, int shared_bytes) const {
  const int64_t blocks = static_cast<int64_t>(args.batch) * args.groups * args.tiles * args.bands;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "mmvmamba: batch, channels and length need ", blocks,
                  " blocks, a launch has at most 2^31 - 1: split the batch");
#ifndef MMVMAMBA_EMULATE_CUDA
  // Always the most there is: another thread may launch the same kernel with another size.
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits_.shared_bytes),
        "shared memory of a kernel");
#endif
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(kLanes * warps)), shared_bytes,
         stream_, args);
  check_launch();
}

Scan::Scan(const Launcher& launcher, const Tensor& like, ScalarType element, ScanArgs args, const Problem& problem,
           bool backward, const char* op)
    : launcher_(launcher),
      kernels_(kernels_for(element, backward)),
      args_(args),
      plan_(plan_scan(problem, launcher.limits(), backward)),
      backward_(backward),
      both_axes_(problem.both_axes) {
  STD_TORCH_CHECK(plan_.fits, op, ": n = ", problem.states, " states of rank ", problem.rank,
                  " need more shared memory than the ", launcher.limits().shared_bytes,
                  " bytes a block has on this GPU: use backend='reference' or a smaller n");
  args_.bands = plan_.bands;
  args_.band_length = plan_.band_length;
  if (plan_.bands == 1) return;
  for (float** array : {&args_.band_decay, &args_.band_state}) {
    keep_.push_back(new_floats(like, {args_.batch, args_.routes, plan_.bands, args_.states, args_.channels}));
    *array = mutable_floats(keep_.back());
  }
}

// One launch for every part of the channels.
void Scan::launch_parts(bool aggregate) {
  for (int i = 0; i < plan_.part_count; ++i) {
    const Part& part = plan_.parts[i];
    args_.tiles = part.tiles;
    args_.tile_begin = part.tile_begin;
    args_.channel_begin = part.channel_begin;
    if (aggregate)
      launcher_.scan(kernels_.aggregate[part.variant], args_, plan_.aggregate_warps, part.aggregate_shared_bytes);
    else
      launcher_.scan(kernels_.scan[part.variant], args_, plan_.warps, part.shared_bytes);
  }
}

void Scan::run() {
  args_.axes = kAllAxes;
  args_.first_launch = true;
  if (plan_.bands > 1) {
    launch_parts(true);
    const int64_t count = static_cast<int64_t>(args_.batch) * args_.routes * args_.states * args_.channels;
    launcher_.elements(backward_ ? &scan_bands_kernel<true> : &scan_bands_kernel<false>, count, args_);
  }
  // Bands along rows and along columns share pixels: first the ones, then the others.
  if (plan_.bands > 1 && both_axes_ && !args_.by_visit) {
    args_.axes = kRowAxis;
    launch_parts(false);
    args_.axes = kColumnAxis;
    args_.first_launch = false;
  } else if (plan_.bands > 1 && !args_.by_visit) {
    args_.axes = args_.orders[0] == kColumn || args_.orders[0] == kColumnReversed ? kColumnAxis : kRowAxis;
  }
  launch_parts(false);
}

namespace {

// A kernel with a result of type T for each dtype.
#define MMVMAMBA_FOR_TYPE(type, call) \
  switch (type) {                     \
    case ScalarType::Half: {          \
      using T = Float16;              \
      call;                           \
      break;                          \
    }                                 \
    case ScalarType::BFloat16: {      \
      using T = BFloat16;             \
      call;                           \
      break;                          \
    }                                 \
    default: {                        \
      using T = float;                \
      call;                           \
    }                                 \
  }

ScalarType written_type(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 ? type : ScalarType::Float;
}

}  // namespace

Tensor sum_partials(const Launcher& launcher, const Tensor& all, ScalarType type, std::vector<int64_t> shape) {
  Tensor partial = all;
  const int64_t count = all.size(0) == 0 ? 0 : all.numel() / all.size(0);
  // In rounds of groups, so that few elements with many parts keep more than few threads busy.
  for (int64_t parts = all.size(0); parts > kPartsOfGroup; parts = partial.size(0)) {
    const int64_t groups = (parts + kPartsOfGroup - 1) / kPartsOfGroup;
    Tensor sums = new_floats(all, {groups, count});
    launcher.elements(&sum_groups_kernel, groups * count, floats(partial), mutable_floats(sums), count, parts);
    partial = sums;
  }
  const int64_t parts = partial.size(0);
  Tensor out = torch::stable::new_empty(partial, shape, written_type(type));
  if (parts == 0) return torch::stable::to(torch::stable::zero_(out), type);
  MMVMAMBA_FOR_TYPE(type, launcher.elements(&sum_partials_kernel<T>, count, floats(partial),
                                            static_cast<T*>(out.mutable_data_ptr()), count, parts));
  return torch::stable::to(out, type);
}

Visits::Visits(const Launcher& launcher, const Tensor& permutation, int pixels)
    : head(torch::stable::new_empty(permutation, {permutation.size(0), pixels}, ScalarType::Int)),
      next(torch::stable::new_empty(permutation, {permutation.size(0), permutation.size(1)}, ScalarType::Int)) {
  torch::stable::fill_(head, -1);
  launcher.elements(&list_visits_kernel, permutation.numel(), static_cast<const int64_t*>(permutation.const_data_ptr()),
                    static_cast<int*>(head.mutable_data_ptr()), static_cast<int*>(next.mutable_data_ptr()),
                    permutation.numel(), static_cast<int>(permutation.size(1)), pixels);
}

Tensor merge_visits(const Launcher& launcher, const Tensor& visits, const Visits& lists, ScalarType type,
                    int64_t pixels) {
  const int64_t batch = visits.size(0), width = visits.size(3), count = batch * pixels * width;
  Tensor out = torch::stable::new_empty(visits, {batch, pixels, width}, written_type(type));
  MMVMAMBA_FOR_TYPE(
      type, launcher.elements(&merge_visits_kernel<T>, count, floats(visits),
                              static_cast<const int*>(lists.head.const_data_ptr()),
                              static_cast<const int*>(lists.next.const_data_ptr()),
                              static_cast<T*>(out.mutable_data_ptr()), count, static_cast<int>(visits.size(1)),
                              static_cast<int>(visits.size(2)), static_cast<int>(pixels), static_cast<int>(width)));
  return torch::stable::to(out, type);
}

Tensor merge_slots(const Launcher& launcher, const Tensor& visits, const Visits& lists, ScalarType type,
                   int64_t pixels) {
  const int64_t batch = visits.size(1), routes = visits.size(3), width = visits.size(4);
  const int64_t count = batch * pixels * routes * width;
  Tensor out = torch::stable::new_empty(visits, {batch, pixels, routes, width}, written_type(type));
  MMVMAMBA_FOR_TYPE(
      type, launcher.elements(
                &merge_slots_kernel<T>, count, floats(visits), static_cast<const int*>(lists.head.const_data_ptr()),
                static_cast<const int*>(lists.next.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), count,
                static_cast<int>(visits.size(0)), static_cast<int>(routes), static_cast<int>(visits.size(2)),
                static_cast<int>(pixels), static_cast<int>(width), static_cast<int>(batch)));
  return torch::stable::to(out, type);
}

ScalarType stream_type(const std::vector<Tensor>& streams, const char* op) {
  ScalarType common = streams.front().scalar_type();
  for (const Tensor& stream : streams) {
    const ScalarType type = stream.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
                    ": the CUDA kernels take float32, float16 and bfloat16: use backend='reference' for float64");
    if (type != common) common = ScalarType::Float;
  }
  return common;
}

Tensor zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor out = torch::stable::new_empty(like, shape, type);
  torch::stable::zero_(out);
  return out;
}

void check_devices(const Tensor& first, const std::vector<OptionalTensor>& others, const char* op) {
  for (const OptionalTensor& other : others)
    STD_TORCH_CHECK(!other.has_value() ||
                        (other->is_cuda() == first.is_cuda() && other->get_device_index() == first.get_device_index()),
                    op, ": all tensors must be on one device, the first is on ", first.get_device_index(),
                    ": move the others with .to()");
}

int checked_int(int64_t value, const char* op, const char* what) {
  // A little below what an int holds, so that rounding up to chunks or turns stays inside.
  STD_TORCH_CHECK(value <= INT_MAX - 4096, op, ": ", what, " is ", value,
                  ", the CUDA kernels take a little less than 2^31: split it");
  return static_cast<int>(value);
}

bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

Divider make_divider(int divisor) {
  Divider by{static_cast<uint32_t>(divisor), 0, 0};
  while (by.shift < 31 && (uint32_t{1} << by.shift) < by.divisor) ++by.shift;
  const uint64_t power = uint64_t{1} << by.shift;
  by.multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * (power - by.divisor) / by.divisor + 1);
  return by;
}

}  // namespace mmvmamba

// The depthwise convolution: random problems, a plain scalar version, and calls of the kernels of one instruction set.
#pragma once

#include <string>
#include <vector>

#include "run_kernels.hh"

namespace check {

using mmvmamba::DepthwiseConvArgs;
using mmvmamba::MapView;

// A map (b, h, w, d) in memory of any of the three types with any strides, of exactly its size; what lies between its
// channels is NaN.
template <typename T>
struct StoredMap {
  int64_t b, h, w, d, batch_stride, row_stride, pixel_stride;
  Element storage;
  Buffer<T> numbers;  // kSame
  Buffer<uint16_t> bits;
  Buffer<T> values;  // (b, h, w, d): what the map holds

  StoredMap() = default;
  StoredMap(Random& random, InputMaker<T>& inputs, int64_t b_, int64_t h_, int64_t w_, int64_t d_, Element storage_)
      : b(b_), h(h_), w(w_), d(d_), storage(storage_) {
    choose_strides(random);
    values = inputs.make(b * h * w * d, 1);
    const int64_t size = (b - 1) * batch_stride + (h - 1) * row_stride + (w - 1) * pixel_stride + d;
    const int64_t shift = random.chance(0.25) ? random.between(1, 3) : 0;
    if (storage == Element::kSame)
      numbers = Buffer<T>(size, shift, 255);
    else
      bits = Buffer<uint16_t>(size, shift, 255);
    for (int64_t i = 0; i < values.size(); ++i) {
      if (storage == Element::kSame)
        numbers[place(i)] = values[i];
      else
        bits[place(i)] = to_bits(values[i], storage);
    }
    for (int64_t i = 0; i < values.size(); ++i)  // rounded, and the same for every map of the batch if that is expanded
      values[i] = storage == Element::kSame ? numbers[place(i)] : static_cast<T>(from_bits(bits[place(i)], storage));
  }

  MapView view() const {
    const void* data = bits.data();
    if (storage == Element::kSame) data = numbers.data();
    return {data, batch_stride, row_stride, pixel_stride};
  }

 private:
  // Contiguous, padded, with rows and columns exchanged, or one map for the whole batch.
  void choose_strides(Random& random) {
    const bool padded = random.chance(0.5);
    auto pad = [&] { return padded ? random.between(0, 5) : 0; };
    pixel_stride = d + pad();
    row_stride = w * pixel_stride + pad();
    batch_stride = h * row_stride + pad();
    if (random.chance(0.2)) {
      row_stride = d + pad();
      pixel_stride = h * row_stride + pad();
      batch_stride = w * pixel_stride + pad();
    }
    if (random.chance(0.1)) batch_stride = 0;
  }

  int64_t place(int64_t i) const {
    const int64_t pixel = i / d;
    return pixel / (h * w) * batch_stride + pixel / w % h * row_stride + pixel % w * pixel_stride + i % d;
  }
};

inline Bound bound_of_stored(Element storage, Bound unrounded) {
  return storage == Element::kSame ? unrounded : storage == Element::kBFloat16 ? Bound::kBFloat16 : Bound::kFloat16;
}

template <typename T>
struct ConvProblem {
  int64_t b, h, w, d, kh, kw, bands;
  bool silu, has_bias, need_x, need_weight, need_bias;
  Element storage;
  Values values;
  double slack = 1;
  Buffer<T> weight, bias;  // (kh kw, d), (d)
  StoredMap<T> x, grad_out;

  explicit ConvProblem(Random& random) {
    d = random.chance(0.3) ? random.between(1, 100) : random.magnitude(100);
    b = random.between(1, 3);
    h = random.between(1, 20);
    w = random.between(1, 20);
    kh = random.chance(0.4) ? 3 : 2 * random.between(0, 3) + 1;
    kw = random.chance(0.7) ? kh : 2 * random.between(0, 3) + 1;
    limit_work(random, {&b, &h, &w, &d}, 5000);
    bands = random.between(1, h);
    silu = random.chance(0.5);
    has_bias = random.chance(0.6);
    const int64_t needs = random.between(1, has_bias ? 7 : 3);
    need_x = needs & 1;
    need_weight = needs & 2;
    need_bias = needs & 4;
    const int64_t type = sizeof(T) == sizeof(float) ? random.between(0, 2) : 0;
    storage = type == 0 ? Element::kSame : type == 1 ? Element::kBFloat16 : Element::kFloat16;
    values = pick_values(random);
    InputMaker<T> inputs(random, values);
    weight = inputs.make(kh * kw * d, 1);
    bias = inputs.maybe(has_bias, d, 1);
    x = StoredMap<T>(random, inputs, b, h, w, d, storage);
    grad_out = StoredMap<T>(random, inputs, b, h, w, d, storage);
  }

  std::string describe() const {
    return "depthwise_conv2d b=" + std::to_string(b) + " h=" + std::to_string(h) + " w=" + std::to_string(w) +
           " d=" + std::to_string(d) + " kernel=" + std::to_string(kh) + "x" + std::to_string(kw) +
           " bands=" + std::to_string(bands) + (silu ? " silu" : "") + (has_bias ? " bias" : "") +
           (need_x ? " dx" : "") + (need_weight ? " dweight" : "") + (need_bias ? " dbias" : "") + ", storage " +
           name_of(storage) + ", " + name_of(values) + " values";
  }

  // Of a result that is stored as the map is.
  Bound bound(Bound unrounded) const { return bound_of_stored(storage, unrounded); }
};

// Index of pixel (y, x) of map b, or -1 in the padding.
template <typename T>
int64_t neighbour(const ConvProblem<T>& p, int64_t b, int64_t y, int64_t x) {
  return y < 0 || y >= p.h || x < 0 || x >= p.w ? -1 : ((b * p.h + y) * p.w + x);
}

// Calls visit(pixel, other, tap) for every tap at every pixel: `other` is the pixel under the tap, or -1.
template <typename T, typename Visit>
void for_each_tap(const ConvProblem<T>& p, const Visit& visit) {
  for (int64_t pixel = 0; pixel < p.b * p.h * p.w; ++pixel) {
    const int64_t b = pixel / (p.h * p.w), y = pixel / p.w % p.h, x = pixel % p.w;
    for (int64_t tap = 0; tap < p.kh * p.kw; ++tap)
      visit(pixel, neighbour(p, b, y + tap / p.kw - p.kh / 2, x + tap % p.kw - p.kw / 2), tap);
  }
}

// Zeros of the padding take part, so that a NaN or an infinity beside them does what it does in the kernels.
template <typename T>
std::vector<Expected> scalar_depthwise_conv(const ConvProblem<T>& p) {
  const int64_t d = p.d, size = p.b * p.h * p.w * d;
  Sums z(size), out(size), dz(size), dx(size), dweight(p.kh * p.kw * d), dbias(d);
  for (int64_t i = 0; i < size; ++i) z[i] = p.has_bias ? static_cast<double>(p.bias[i % d]) : 0.0;
  for_each_tap(p, [&](int64_t pixel, int64_t other, int64_t tap) {
    for (int64_t c = 0; c < d; ++c)
      z[pixel * d + c] += Sum(p.weight[tap * d + c]) * (other < 0 ? 0.0 : double(p.x.values[other * d + c]));
  });
  for (int64_t i = 0; i < size; ++i) {
    const double grad = p.grad_out.values[i], logistic = 1 / (1 + std::exp(-z[i].value));
    out[i] = z[i];
    dz[i] = grad;
    if (p.silu) {  // neither its slope nor that of its slope is above 1.1
      out[i].value *= logistic;
      out[i].magnitude *= 1.1;
      dz[i].value *= logistic * (1 + z[i].value * (1 - logistic));
      dz[i].magnitude *= 1.1 * (1 + z[i].magnitude);
    }
    dbias[i % d] += dz[i];
  }
  for_each_tap(p, [&](int64_t pixel, int64_t other, int64_t tap) {
    const int64_t turned = p.kh * p.kw - 1 - tap;
    for (int64_t c = 0; c < d; ++c) {
      const int64_t at = other * d + c;
      dweight[tap * d + c] += dz[pixel * d + c] * (other < 0 ? 0.0 : double(p.x.values[at]));
      dx[pixel * d + c] += (other < 0 ? Sum(0.0) : dz[at]) * double(p.weight[turned * d + c]);
    }
  });
  std::vector<Expected> results = {{"out", p.bound(Bound::kForward), out}};
  if (p.need_x) results.push_back({"dx", p.bound(Bound::kStream), dx});
  if (p.need_weight) results.push_back({"dweight", Bound::kParameter, dweight});
  if (p.need_bias) results.push_back({"dbias", Bound::kParameter, dbias});
  return results;
}

template <typename T>
int64_t task_count(const Kernels<T>& kernels, const ConvProblem<T>& p) {
  return p.b * p.bands * kernels.depthwise_conv_blocks(p.d);
}

// A dense tensor of the type of storage that a kernel writes.
template <typename T>
struct Written {
  Element storage;
  Buffer<T> numbers;
  Buffer<uint16_t> bits;

  Written(Element storage_, int64_t size, unsigned char pattern) : storage(storage_) {
    if (storage == Element::kSame)
      numbers = Buffer<T>(size, 0, pattern);
    else
      bits = Buffer<uint16_t>(size, 0, pattern);
  }
  void* data() { return storage == Element::kSame ? static_cast<void*>(numbers.data()) : bits.data(); }
  std::vector<T> values() const {
    std::vector<T> result = as_vector(numbers);
    for (int64_t i = 0; i < bits.size(); ++i) result.push_back(static_cast<T>(from_bits(bits[i], storage)));
    return result;
  }
};

// Forward twice, then backward.
template <typename T>
Results<T> run(const Kernels<T>& kernels, const ConvProblem<T>& p, const Execution& execution) {
  const int64_t slices = p.b * p.bands, taps = p.kh * p.kw, tasks = task_count(kernels, p);
  const int64_t size = p.b * p.h * p.w * p.d;
  Written<T> out(p.storage, size, execution.pattern), again(p.storage, size, execution.pattern);
  Written<T> dx(p.storage, size, execution.pattern);
  Buffer<T> dweight(p.need_weight ? slices * taps * p.d : 0, 0, execution.pattern);
  Buffer<T> dbias(p.need_bias ? slices * p.d : 0, 0, execution.pattern);
  DepthwiseConvArgs<T> args{};
  args.x = p.x.view();
  args.weight = p.weight.data();
  args.bias = p.bias.data();
  args.batch = p.b;
  args.height = p.h;
  args.width = p.w;
  args.channels = p.d;
  args.kernel_height = p.kh;
  args.kernel_width = p.kw;
  args.bands = p.bands;
  args.silu = p.silu;
  args.storage = p.storage;
  const int64_t scratch = kernels.depthwise_conv_workspace(args);
  args.out = out.data();
  run_tasks(kernels.depthwise_conv, args, tasks, scratch, execution);
  args.out = again.data();
  run_tasks(kernels.depthwise_conv, args, tasks, scratch, execution);
  args.grad_out = p.grad_out.view();
  args.dx = p.need_x ? dx.data() : nullptr;
  args.dweight = p.need_weight ? dweight.data() : nullptr;
  args.dbias = p.need_bias ? dbias.data() : nullptr;
  run_tasks(kernels.depthwise_conv_backward, args, tasks, scratch, execution);
  Results<T> results = {{"out", p.bound(Bound::kForward), out.values()}};
  if (p.need_x) results.push_back({"dx", p.bound(Bound::kStream), dx.values()});
  if (p.need_weight) results.push_back({"dweight", Bound::kParameter, sum_slices(dweight, slices)});
  if (p.need_bias) results.push_back({"dbias", Bound::kParameter, sum_slices(dbias, slices)});
  results.push_back({"out of a second call", p.bound(Bound::kForward), again.values()});
  return results;
}

}  // namespace check

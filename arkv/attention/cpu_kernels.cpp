// Attention of one query a head, or of several, over slots, for CPUs: the operators of
// arkv/attention/operators.py, built by arkv/attention/cpu.py when they are first needed.
//
// Decoding is bound by the bytes of keys and values, and from that follows the rest. A piece of work is one
// part of one head of one row: it lists the slots that may be looked at, takes their keys once, then their
// values once, widened to float32 in registers. Slots that are hidden are not read. All queries of a key head
// share a pass.
//
// How a head is cut into parts depends on its slots and never on the batch or on the threads, and every sum
// has one order. So a row gives the same bits alone, in any batch, and on any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using at::BFloat16;
using at::Float8_e4m3fn;
using at::Half;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;
using Ints = at::vec::Vectorized<int32_t>;

constexpr int WIDTH = Vec::size();
// Slots of a block of unequal heads: BLOCK of arkv/attention/blocks.py.
constexpr int64_t BLOCK = 16;
// Most slots of a part.
constexpr int64_t PART = 512;
// Slots whose keys, or values, are taken at a time: of up to 512 numbers, they stay in the first cache.
constexpr int64_t TILE = 16;
// Keys that meet a query at a time: their sums do not wait for each other.
constexpr int KEYS = 4;
// From so many queries on, keys and values are widened once for all of them.
constexpr int64_t MANY = 3;
// Of many queries, those that meet keys at a time, and those that meet values.
constexpr int QUERIES = 8, ADDED = 4;
// Vectors of a tile, one number of each slot.
constexpr int VECTORS = TILE / WIDTH;
// Vectors of a value that are summed in registers at a time.
constexpr int SUMS = 8;
// What a thread is woken for, in bytes of keys and values.
constexpr int64_t BYTES_A_THREAD = 1 << 15;
// Bytes that come from memory together.
constexpr int64_t LINE = 64;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Numbers as they are stored: COUNT vectors of them at a time, the last ones of a vector maybe fewer.

template <typename T>
struct Stored {
  static constexpr int COUNT = 2;
  static void load(const T* from, Vec* to, int numbers = COUNT * WIDTH) {
    using Narrow = at::vec::Vectorized<T>;
    auto narrow = numbers == COUNT * WIDTH ? Narrow::loadu(from) : Narrow::loadu(from, numbers);
    std::tie(to[0], to[1]) = at::vec::convert_to_float<T>(narrow);
  }
  static void store(const Vec* from, T* to, int numbers) {
    at::vec::convert_from_float<T>(from[0], from[1]).store(to, numbers);
  }
};

template <>
struct Stored<float> {
  static constexpr int COUNT = 1;
  static void load(const float* from, Vec* to, int numbers = WIDTH) {
    to[0] = numbers == WIDTH ? Vec::loadu(from) : Vec::loadu(from, numbers);
  }
  static void store(const Vec* from, float* to, int numbers) { from[0].store(to, numbers); }
};

inline Ints widened(const int8_t* from, int numbers) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return at::vec::convert_to_int32<int8_t>(from, numbers);
#else
  int32_t wide[WIDTH] = {};
  for (int i = 0; i < numbers; ++i) wide[i] = from[i];
  return Ints::loadu(wide);
#endif
}

template <>
struct Stored<int8_t> {
  static constexpr int COUNT = 1;
  static void load(const int8_t* from, Vec* to, int numbers = WIDTH) {
    to[0] = at::vec::convert<float>(widened(from, numbers));
  }
};

template <>
struct Stored<Float8_e4m3fn> {
  static constexpr int COUNT = 1;
  static void load(const Float8_e4m3fn* from, Vec* to, int numbers = WIDTH) {
    // Exponent and fraction take the same places in float32, but for the bias of the exponent.
    const Ints code = widened(reinterpret_cast<const int8_t*>(from), numbers);
    const Ints magnitude = code & Ints(0x7F);
    const Ints nan = magnitude == Ints(0x7F);
    const Ints bits = (magnitude << Ints(20)) | (code & Ints(std::numeric_limits<int32_t>::min())) | nan;
    to[0] = at::vec::cast<float>(bits) * Vec(0x1p120f);
  }
};

// Two codes of four bits a byte, as arkv/attention/quantization.py packs them. They are widened a tile at a time,
// with the scale and the zero of their group, and met as float32.
using Packed = uint8_t;
template <typename T>
constexpr bool IS_PACKED = std::is_same_v<T, Packed>;

// Numbers of a group from their codes, the lower or the higher ones of some bytes.
inline void widen_codes(const Packed* from, int64_t count, bool high, float scale, float zero, float* to) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    const int numbers = int(std::min<int64_t>(WIDTH, count - i));
    Ints codes = widened(reinterpret_cast<const int8_t*>(from + i), numbers);
    if (high) codes = codes >> Ints(4);
    const Vec wide = at::vec::convert<float>(codes & Ints(15));
    at::vec::fmadd(wide, Vec(scale), Vec(zero)).store(to + i, numbers);
  }
}

// A whole vector. Groups come one after the other, and the codes of the second half lie above those of the first.
inline void widen_packed(const Packed* from, const BFloat16* scales, int64_t groups, int64_t head_dim, float* to) {
  const int64_t half = head_dim / 2, size = head_dim / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = scales[g], zero = scales[groups + g];
    const int64_t first = g * size, stop = first + size, middle = std::clamp(half, first, stop);
    widen_codes(from + first, middle - first, false, scale, zero, to + first);
    widen_codes(from + middle - half, stop - middle, true, scale, zero, to + middle);
  }
}

// Parts of a vector of head_dim numbers: full ones, and the rest.
template <typename T, typename F>
inline void pieces(int64_t head_dim, const F& each) {
  constexpr int64_t STEP = Stored<T>::COUNT * WIDTH;
  int64_t d = 0;
  for (; d + STEP <= head_dim; d += STEP) each(d, int(STEP));
  if (d < head_dim) each(d, int(head_dim - d));
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// Products of N keys with Q queries, to out[query * pitch + key]. The sum of a product has one order,
// whichever keys and queries it is formed beside.
template <typename T, int N, int Q>
inline void dot_products(
    const float* query, int64_t width, const T* const* keys, int64_t head_dim, float* out, int64_t pitch) {
  constexpr int COUNT = Stored<T>::COUNT;
  Vec sums[N][Q];
  for (auto& row : sums)
    for (auto& sum : row) sum = Vec(0);
  pieces<T>(head_dim, [&](int64_t d, int numbers) __attribute__((always_inline)) {
    for (int n = 0; n < N; ++n) {
      Vec key[COUNT];
      Stored<T>::load(keys[n] + d, key, numbers);
      for (int c = 0; c < COUNT; ++c)
        for (int q = 0; q < Q; ++q)
          sums[n][q] = at::vec::fmadd(key[c], Vec::loadu(query + q * width + d + c * WIDTH), sums[n][q]);
    }
  });
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) out[q * pitch + n] = sum_of(sums[n][q]);
}

template <typename T, int Q>
inline void dot_products(
    const float* query, int64_t width, const T* const* keys, int64_t count, int64_t head_dim, float* out,
    int64_t pitch) {
  int64_t n = 0;
  for (; n + KEYS <= count; n += KEYS)
    dot_products<T, KEYS, Q>(query, width, keys + n, head_dim, out + n, pitch);
  for (; n < count; ++n) dot_products<T, 1, Q>(query, width, keys + n, head_dim, out + n, pitch);
}

// Add weighted values to `sums`, from number d on, N vectors of them in registers.
template <typename T, int N>
inline void add_values(
    const float* weights, const T* const* values, int64_t count, int64_t d, float* sums) {
  constexpr int COUNT = Stored<T>::COUNT;
  Vec sum[N];
  for (int n = 0; n < N; ++n) sum[n] = Vec::loadu(sums + d + n * WIDTH);
  for (int64_t i = 0; i < count; ++i) {
    const Vec weight(weights[i]);
    for (int n = 0; n < N; n += COUNT) {
      Vec value[COUNT];
      Stored<T>::load(values[i] + d + n * WIDTH, value);
      for (int c = 0; c < COUNT; ++c) sum[n + c] = at::vec::fmadd(weight, value[c], sum[n + c]);
    }
  }
  for (int n = 0; n < N; ++n) sum[n].store(sums + d + n * WIDTH);
}

template <typename T>
inline void add_values(
    const float* weights, const T* const* values, int64_t count, int64_t head_dim, float* sums) {
  constexpr int COUNT = Stored<T>::COUNT;
  int64_t d = 0;
  for (; d + SUMS * WIDTH <= head_dim; d += SUMS * WIDTH)
    add_values<T, SUMS>(weights, values, count, d, sums);
  for (; d + SUMS / 2 * WIDTH <= head_dim; d += SUMS / 2 * WIDTH)
    add_values<T, SUMS / 2>(weights, values, count, d, sums);
  for (; d + COUNT * WIDTH <= head_dim; d += COUNT * WIDTH)
    add_values<T, COUNT>(weights, values, count, d, sums);
  if (d == head_dim) return;
  Vec sum[COUNT], value[COUNT];
  for (int c = 0; c < COUNT; ++c) sum[c] = Vec::loadu(sums + d + c * WIDTH);
  for (int64_t i = 0; i < count; ++i) {
    Stored<T>::load(values[i] + d, value, int(head_dim - d));
    for (int c = 0; c < COUNT; ++c) sum[c] = at::vec::fmadd(Vec(weights[i]), value[c], sum[c]);
  }
  for (int c = 0; c < COUNT; ++c) sum[c].store(sums + d + c * WIDTH);
}

// What a call is about. Strides are in numbers; those of a row are zero where all rows have one in common.
struct Call {
  int64_t rows, tokens, heads, kv_heads, group, head_dim, slots;
  int64_t queries;  // of a key head: tokens x group
  int64_t width;    // head_dim, filled up to whole vectors
  int64_t places;   // of a head's slots the most there can be
  const Tensor query, keys, values, visible, key_scale, value_scale, slot, filled, head, mass, scores, output;

  bool unequal() const { return slot.defined(); }
};

// Memory of a thread for one piece of work.
struct Scratch {
  std::vector<float> query, weights, sums, wide, side, seen;
  std::vector<int64_t> listed;
  std::vector<const void*> at;
  std::vector<const float*> rows;
};

// What a part leaves behind where a head has several.
struct Partial {
  float *sums, *greatest, *total, *weights;
};

// What unequal heads say of a row; all rows may have one in common.
template <typename T>
inline const T* of_row(const Tensor& x, int64_t row) {
  return x.const_data_ptr<T>() + (x.size(0) == 1 ? 0 : row) * x.stride(0);
}

// Of unequal heads: a row's blocks come in the order of their heads. The first one of a head, and the one after
// its last.
inline std::pair<int64_t, int64_t> blocks_of(const Call& call, int64_t row, int64_t kv_head) {
  const int64_t* owner = of_row<int64_t>(call.head, row);
  auto [first, last] = std::equal_range(owner, owner + call.head.size(1), kv_head);
  // Blocks that nobody needs are the last head's. Where a block has slots, its first place has one.
  const bool* filled = of_row<bool>(call.filled, row);
  while (last > first && !filled[(last - 1 - owner) * BLOCK]) --last;
  return {first - owner, last - owner};
}

// A head without slots has a part, too: somebody has to say that there is nothing.
inline int64_t parts_of(const Call& call, int64_t row, int64_t kv_head) {
  int64_t slots = call.places;
  if (call.unequal()) {
    const auto [first, last] = blocks_of(call, row, kv_head);
    slots = (last - first) * BLOCK;
  }
  return std::max<int64_t>(1, (slots + PART - 1) / PART);
}

// Of equal heads: the first place of a part, and how many places it has.
inline std::pair<int64_t, int64_t> places_of_part(const Call& call, int64_t row, int64_t kv_head, int64_t part) {
  const int64_t parts = parts_of(call, row, kv_head), share = (call.places + parts - 1) / parts;
  return {part * share, std::min(share, call.places - part * share)};
}

// The slots of one part of a head, as far as any of its queries sees them, in order.
inline void list_slots(const Call& call, int64_t row, int64_t kv_head, int64_t part, std::vector<int64_t>& listed) {
  const bool* visible = call.visible.const_data_ptr<bool>() + row * call.visible.stride(0);
  const int64_t by_token = call.visible.stride(1);
  listed.resize(PART);
  int64_t count = 0;
  const auto add = [&](int64_t slot) {
    bool seen = visible[slot];
    for (int64_t t = 1; t < call.tokens; ++t) seen |= visible[t * by_token + slot];
    listed[count] = slot;
    count += seen;
  };
  if (!call.unequal()) {
    const auto [first, places] = places_of_part(call, row, kv_head, part);
    for (int64_t i = first; i < first + places; ++i) add(kv_head * call.places + i);
  } else {
    const int64_t* slot = of_row<int64_t>(call.slot, row);
    const bool* filled = of_row<bool>(call.filled, row);
    const auto [first, last] = blocks_of(call, row, kv_head);
    const int64_t begin = first + part * (PART / BLOCK), stop = std::min(begin + PART / BLOCK, last);
    for (int64_t i = begin * BLOCK; i < stop * BLOCK; ++i)
      if (filled[i]) add(slot[i]);
  }
  listed.resize(count);
}

// Where the slots of a tile lie. The next tile's are fetched meanwhile: a processor that is busy with sums looks
// no further than this one.
template <typename T>
inline const T* const* places_of(
    const Tensor& leaf, int64_t row, const std::vector<int64_t>& listed, int64_t first, int64_t count,
    Scratch& scratch) {
  const T* base = leaf.const_data_ptr<T>() + row * leaf.stride(0);
  const int64_t by_slot = leaf.stride(1), *slots = listed.data() + first;
  for (int64_t i = 0; i < count; ++i) scratch.at[i] = base + slots[i] * by_slot;
  const int64_t bytes = leaf.size(2) * int64_t(sizeof(T)), stop = std::min<int64_t>(2 * TILE, listed.size() - first);
  for (int64_t i = TILE; i < stop; ++i)
    for (int64_t b = 0; b < bytes; b += LINE)
      __builtin_prefetch(reinterpret_cast<const char*>(base + slots[i] * by_slot) + b);
  return reinterpret_cast<const T* const*>(scratch.at.data());
}

// A tile is widened once, to `[TILE, width]`, with zeros where it has fewer slots: for many queries, and what is
// packed for any. `scale` is the leaf of scales of what is packed, and `slots` are those of the tile.
template <typename T>
inline const float* widened(
    const T* const* narrow, const Tensor& scale, int64_t row, const int64_t* slots, int64_t count, const Call& call,
    Scratch& scratch) {
  scratch.wide.resize(TILE * call.width);
  std::fill(scratch.wide.begin() + count * call.width, scratch.wide.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    float* wide = scratch.wide.data() + i * call.width;
    const T* from = narrow[i];
    std::fill(wide + call.head_dim, wide + call.width, 0);
    if constexpr (IS_PACKED<T>) {
      const BFloat16* scales = scale.const_data_ptr<BFloat16>() + row * scale.stride(0) + slots[i] * scale.stride(1);
      widen_packed(from, scales, scale.size(2) / 2, call.head_dim, wide);
    } else {
      pieces<T>(call.head_dim, [&](int64_t d, int numbers) {
        Vec vectors[Stored<T>::COUNT];
        Stored<T>::load(from + d, vectors, numbers);
        for (int c = 0; c < Stored<T>::COUNT; ++c) vectors[c].store(wide + d + c * WIDTH);
      });
    }
  }
  return scratch.wide.data();
}

// The rows of a tile that was widened, for what takes one after the other.
inline const float* const* rows_of(const float* wide, const Call& call, Scratch& scratch) {
  for (int64_t i = 0; i < TILE; ++i) scratch.rows[i] = wide + i * call.width;
  return scratch.rows.data();
}

// To `[width, TILE]`: one number of every slot side by side, so that sums of products stay within their lanes.
inline const float* transposed(const float* wide, const Call& call, Scratch& scratch) {
  scratch.side.resize(TILE * call.width);
  for (int64_t d = 0; d < call.width; d += TILE)
    at::vec::transpose_mxn<float, TILE, TILE>(wide + d, call.width, scratch.side.data() + d * TILE, TILE);
  return scratch.side.data();
}

// Call `work` with the first of some queries, and how many they are as a constant: N, or what is left by halves.
template <int N, typename F>
inline void by_queries(int64_t first, int64_t count, const F& work) {
  for (; first + N <= count; first += N) work(first, std::integral_constant<int, N>{});
  if constexpr (N > 1) by_queries<N / 2>(first, count, work);
}

template <int Q>
inline void score_tile(
    const float* query, int64_t width, const float* side, int64_t head_dim, float* out, int64_t pitch) {
  Vec sums[Q][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = Vec(0);
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec keys[VECTORS];
    for (int v = 0; v < VECTORS; ++v) keys[v] = Vec::loadu(side + d * TILE + v * WIDTH);
    for (int q = 0; q < Q; ++q) {
      const Vec number(query[q * width + d]);
      for (int v = 0; v < VECTORS; ++v) sums[q][v] = at::vec::fmadd(number, keys[v], sums[q][v]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < VECTORS; ++v) sums[q][v].store(out + q * pitch + v * WIDTH);
}

// N vectors of the values of a tile, weighted, to the sums of Q queries.
template <int Q, int N>
inline void add_tile(
    const float* weights, int64_t pitch, const float* wide, int64_t count, int64_t width, float* sums) {
  Vec sum[Q][N];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) sum[q][n] = Vec::loadu(sums + q * width + n * WIDTH);
  for (int64_t i = 0; i < count; ++i) {
    Vec value[N];
    for (int n = 0; n < N; ++n) value[n] = Vec::loadu(wide + i * width + n * WIDTH);
    for (int q = 0; q < Q; ++q) {
      const Vec weight(weights[q * pitch + i]);
      for (int n = 0; n < N; ++n) sum[q][n] = at::vec::fmadd(weight, value[n], sum[q][n]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) sum[q][n].store(sums + q * width + n * WIDTH);
}

template <int Q>
inline void add_tile(
    const float* weights, int64_t pitch, const float* wide, int64_t count, int64_t width, float* sums) {
  int64_t d = 0;
  for (; d + ADDED * WIDTH <= width; d += ADDED * WIDTH)
    add_tile<Q, ADDED>(weights, pitch, wide + d, count, width, sums + d);
  for (; d < width; d += WIDTH) add_tile<Q, 1>(weights, pitch, wide + d, count, width, sums + d);
}

template <typename T>
inline void take_queries(const Call& call, int64_t row, int64_t kv_head, float* to) {
  const T* base = call.query.const_data_ptr<T>() + row * call.query.stride(0);
  const Vec factor(1 / std::sqrt(float(call.head_dim)));
  for (int64_t q = 0; q < call.queries; ++q, to += call.width) {
    const int64_t head = kv_head * call.group + q % call.group;
    const T* from = base + q / call.group * call.query.stride(1) + head * call.query.stride(2);
    pieces<T>(call.head_dim, [&](int64_t d, int numbers) {
      Vec vectors[Stored<T>::COUNT];
      Stored<T>::load(from + d, vectors, numbers);
      for (int c = 0; c < Stored<T>::COUNT; ++c) (vectors[c] * factor).store(to + d + c * WIDTH);
    });
  }
}

template <typename T>
inline void give_output(const Call& call, int64_t row, int64_t kv_head, const float* sums, const float* totals) {
  T* base = call.output.mutable_data_ptr<T>() + row * call.output.stride(0);
  for (int64_t q = 0; q < call.queries; ++q, sums += call.width) {
    const int64_t head = kv_head * call.group + q % call.group;
    T* to = base + q / call.group * call.output.stride(1) + head * call.output.stride(2);
    // A head that sees nothing has no sum, and its values are zero.
    const Vec factor(totals[q] == 0 ? 0 : 1 / totals[q]);
    pieces<T>(call.head_dim, [&](int64_t d, int numbers) {
      Vec vectors[Stored<T>::COUNT];
      for (int c = 0; c < Stored<T>::COUNT; ++c) vectors[c] = Vec::loadu(sums + d + c * WIDTH) * factor;
      Stored<T>::store(vectors, to + d, numbers);
    });
  }
}

// Softmax in place, without the division: the greatest is written, and the sum.
inline void exponentials(float* x, int64_t count, float& greatest) {
  greatest = NOTHING;
  if (count == 0) return;
  greatest = at::vec::reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x, count);
  const Vec most(greatest);
  at::vec::map<float>([most](Vec v) { return (v - most).exp(); }, x, x, count);
}

// Sums over the queries of a token of what they have for each listed slot, to where slots are.
inline void give_by_slot(
    const Call& call, const Tensor& room, int64_t row, const std::vector<int64_t>& listed, const float* x,
    const float* factors, bool sees_all) {
  // Whatever a tensor is asked for is a call into a library: not within a loop over slots.
  const int64_t count = listed.size(), group = call.group, by_slot = room.stride(2);
  const int64_t* slots = listed.data();
  const bool* visible = call.visible.const_data_ptr<bool>() + row * call.visible.stride(0);
  float* to = room.mutable_data_ptr<float>() + row * room.stride(0);
  for (int64_t t = 0; t < call.tokens; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      if (!sees_all && !visible[slots[i]]) continue;
      float sum = 0;
      for (int64_t g = 0; g < group; ++g) sum += x[g * PART + i] * (factors == nullptr ? 1 : factors[g]);
      to[slots[i] * by_slot] = sum;
    }
    x += group * PART;
    factors = factors == nullptr ? nullptr : factors + group;
    visible += call.visible.stride(1);
    to += room.stride(1);
  }
}

inline void clear(const Call& call, const Tensor& room, int64_t row, int64_t first, int64_t count) {
  float* to = room.mutable_data_ptr<float>() + row * room.stride(0);
  const int64_t by_token = room.stride(1), by_slot = room.stride(2);
  for (int64_t t = 0; t < call.tokens; ++t)
    if (by_slot == 1)
      std::fill_n(to + t * by_token + first, count, 0.f);
    else
      for (int64_t i = first; i < first + count; ++i) to[t * by_token + i * by_slot] = 0;
}

// One part of one head of one row. Q is the dtype of the queries, T that of keys and values.
template <typename Q, typename T>
void attend_part(
    const Call& call, int64_t row, int64_t kv_head, int64_t part, const Partial& left, Scratch& scratch) {
  list_slots(call, row, kv_head, part, scratch.listed);
  const auto& listed = scratch.listed;
  const int64_t count = listed.size(), queries = call.queries;
  const bool many = queries >= MANY;
  scratch.at.resize(TILE);
  scratch.rows.resize(TILE);
  scratch.query.assign(queries * call.width, 0);
  take_queries<Q>(call, row, kv_head, scratch.query.data());
  const float* query = scratch.query.data();
  float* weights = left.weights;

  const auto scale_of_slots = [row](const Tensor& scale) {
    return IS_PACKED<T> || !scale.defined() ? nullptr : scale.const_data_ptr<float>() + row * scale.stride(0);
  };
  const float* scale = scale_of_slots(call.key_scale);
  for (int64_t i = 0; i < count; i += TILE) {
    const int64_t tile = std::min(TILE, count - i);
    const T* const* keys = places_of<T>(call.keys, row, listed, i, tile, scratch);
    const float* wide =
        many || IS_PACKED<T> ? widened(keys, call.key_scale, row, &listed[i], tile, call, scratch) : nullptr;
    if (many) {
      const float* side = transposed(wide, call, scratch);
      by_queries<QUERIES>(0, queries, [&](int64_t q, auto n) {
        score_tile<n>(query + q * call.width, call.width, side, call.head_dim, weights + q * PART + i, PART);
      });
    } else {
      by_queries<2>(0, queries, [&](int64_t q, auto n) {
        const float* own = query + q * call.width;
        float* to = weights + q * PART + i;
        if constexpr (IS_PACKED<T>)
          dot_products<float, n>(own, call.width, rows_of(wide, call, scratch), tile, call.head_dim, to, PART);
        else
          dot_products<T, n>(own, call.width, keys, tile, call.head_dim, to, PART);
      });
    }
    if (scale != nullptr)
      for (int64_t q = 0; q < queries; ++q)
        for (int64_t j = i; j < i + tile; ++j) weights[q * PART + j] *= scale[listed[j]];
  }
  if (call.scores.defined()) {
    if (!call.unequal()) {
      const auto [first, places] = places_of_part(call, row, kv_head, part);
      clear(call, call.scores, row, kv_head * call.places + first, places);
    }
    give_by_slot(call, call.scores, row, listed, weights, nullptr, call.tokens == 1);
  }

  // What one token sees another may not: it is out of the greatest, and has no weight.
  const bool* visible = call.visible.const_data_ptr<bool>() + row * call.visible.stride(0);
  const int64_t by_token = call.visible.stride(1);
  scratch.seen.resize(PART);
  float* seen = scratch.seen.data();
  const auto hide = [&](float* x, float with) {
    at::vec::map2<float>(
        [with](Vec v, Vec s) { return Vec::blendv(v, Vec(with), s == Vec(0)); }, x, x, seen, count);
  };
  for (int64_t q = 0; q < queries; ++q) {
    float* own = weights + q * PART;
    if (call.tokens > 1 && q % call.group == 0)
      for (int64_t i = 0; i < count; ++i) seen[i] = visible[q / call.group * by_token + listed[i]];
    if (call.tokens > 1) hide(own, NOTHING);
    exponentials(own, count, left.greatest[q]);
    if (call.tokens > 1) hide(own, 0);
    left.total[q] =
        count == 0 ? 0 : at::vec::reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, own, count);
  }

  std::fill(left.sums, left.sums + queries * call.width, 0);
  scale = scale_of_slots(call.value_scale);
  float scaled[ADDED * TILE];
  for (int64_t i = 0; i < count; i += TILE) {
    const int64_t tile = std::min(TILE, count - i);
    const T* const* values = places_of<T>(call.values, row, listed, i, tile, scratch);
    const float* wide =
        many || IS_PACKED<T> ? widened(values, call.value_scale, row, &listed[i], tile, call, scratch) : nullptr;
    by_queries<ADDED>(0, queries, [&](int64_t q, auto n) {
      const float* own = weights + q * PART + i;
      int64_t pitch = PART;
      if (scale != nullptr) {
        // A code times a weight of zero is zero whatever its scale.
        for (int k = 0; k < n; ++k)
          for (int64_t j = 0; j < tile; ++j)
            scaled[k * TILE + j] = own[k * PART + j] == 0 ? 0 : own[k * PART + j] * scale[listed[i + j]];
        own = scaled, pitch = TILE;
      }
      float* sums = left.sums + q * call.width;
      if (wide != nullptr)
        add_tile<n>(own, pitch, wide, tile, call.width, sums);
      else if constexpr (!IS_PACKED<T>)
        for (int k = 0; k < n; ++k)
          add_values<T>(own + k * pitch, values, tile, call.head_dim, sums + k * call.width);
    });
  }
}

// Put the parts of a head together, of which there is one or several. `listed` says that the scratch still has
// the slots of the only one.
template <typename Q>
void finish(
    const Call& call, int64_t row, int64_t kv_head, const std::vector<Partial>& parts, bool listed,
    Scratch& scratch) {
  const int64_t queries = call.queries;
  std::vector<float> totals(queries, 0), factors(parts.size() * queries, 1);
  float* sums = parts[0].sums;
  for (int64_t q = 0; q < queries; ++q) {
    if (parts.size() > 1) {
      float greatest = NOTHING;
      for (const Partial& part : parts)
        // A maximum that is not a number stays one.
        greatest = part.greatest[q] > greatest || std::isnan(part.greatest[q]) ? part.greatest[q] : greatest;
      for (size_t p = 0; p < parts.size(); ++p)
        factors[p * queries + q] = parts[p].total[q] == 0 ? 0 : std::exp(parts[p].greatest[q] - greatest);
      scratch.sums.assign(call.width, 0);
      for (size_t p = 0; p < parts.size(); ++p)
        for (int64_t d = 0; d < call.width; ++d)
          scratch.sums[d] += parts[p].sums[q * call.width + d] * factors[p * queries + q];
      std::copy(scratch.sums.begin(), scratch.sums.end(), sums + q * call.width);
    }
    for (size_t p = 0; p < parts.size(); ++p) totals[q] += parts[p].total[q] * factors[p * queries + q];
    for (size_t p = 0; p < parts.size(); ++p)
      factors[p * queries + q] *= totals[q] == 0 ? 0 : 1 / totals[q];
  }
  give_output<Q>(call, row, kv_head, sums, totals.data());
  if (!call.mass.defined()) return;
  if (!call.unequal()) clear(call, call.mass, row, kv_head * call.places, call.places);
  for (size_t p = 0; p < parts.size(); ++p) {
    if (!listed) list_slots(call, row, kv_head, p, scratch.listed);
    give_by_slot(call, call.mass, row, scratch.listed, parts[p].weights, &factors[p * queries], true);
  }
}

// Pieces of work, whichever thread is free takes the next: a thread that is held up holds nobody up.
template <typename F>
void in_parallel(int64_t pieces, int64_t bytes, const F& work) {
  const int64_t threads = std::min({int64_t(at::get_num_threads()), pieces, bytes / BYTES_A_THREAD});
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    static thread_local Scratch scratch;
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(piece, scratch);
  };
  if (threads <= 1 || at::in_parallel_region())
    take(0, 1);
  else
    at::parallel_for(0, threads, 1, take);
}

template <typename Q, typename T>
void attend(const Call& call) {
  if (call.unequal())  // not every slot is somebody's
    for (const Tensor& room : {call.mass, call.scores})
      for (int64_t row = 0; room.defined() && row < call.rows; ++row) clear(call, room, row, 0, call.slots);
  const int64_t heads = call.rows * call.kv_heads, queries = call.queries;
  const int64_t bytes = 2 * call.rows * call.slots * call.head_dim * int64_t(sizeof(T));
  const int64_t room = queries * (call.width + 2 + PART);
  const auto partial = [&](float* memory) {
    float* weights = memory + queries * (call.width + 2);
    return Partial{memory, memory + queries * call.width, memory + queries * (call.width + 1), weights};
  };
  // Parts of all heads, one after the other: where those of a head begin.
  std::vector<int64_t> first(heads + 1, 0);
  for (int64_t head = 0; head < heads; ++head)
    first[head + 1] = first[head] + parts_of(call, head / call.kv_heads, head % call.kv_heads);
  if (first[heads] == heads) {
    in_parallel(heads, bytes, [&](int64_t head, Scratch& scratch) {
      const int64_t row = head / call.kv_heads, kv_head = head % call.kv_heads;
      scratch.weights.resize(room);
      const std::vector<Partial> one{partial(scratch.weights.data())};
      attend_part<Q, T>(call, row, kv_head, 0, one[0], scratch);
      finish<Q>(call, row, kv_head, one, true, scratch);
    });
    return;
  }
  const Tensor left = at::empty({first[heads] * room}, at::kFloat);
  float* memory = left.mutable_data_ptr<float>();
  in_parallel(first[heads], bytes, [&](int64_t piece, Scratch& scratch) {
    const int64_t head = std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
    const int64_t row = head / call.kv_heads, kv_head = head % call.kv_heads;
    attend_part<Q, T>(call, row, kv_head, piece - first[head], partial(memory + piece * room), scratch);
  });
  in_parallel(heads, bytes, [&](int64_t head, Scratch& scratch) {
    std::vector<Partial> parts;
    for (int64_t piece = first[head]; piece < first[head + 1]; ++piece)
      parts.push_back(partial(memory + piece * room));
    finish<Q>(call, head / call.kv_heads, head % call.kv_heads, parts, false, scratch);
  });
}

template <typename Q>
void attend_stored(const Call& call) {
  const auto stored = call.keys.scalar_type();
  if (stored == at::kChar) return attend<Q, int8_t>(call);
  if (stored == at::kByte) return attend<Q, Packed>(call);
  if (stored == at::kFloat8_e4m3fn) return attend<Q, Float8_e4m3fn>(call);
  TORCH_CHECK(
      stored == call.query.scalar_type(), "keys are ", stored, ": expected the dtype of the query, int8, float8_e4m3fn or uint8");
  attend<Q, Q>(call);
}

// The numbers of a vector must lie side by side; what is given otherwise is copied.
Tensor dense(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }
Tensor dense(const MaybeTensor& x) { return x.has_value() ? dense(*x) : Tensor(); }
// One token of each row.
Tensor with_tokens(const MaybeTensor& x, bool single) {
  return !x.has_value() ? Tensor() : single ? x->unsqueeze(1) : *x;
}

Tensor observed_attention(
    const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& visible, int64_t kv_heads,
    const MaybeTensor& key_scale, const MaybeTensor& value_scale, const MaybeTensor& slot,
    const MaybeTensor& filled, const MaybeTensor& head, const MaybeTensor& mass, const MaybeTensor& scores) {
  const bool single = query.dim() == 3;
  const Tensor output = at::empty(query.sizes(), query.options());
  const Tensor queries = dense(with_tokens(query, single));
  const int64_t rows = queries.size(0), tokens = queries.size(1), heads = queries.size(2);
  const int64_t head_dim = queries.size(3), slots = keys.size(1), group = heads / kv_heads;
  TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, kv_heads, " key heads do not divide ", heads, " query heads");
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.scalar_type() == values.scalar_type(), "keys and values differ");
  const bool packed = keys.scalar_type() == at::kByte;
  TORCH_CHECK(keys.size(0) == rows && keys.size(2) == (packed ? head_dim / 2 : head_dim), "keys do not fit the query");
  TORCH_CHECK(!packed || (key_scale.has_value() && value_scale.has_value()), "two codes a byte need their scales");
  TORCH_CHECK(visible.size(0) == rows && visible.size(-1) == slots, "visible does not fit the keys");
  const int64_t places = slot.has_value() ? slots : slots / kv_heads;
  const int64_t step = 2 * WIDTH;
  const Call call{
      rows, tokens, heads, kv_heads, group, head_dim, slots, tokens * group,
      (head_dim + step - 1) / step * step, places, queries, dense(keys), dense(values),
      dense(with_tokens(visible, single)), dense(key_scale), dense(value_scale), dense(slot), dense(filled),
      dense(head), with_tokens(mass, single), with_tokens(scores, single), with_tokens(output, single)};
  if (query.numel() == 0) return output;
  switch (query.scalar_type()) {
    case at::kFloat: attend_stored<float>(call); break;
    case at::kBFloat16: attend_stored<BFloat16>(call); break;
    case at::kHalf: attend_stored<Half>(call); break;
    default: TORCH_CHECK(false, "queries are ", query.scalar_type(), ": expected float32, bfloat16 or float16");
  }
  return output;
}

Tensor slot_attention(
    const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& visible, int64_t kv_heads,
    const MaybeTensor& key_scale, const MaybeTensor& value_scale, const MaybeTensor& slot,
    const MaybeTensor& filled, const MaybeTensor& head) {
  return observed_attention(
      query, keys, values, visible, kv_heads, key_scale, value_scale, slot, filled, head, {}, {});
}

// Which slots hold a token that may be looked at. Inductor makes bools of comparisons one by one: of a full
// cache that was 6% of a step.
Tensor visible_slots(const Tensor& position, int64_t condition, const MaybeTensor& limit) {
  TORCH_CHECK(position.scalar_type() == at::kInt, "positions are ", position.scalar_type(), ": expected int32");
  const Tensor output = at::empty(position.sizes(), position.options().dtype(at::kBool));
  const Tensor held = position.contiguous();
  const Tensor limits = limit.has_value() ? limit->expand(position.sizes()).contiguous() : Tensor();
  at::parallel_for(0, held.numel(), BYTES_A_THREAD, [&](int64_t begin, int64_t end) {
    const int32_t word = int32_t(condition);
    const int32_t* __restrict from = held.const_data_ptr<int32_t>() + begin;
    uint8_t* __restrict to = static_cast<uint8_t*>(output.mutable_data_ptr()) + begin;
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) to[i] = uint8_t((from[i] >= 0) | (from[i] == word));
    if (!limit.has_value()) return;
    const uint8_t* __restrict allowed = static_cast<const uint8_t*>(limits.const_data_ptr()) + begin;
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) to[i] &= allowed[i];
  });
  return output;
}

// How many threads what the calling thread starts may take from now on. at::set_num_threads would decide for
// threads that have yet to begin, too.
void use_threads(int64_t count) {
#ifdef _OPENMP
  omp_set_num_threads(int(count));
#else
  at::set_num_threads(int(count));
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(arkv, library) { library.def("use_threads(int count) -> ()", use_threads); }

TORCH_LIBRARY_IMPL(arkv, CPU, library) {
  library.impl("slot_attention", slot_attention);
  library.impl("observed_attention", observed_attention);
  library.impl("visible_slots", visible_slots);
}

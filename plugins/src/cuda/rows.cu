// Before and after the operator where a server keeps tokens flattened: new ones are gathered into rows and turned back, exact
// vectors come from pages; then the output and the vectors that were appended go to their places.
#include <algorithm>
#include <initializer_list>

#include "source.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostRows = 65535;  // of a grid's second axis

__host__ __device__ inline int64_t exact_vector(const gsrq_layer& layer, const gsrq_call& call) {  // bytes
  return static_cast<int64_t>(layer.head_dim) * dtype_bytes(call.exact_dtype);
}

__host__ __device__ inline int64_t exact_side(const gsrq_layer& layer, const gsrq_call& call) {  // bytes of a row's exact keys
  return layer.kv_heads * gsrq_exact_slots(layer.sinks, layer.window, layer.block) * exact_vector(layer, call);
}

// A thread copies pieces of so many bytes: 16 where vectors, pages and places allow it, else an element.
struct Pieces {
  int exact, output;
};

__device__ inline void copy(char* to, const char* from, int bytes) {
  if (bytes == 16) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  else if (bytes == 4) *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  else *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
}

__device__ inline void clear(char* to, int bytes) {
  if (bytes == 16) *reinterpret_cast<uint4*>(to) = uint4{};
  else if (bytes == 4) *reinterpret_cast<uint32_t*>(to) = 0;
  else *reinterpret_cast<uint16_t*>(to) = 0;
}

// Byte `at` of row b's exact keys, after them its exact values: the keys' parts of its pages, then the values' parts.
__device__ inline char* exact_at(const gsrq_rows& rows, int64_t b, uint32_t at) {
  const uint32_t keys = static_cast<uint32_t>(rows.exact_pages) * rows.key_page_bytes;
  const bool second = at >= keys;
  const uint32_t within = second ? at - keys : at, size = second ? rows.value_page_bytes : rows.key_page_bytes;
  const int64_t page = rows.exact_table[b * rows.exact_stride + within / size];
  return static_cast<char*>(second ? rows.value_pages : rows.key_pages) + page * size + within % size;
}

// RoPE pair i % pairs of a vector of the row's new tokens, or zeros past them.
__device__ void gather_pair(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows, const RowLengths& row,
                            int64_t b, int64_t i) {
  const int pairs = layer.head_dim / 2, all = layer.heads + 2 * layer.kv_heads;
  const int pair = static_cast<int>(i % pairs), of = static_cast<int>(i / pairs % all);
  const int64_t step = i / pairs / all;
  const bool is_query = of < layer.heads, is_key = !is_query && of < layer.heads + layer.kv_heads;
  const int heads = is_query ? layer.heads : layer.kv_heads;
  const int head = is_query ? of : (of - layer.heads) % layer.kv_heads;
  const void* from = is_query ? rows.query : is_key ? rows.key : rows.value;
  const int64_t stride = is_query ? rows.query_stride : is_key ? rows.key_stride : rows.value_stride;
  int first, second;
  pair_elements(layer, pair, &first, &second);
  float x = 0, y = 0;
  if (step < row.total - row.past) {
    const int64_t at = (rows.starts[b] + step) * stride + static_cast<int64_t>(head) * layer.head_dim;
    x = load(from, at + first, call.dtype), y = load(from, at + second, call.dtype);
    if ((is_query || is_key) && pair < layer.half_rope) {  // each operation rounded, as torch's are
      const int64_t position = row.past + step;
      const float c = layer.cos[position * layer.half_rope + pair], s = layer.sin[position * layer.half_rope + pair];
      const float size = __fadd_rn(__fmul_rn(c, c), __fmul_rn(s, s));
      const float cosine = __fdiv_rn(c, size), sine = __fdiv_rn(-s, size);
      const float turned = __fsub_rn(__fmul_rn(x, cosine), __fmul_rn(y, sine));
      y = __fadd_rn(__fmul_rn(y, cosine), __fmul_rn(x, sine));
      x = turned;
    }
  }
  void* to = const_cast<void*>(is_query ? call.query : is_key ? call.key : call.value);
  const int64_t at = ((b * heads + head) * call.steps + step) * layer.head_dim;
  store(to, at + first, x, call.dtype), store(to, at + second, y, call.dtype);
}

// Grid: (blocks of tokens, then of exact vectors; rows).
__global__ void __launch_bounds__(kThreads) gather_rows(gsrq_layer layer, gsrq_call call, gsrq_rows rows, int64_t token_blocks,
                                                        Pieces pieces) {
  const int64_t b = blockIdx.y;
  const RowLengths row = row_lengths(layer, call, b);
  if (blockIdx.x < token_blocks) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
    const int64_t all = static_cast<int64_t>(layer.heads + 2 * layer.kv_heads) * (layer.head_dim / 2) * call.steps;
    if (i < all) gather_pair(layer, call, rows, row, b, i);
    return;
  }
  const int64_t side = exact_side(layer, call), i = (blockIdx.x - token_blocks) * kThreads + threadIdx.x;
  if (i * pieces.exact >= 2 * side) return;
  // Of the row, whose exact vectors are less than 2 GiB.
  const uint32_t at = static_cast<uint32_t>(i) * pieces.exact, half = static_cast<uint32_t>(side);
  const uint32_t within = at < half ? at : at - half, vector = static_cast<uint32_t>(exact_vector(layer, call));
  const uint32_t slots = static_cast<uint32_t>(gsrq_exact_slots(layer.sinks, layer.window, layer.block));
  // A slot's first token is that of its number. What none has written becomes zero: pages come with anything in them.
  const bool written = within / vector % slots < static_cast<uint64_t>(row.past);
  char* to = static_cast<char*>(at < half ? call.key_exact : call.value_exact) + b * side + within;
  if (written) copy(to, exact_at(rows, b, at), pieces.exact);
  else clear(to, pieces.exact);
}

// Grid: (blocks of the output, then of appended vectors; rows).
__global__ void __launch_bounds__(kThreads) scatter_rows(gsrq_layer layer, gsrq_call call, gsrq_rows rows, int64_t token_blocks,
                                                         Pieces pieces) {
  const int64_t b = blockIdx.y;
  const RowLengths row = row_lengths(layer, call, b);
  if (blockIdx.x < token_blocks) {
    const int64_t bytes = static_cast<int64_t>(layer.heads) * layer.head_dim * dtype_bytes(call.dtype);  // of a token
    const int64_t at = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * pieces.output, step = at / bytes;
    if (step >= row.total - row.past) return;
    const int64_t to = (rows.starts[b] + step) * rows.output_stride * dtype_bytes(call.dtype) + at % bytes;
    const char* from = static_cast<const char*>(call.output) + b * call.steps * bytes + at;
    copy(static_cast<char*>(rows.output) + to, from, pieces.output);
    return;
  }
  const int64_t vector = exact_vector(layer, call), each = vector / pieces.exact, side = exact_side(layer, call);
  const int64_t i = (blockIdx.x - token_blocks) * kThreads + threadIdx.x, writer = i / each / (2 * layer.kv_heads);
  const RingWriters writers = ring_writers(layer, row.past, row.total);
  if (writer >= writers.count) return;
  const int64_t of = i / each % (2 * layer.kv_heads), head = of % layer.kv_heads;  // keys' heads, then values'
  const int64_t slot = gsrq_slot(writers.token(writer, row.past), layer.sinks, layer.window, layer.block);
  const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
  const int64_t within = (head * slots + slot) * vector + i % each * pieces.exact;
  const bool values = of >= layer.kv_heads;
  const char* from = static_cast<const char*>(values ? call.value_exact : call.key_exact) + b * side + within;
  copy(exact_at(rows, b, static_cast<uint32_t>((values ? side : 0) + within)), from, pieces.exact);
}

bool all_wide(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes) {
  return std::all_of(pointers.begin(), pointers.end(), aligned) &&
         std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size % 16 == 0; });
}

Pieces pieces_of(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows) {
  const int64_t element = dtype_bytes(call.dtype);
  const bool exact = all_wide({rows.key_pages, rows.value_pages},
                              {exact_vector(layer, call), rows.key_page_bytes, rows.value_page_bytes});
  const bool output = all_wide({rows.output}, {layer.head_dim * element, rows.output_stride * element});
  return {exact ? 16 : dtype_bytes(call.exact_dtype), output ? 16 : static_cast<int>(element)};
}

int64_t blocks(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

int grid_of(const gsrq_call& call, int64_t across, dim3* grid) {
  if (across > INT32_MAX || call.batch > kMostRows)
    return fail("rows: %d rows of %lld blocks are too many", call.batch, static_cast<long long>(across));
  *grid = dim3(static_cast<unsigned>(across), static_cast<unsigned>(call.batch));
  return 0;
}

}  // namespace

int check_rows(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows) {
  for (const void* pointer : {rows.query, rows.key, rows.value, static_cast<const void*>(rows.output),
                              static_cast<const void*>(rows.starts), static_cast<const void*>(rows.exact_table),
                              static_cast<const void*>(rows.key_pages), static_cast<const void*>(rows.value_pages)})
    if (pointer == nullptr) return fail("a tensor of the rows is null");
  const int64_t side = exact_side(layer, call), element = dtype_bytes(call.exact_dtype);
  if (rows.exact_pages < 1 || rows.exact_stride < rows.exact_pages || rows.key_page_bytes < 1 || rows.value_page_bytes < 1)
    return fail("exact_pages %d (of %lld in a row of the table), key_page_bytes %lld and value_page_bytes %lld must be positive",
                rows.exact_pages, static_cast<long long>(rows.exact_stride), static_cast<long long>(rows.key_page_bytes),
                static_cast<long long>(rows.value_page_bytes));
  if (rows.key_page_bytes % element != 0 || rows.value_page_bytes % element != 0 || rows.key_page_bytes > INT32_MAX ||
      rows.value_page_bytes > INT32_MAX || 2 * side > INT32_MAX)
    return fail("pages of %lld and %lld bytes for rows of %lld exact bytes: whole elements, and less than 2 GiB",
                static_cast<long long>(rows.key_page_bytes), static_cast<long long>(rows.value_page_bytes),
                static_cast<long long>(2 * side));
  if (rows.exact_pages * (rows.key_page_bytes + rows.value_page_bytes) < 2 * side)
    return fail("%d pages of %lld and %lld bytes do not hold a row's %lld exact bytes", rows.exact_pages,
                static_cast<long long>(rows.key_page_bytes), static_cast<long long>(rows.value_page_bytes),
                static_cast<long long>(2 * side));
  return 0;
}

void rows_workspace(const gsrq_layer& layer, gsrq_call& call, Arena& arena) {
  const int64_t tokens = static_cast<int64_t>(call.batch) * call.steps * layer.head_dim * dtype_bytes(call.dtype);
  const int64_t side = call.batch * exact_side(layer, call);
  call.query = arena.take<char>(tokens * layer.heads);
  call.key = arena.take<char>(tokens * layer.kv_heads);
  call.value = arena.take<char>(tokens * layer.kv_heads);
  call.output = arena.take<char>(tokens * layer.heads);
  call.key_exact = arena.take<char>(side);
  call.value_exact = arena.take<char>(side);
}

int gather(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows, cudaStream_t stream) {
  const Pieces pieces = pieces_of(layer, call, rows);
  const int64_t pairs = static_cast<int64_t>(layer.heads + 2 * layer.kv_heads) * (layer.head_dim / 2) * call.steps;
  const int64_t tokens = blocks(pairs), exact = blocks(2 * exact_side(layer, call) / pieces.exact);
  dim3 grid;
  if (grid_of(call, tokens + exact, &grid)) return 1;
  gather_rows<<<grid, kThreads, 0, stream>>>(layer, call, rows, tokens, pieces);
  return launched("gather_rows");
}

int scatter(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows, cudaStream_t stream) {
  const Pieces pieces = pieces_of(layer, call, rows);
  const int64_t bytes = static_cast<int64_t>(layer.heads) * layer.head_dim * dtype_bytes(call.dtype) * call.steps;
  const int64_t most = std::min<int64_t>(call.steps, gsrq_exact_slots(layer.sinks, layer.window, layer.block));
  const int64_t tokens = blocks(bytes / pieces.output);
  const int64_t exact = blocks(most * 2 * layer.kv_heads * (exact_vector(layer, call) / pieces.exact));
  dim3 grid;
  if (grid_of(call, tokens + exact, &grid)) return 1;
  scatter_rows<<<grid, kThreads, 0, stream>>>(layer, call, rows, tokens, pieces);
  return launched("scatter_rows");
}

}  // namespace gsrq::cuda

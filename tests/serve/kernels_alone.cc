// Calls one kernel as XLA would, without XLA: for processors that are emulated, where no jaxlib runs.
//
//     kernels_alone CALL RESULTS
//
// CALL, of little-endian 64-bit numbers N and bytes: N bytes of the kernel's name; N arguments, each N dtype (XLA's
// code), N dims, the dims and its data; N results, the same without data; N attributes in the order of their names,
// each N bytes of its name, N dtype and N bits. RESULTS gets the data of all results. Exits with 1 and the message of a
// kernel that refuses its arguments.

#include "kernels.cc"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace {

constexpr int kThreads = 3;
std::vector<std::thread> threads;
std::mutex starting;

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const std::lock_guard<std::mutex> lock(starting);
  threads.emplace_back(args->task, args->data);
  return nullptr;
}

XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = kThreads;
  return nullptr;
}

XLA_FFI_Error* refuse(XLA_FFI_Error_Create_Args* args) {
  std::fprintf(stderr, "%s\n", args->message);
  std::exit(1);
}

struct Array {
  std::vector<int64_t> dims;
  std::vector<char> data;
  XLA_FFI_Buffer buffer;
};

struct Message {
  std::vector<char> bytes;
  size_t at = 0;

  int64_t number() {
    int64_t found;
    std::memcpy(&found, take(sizeof(found)), sizeof(found));
    return found;
  }
  const char* take(size_t num) { return bytes.data() + std::exchange(at, at + num); }
  std::string name() {
    const int64_t num = number();
    return std::string(take(num), num);
  }

  void read(Array& array, bool with_data) {
    const auto dtype = static_cast<XLA_FFI_DataType>(number());
    array.dims.resize(number());
    for (int64_t& dim : array.dims) dim = number();
    array.buffer = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr,           dtype, nullptr, static_cast<int64_t>(array.dims.size()),
                    array.dims.data()};
    array.data.resize(ffi::AnyBuffer(&array.buffer).size_bytes());
    if (with_data) std::memcpy(array.data.data(), take(array.data.size()), array.data.size());
    array.buffer.data = array.data.data();
  }
};

#define GCOMPUTE_KERNEL(name) {#name, name}
const std::map<std::string, XLA_FFI_Handler*> kKernels = {
    GCOMPUTE_KERNEL(product_float32),       GCOMPUTE_KERNEL(product_bfloat16),       GCOMPUTE_KERNEL(product_int8),
    GCOMPUTE_KERNEL(gated_product_float32), GCOMPUTE_KERNEL(gated_product_bfloat16), GCOMPUTE_KERNEL(attention_paged),
    GCOMPUTE_KERNEL(norm_add_rms),          GCOMPUTE_KERNEL(cells_store),            GCOMPUTE_KERNEL(cells_place),
    GCOMPUTE_KERNEL(choice_largest)};

}  // namespace

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  Message call{{std::istreambuf_iterator<char>(file), {}}};
  XLA_FFI_Handler* const kernel = kKernels.at(call.name());
  std::vector<Array> args(call.number());
  for (Array& array : args) call.read(array, true);
  std::vector<Array> results(call.number());
  for (Array& array : results) call.read(array, false);
  struct Attribute {
    std::string name;
    int64_t bits;
    XLA_FFI_ByteSpan span;
    XLA_FFI_Scalar scalar;
  };
  std::vector<Attribute> attributes(call.number());

  std::vector<void*> to_args, to_results, to_attributes;
  std::vector<XLA_FFI_ByteSpan*> names;
  for (Array& array : args) to_args.push_back(&array.buffer);
  for (Array& array : results) to_results.push_back(&array.buffer);
  for (Attribute& attribute : attributes) {
    attribute.name = call.name();
    const auto dtype = static_cast<XLA_FFI_DataType>(call.number());
    attribute.bits = call.number();
    attribute.span = {attribute.name.data(), attribute.name.size()};
    attribute.scalar = {dtype, &attribute.bits};
    names.push_back(&attribute.span);
    to_attributes.push_back(&attribute.scalar);
  }
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_AttrType> attribute_types(attributes.size(), XLA_FFI_AttrType_SCALAR);
  const auto size = [](const auto& vector) { return static_cast<int64_t>(vector.size()); };

  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = refuse;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = num_threads;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, size(args), arg_types.data(), to_args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, size(results), result_types.data(), to_results.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      size(attributes),
                 attribute_types.data(),    names.data(), to_attributes.data()};
  kernel(&frame);
  // One that comes late may still look for work.
  for (std::thread& thread : threads) thread.join();

  std::ofstream out(arguments[2], std::ios::binary);
  for (const Array& array : results) out.write(array.data.data(), array.data.size());
  return out.good() ? 0 : 1;
}

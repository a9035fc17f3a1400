// Keys and values of a step put among a dispatch's new cells, for serving on CPU: XLA rewrites all of them.

#include "vectors.h"

namespace {

// cells, stored: [B, K, C, H], one array. new_cells: [B, T, K, H], for cells from `first` [B] on; others are dropped.
ffi::Error store(ffi::Buffer<ffi::F32> cells, ffi::Buffer<ffi::F32> new_cells, ffi::Buffer<ffi::S32> first,
                 ffi::ResultBuffer<ffi::F32> stored) {
  const auto dims = cells.dimensions();
  const int64_t rows = dims[0], heads = dims[1], room = dims[2], size = dims[3], num = new_cells.dimensions()[1];
  if (stored->typed_data() != cells.typed_data())
    std::copy_n(cells.typed_data(), cells.element_count(), stored->typed_data());
  for (int64_t row = 0; row < rows; row++)
    for (int64_t one = 0; one < num; one++) {
      const int64_t cell = first.typed_data()[row] + one;
      if (cell < 0 || cell >= room) continue;
      for (int64_t head = 0; head < heads; head++)
        std::copy_n(new_cells.typed_data() + ((row * num + one) * heads + head) * size, size,
                    stored->typed_data() + ((row * heads + head) * room + cell) * size);
    }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cells_store, store,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

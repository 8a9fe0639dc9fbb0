// Keyed draws and dropout (see ops.h). Rows of elements are given by the places of their first elements.

#include "ops/ops.h"

namespace trident::ops {

DrawKey key_of(int64_t key, int64_t stream) { return {uint64_t(key), uint64_t(stream)}; }

uint32_t require_threshold(int64_t threshold, const char* op) {
    require(threshold >= 0 && threshold <= int64_t(0xffffffff), op,
            "threshold is " + std::to_string(threshold) + ", expected 32 bits");
    return uint32_t(threshold);
}

void require_places(const Tensor& places, at::IntArrayRef shape, const Tensor& like, const char* op, const char* name) {
    require_typed(places, at::kLong, shape, like, op, name);
    const int64_t* place = data<int64_t>(places);
    for (int64_t i = 0; i < places.numel() && places.is_cpu(); i++)
        require(place[i] >= 0, op, std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(place[i]));
}

Tensor draw(const Tensor& starts, int64_t n, int64_t key, int64_t stream, int64_t kind, int64_t threshold) {
    const char* op = "draw";
    require_places(starts, {starts.numel()}, starts, op, "starts");
    require(n >= 0, op, "n is " + std::to_string(n));
    require(kind >= 0 && kind < DRAWS, op,
            "kind is " + std::to_string(kind) + ", expected 0 bits, 1 uniform, 2 normal or 3 keep");
    const uint32_t least = require_threshold(threshold, op);
    const auto type = kind == BITS ? at::kInt : kind == KEEP ? at::kBool : at::kFloat;
    Tensor out = at::empty({starts.numel(), n}, starts.options().dtype(type));
    on_device(starts, [&](const auto& where) {
        trident::draw(data<int64_t>(starts), starts.numel(), n, key_of(key, stream), int(kind), least, out.data_ptr(),
                      where);
    });
    return out;
}

Tensor dropout(const Tensor& x, const Tensor& starts, int64_t key, int64_t stream, int64_t threshold, double scale) {
    const char* op = "dropout";
    require_plain(x, op, "x");
    require(x.dim() == 2, op, "x is " + shape(x) + ", expected [rows, n]");
    require_places(starts, {x.size(0)}, x, op, "starts");
    const uint32_t least = require_threshold(threshold, op);
    Tensor y = at::empty_like(x);
    dispatch(x, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::dropout<T>(data<T>(x), data<int64_t>(starts), x.size(0), x.size(1), key_of(key, stream), least, scale,
                            data<T>(y), where);
    });
    return y;
}

}  // namespace trident::ops

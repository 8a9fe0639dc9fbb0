// The CUDA kernels of csrc on the emulator, for ctypes: one C function per operator, which returns null or an error
// message. type: 0 float, 1 double, 2 bf16, 3 f16, the type of the tensors (adamw: of `values`; with 1 all tensors are
// double).

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "kernels/cuda/kernels.h"

namespace {

using namespace trident;

std::string message;

// Calls f with a null pointer of the type, and a queue whose scratch memory is filled with NaN and freed after the
// kernels.
template <class F>
const char* call(int type, F f) {
    std::vector<void*> scratch;
    const Queue queue{nullptr, [&](size_t bytes) {
                          scratch.push_back(std::memset(std::malloc(bytes + 1), 0xff, bytes + 1));
                          return scratch.back();
                      }};
    message.clear();
    try {
        switch (type) {
            case 0: f(static_cast<float*>(nullptr), queue); break;
            case 1: f(static_cast<double*>(nullptr), queue); break;
            case 2: f(static_cast<bf16*>(nullptr), queue); break;
            default: f(static_cast<f16*>(nullptr), queue);
        }
    } catch (const std::exception& error) {
        message = error.what();
    }
    for (void* memory : scratch) std::free(memory);
    return message.empty() ? nullptr : message.c_str();
}

template <class T>
Heads<T> heads(void* p, const int64_t* strides) {
    return {static_cast<T*>(p), strides[0], strides[1], strides[2]};
}

}  // namespace

#define TYPES                                       \
    using T = std::remove_pointer_t<decltype(tag)>; \
    using W [[maybe_unused]] = Wide<T>
#define IN(name) static_cast<const T*>(name)
#define OUT(name) static_cast<T*>(name)
#define WIDE(name) static_cast<W*>(name)

extern "C" {

const char* rms_norm(int type, void* x, void* residual, void* sum, void* w, void* y, void* scale, int64_t rows,
                     int64_t h, double eps, double offset) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::rms_norm<T>(IN(x), IN(residual), OUT(sum), IN(w), OUT(y), WIDE(scale), rows, h, eps, offset, queue);
    });
}

const char* rms_norm_backward(int type, void* grad, void* more, void* x, void* w, void* scale, void* gx, void* gw,
                              int64_t rows, int64_t h, double offset) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::rms_norm_backward<T>(IN(grad), IN(more), IN(x), IN(w), WIDE(scale), OUT(gx), OUT(gw), rows, h, offset,
                                      queue);
    });
}

const char* layer_norm(int type, void* x, void* residual, void* sum, void* w, void* b, void* y, void* stats,
                       int64_t rows, int64_t h, double eps) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::layer_norm<T>(IN(x), IN(residual), OUT(sum), IN(w), IN(b), OUT(y), WIDE(stats), rows, h, eps, queue);
    });
}

const char* layer_norm_backward(int type, void* grad, void* more, void* x, void* w, void* stats, void* gx, void* gw,
                                void* gb, int64_t rows, int64_t h) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::layer_norm_backward<T>(IN(grad), IN(more), IN(x), IN(w), WIDE(stats), OUT(gx), OUT(gw), OUT(gb), rows,
                                        h, queue);
    });
}

const char* gated(int type, void* fused, void* y, int kind, int64_t rows, int64_t f) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::gated<T>(IN(fused), OUT(y), kind, rows, f, queue);
    });
}

const char* gated_backward(int type, void* grad, void* fused, void* gfused, int kind, int64_t rows, int64_t f) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::gated_backward<T>(IN(grad), IN(fused), OUT(gfused), kind, rows, f, queue);
    });
}

// strides: of q, k and v along sample, head and position; shape: s, b, n, m, d, r.
const char* rope(int type, void* fused, void* cos, void* sin, void* q, void* k, void* v, const int64_t* strides,
                 const int64_t* shape, bool back) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        const HeadShape x{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
        if (back)
            trident::rope_backward<T>(heads<const T>(q, strides), heads<const T>(k, strides + 3),
                                      heads<const T>(v, strides + 6), IN(cos), IN(sin), OUT(fused), x, queue);
        else
            trident::rope<T>(IN(fused), IN(cos), IN(sin), heads<T>(q, strides), heads<T>(k, strides + 3),
                             heads<T>(v, strides + 6), x, queue);
    });
}

const char* softmax_stats(int type, void* logits, const int64_t* target, void* stats, int64_t rows, int64_t v,
                          int64_t valid) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::softmax_stats<T>(IN(logits), target, WIDE(stats), rows, v, valid, queue);
    });
}

const char* softmax_gradient(int type, void* logits, const int64_t* target, void* peak, void* scale, void* grad,
                             int64_t rows, int64_t v, int64_t valid) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::softmax_gradient<T>(OUT(logits), target, WIDE(peak), WIDE(scale), WIDE(grad), rows, v, valid, queue);
    });
}

const char* adamw(int type, void* master, void* grad, void* m, void* v, void* values, int64_t n, const double* how,
                  int64_t step) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::adamw<W, T>(WIDE(master), WIDE(grad), WIDE(m), WIDE(v), OUT(values), n,
                             {how[0], how[1], how[2], how[3], how[4], how[5], step}, queue);
    });
}

const char* sum_squares(int type, void* x, int64_t n, const int64_t* bounds, double* out, int64_t k) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::sum_squares<T>(IN(x), n, bounds, out, k, queue);
    });
}

// key: key, stream.
const char* draw(int type, const int64_t* starts, int64_t rows, int64_t n, const int64_t* key, int kind,
                 int64_t threshold, void* out) {
    return call(type, [&](auto*, const Queue& queue) {
        trident::draw(starts, rows, n, {uint64_t(key[0]), uint64_t(key[1])}, kind, uint32_t(threshold), out, queue);
    });
}

const char* dropout(int type, void* x, const int64_t* starts, int64_t rows, int64_t n, const int64_t* key,
                    int64_t threshold, double scale, void* y) {
    return call(type, [&](auto* tag, const Queue& queue) {
        TYPES;
        trident::dropout<T>(IN(x), starts, rows, n, {uint64_t(key[0]), uint64_t(key[1])}, uint32_t(threshold), scale,
                            OUT(y), queue);
    });
}

}  // extern "C"

// The CUDA kernels behind the operators: as in kernels/kernels.h, with a Queue instead of `threads`. Pointers are to
// memory of the current device. Calls are asynchronous. No torch.
#pragma once

#include <functional>

#include "kernels/kernels.h"

namespace trident {

// The stream of the kernels. scratch: allocates memory of the current device, which stays unused by others until all
// kernels that were queued during the lifetime of the Queue have run.
struct Queue {
    void* stream;  // cudaStream_t
    std::function<void*(size_t bytes)> scratch;
};

template <class T>
void rms_norm(const T* x, const T* residual, T* sum, const T* w, T* y, Wide<T>* scale, int64_t rows, int64_t h,
              double eps, double offset, const Queue& queue);
template <class T>
void rms_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* scale, T* gx, T* gw,
                       int64_t rows, int64_t h, double offset, const Queue& queue);
template <class T>
void layer_norm(const T* x, const T* residual, T* sum, const T* w, const T* b, T* y, Wide<T>* stats, int64_t rows,
                int64_t h, double eps, const Queue& queue);
template <class T>
void layer_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* stats, T* gx, T* gw,
                         T* gb, int64_t rows, int64_t h, const Queue& queue);

template <class T>
void gated(const T* fused, T* y, int kind, int64_t rows, int64_t f, const Queue& queue);
template <class T>
void gated_backward(const T* grad, const T* fused, T* gfused, int kind, int64_t rows, int64_t f, const Queue& queue);

template <class T>
void rope(const T* fused, const T* cos, const T* sin, Heads<T> q, Heads<T> k, Heads<T> v, HeadShape shape,
          const Queue& queue);
template <class T>
void rope_backward(Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* cos, const T* sin, T* fused,
                   HeadShape shape, const Queue& queue);

template <class T>
void softmax_stats(const T* logits, const int64_t* target, Wide<T>* stats, int64_t rows, int64_t v, int64_t valid,
                   const Queue& queue);
template <class T>
void softmax_gradient(T* logits, const int64_t* target, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* grad,
                      int64_t rows, int64_t v, int64_t valid, const Queue& queue);

template <class W, class T>
void adamw(W* master, const W* grad, W* m, W* v, T* values, int64_t n, AdamW how, const Queue& queue);

// bounds are on the device and therefore unchecked: an entry that is not a range of [0, n) gives NaN.
template <class T>
void sum_squares(const T* x, int64_t n, const int64_t* bounds, double* out, int64_t k, const Queue& queue);

void draw(const int64_t* starts, int64_t rows, int64_t n, DrawKey key, int kind, uint32_t threshold, void* out,
          const Queue& queue);
template <class T>
void dropout(const T* x, const int64_t* starts, int64_t rows, int64_t n, DrawKey key, uint32_t threshold, double scale,
             T* y, const Queue& queue);

}  // namespace trident

// What the optimizer does to flat buckets (see ops.h).

#include "ops/ops.h"

namespace trident::ops {

void adamw_(Tensor& master, const Tensor& grad, Tensor& exp_avg, Tensor& exp_avg_sq, const Optional& values, double lr,
            double beta1, double beta2, double eps, double weight_decay, double grad_scale, int64_t step) {
    const char* op = "adamw_";
    want_plain(master, op, "master");
    want_like(grad, master.sizes(), master, op, "grad");
    want_like(exp_avg, master.sizes(), master, op, "exp_avg");
    want_like(exp_avg_sq, master.sizes(), master, op, "exp_avg_sq");
    want(step >= 1, op, "step counts from 1");
    const bool whole = master.scalar_type() == at::kDouble;
    want_type(whole || master.scalar_type() == at::kFloat, op,
              std::string("masters are ") + toString(master.scalar_type()));
    if (values) {
        const auto low = values->scalar_type();
        want_type(!whole, op, "values are for float32 masters");
        want_type(low == at::kBFloat16 || low == at::kHalf, op,
                  std::string("values are ") + toString(low) + ", wanted bfloat16 or float16");
        want_typed(*values, low, master.sizes(), master, op, "values");
    }
    const AdamW how{lr, beta1, beta2, eps, weight_decay, grad_scale, step};
    const auto run = [&](auto wide_tag, auto low_tag) {
        using W = TYPE_OF(wide_tag);
        using T = TYPE_OF(low_tag);
        on_device(master, [&](const auto& where) {
            trident::adamw<W, T>(data<W>(master), data<W>(grad), data<W>(exp_avg), data<W>(exp_avg_sq), data<T>(values),
                                 master.numel(), how, where);
        });
    };
    if (whole)
        run(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    else if (!values)
        run(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    else if (values->scalar_type() == at::kBFloat16)
        run(static_cast<float*>(nullptr), static_cast<bf16*>(nullptr));
    else
        run(static_cast<float*>(nullptr), static_cast<f16*>(nullptr));
}

Tensor sum_squares(const Tensor& flat, const Tensor& bounds) {
    const char* op = "sum_squares";
    want_plain(flat, op, "flat");
    want(flat.dim() == 1, op, "flat is " + shape(flat) + ", wanted [n]");
    want(bounds.dim() == 2, op, "bounds are " + shape(bounds) + ", wanted [k, 2]");
    const int64_t k = bounds.size(0), n = flat.numel();
    want_typed(bounds, at::kLong, {k, 2}, flat, op, "bounds");
    const int64_t* range = data<int64_t>(bounds);
    // a GPU would have to be waited for; its kernel looks for itself
    for (int64_t i = 0; i < k && bounds.is_cpu(); i++)
        want(0 <= range[2 * i] && range[2 * i] <= range[2 * i + 1] && range[2 * i + 1] <= n, op,
             "bounds[" + std::to_string(i) + "] is " + shape(at::IntArrayRef(range + 2 * i, 2)) +
                 ", wanted a range of " + std::to_string(n) + " values");
    Tensor out = at::empty({k}, flat.options().dtype(at::kDouble));
    dispatch(flat, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::sum_squares<T>(data<T>(flat), n, range, data<double>(out), k, where);
    });
    return out;
}

}  // namespace trident::ops

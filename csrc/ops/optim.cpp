// The optimizer's operators on flat buckets: AdamW, sums of squares (see ops.h).

#include "ops/ops.h"

namespace trident::ops {

void adamw_(Tensor& master, const Tensor& grad, Tensor& exp_avg, Tensor& exp_avg_sq, const Optional& values, double lr,
            double beta1, double beta2, double eps, double weight_decay, double grad_scale, int64_t step) {
    const char* op = "adamw_";
    require_plain(master, op, "master");
    require_like(grad, master.sizes(), master, op, "grad");
    require_like(exp_avg, master.sizes(), master, op, "exp_avg");
    require_like(exp_avg_sq, master.sizes(), master, op, "exp_avg_sq");
    require(step >= 1, op, "step counts from 1");
    const bool is_double = master.scalar_type() == at::kDouble;
    require_type(is_double || master.scalar_type() == at::kFloat, op,
                 std::string("master weights are ") + toString(master.scalar_type()) + ", expected Float or Double");
    if (values) {
        const auto low = values->scalar_type();
        require_type(!is_double, op, "values need float32 master weights");
        require_type(low == at::kBFloat16 || low == at::kHalf, op,
                     std::string("values are ") + toString(low) + ", expected bfloat16 or float16");
        require_typed(*values, low, master.sizes(), master, op, "values");
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
    if (is_double)
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
    require_plain(flat, op, "flat");
    require(flat.dim() == 1, op, "flat is " + shape(flat) + ", expected [n]");
    require(bounds.dim() == 2, op, "bounds are " + shape(bounds) + ", expected [k, 2]");
    const int64_t k = bounds.size(0), n = flat.numel();
    require_typed(bounds, at::kLong, {k, 2}, flat, op, "bounds");
    const int64_t* range = data<int64_t>(bounds);
    // on a GPU, reading the bounds here would synchronize, so its kernel checks them itself
    for (int64_t i = 0; i < k && bounds.is_cpu(); i++)
        require(0 <= range[2 * i] && range[2 * i] <= range[2 * i + 1] && range[2 * i + 1] <= n, op,
                "bounds[" + std::to_string(i) + "] is " + shape(at::IntArrayRef(range + 2 * i, 2)) +
                    ", expected a range of " + std::to_string(n) + " values");
    Tensor out = at::empty({k}, flat.options().dtype(at::kDouble));
    dispatch(flat, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::sum_squares<T>(data<T>(flat), n, range, data<double>(out), k, where);
    });
    return out;
}

}  // namespace trident::ops

"""Megatron-core on a CPU: its GPTModel, DDP, schedules and optimizer, with its CUDA calls replaced.

Megatron-core has no CPU path. What a step needs: new tensors on "cuda" are made on the CPU, streams and
synchronisation do nothing, the CUDA random states are the CPU's. Its layers are those of its "local" specification
(torch norms and matmuls); attention is its DotProductAttention, since Transformer Engine needs a GPU.
"""

from __future__ import annotations

import os
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from measure import Case, Meter, Options, mine
from peers import restart
from torch import Tensor


def on_cpu() -> None:
    """Make torch.cuda's functions that Megatron-core calls do the same on the CPU, or nothing."""

    def without_cuda(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return wrapper

    for name in ("tensor", "zeros", "ones", "empty"):
        setattr(torch, name, without_cuda(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = lambda *_: torch.get_rng_state(), torch.set_rng_state
    torch.cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *_, **__: self
    kind = torch.Tensor.type  # asserts compare its text with "torch.cuda.FloatTensor"
    torch.Tensor.type = lambda self, *to: kind(self, *to) if to else kind(self).replace("torch.", "torch.cuda.")


def build(o: Options, case: Case) -> tuple[Any, Any, Any]:
    """(config, wrapped model of this rank, optimizer), as Megatron-LM's training.py puts them together."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    first, last = o.stages() if case.column == "pipeline" else (None, None)
    degrees = {case.column: case.processes} if case.processes > 1 else {}
    parallel_state.initialize_model_parallel(degrees.get("tensor", 1), degrees.get("pipeline", 1))
    states = "megatron.core.tensor_parallel.random"
    mock.patch(f"{states}._get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()).start()
    mock.patch(f"{states}._set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)).start()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=o.layers,
        hidden_size=o.hidden,
        ffn_hidden_size=o.ffn,
        num_attention_heads=o.heads,
        tensor_model_parallel_size=degrees.get("tensor", 1),
        pipeline_model_parallel_size=degrees.get("pipeline", 1),
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        batch_p2p_comm=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=o.vocab,
        max_sequence_length=o.seq,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    restart(model)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=o.lr, adam_beta2=0.95, weight_decay=0.1, clip_grad=1.0, params_dtype=torch.float32
        ),
        [wrapped],
    )
    return config, wrapped, optimizer


def megatron(o: Options, case: Case) -> dict[str, Any]:
    """Measure it in this process."""
    warnings.simplefilter("ignore")
    on_cpu()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config, model, optimizer = build(o, case)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    tokens, labels = mine(o, case, dist.get_rank())
    batches = list(zip(tokens.split(o.micro_batch), labels.split(o.micro_batch)))
    positions = torch.arange(o.seq).expand(o.micro_batch, -1)
    mask = torch.triu(torch.ones(1, 1, o.seq, o.seq, dtype=torch.bool), 1)
    forward_backward = get_forward_backward_func()

    def loss_func(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides it in place

    def forward_step(data: Any, part: Any) -> tuple[Tensor, Any]:
        tokens, labels = next(data)
        return part(tokens, positions, mask, labels=labels), loss_func

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=case.micro_batches,
            seq_length=o.seq,
            micro_batch_size=o.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        return sum(float(one["loss"]) for one in losses) / case.micro_batches  # on the last stage

    parameters = torch.tensor(float(sum(p.numel() for p in model.parameters())))
    if case.column in ("tensor", "pipeline"):
        dist.all_reduce(parameters)

    def total(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    result = Meter(o, case, int(parameters), total).run(step)
    if case.column == "pipeline":  # the last stage has the losses, the first one writes
        losses = torch.tensor(result["losses"])
        dist.all_reduce(losses)
        result["losses"] = losses.tolist()
    return result

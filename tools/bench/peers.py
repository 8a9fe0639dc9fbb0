"""The peers that run on a CPU, each as its own training script would run it: same sizes, tokens, AdamW and clipping.

`run(options, case, name)` measures one in this process (a rank of it). Of a peer's own code as much as can be had
without its data pipeline and command line is used: its model, its wrapping and compiling, its step. Megatron-core
needs more: peer_megatron.py. Where a package comes from: peers_env.py.
"""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from measure import Case, Meter, Options, mine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def connect(case: Case) -> int:
    """Join the other ranks, if there are any; this one's number."""
    if case.processes > 1:
        dist.init_process_group("gloo")
        return dist.get_rank()
    return 0


def total(x: Tensor) -> Tensor:
    """Summed over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def restart(model: nn.Module) -> int:
    """Initialise all matrices in the same way, so that all losses fall equally; returns the number of parameters."""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    return sum(p.numel() for p in model.parameters())


def llama(o: Options) -> nn.Module:
    """transformers' model of the sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=o.vocab,
        hidden_size=o.hidden,
        intermediate_size=o.ffn,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.heads,
        max_position_embeddings=o.seq,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def loop(o: Options, case: Case, compiled: bool = False) -> dict[str, Any]:
    """The baseline: a short hand-written training loop, eager or with torch.compile."""
    rank = connect(case)
    model = llama(o)
    parameters = restart(model)
    if case.processes > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, labels = mine(o, case, rank)

    def step() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens).logits.view(-1, o.vocab), labels.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return Meter(o, case, parameters, total).run(step)


def trainer(o: Options, case: Case) -> dict[str, Any]:
    """HF Trainer with torch_compile, over a data set that is the batch again and again."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Again(torch.utils.data.Dataset[dict[str, Tensor]]):
        """Row i is the batch's, over all ranks; HF models shift the labels themselves, so the tokens are given."""

        def __init__(self) -> None:
            rows = [mine(o, case, r)[0] for r in range(case.processes)]
            self.rows = torch.cat(rows)

        def __len__(self) -> int:
            return len(self.rows) * 10_000

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            row = self.rows[i % len(self.rows)]
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):
        """Reports the start and end of each step to the meter."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> Any:
            meter.end()
            control.should_training_stop = meter.done
            return control

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                meter.losses.append(logs["loss"])

    model = llama(o)
    parameters = restart(model)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            ddp_backend="gloo" if case.processes > 1 else None,
            per_device_train_batch_size=o.micro_batch,
            max_steps=10_000,
            learning_rate=o.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            torch_compile=True,
            torch_compile_backend="inductor",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        meter = Meter(o, case, parameters, total)
        Trainer(model, args, train_dataset=Again(), callbacks=[Clock()]).train()
    return meter.result()


def litgpt(o: Options, case: Case) -> dict[str, Any]:
    """litgpt's model and the steps of its pretrain.py: Fabric, torch.compile, its loss, AdamW unfused on a CPU."""
    import lightning as L
    from litgpt.model import GPT, Config
    from litgpt.pretrain import initialize_weights
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        n_layer=o.layers,
        n_embd=o.hidden,
        n_head=o.heads,
        n_query_groups=o.heads,
        intermediate_size=o.ffn,
        vocab_size=o.vocab,
        padded_vocab_size=o.vocab,
        block_size=o.seq,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    strategy = "ddp" if case.processes > 1 else "auto"
    fabric = L.Fabric(accelerator="cpu", devices=case.processes, strategy=strategy, precision="32-true")
    fabric.launch()
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=o.layers, n_embd=o.hidden)
    parameters = restart(model)
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=False)
    optimizer = fabric.setup_optimizers(optimizer)
    tokens, labels = mine(o, case, fabric.global_rank)

    def step() -> float:
        loss = chunked_cross_entropy(model(tokens), labels)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Meter(o, case, parameters, total).run(step)


def olmo(o: Options, case: Case) -> dict[str, Any]:
    """OLMo-core's model and its TransformerTrainModule with compile_model; data=2 by its DDP."""
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module.transformer import TransformerDataParallelConfig, TransformerTrainModule

    rank, parallel = connect(case), None
    if case.processes > 1:
        parallel = TransformerDataParallelConfig(name=DataParallelType.ddp)
    config = TransformerConfig.llama_like(
        d_model=o.hidden,
        vocab_size=o.vocab,
        n_layers=o.layers,
        n_heads=o.heads,
        feed_forward=FeedForwardConfig(hidden_size=o.ffn, bias=False),
    )
    model = config.build(init_device="cpu")
    module = TransformerTrainModule(
        model,
        AdamWConfig(lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        rank_microbatch_size=o.micro_batch * o.seq,
        max_sequence_length=o.seq,
        compile_model=True,
        dp_config=parallel,
        max_grad_norm=1.0,
        device=torch.device("cpu"),
    )
    parameters = restart(model)  # the module has initialised it
    losses: list[Tensor] = []
    module._trainer = SimpleNamespace(  # metrics that the module needs; others are only logged
        record_metric=lambda *_, **__: None, record_ce_loss=lambda loss, **__: losses.append(loss)
    )
    tokens, labels = mine(o, case, rank)

    def step() -> float:
        module.zero_grads()
        module.train_batch({"input_ids": tokens, "labels": labels})
        module.optim_step()
        return losses.pop().item()

    return Meter(o, case, parameters, total).run(step)


def run(o: Options, case: Case, name: str) -> dict[str, Any]:
    """Measure the peer of that name."""
    torch.manual_seed(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    if name == "megatron":
        from peer_megatron import megatron

        return megatron(o, case)
    if name == "compiled":
        return loop(o, case, compiled=True)
    return {"loop": loop, "trainer": trainer, "litgpt": litgpt, "olmo": olmo}[name](o, case)

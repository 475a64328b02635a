"""fused_adam.torch in programs of others: many processes, Hugging Face, torch.compile."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fused_adam.torch as fused  # noqa: E402

# Each process: gradients averaged by DDP over gloo, moments divided among the processes by ZeRO. And the same
# steps alone, from the gradients that it saw.
WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
import fused_adam.torch as fused

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 16))

options = dict(lr=0.01, weight_decay=0.1, amsgrad=True, num_threads=1)
net = model()
parallel = DistributedDataParallel(net)
optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=fused.AdamW, **options)
alone = model()
alone_optimizer = fused.AdamW(alone.parameters(), **options)
for step in range(5):
    optimizer.zero_grad()
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))
    (parallel(x) ** 2).mean().backward()
    for p, q in zip(net.parameters(), alone.parameters()):
        q.grad = p.grad.clone()
    optimizer.step()
    alone_optimizer.step()
optimizer.consolidate_state_dict(to=0)
for p, q in zip(net.parameters(), alone.parameters()):
    assert torch.equal(p, q), (p - q).abs().max()
own = sum(p.numel() for p in optimizer.optim.param_groups[0]["params"])
whole = sum(p.numel() for p in net.parameters())
assert 0 < own < whole, (own, whole)
if rank == 0:
    saved = optimizer.state_dict()
    assert len(saved["state"]) == 4
    print("the same bits")
dist.destroy_process_group()
# PyTorch's threads end a process that ends meanwhile with SIGABRT, 1 in 40 of its own optimizers' too.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file is tested on Linux")
@pytest.mark.parametrize("world", [2, 4])
def test_zero_and_ddp(world: int, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    assert "the same bits" in outputs[0]


def tiny_bert(transformers: Any) -> tuple[Any, list[dict[str, Any]]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=32,
        num_labels=16,  # so that all sizes are multiples of PyTorch's vectors
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    data = [{"input_ids": torch.randint(0, 64, (16,)), "labels": torch.tensor(i % 2)} for i in range(32)]
    return transformers.BertForSequenceClassification(config), data


def test_trainer_of_hugging_face(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trained = []
    for make in (fused.AdamW, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)):
        model, data = tiny_bert(transformers)
        optimizer = make(model.parameters(), lr=1e-3)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 8)
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(len(trained))),
            max_steps=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            report_to=[],
            use_cpu=True,
            save_steps=4,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler)
        )
        trainer.train()
        trained.append([p.detach().clone() for p in model.parameters()])
        assert (tmp_path / str(len(trained) - 1) / "checkpoint-4" / "optimizer.pt").exists()
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    trained = []
    for make in (fused.AdamW, lambda p: torch.optim.AdamW(p, fused=True)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, make(net.parameters()))
        for seed in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
            accelerator.backward((net(x) ** 2).mean())
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        trained.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_compiled_models() -> None:
    """A model behind torch.compile, with the backend that compiles nothing."""
    trained = []
    for make in (fused.AdamW, lambda p: torch.optim.AdamW(p, fused=True)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        compiled = torch.compile(net, backend="eager")
        optimizer = make(compiled.parameters())
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
            (compiled(x) ** 2).mean().backward()
            optimizer.step()
        trained.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_without_torch_the_package_is_whole() -> None:
    """Nothing else of it imports torch; the module says what it lacks."""
    script = """
        import sys
        sys.modules["torch"] = None
        import fused_adam, fused_adam.schedules, fused_adam.loss_scale, fused_adam.functional
        try:
            import fused_adam.torch
        except ImportError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "torch" in run.stdout

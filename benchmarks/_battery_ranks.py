"""Two processes that train one layer together, against one process that trains it alone."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from _battery_contestants import Contestant, Refused, contestant, free_of, gaussian
from torch import Tensor, nn

N = 8


def model(subject: Contestant) -> nn.Sequential:
    return nn.Sequential(subject.layer(N), nn.Tanh(), subject.layer(N, 4, seed=1))


def train(network: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (network(inputs) - targets).square().mean().backward()
        optimizer.step()


def on_two_ranks(subject: Contestant, kind: str) -> None:
    """Start the two ranks as processes of their own and compare their free tensors with those of one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, subject.name, PRESET, kind, folder]
        ranks = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            for rank in range(2)
        ]
        try:
            messages = [process.communicate(timeout=80)[1] for process in ranks]
        except subprocess.TimeoutExpired:
            raise Refused("no end after 80 seconds") from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        for process, message in zip(ranks, messages, strict=True):
            if process.returncode:
                raise Refused(next((line for line in reversed(message.splitlines()) if "Error" in line), "failed"))
        alone = model(subject)
        train(alone, gaussian(8, N), gaussian(8, 4, seed=2))
        for rank in range(2):
            state = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            for layer, found in zip((alone[0], alone[2]), state, strict=True):
                if not torch.allclose(found, free_of(layer), atol=1e-5):
                    raise Refused(f"rank {rank} has another weight than one process")


def work(subject: Contestant, kind: str, folder: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = model(subject)
    trained: nn.Module
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(network)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (network[0], network[2]):
            fully_shard(layer, mesh=mesh)
        trained = fully_shard(network, mesh=mesh)
    train(trained, gaussian(8, N)[rank::2], gaussian(8, 4, seed=2)[rank::2])
    whole = []
    for layer in (network[0], network[2]):
        free = free_of(layer).detach()
        whole.append(free.full_tensor() if hasattr(free, "full_tensor") else free)
    torch.save([tensor.clone() for tensor in whole], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


PRESET = "default"  # of our own layers; set by the process that runs the checks

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, preset, kind, folder, rank = sys.argv[1:]
    work(contestant(name, preset), kind, folder, int(rank))

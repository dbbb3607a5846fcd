"""SimCLR as one writes it down: python -m tests.plain_simclr --backbone resnet50 --steps 50

Pictures and torchvision's transforms in loader processes, the whole similarity matrix, SGD; nothing
of `common` or `kernels` but the embedded images. What train_simclr.py is timed beside. Prints one
JSON line: pairs/s and the phases' shares after three steps, peak memory.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common.amp import peak_bytes
from common.data.synthetic import cytology


class Pairs:
    def __init__(self, side, count):
        self.images = [Image.fromarray(x.transpose(1, 2, 0)) for x in cytology(count)[0]]
        jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
        blur = v2.RandomApply([v2.GaussianBlur(side // 20 * 2 + 1, (0.1, 2.0))], 0.5)
        crop = [v2.RandomResizedCrop(side, (0.08, 1.0)), v2.RandomHorizontalFlip()]
        tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
        self.transform = v2.Compose([*crop, jitter, v2.RandomGrayscale(0.2), blur, *tensor])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


def loss_of(z, temperature=0.1):
    z = F.normalize(z.float())
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.plain_simclr")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--device", default="cuda")
    for flag, value in {"bs": 256, "image-size": 224, "steps": 50, "workers": 8}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--images", type=int, default=1280)
    args = parser.parse_args(argv)
    device, spent, done, epoch = torch.device(args.device), {}, 0, iter(())
    network = getattr(torchvision.models, args.backbone)()
    width, network.fc = network.fc.in_features, nn.Identity()
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    model = nn.Sequential(network, head).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    options = {"drop_last": True, "shuffle": True, "num_workers": args.workers}
    options |= {"pin_memory": device.type == "cuda", "persistent_workers": args.workers > 0}
    loader = DataLoader(Pairs(args.image_size, args.images), args.bs, **options)

    def lap(name):
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if done >= 3:  # the first ones allocate, and choose algorithms
            spent[name] = spent.get(name, 0.0) + now - last
        last = now

    last = time.perf_counter()
    for done in range(args.steps):  # noqa: B007
        batch = next(epoch, None)
        if batch is None:
            epoch = iter(loader)
            batch = next(epoch)
        x = torch.cat(batch).to(device, non_blocking=True, memory_format=torch.channels_last)
        lap("input and views")
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = model(x)
        lap("forward")
        loss = loss_of(z)
        lap("loss")
        optimizer.zero_grad()
        loss.backward()
        lap("backward")
        optimizer.step()
        lap("optimizer")
    total = sum(spent.values())
    shares = {name: seconds / total for name, seconds in spent.items()}
    rate = args.bs * (args.steps - 3) / total
    print(
        json.dumps({"pairs_s": rate, "shares": shares, "peak_gb": (peak_bytes(device) or 0) / 1e9})
    )


if __name__ == "__main__":
    main(sys.argv[1:])

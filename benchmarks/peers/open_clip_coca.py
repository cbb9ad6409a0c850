"""open_clip's CoCa as a peer: a process in its own environment that answers one JSON request a line.

Started by the benchmarks through `peers.client`; a request names a method of `Peer` and its arguments. Times are taken
here, around the work alone.
"""

import json
import sys
import time
from typing import Any

import torch


def import_open_clip() -> Any:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A torchvision built for another torch finds no operators; CoCa uses none, so their names are enough.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        import_open_clip.library = library  # type: ignore[attr-defined]
    import open_clip

    return open_clip


class Peer:
    def load(self, weights: str, variant: str, threads: int, device: str = "cpu") -> dict[str, Any]:
        import safetensors.torch

        open_clip = import_open_clip()
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.model = open_clip.create_model(variant)
        self.model.load_state_dict(safetensors.torch.load_file(weights))
        self.model.to(self.device)
        return {"open_clip": open_clip.__version__, "torch": torch.__version__}

    def generate(self, images: str, options: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.load(images).to(self.device)
        self.model.eval()
        started = time.perf_counter()
        tokens = self.model.generate(pixels, **options)
        tokens = tokens.tolist()
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    def train(self, batch: str, steps: int, precision: str, compiled: bool, rate: float) -> dict[str, Any]:
        """Steps of AdamW on one batch, as open_clip's training loop takes them."""
        from open_clip.loss import CoCaLoss

        data = torch.load(batch)
        pixels, tokens = data["pixels"].to(self.device), data["tokens"].to(self.device)
        if not hasattr(self, "optimizer"):
            self.model.train()
            self.loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
            self.forward = torch.compile(self.model) if compiled else self.model
        losses, started = [], time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                output = self.forward(pixels, tokens)
                total = sum(self.loss(**output))
            total.backward()
            self.optimizer.step()
            losses.append(total.detach())
        values = [loss.item() for loss in losses]
        return {"seconds": time.perf_counter() - started, "losses": values}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; only answers go to the benchmark
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

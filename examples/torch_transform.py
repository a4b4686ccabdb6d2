"""A transform for torch's data loading: every photograph is restored in the loader's own processes.

python examples/torch_transform.py photos/*.jpg
"""

import sys
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from deblur_deploy import DeblurEngine


class Deblur:
    """uint8 or float (in [0, 1]) tensor of 3xHxW to a restored one; goes into torchvision's ``Compose`` as well."""

    def __init__(self, model: str | Path | None = None) -> None:
        # It pickles as its arguments; one thread, since the loader's processes share the cores.
        self.engine = DeblurEngine(model, "cpu", threads=1)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.engine(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)


class Photos(Dataset[torch.Tensor]):
    def __init__(self, paths: list[str], transform: Deblur) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(torch.from_numpy(cv2.imread(self.paths[index])[..., ::-1].copy()).permute(2, 0, 1))


if __name__ == "__main__":
    photos = Photos(sys.argv[1:], Deblur())
    for batch in DataLoader(photos, batch_size=1, num_workers=2, multiprocessing_context="spawn"):
        print(tuple(batch.shape), batch.float().mean().item())

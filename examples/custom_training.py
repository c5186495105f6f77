"""Training in a loop of your own, without Lightning: the library's recipe, model and loss over your own photos.

python examples/custom_training.py outputs/trained.ckpt
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import pbe
from pbe.checkpoints.infer_config import pbe_entry
from pbe.data.dataset import ExampleDataset
from pbe.data.example import collate
from pbe.data.recipe_config import RecipeConfig, of_model
from pbe.data.records import Record
from pbe.sampling import NoiseSchedule
from pbe.training.draws import add_noise_draws
from pbe.training.loss import training_losses

EXAMPLES = Path(__file__).resolve().parent


class Flowers:  # a `pbe.data.records.Source`
    name = "two photos of the dahlia"
    photos = np.array([0, 1])  # the number of each record's photo

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, i: int) -> Record:
        file, box = [("flower.jpg", (0.24, 0.16, 0.72, 0.88)), ("flower.png", (0.05, 0.05, 0.95, 0.95))][i]
        return Record(EXAMPLES / file, np.array([box], dtype=np.float32))  # as fractions of width and height


def main(out: str, epochs: int = 8) -> list[float]:
    model = pbe.load_model("demo", device="auto", dtype="float32").requires_grad_(False)
    optimizer = torch.optim.AdamW(model.unet.requires_grad_(True).parameters(), lr=1e-5)
    schedule = NoiseSchedule.scaled_linear().first(model.config.num_timesteps)
    recipe = RecipeConfig(**of_model(model.config), max_area=0.9)
    data = ExampleDataset(Flowers(), recipe, seed=0)
    losses = []
    for epoch in range(epochs):
        data.set_epoch(epoch)  # other crops, masks and augmentations
        for examples in DataLoader(data, batch_size=2, collate_fn=collate):
            batch = add_noise_draws(examples, model.config.vae, schedule.num_timesteps).to(model.device)
            loss = training_losses(model, schedule, batch, drop_exemplar=0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    torch.save({"state_dict": model.state_dict(), "pbe": pbe_entry(model.config)}, out)
    return losses


if __name__ == "__main__":
    main(sys.argv[1])

"""A network for tests."""

import torch
from torch import nn


class TinyBackbone(nn.Module):
    """Two convolutions, 4 and 8 pixels a cell, with weights drawn once."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.fine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.coarse = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.ReLU(inplace=True))
            self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.coarse(self.fine(x)).mean((2, 3)))

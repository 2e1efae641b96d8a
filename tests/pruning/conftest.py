"""What several tests of pruning need."""

import pytest


@pytest.fixture(scope="session")
def train():
    """A function that trains a classifier for some steps, and returns it in evaluation mode."""
    torch = pytest.importorskip("torch")

    def trained(model, x, y, steps=60, rate=0.02):
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.eval()

    return trained
